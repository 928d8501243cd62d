"""Finds the checkpoint to resume from, and saves and restores a run's parts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..config import CPSConfig
from ..files import link_tree, write_atomically
from . import checkpoints
from .fingerprint import differences
from .lock import FolderLock

logger = logging.getLogger(__name__)


class State(Protocol):
    """What a run knows about itself (`cps_hf.training.state.RunState`)."""

    global_step: int
    best: dict[str, Any]

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: Mapping[str, Any], *, same_choice: bool, same_set: bool) -> None: ...


def on_main_process(accelerator: Accelerator | PartialState, call: Callable[[], Any]) -> Any:
    """The result of `call()` on the main process, on every process; or its error. The other processes raise a
    ValueError with the same text, so that none waits for a process that is gone."""
    outcome: list[Any] = [None, None]
    failure = None
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except Exception as error:
            failure, outcome[1] = error, f"{error}"
    broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def length_of(saved: Mapping[str, Any], max_steps: int) -> int:
    """The length of a resumed run: `max_steps`, or what a callback changed it to before.

    Args:
        saved: our state in the checkpoint.
    """
    return saved["settings"]["max_steps"] if saved.get("planned_steps") == max_steps else max_steps


class Checkpointer:
    """Saves and restores a run's parts. All processes call every method.

    Args:
        optimizer: the optimizer prepared by Accelerate, which saves it and the models.
        callbacks: `ExportableState`s among them are saved too.
        settings: all settings of the run, for people to read.
    """

    def __init__(
        self,
        args: CPSConfig,
        accelerator: Accelerator,
        *,
        state: State,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        callbacks: Sequence[TrainerCallback],
        settings: Mapping[str, Any],
        evaluates: bool,
    ):
        self.args, self.accelerator, self.state = args, accelerator, state
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.callbacks, self.settings, self.evaluates = callbacks, settings, evaluates
        self.fingerprint: dict[str, Any] = {}  # of this run, once `find` was called
        self.lock = FolderLock(args.output_dir)
        accelerator.register_save_state_pre_hook(_save_shared_weights_once)

    # -------------------------------------------------------------------------------------------- before the run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which the output folder belongs to this run alone; its processes share it.

        Raises:
            LockedError: another run has it.
            ValueError: it cannot be created or is not writable.
        """
        on_main_process(self.accelerator, self._take)
        try:
            yield
        finally:
            self.lock.release()

    def _take(self) -> None:
        output_dir = self.args.output_dir
        checkpoints.check_place(output_dir)
        try:
            self.lock.take()
        except OSError as error:
            raise ValueError(f"`output_dir` {output_dir} cannot be written: {error}. Choose another.") from error
        checkpoints.put_back(Path(output_dir))

    def check_lock(self) -> None:
        """Raise a LockedError (a ValueError except on the main process) if another run has taken the folder meanwhile.
        Call it before writing anything."""
        on_main_process(self.accelerator, self.lock.check)

    def find(
        self,
        wanted: str | bool | None,
        fingerprint: Callable[[], dict[str, Any]],
        complete: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint to resume from and our state in it; without one, (None, a new run's state).

        Called before anything but the lock is written.

        Args:
            fingerprint: returns what determines how this run continues; called on the main process.
            complete: adds fields to a checkpoint's fingerprint that are newer than the checkpoint.

        Raises:
            ValueError: the checkpoint is missing or incomplete, the output folder contains another run, or the
                settings, the data or the models differ from the checkpoint's (unless `args.resume_force`).
        """
        args = self.args

        def find() -> tuple[Path | None, dict[str, Any], dict[str, Any]]:
            checkpoint = checkpoints.resolve_checkpoint(wanted, args.output_dir)
            checkpoints.check_output_dir(
                args.output_dir,
                overwrite=args.overwrite_output_dir,
                resuming=_is_in(checkpoint, args.output_dir),
                auto=wanted == "auto",
            )
            now = fingerprint()
            if checkpoint is None:
                return None, {"step": 0, "streams": {}}, now
            saved = checkpoints.read_state(checkpoint)
            if saved["step"] > length_of(saved, args.max_steps):
                raise ValueError(
                    f"{checkpoint} is at step {saved['step']}, beyond `max_steps` {args.max_steps}. Increase "
                    "`max_steps`, or resume from an earlier checkpoint."
                )
            saved["fingerprint"] = complete(saved["fingerprint"])
            _check_same_run(checkpoint, saved["fingerprint"], now, force=args.resume_force)
            return checkpoint, saved, now

        checkpoint, saved, self.fingerprint = on_main_process(self.accelerator, find)
        return checkpoint, saved

    def prepare_output_dir(self, checkpoint: Path | None, saved: Mapping[str, Any], settings: str) -> None:
        """Set up the output folder for the step that the run begins at.

        Args:
            checkpoint, saved: the results of `find`.
            settings: the text of config.yaml.

        Raises:
            OSError: a file or folder cannot be deleted or created; a ValueError except on the main process.
            ValueError: something is in the way of what the run will write.
        """
        on_main_process(self.accelerator, lambda: self._prepare(checkpoint, saved, settings))

    def _prepare(self, checkpoint: Path | None, saved: Mapping[str, Any], settings: str) -> None:
        goes_on = _is_in(checkpoint, self.args.output_dir)
        checkpoints.prepare_output_dir(
            self.args.output_dir, step=saved["step"] if goes_on else None, overwrite=self.args.overwrite_output_dir
        )
        best = Path(self.args.output_dir) / "best"
        if checkpoint is not None:
            if best.is_dir():  # perhaps of a step after the checkpoint
                shutil.rmtree(best)
            if (checkpoint / "best").is_dir() and not self._change_of_choice(saved):
                link_tree(checkpoint / "best", best)
        checkpoints.check_run_files(self.args.output_dir)
        write_atomically(Path(self.args.output_dir) / "config.yaml", settings)

    def _change_of_choice(self, saved: Mapping[str, Any]) -> list[str]:
        """Changes in how the best branch is chosen; none if the run no longer makes this choice."""
        return differences(saved["fingerprint"]["best"], self.fingerprint["best"]) if self.evaluates else []

    # -------------------------------------------------------------------------------------------- saving

    def save(self, streams: Mapping[str, Mapping[str, Any]]) -> Path:
        """Write a checkpoint of the current step.

        Batch norm's statistics must be the main process's on all of them: a sharded save takes replicated values from
        any process.

        Args:
            streams: by stream, its "position" in the global order and its "length".

        Raises:
            CheckpointError: on every process, if one could not write.
        """
        return checkpoints.save_checkpoint(
            self.args.output_dir,
            self.state.global_step,
            self._content(streams),
            save_state=self.accelerator.save_state,
            gather_errors=gather_object,
            is_main_process=self.accelerator.is_main_process,
            save_total_limit=self.args.save_total_limit,
            best_step=self.state.best.get("step"),
        )

    def amend(self, streams: Mapping[str, Mapping[str, Any]]) -> None:
        """Update this step's checkpoint with what happened since it was saved: its evaluation, a new best branch.

        If the disk is full, the checkpoint stays as it was saved, and a run that resumes from it repeats what it lists
        as pending. Nothing happens if this step's checkpoint is in another folder.
        """
        step = self.state.global_step
        if self.accelerator.is_main_process and (Path(self.args.output_dir) / f"checkpoint-{step}").is_dir():
            try:
                checkpoints.amend_checkpoint(
                    self.args.output_dir,
                    step,
                    self._content(streams),
                    save_total_limit=self.args.save_total_limit,
                    best_step=self.state.best.get("step"),
                )
            except Exception as error:  # whatever it is, the others must not wait for this process
                logger.warning(
                    "checkpoint-%d stays as it was before what came after it, which resuming repeats: %s",
                    step,
                    error,
                    exc_info=not isinstance(error, OSError),
                )
        self.accelerator.wait_for_everyone()

    def _content(self, streams: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What Accelerate does not save, as JSON values."""
        return {
            **self.state.state_dict(),
            "streams": {name: dict(stream) for name, stream in streams.items()},
            "scheduler": self.lr_scheduler.state_dict(),
            "callbacks": [[type(c).__name__, c.state()["attributes"]] for c in self._stateful_callbacks()],
            "fingerprint": self.fingerprint,
            "settings": self.settings,
        }

    def _stateful_callbacks(self) -> list[Any]:
        return [callback for callback in self.callbacks if isinstance(callback, ExportableState)]

    # -------------------------------------------------------------------------------------------- loading

    def load(self, checkpoint: Path, saved: Mapping[str, Any]) -> None:
        """Restore all parts, before the first step.

        Args:
            checkpoint, saved: the results of `find`.

        Raises:
            ValueError: with `resume_force`, the checkpoint has other models or another optimizer.
        """
        accelerator, scheduler = self.accelerator, self.lr_scheduler
        fresh_groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        keeps = optimizer.register_load_state_dict_pre_hook(_keep_kernels)
        try:
            accelerator.load_state(str(checkpoint))
        except (RuntimeError, ValueError, KeyError, OSError) as error:  # with `resume_force`, another model
            raise ValueError(f"{checkpoint} does not match this run's models or optimizer: {error}") from error
        finally:
            keeps.remove()
        accelerator.step = 0  # micro-batches since the step's beginning; their number per step may have changed
        scheduler.load_state_dict(saved["scheduler"])
        if saved["fingerprint"]["rounding"]["processes"] != accelerator.num_processes:
            set_seed(self.args.seed + saved["step"], device_specific=True)  # not the same random states again
        choice = self._change_of_choice(saved)
        if choice:
            logger.warning("The best branch is chosen again, since these changed: %s.", "; ".join(choice))
        same_set = saved["fingerprint"]["best"] == self.fingerprint["best"]
        self.state.load_state_dict(saved, same_choice=not choice, same_set=same_set)
        self._load_callbacks(saved["callbacks"])
        self._apply_changes(saved, fresh_groups)
        done = ", its last: there is nothing left to train" if saved["step"] == self.args.max_steps else ""
        logger.info("Resumed from %s at step %d%s.", checkpoint, saved["step"], done)

    def _load_callbacks(self, saved: Sequence[Sequence[Any]]) -> None:
        by_class = [*saved]
        for callback in self._stateful_callbacks():
            entry = next((entry for entry in by_class if entry[0] == type(callback).__name__), None)
            if entry is not None:
                by_class.remove(entry)
                for name, value in entry[1].items():
                    setattr(callback, name, value)

    def _apply_changes(self, saved: Mapping[str, Any], fresh_groups: list[dict[str, Any]]) -> None:
        """Apply another `max_steps` or, with `resume_force`, other rates: the checkpoint would restore the old
        ones."""
        same_length = saved["settings"]["max_steps"] == self.args.max_steps
        if same_length and not differences(saved["fingerprint"]["run"], self.fingerprint["run"]):
            return
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        for group, fresh in zip(groups, fresh_groups, strict=True):
            group.update({name: value for name, value in fresh.items() if name != "lr"})
        if isinstance(scheduler, LambdaLR):  # as all of transformers' are: the rate is a function of the step
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def _is_in(checkpoint: Path | None, output_dir: str) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == Path(output_dir).resolve()


def _check_same_run(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any], *, force: bool) -> None:
    changed = differences(saved["run"], now["run"])
    if changed and not force:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings (in the checkpoint -> now):\n  "
            + "\n  ".join(changed)
            + "\nContinue with the old ones, or with the new ones and `--resume_force`, or use another folder."
        )
    if changed:
        logger.warning("Continuing with other settings because of `resume_force`: %s.", "; ".join(changed))
    rounding = differences(saved["rounding"], now["rounding"])
    if rounding:
        logger.warning(
            "This is not bit for bit the run that was stopped, since these changed: %s. The order of samples, their "
            "crops and their masks stay. Sums are rounded differently, and if a process's share of a step changed, "
            "dropout is drawn again and batch norm sees other batches.",
            "; ".join(rounding),
        )


def _keep_kernels(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """A checkpoint would restore its own `fused`, which may change (and determines where step counts are stored)."""
    for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        saved.update({name: own[name] for name in ("fused", "foreach") if name in own})


def _save_shared_weights_once(models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
    """Remove all names but the first of a weight that several networks use: it is loaded for all of them.
    (Accelerate would do so too, with a warning that lists the names.)"""
    for state in weights:
        seen: set[tuple[int, torch.Size]] = set()
        for name, value in [*state.items()]:
            place = (value.data_ptr(), value.shape) if isinstance(value, torch.Tensor) and value.numel() else None
            if place in seen:
                del state[name]
            elif place is not None:
                seen.add(place)
