"""`cps-hf train`: two segmentation models learn from each other's pseudo labels, and the better one is kept."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import OutOfMemoryError
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from ..checkpointing.checkpoints import check_output_dir
from ..config import CPSConfig
from ..files import write_atomically
from ..hub.loading import loading_lines, prediction_lines
from ..planning import LABELED
from ..planning.plan import Plan
from ..report.page import REPORT
from ..training import comparison, setup
from ..training.inspection import absent_line
from ..training.late import AfterTrainingError
from ..training.reporting import mean_iou_in_words, scores_table
from ..training.sharding import reject_engines
from ..training.trainer import CPSTrainer
from . import main as command_line
from . import parser, planned
from .console import print_any_text, terminal_width, wrapped
from .datasets import HELD_OUT, OWN, TrainingSets, load_data, warn_of_earlier_training
from .errors import fail, user_errors
from .main import COMMANDS
from .models import warn_of_random_weights
from .planned import models_of
from .settings import Settings
from .smoke import shrink

SomeSettings = TypeVar("SomeSettings", bound=Settings)

# The demonstration draws its data: small enough for two CPU cores and five minutes. The learning rate was chosen on
# supervised training alone (the best of 1e-3, 2e-3, 4e-3, 8e-3). The CPS options were chosen on other seeds (7 and 8)
# than those in the README.
DEFAULTS = {
    "output_dir": "outputs/train_cps",
    "max_steps": 800,
    "per_device_train_batch_size": 4,
    "optim": "adamw",
    "learning_rate": 4e-3,
    "weight_decay": 0.01,
    "crop_size": [48, 96],
    "random_scale": [0.75, 1.0, 1.25, 1.5],
    "eval_steps": 400,
    "per_device_eval_batch_size": 8,
    "logging_steps": 25,
    "dataloader_num_workers": 1,
    "save_total_limit": 1,
    # The paper has no ramp-up or balance: its networks start from ImageNet, these are trained from scratch.
    "cps": {"weight": 0.5, "ramp_up": 0.3, "class_balance": 0.5},
}
# Shown by `--help`; `--help-all` shows everything.
FIRST = (
    *("time", "dataset", "unlabeled_root", "validation", "class_names", "backbone", "init_from"),
    *("output_dir", "max_steps", "crop_size"),
)
PLAN_TITLE = "The plan for these images and this machine. Each line is an option; those you gave are kept:"
ONE_CLASS = 0.98
"""If at least this share of predictions is one class, agreeing branches are reported as collapsed."""
USER_ERRORS = (ValueError, OSError, FloatingPointError, OutOfMemoryError, AfterTrainingError)
"""Errors the user can fix: reported in one line, without a traceback."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Train as the command line says. Returns the content of results.json."""
    began = command_line.STARTED or time.monotonic()
    print_any_text()  # for examples, which call this and not `cps-hf`
    argv = as_resumed(argv)
    settings = parse(argv)
    with user_errors(settings.args.output_dir, USER_ERRORS):
        is_main = join_processes(settings.args.ddp_timeout)
        if settings.data.smoke:
            settings = shrink(settings)
        check_before_loading(settings)
        sets = load_data(settings.data)
        if sets.found is not None and is_main:
            print(f"\n{sets.found.table(terminal_width())}\n", flush=True)
        warn_of_earlier_training(sets, settings.plan.init_from)
        limits: list[TrainerCallback] = []
        if settings.data.dataset == OWN:
            words = folder_as_options(argv)
            typed = parser.given_names(words)
            settings, plan = planned.complete(settings, sets, typed, began=began)
            # The config.yaml of an earlier run repeats its number of steps, also on a slower machine.
            repeats = "config" in parser.read_words(words)
            limits = [] if repeats and plan.timings is None else planned.time_limit(settings, plan, began=began)
            limits += [WritePlan(plan)] if plan.choices else []
            if is_main and plan.choices:
                print(f"{PLAN_TITLE}\n\n{plan.table(terminal_width())}\n", flush=True)
        check_unlabeled(settings, sets)
        settings = planned.with_baseline(settings)
        trainer, settings = build(settings, sets, limits)
        results = trainer.train()
    if is_main:
        report(results, settings, [*trainer.id2label.values()])
    PartialState().destroy_process_group()
    return results


def parse(
    argv: Sequence[str],
    settings: type[SomeSettings] = Settings,
    *,
    defaults: Mapping[str, Any] = DEFAULTS,
    description: str = COMMANDS["train"],
    first: Sequence[str] = FIRST,
    **options: Any,
) -> SomeSettings:
    """Parse the command line. The demonstration's defaults apply if it names neither real data nor a recipe.

    Args:
        settings: `Settings`, or a class that adds groups.
        defaults: the demonstration's.
        first: the fields that `--help` shows.
        options: additional arguments of `parser.parse`.
    """
    argv = folder_as_options(argv)
    found = parser.parse(
        settings,
        argv,
        description=description,
        first=first,
        defaults=lambda given: _defaults(given, defaults),
        **options,
    )
    config = parser.read_words(argv).get("config")
    found.data.models = [beside(config, model) for model in found.data.models]
    return found


