"""The settings that a plan completes: what people's own images and this machine ask for, under what was typed."""

from __future__ import annotations

import dataclasses
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
from ..planning import FIRST_STAGE_SHARE, UNLABELED, DataFacts, Machine, Plan, Timings, make_plan
from ..training.trainer import CPSTrainer
from .datasets import OWN, TrainingSets
from .models import branches_of, chosen_models, num_branches
from .settings import Settings
from .timing import TimeLimit, time_steps

SomeSettings = TypeVar("SomeSettings", bound=Settings)

SLOWER = 1.3
"""What follows the last step is given so much of the time that it took in the trial."""
UNTIMED_END = 10.0
"""Seconds of a run after its last step, about, where no step was timed."""
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """`--time`'s value in seconds: "90", "90s", "10m", "1.5h".

    Raises:
        ValueError: it is no such text, or no time at all.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([smh]?)\s*", text)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ValueError(f"`time` must be like 90s, 10m or 1.5h, got {text!r}.")
    return seconds


def check(settings: Settings, *, plans: bool | None = None) -> None:
    """What can be wrong with `--time` and `--init_from` before there are data.

    Args:
        plans: whether a plan is made, whose length `--time` decides; `None`: for a folder of own images.

    Raises:
        ValueError: it is.
    """
    wanted, run = settings.plan.time, settings.plan.init_from
    if wanted is not None:
        seconds_of(wanted)
        if not (settings.data.dataset == OWN if plans is None else plans):
            raise ValueError(
                "`time` goes with a folder of your own (`cps-hf train DIR --time 10m`), for which a plan is made. "
                "Otherwise say how long with `max_steps`."
            )
    if run is not None:
        branches_of(run, 1)
        if Path(run).resolve() == Path(settings.args.output_dir).resolve():
            raise ValueError(f"`init_from` and `output_dir` are both {run}: write the new run somewhere else.")


def complete(
    settings: SomeSettings, sets: TrainingSets, typed: Collection[str], *, began: float, share: float = 1.0
) -> tuple[SomeSettings, Plan]:
    """Choose what was not typed.

    Called by all processes, which get the same plan.

    Args:
        typed: the names of the options that a command line and a file give, "objective" among them where they do.
        began: when the command began (`time.monotonic`), which `--time` counts from.
        share: of what is left of `--time`, what the run may take.

    Raises:
        ValueError: what was typed does not fit the images, or `--time` is too short.
    """
    state = PartialState()
    if settings.plan.baseline is False and "pretrain_steps" not in typed:
        settings, typed = settings.with_values(pretrain_steps=0), {*typed, "pretrain_steps"}
    values = settings.flat() | {"objective": _name_of(settings)}
    given = {name: values[name] for name in typed if name in values}
    with state.main_process_first():  # who may have to fetch a backbone from the Hub
        wants_backbone = not given.keys() & {"models", "init_from", "backbone"}
        machine = Machine.here(num_processes=state.num_processes, looks_for_backbone=wants_backbone)
    facts = DataFacts.of(sets.labeled, sets.unlabeled, sets.evaluation, _class_names(sets))
    limit = settings.plan.time

    def measure(chosen: dict[str, Any]) -> Timings:
        trial = with_choices(settings, {name: value for name, value in chosen.items() if name not in given}, typed)
        two_stages = bool(trial.objective.views) and bool(given.get("pretrain_steps", True))
        return time_steps(
            lambda clock, **others: make_trainer(trial.with_values(**others), sets, models_of(trial), [clock]),
            two_stages,
            timed=5 if seconds > 300 else 3,
        )

    passed = time.monotonic() - began
    seconds = None if limit is None else share * (seconds_of(limit) - passed)
    if seconds is not None and seconds <= 0 and "max_steps" not in given:  # before the trial, which takes longer still
        raise ValueError(
            f"`--time` {limit}: starting and reading the images alone took {math.ceil(passed)} s. Give some minutes, "
            "or say how long with `--max_steps`."
        )
    plan = make_plan(facts, machine, given, network=_network_of(settings), seconds=seconds, measure=measure)
    plan = broadcast_object_list([plan])[0]  # times differ between processes
    return with_choices(settings, plan.values(), typed), plan


def with_baseline(settings: SomeSettings) -> SomeSettings:
    """The settings with a supervised stage where `--baseline` wants one and nothing says how long it is: as long as a
    plan has it.

    Raises:
        ValueError: the method learns from no unlabeled images, or there is to be no supervised stage.
    """
    args, method = settings.args, type(settings.objective).__name__
    if not settings.plan.baseline or args.pretrain_steps:
        return settings
    if not settings.objective.views:
        raise ValueError(
            f"`baseline` is what unlabeled images are compared with, and {method} uses none: leave it out."
        )
    if args.pretrain_steps == 0:
        raise ValueError("`baseline` is the supervised stage, and `pretrain_steps` 0 leaves it out. Give one of them.")
    first = max(1, round(FIRST_STAGE_SHARE * args.max_steps))
    factor = UNLABELED["second_stage_learning_rate_factor"]
    return settings.with_values(pretrain_steps=first, second_stage_learning_rate_factor=factor)


def time_limit(settings: Settings, plan: Plan, *, began: float) -> list[TrainerCallback]:
    """The callback that ends training in time: steps may become slower than the timed ones, and `--max_steps` may name
    more than fit.

    Of one process: several would have to agree on the time.
    """
    timings = plan.timings
    if settings.plan.time is None or PartialState().num_processes > 1:
        return []
    # Without timings it is not known how long the end takes; a fixed reserve must not eat up a short time.
    whole = seconds_of(settings.plan.time)
    last = min(UNTIMED_END, 0.1 * whole) if timings is None else SLOWER * (timings.evaluation + timings.end)
    return [TimeLimit(began + whole - last)]


def with_choices(settings: SomeSettings, choices: dict[str, Any], typed: Collection[str]) -> SomeSettings:
    """The settings with these values, the objective among them by its name.

    Raises:
        ValueError: an option was typed that the chosen objective does not have.
    """
    choices = dict(choices)
    cls = OBJECTIVES[choices.pop("objective", _name_of(settings))]
    if cls is not type(settings.objective):
        own = dataclasses.asdict(settings.objective)
        lost = [name for name in own if name in typed and name not in cls.__dataclass_fields__]
        if lost:
            raise ValueError(
                f"`{lost[0]}` is an option of methods with unlabeled images, and there are none: leave it out, or "
                "give unlabeled images with `--unlabeled_root`."
            )
        kept = {name: value for name, value in own.items() if name in typed}
        settings = dataclasses.replace(settings, objective=cls(**kept))
    return settings.with_values(**choices)


def make_trainer(settings: Settings, sets: TrainingSets, models: Any, callbacks: list[TrainerCallback]) -> CPSTrainer:
    """The trainer that the settings describe; `models`: those of `models_of`."""
    return CPSTrainer(
        models,
        **settings.for_trainer(),
        train_dataset=sets.labeled,
        unlabeled_dataset=sets.unlabeled,
        eval_dataset=sets.evaluation,
        callbacks=callbacks,
    )


def models_of(settings: Settings) -> Any:
    """The networks that the settings name, as `CPSTrainer` takes them."""
    config = settings.model_config
    count = num_branches(settings.objective, config.num_branches)
    return chosen_models(settings.data.models, config.backbone, settings.plan.init_from, count)


def _network_of(settings: Settings) -> PreTrainedConfig | None:
    """The configuration of the network that is named by `--models` or `--init_from`; none where it cannot be read yet:
    what is wrong with it is said when the networks are built."""
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
