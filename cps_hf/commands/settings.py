"""All options of a training command line and a YAML file, in groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..config import (
    AugmentationConfig,
    CPSConfig,
    EvaluationConfig,
    HubConfig,
    ModelConfig,
    Provenance,
    flat,
)
from ..objectives import Objective
from ..training.setup import to_yaml
from .datasets import DataConfig

SomeSettings = TypeVar("SomeSettings", bound="Settings")


@dataclass(kw_only=True)
class PlanConfig:
    """What a run starts from and how long it may take.

    Plan
        time: how long the whole command may take, with a folder of own images: 90s, 10m or 1.5h. A step is timed, and
            the schedule is fitted. With `max_steps` the run ends at whichever comes first. If None, a default length.
        init_from: the output folder of an earlier run whose networks this one starts from (say, in the next round of
            labeling), or one of the branches in it. Heads are kept if the classes are the same.
        baseline: first train on the labels alone; the method starts from these networks, and the end reports what the
            unlabeled images changed. If None, this is done if a plan is made and there are unlabeled images.
    """

    time: str | None = None
    init_from: str | None = None
    baseline: bool | None = None


@dataclass(kw_only=True)
class Settings:
    """The groups. Their fields share one namespace on a command line and in a file: no two have the same name.

    Raises:
        ValueError: two groups contradict each other.
    """

    data: DataConfig
    plan: PlanConfig = field(default_factory=PlanConfig)
    objective: Objective
    args: CPSConfig
    augmentation: AugmentationConfig
    model_config: ModelConfig
    evaluation: EvaluationConfig
    hub: HubConfig
    provenance: Provenance

    def __post_init__(self):
        self.evaluation.check_stride(self.augmentation.crop_size)

    def with_values(self: SomeSettings, **values: Any) -> SomeSettings:
        """A copy with new values of some fields, each in the group that has it."""
        groups = {}
        for name, group in vars(self).items():
            own = {f.name for f in dataclasses.fields(group)} & values.keys()
            groups[name] = dataclasses.replace(group, **{key: values.pop(key) for key in own})
        if values:
            raise TypeError(f"no group has a field {', '.join(values)}.")
        return type(self)(**groups)

    def for_trainer(self) -> dict[str, Any]:
        """The groups that `CPSTrainer` takes, by argument name."""
        return {
            "args": self.args,
            "objective": self.objective,
            "augmentation": self.augmentation,
            "model_config": self.model_config,
            "evaluation": self.evaluation,
            "hub": self.hub,
            "provenance": self.provenance,
        }

    def flat(self) -> dict[str, Any]:
        """Every field of every group and of the objective, by name, without the token."""
        return flat(*vars(self).values())

    def to_yaml(self) -> str:
        """The content of a file from which `--config` reads the same settings."""
        return to_yaml(self.objective, *(group for group in vars(self).values() if group is not self.objective))