def is_demonstration(given: Mapping[str, Any]) -> bool:
    """Whether a command line uses the demonstration's drawn data and settings."""
    drawn = given.get("dataset", "street_scenes") in ("street_scenes", "object_scenes")
    return drawn and not given.keys() & {"config", "data_root"}


def _defaults(given: Mapping[str, Any], of_demonstration: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe and a data set use the classes' defaults. A plan sets an optimizer; its options may be set alone."""
    if given.get("dataset") == OWN:
        return {"optim": LABELED["optim"]}
    return of_demonstration if is_demonstration(given) else {}


def folder_as_options(argv: Sequence[str]) -> list[str]:
    """Turn `DIR ...` into options: the folder of an own data set, unless `--dataset` names another type."""
    if not argv or argv[0].startswith("-"):
        return [*argv]
    if argv[0].endswith((".yaml", ".yml")):
        fail(f"expected a folder of images and masks, found {argv[0]!r}. Pass a settings file with `--config`.")
    names = {word.partition("=")[0].replace("-", "_") for word in argv}
    return [*([] if "__dataset" in names else ["--dataset", OWN]), "--data_root", *argv]


def as_resumed(argv: Sequence[str]) -> list[str]:
    """With `DIR` and `--resume_from_checkpoint`, use the run's own config.yaml, so that no new plan is made."""
    words = folder_as_options(argv)
    try:
        given = parser.read_words(words)
    except ValueError:  # `parse` reports it
        return [*argv]
    config = Path(str(given.get("output_dir", CPSConfig().output_dir))) / "config.yaml"
    resumes = str(given.get("resume_from_checkpoint", "none")).lower() not in ("none", "null", "false")
    if given.get("dataset") == OWN and resumes and "config" not in given and config.is_file():
        return [*words, "--config", str(config)]
    return [*argv]


def beside(config: str | None, model: str) -> str:
    """`model`, or its path next to the `--config` file if it exists there and not in the working folder."""
    candidate = Path(config or ".").parent / model
    return str(candidate) if not Path(model).exists() and candidate.is_file() else model


def join_processes(ddp_timeout: int) -> bool:
    """Join the other processes and silence noisy loggers. Returns whether this is the main process."""
    reject_engines()  # Accelerate would look for them here
    timeout = timedelta(seconds=ddp_timeout)
    # Before the trainer creates its Accelerator, and with the same options: CPU processes join only if told to.
    is_main = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timeout).is_main_process
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    for noisy in ("httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # one per exported branch
    return is_main


def check_before_loading(settings: Settings) -> None:
    """Check what needs neither data nor models. A checkpoint to resume from is checked with them."""
    args = settings.args
    planned.check(settings)
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resuming=bool(args.resume_from_checkpoint))
    setup.check_trackers(args)
    setup.check_schedule(args)


def check_unlabeled(settings: Settings, sets: TrainingSets) -> None:
    """Check that a method that learns from unlabeled images has some.

    Raises:
        ValueError: there are none; the message says how to add them.
    """
    if settings.objective.views and sets.unlabeled is None and sets.found is not None:
        raise ValueError(
            f"{type(settings.objective).__name__} learns from unlabeled images, and all images to train on in "
            f"{settings.data.data_root} have a mask. Add images without masks to it, set a folder of such images with "
            "`--unlabeled_root`, or train without them: `--objective supervised`."
        )
    if settings.objective.views and sets.unlabeled is None:
        raise ValueError(
            f"{type(settings.objective).__name__} learns from unlabeled images, and all {len(sets.labeled)} images of "
            f"`{settings.data.train_split}` are labeled. Set a folder of images without masks with "
            "`--unlabeled_root`; or choose with `--partition` (a count such as 12, a ratio such as 1-8, a list file) "
            "which images count as labeled, so that the rest is unlabeled; or train without them: "
            "`--objective supervised`."
        )


