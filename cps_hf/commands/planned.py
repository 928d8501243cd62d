"""Settings completed by a plan: chosen for the user's images and this machine, below the options given."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, PreTrainedConfig, TrainerCallback

from ..data.labels import LabelEncoding
from ..objectives import OBJECTIVES
from ..planning import FIRST_STAGE_SHARE, UNLABELED, DataFacts, Machine, Plan, Timings, TooShortError, make_plan
from ..training.trainer import CPSTrainer
from .datasets import OWN, TrainingSets
from .models import branches_of, chosen_models, num_branches
from .settings import Settings
from .timing import TimeLimit, time_steps

logger = logging.getLogger(__name__)

SomeSettings = TypeVar("SomeSettings", bound=Settings)

UNTIMED_END = 10.0
"""Approximate seconds of a run after its last step, if no step was timed."""
SHORT_TIME = 30.0
"""Starting alone takes about this many seconds: a shorter `--time` probably lacks its unit."""
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """`--time`'s value in seconds: "90", "90s", "10m", "1.5h".

    Raises:
        ValueError: the text has another form, or the time is zero.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([smh]?)\s*", text)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ValueError(f"`time` must be like 90s, 10m or 1.5h, got {text!r}.")
    return seconds


def check(settings: Settings, *, plans: bool | None = None) -> None:
    """Check `--time` and `--init_from` before the data is loaded.

    Args:
        plans: whether a plan is made whose length `--time` decides. If `None`, only for a folder of own images.

    Raises:
        ValueError: an option is invalid.
    """
    wanted, run = settings.plan.time, settings.plan.init_from
    if wanted is not None:
        seconds = seconds_of(wanted)
        if not (settings.data.dataset == OWN if plans is None else plans):
            raise ValueError(
                "`time` requires a folder of your own (`cps-hf train DIR --time 10m`), for which a plan is made. "
                "Otherwise set the length with `max_steps`."
            )
        if seconds < SHORT_TIME:
            number = wanted.strip().rstrip("smh")
            logger.warning(
                f"`--time {wanted}` is {seconds:g} seconds, and starting alone may take longer. "
                f"{number} minutes are written `--time {number}m`."
            )
    if run is not None:
        branches_of(run, 1)
        if Path(run).resolve() == Path(settings.args.output_dir).resolve():
            raise ValueError(f"`init_from` and `output_dir` are both {run}. Choose another `output_dir`.")


def complete(
    settings: SomeSettings, sets: TrainingSets, typed: Collection[str], *, began: float, share: float = 1.0
) -> tuple[SomeSettings, Plan]:
    """Choose the options that were not given.

    Called by all processes, which get the same plan.

    Args:
        typed: the names of the options given by a command line and a file, including "objective" if given.
        began: when the command began (`time.monotonic`); `--time` counts from it.
        share: the share of the remaining `--time` that the run may take.

    Raises:
        ValueError: an option does not fit the images, or `--time` is too short.
    """
    state = PartialState()
    if settings.plan.baseline is False and "pretrain_steps" not in typed:
        settings, typed = settings.with_values(pretrain_steps=0), {*typed, "pretrain_steps"}
    values = settings.flat() | {"objective": _name_of(settings)}
    given = {name: values[name] for name in typed if name in values}
    with state.main_process_first():  # it may have to download a backbone from the Hub
        wants_backbone = not given.keys() & {"models", "init_from", "backbone"}
        machine = Machine.here(num_processes=state.num_processes, looks_for_backbone=wants_backbone)
    facts = DataFacts.of(
        *(sets.labeled, sets.unlabeled, sets.evaluation),
        _class_names(sets),
        skip_bad_samples=settings.args.skip_bad_samples,
    )
    limit = settings.plan.time

    def measure(chosen: dict[str, Any]) -> Timings:
        trial = with_choices(settings, {name: value for name, value in chosen.items() if name not in given}, typed)
        two_stages = bool(trial.objective.views) and bool(given.get("pretrain_steps", True))
        if state.is_main_process:
            print(f"Timing a few steps, to fit the run into `--time {limit}` ...", flush=True)
        return time_steps(
            lambda clock, **others: make_trainer(trial.with_values(**others), sets, models_of(trial), [clock]),
            two_stages,
            timed=5 if seconds > 300 else 3,
        )

    passed = time.monotonic() - began
    seconds = None if limit is None else share * (seconds_of(limit) - passed)
    if seconds is not None and seconds <= 0 and "max_steps" not in given:  # before the trial, which takes even longer
        raise ValueError(
            f"`--time` {limit}: starting and reading the images alone took {math.ceil(passed)} s. Allow some minutes, "
            "or set the length with `--max_steps`."
        )
    try:
        plan = make_plan(facts, machine, given, network=_network_of(settings), seconds=seconds, measure=measure)
    except TooShortError as error:
        timed = time.monotonic() - began - passed
        enough = math.ceil((passed + error.needed / share) / 60)
        rest = "the rest" if share == 1 else "this run's share of the rest"
        twice = "" if share == 1 else " (`compare` trains twice)"
        raise ValueError(
            f"`--time {limit}`: starting took {passed:.0f} s and timing a few steps {timed:.0f} s. In {rest}, "
            f"{error.fits}. Give `--time {enough}m`{twice}, a smaller `--crop_size`, or `--max_steps`."
        ) from error
    plan = broadcast_object_list([plan])[0]  # times differ between processes
    return with_choices(settings, plan.values(), typed), plan


