"""What of a trainer goes into a checkpoint and comes back from it; `checkpoints` writes and finds the files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import ExportableState

from ..files import link_tree
from . import checkpoints
from .fingerprint import differences, fingerprint

logger = logging.getLogger(__name__)


def on_main_process(accelerator: Accelerator, call: Callable[[], Any]) -> Any:
    """What `call()` gives on the main process, or the ValueError that it raises there, on every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except ValueError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


# ------------------------------------------------------------------------------------------------ before the run


def find_checkpoint(trainer: Any, wanted: str | bool | None) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and what we wrote into it; without one, (None, a new run's state).

    Called by every process before anything is written.

    Raises:
        ValueError: what is wanted is not there or not whole, the output folder holds another run, or the settings,
            the data or the models are not those of the checkpoint (unless `args.resume_force`).
    """
    args = trainer.args

    def find() -> tuple[Path | None, dict[str, Any], dict[str, Any]]:
        checkpoint = checkpoints.resolve_checkpoint(wanted, args.output_dir)
        checkpoints.check_output_dir(
            args.output_dir,
            overwrite=args.overwrite_output_dir,
            resuming=_is_in(checkpoint, args.output_dir),
            auto=wanted == "auto",
        )
        now = fingerprint(trainer)
        if checkpoint is None:
            return None, {"step": 0, "streams": {}}, now
        state = checkpoints.read_state(checkpoint)
        if state["step"] > args.max_steps:
            raise ValueError(
                f"{checkpoint} is at step {state['step']}, beyond `max_steps` {args.max_steps}. Give at least that "
                "many, or resume from an earlier checkpoint."
            )
        _check_same_run(checkpoint, state["fingerprint"], now, force=args.resume_force)
        return checkpoint, state, now

    checkpoint, state, trainer.fingerprint = on_main_process(trainer.accelerator, find)
    return checkpoint, state


def _is_in(checkpoint: Path | None, output_dir: str) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == Path(output_dir).resolve()


def _best_is_found_anew(trainer: Any, state: dict[str, Any]) -> list[str]:
    """What changed of the choice of the best branch; nothing where the run makes no such choice any more."""
    if trainer.eval_dataset is None:
        return []
    return differences(state["fingerprint"]["best"], trainer.fingerprint["best"])


def _check_same_run(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any], *, force: bool) -> None:
    changed = differences(saved["run"], now["run"])
    if changed and not force:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings (in the checkpoint -> now):\n  "
            + "\n  ".join(changed)
            + "\nGo on with the old ones, or with the new ones by `--resume_force`, or start a run in another folder."
        )
    if changed:
        logger.warning("Going on with other settings, as `resume_force` says: %s.", "; ".join(changed))
    rounding = differences(saved["rounding"], now["rounding"])
    if rounding:
        logger.warning(
            "Not bit for bit the run that was stopped, since these changed: %s. The order of samples, their crops and "
            "their masks stay; sums are rounded otherwise, and where a process's share of a step changed, dropout is "
            "drawn anew and batch norm sees other batches.",
            "; ".join(rounding),
        )


def prepare_output_dir(trainer: Any, checkpoint: Path | None, state: dict[str, Any]) -> None:
    """Make the output folder that of the step that the run begins at; called by the main process.

    Args:
        state: what `find_checkpoint` gave.
    """
    args = trainer.args
    goes_on = _is_in(checkpoint, args.output_dir)
    checkpoints.prepare_output_dir(
        args.output_dir, step=state["step"] if goes_on else None, overwrite=args.overwrite_output_dir
    )
    best = Path(args.output_dir) / "best"
    if checkpoint is not None:
        if best.is_dir():  # perhaps of a step after the checkpoint
            shutil.rmtree(best)
        if (checkpoint / "best").is_dir() and not _best_is_found_anew(trainer, state):
            link_tree(checkpoint / "best", best)


# ------------------------------------------------------------------------------------------------ saving


def position(trainer: Any, stream: str) -> int:
    """Where the next step begins in the global order of the "labeled" or the "unlabeled" stream."""
    stream = trainer.streams[stream]
    return stream.start + (trainer.state.global_step - trainer.first_step) * stream.shard.global_batch_size


def save_checkpoint(trainer: Any) -> None:
    """Write the `CPSTrainer`'s checkpoint of the step it is at; called by every process.

    Raises:
        CheckpointError: on every process, when one could not write.
    """
    # Of what all processes hold, a sharded save takes any one's; batch norm's statistics are to be the main one's.
    trainer.module.share_buffers(trainer.accelerator)
    checkpoints.save_checkpoint(
        trainer.args.output_dir,
        trainer.state.global_step,
        _state_of(trainer),
        save_state=trainer.accelerator.save_state,
        gather_errors=gather_object,
        is_main_process=trainer.accelerator.is_main_process,
        save_total_limit=trainer.args.save_total_limit,
        best_step=trainer.best.get("step"),
    )


def _state_of(trainer: Any) -> dict[str, Any]:
    """What Accelerate does not save: JSON values only."""
    return {
        "step": trainer.state.global_step,
        "streams": {
            name: {"position": position(trainer, name)} | stream.state() for name, stream in trainer.streams.items()
        },
        "scheduler": trainer.lr_scheduler.state_dict(),
        "averages": trainer.averages.state(),
        "stopwatch": trainer.stopwatch.total,
        "skipped_steps": trainer.guard.skipped_steps,
        "scores": trainer.scores,
        "best": trainer.best,
        "best_metric": trainer.state.best_metric,
        "agreement": trainer.agreement,
        "callbacks": [[type(c).__name__, c.state()["attributes"]] for c in _stateful_callbacks(trainer)],
        "fingerprint": trainer.fingerprint,
        "settings": trainer.args.to_dict(),
    }


def _stateful_callbacks(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ExportableState)]


# ------------------------------------------------------------------------------------------------ loading


def load_checkpoint(trainer: Any, checkpoint: Path, state: dict[str, Any]) -> None:
    """Bring the trainer to where it was; called by every process before the first step.

    Args:
        state: what `find_checkpoint` gave.
    """
    fresh_groups = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    keeps = optimizer.register_load_state_dict_pre_hook(_keep_kernels)
    try:
        trainer.accelerator.load_state(str(checkpoint))
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # with `resume_force`, another model
        raise ValueError(f"{checkpoint} does not fit this run's models or optimizer: {error}") from error
    finally:
        keeps.remove()
    trainer.accelerator.step = 0  # micro-batches, from a step's beginning on; how many a step has may have changed
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    if state["fingerprint"]["rounding"]["processes"] != trainer.accelerator.num_processes:
        set_seed(trainer.args.seed + state["step"], device_specific=True)  # not the same random states once more
    trainer.averages.load(state["averages"])
    trainer.stopwatch.total = state["stopwatch"]
    trainer.guard.skipped_steps = state["skipped_steps"]
    trainer.agreement = state["agreement"]
    trainer.state.global_step = trainer.first_step = state["step"]
    choice = _best_is_found_anew(trainer, state)
    if choice:
        logger.warning("The best branch is found anew, since these changed: %s.", "; ".join(choice))
    else:
        trainer.best, trainer.state.best_metric = state["best"], state["best_metric"]
        trainer.state.best_global_step = state["best"].get("step")
    same_set = state["fingerprint"]["best"] == trainer.fingerprint["best"]
    trainer.scores = state["scores"] if same_set else {}  # of another set they are not what this run scores
    by_class = [*state["callbacks"]]
    for callback in _stateful_callbacks(trainer):
        saved = next((entry for entry in by_class if entry[0] == type(callback).__name__), None)
        if saved is not None:
            by_class.remove(saved)
            for name, value in saved[1].items():
                setattr(callback, name, value)
    _apply_changes(trainer, state, fresh_groups)
    done = ", its last: nothing is left to train" if state["step"] == trainer.args.max_steps else ""
    logger.info("Resumed from %s at step %d%s.", checkpoint, state["step"], done)


def _keep_kernels(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """A checkpoint would bring back its own `fused`, which may change (and says where the steps' counts lie)."""
    for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        saved.update({name: own[name] for name in ("fused", "foreach") if name in own})


def _apply_changes(trainer: Any, state: dict[str, Any], fresh_groups: list[dict[str, Any]]) -> None:
    """Another `max_steps`, or by `resume_force` other rates: the checkpoint would silently bring the old ones back."""
    same_length = state["settings"]["max_steps"] == trainer.args.max_steps
    if same_length and not differences(state["fingerprint"]["run"], trainer.fingerprint["run"]):
        return
    groups, scheduler = trainer.optimizer.param_groups, trainer.lr_scheduler
    for group, fresh in zip(groups, fresh_groups, strict=True):
        group.update({name: value for name, value in fresh.items() if name != "lr"})
    if isinstance(scheduler, LambdaLR):  # as all of transformers' are: the rate is a function of the step
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