def build(
    settings: SomeSettings, sets: TrainingSets, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[CPSTrainer, SomeSettings]:
    """The trainer, and the settings completed from the data sets."""
    chosen = sets.chosen
    provenance = replace(
        settings.provenance,
        dataset_name=settings.provenance.dataset_name or _called(settings),
        partition_name=None if chosen is None else chosen.name,
        partition_sha256=None if chosen is None else chosen.sha256,
    )
    settings = replace(settings, provenance=provenance)
    write = WriteSettings(settings)
    lists = [WriteHeldOut(sets.found.held_out)] if sets.found is not None and sets.found.held_out else []
    models = models_of(settings)
    # The demonstration shows training from scratch on purpose; a plan has already printed the note.
    if not settings.data.dataset.endswith("_scenes") and (settings.data.models or settings.data.dataset != OWN):
        warn_of_random_weights(models, settings.model_config.backbone, setup.length(sets.labeled))
    trainer = CPSTrainer(
        models,
        **settings.for_trainer(),
        train_dataset=sets.labeled,
        unlabeled_dataset=sets.unlabeled,
        eval_dataset=sets.evaluation,
        callbacks=[write, *lists, *callbacks],
    )
    write.settings = settings = replace(settings, model_config=trainer.model_config)  # with the checkpoint's mean
    return trainer, settings


class WriteSettings(TrainerCallback):
    """OUT/config.yaml, including the groups that the trainer does not know, so that `--config` repeats the run."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._steps: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._steps = args.max_steps
        if state.is_world_process_zero:
            text = replace(self.settings, args=args).to_yaml()  # the trainer's args: it may have fitted the batch size
            write_atomically(Path(args.output_dir) / "config.yaml", text)

    def on_step_begin(self, args, state, control, **kwargs):
        if args.max_steps != self._steps:  # fitted to the time that is left
            self.on_train_begin(args, state, control, **kwargs)


class WritePlan(TrainerCallback):
    """OUT/plan.json: what was chosen and why. The report shows it."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            text = json.dumps([asdict(choice) for choice in self.plan.choices], indent=1, ensure_ascii=False)
            write_atomically(Path(args.output_dir) / "plan.json", text)

    def on_step_begin(self, args, state, control, **kwargs):
        for i, choice in enumerate(self.plan.choices):
            if choice.name == "max_steps" and choice.value != args.max_steps:
                reason = f"{choice.value} were planned; fitted to the time left after the first stage"
                self.plan.choices[i] = replace(choice, value=args.max_steps, reason=reason)
                self.on_train_begin(args, state, control, **kwargs)


class WriteHeldOut(TrainerCallback):
    """OUT/validation.txt: the labeled images held out for validation, in the format of `--validation`."""

    def __init__(self, ids: Sequence[str]):
        self.ids = ids

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_atomically(Path(args.output_dir) / HELD_OUT, "".join(f"{name}\n" for name in self.ids))


def _called(settings: Settings) -> str:
    """The data set's name. For an own folder, the folder's name without its path."""
    data = settings.data
    return Path(data.data_root).resolve().name if data.dataset == OWN else data.dataset


def report(results: Mapping[str, Any], settings: Settings, names: Sequence[str]) -> None:
    """Print the table, the agreement, the written files, and how to load the branch."""
    best, folder = results["best"], settings.args.output_dir
    labeled = settings.provenance.partition_name or "all of data_root"
    labeled = results["num_labeled"] if settings.data.dataset == OWN else labeled
    print(f"\n{_called(settings)}, {labeled} labeled, step {results['steps']}:\n")
    if results["final"]:
        print(scores_table(results["final"], names))
    else:
        print("Not evaluated: there is no evaluation set.")
    if line := absent_line(results["classes"]["absent"], len(names)):
        print(f"\n{wrapped(line)}")
    if best:
        supervised = ""
        if best["step"] <= (settings.args.pretrain_steps or 0):
            supervised = " of the supervised stage, since the second stage is worse beyond chance"
        print(f"\nBest: {best['branch'].replace('_', ' ')} at step {best['step']}{supervised}, ", end="")
        print(f"{mean_iou_in_words(best[best['branch']])}.")
    if results["agreement"]:
        print(f"\n{wrapped(agreement_in_words(results['agreement'], results['commonest_class']))}")
    if found := results.get("comparison"):
        said = f"Did the unlabeled images help? {found['sentence']}"
        first = next(iter(found["branches"].values()))
        if first["verdict"] == comparison.TOO_FEW:
            print(f"\n{wrapped(said)}")
        else:
            print(f"\n{wrapped(said)}\n\n{comparison.table(first)}\n")
            more = "More steps alone may explain part of that: `cps-hf compare` trains without the unlabeled images"
            print(wrapped(f"{more} for the same time."))
    print(f"\nWritten to {folder}:")
    for path in sorted(Path(folder).iterdir()):
        print(f"  {path.name}{os.sep if path.is_dir() else ''}")
    if (Path(folder) / REPORT).is_file():
        print(f"\nOpen in a browser: {Path(folder) / REPORT}")
    branch = Path(folder) / ("best" if best else "branch_0")
    print(f"\nLoad {'the best branch' if best else 'branch 0'} anywhere, without cps_hf, and predict an image:\n")
    print("\n".join([*loading_lines(branch), *prediction_lines()]))


def agreement_in_words(agreement: Mapping[str, float], commonest_class: Mapping[str, float]) -> str:
    """How far the branches agree at the start and at the end. Agreement on one class is reported as a collapse."""
    start, end = (f"{100 * agreement[when]:.1f} %" for when in ("start", "end"))
    said = f"The branches agree on {start} of unlabeled pixels at the start, {end} at the end"
    if "end" not in commonest_class:
        return f"{said}."
    share = commonest_class["end"]
    said = f"{said}, where {100 * share:.1f} % of predictions are one class."
    return said if share < ONE_CLASS else f"{said} This is a collapse, not a success: look at the IoU of each class."