def with_baseline(settings: SomeSettings) -> SomeSettings:
    """The settings with a supervised stage if `--baseline` needs one and no length is set. Its length is that of a
    plan.

    Raises:
        ValueError: the method uses no unlabeled images, or the supervised stage is disabled.
    """
    args, method = settings.args, type(settings.objective).__name__
    if not settings.plan.baseline or args.pretrain_steps:
        return settings
    if not settings.objective.views:
        raise ValueError(f"`baseline` is what unlabeled images are compared with, and {method} uses none. Remove it.")
    if args.pretrain_steps == 0:
        raise ValueError("`baseline` needs the supervised stage, but `pretrain_steps` is 0. Remove one of them.")
    first = max(1, round(FIRST_STAGE_SHARE * args.max_steps))
    factor = UNLABELED["second_stage_learning_rate_factor"]
    return settings.with_values(pretrain_steps=first, second_stage_learning_rate_factor=factor)


def time_limit(settings: Settings, plan: Plan, *, began: float) -> list[TrainerCallback]:
    """The callback that keeps a run within `--time`.

    Single process only: several would have to agree on the time.
    """
    timings = plan.timings
    if settings.plan.time is None or PartialState().num_processes > 1:
        return []
    whole = seconds_of(settings.plan.time)
    # Without timings, the duration of the end is unknown; a fixed reserve must not use up a short time.
    last = min(UNTIMED_END, 0.1 * whole) if timings is None else timings.evaluation + timings.end
    return [TimeLimit(settings.plan.time, began + whole, last, timings, given=timings is None)]


def with_choices(settings: SomeSettings, choices: dict[str, Any], typed: Collection[str]) -> SomeSettings:
    """The settings with these values; the objective is given by name.

    Raises:
        ValueError: an option was given that the chosen objective does not have.
    """
    choices = dict(choices)
    cls = OBJECTIVES[choices.pop("objective", _name_of(settings))]
    if cls is not type(settings.objective):
        own = dataclasses.asdict(settings.objective)
        lost = [name for name in own if name in typed and name not in cls.__dataclass_fields__]
        if lost:
            raise ValueError(
                f"`{lost[0]}` is an option of methods with unlabeled images, and there are none. Remove it, or give "
                "unlabeled images with `--unlabeled_root`."
            )
        kept = {name: value for name, value in own.items() if name in typed}
        settings = dataclasses.replace(settings, objective=cls(**kept))
    return settings.with_values(**choices)


def make_trainer(settings: Settings, sets: TrainingSets, models: Any, callbacks: list[TrainerCallback]) -> CPSTrainer:
    """The trainer that the settings describe. `models`: from `models_of`."""
    return CPSTrainer(
        models,
        **settings.for_trainer(),
        train_dataset=sets.labeled,
        unlabeled_dataset=sets.unlabeled,
        eval_dataset=sets.evaluation,
        callbacks=callbacks,
    )


def models_of(settings: Settings) -> Any:
    """The settings' networks, as `CPSTrainer` takes them."""
    config = settings.model_config
    count = num_branches(settings.objective, config.num_branches)
    return chosen_models(settings.data.models, config.backbone, settings.plan.init_from, count)


def _network_of(settings: Settings) -> PreTrainedConfig | None:
    """The configuration of the network named by `--models` or `--init_from`. `None` if it cannot be read: the error is
    reported when the networks are built."""
    models, run = settings.data.models, settings.plan.init_from
    if not models and run is None:
        return None
    source = branches_of(run, 1)[0] if run is not None else models[0]
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=settings.model_config.trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None


def _class_names(sets: TrainingSets) -> list[str]:
    encoding = LabelEncoding.from_feature(sets.labeled.features["label"])
    return list(encoding.names)


def _name_of(settings: Settings) -> str:
    return next(name for name, cls in OBJECTIVES.items() if type(settings.objective) is cls)
