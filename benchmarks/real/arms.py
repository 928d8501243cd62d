"""The settings of every arm of the comparison, in addition to the shared ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cps_hf.planning.recommended import FIRST_STAGE_SHARE, LABELED, UNLABELED

CROP = {"camvid": 160, "steel": 96}
LABELS = {"camvid": 23, "steel": 24}

PLAIN: dict[str, Any] = {
    **{name: LABELED[name] for name in ("optim", "learning_rate", "head_learning_rate_factor", "weight_decay")},
    **{name: LABELED[name] for name in ("per_device_train_batch_size", "lr_scheduler_type")},
    **{name: LABELED[name] for name in ("horizontal_flip", "random_scale", "random_scale_mode", "resize_antialias")},
    "channels_last": True,  # a quarter faster on a CPU, for every arm
}
"""Today's plain supervised training, and what all arms share: data, network, optimizer, batch and geometry."""

CONTROL = PLAIN | LABELED
"""What makes the labeled images teach more besides; of the control and of every method."""

STAGES = CONTROL | {"second_stage_learning_rate_factor": UNLABELED["second_stage_learning_rate_factor"]}


@dataclass(frozen=True)
class Arm:
    """A way of training.

    Args:
        objective: the objective's name.
        options: settings by option name.
        branches: how many networks are trained.
        two_stages: use the first half of the steps as a supervised stage.
        as_long_as: take as many steps as fit into the training time of this arm.
        labelers: the arm whose first-stage networks make the labels; this arm replaces its second stage. That run's
            folder must still exist.
    """

    objective: str
    options: dict[str, Any] = field(default_factory=dict)
    branches: int = 2
    two_stages: bool = False
    as_long_as: str | None = None
    labelers: str | None = None

    def max_steps(self, length: int, seconds: dict[str, float], arms: dict[str, Arm]) -> int:
        """The number of steps at this length.

        Args:
            seconds: per step, by kind (`step_kind`).
        """
        if self.labelers is not None:
            return length - (arms[self.labelers].pretrain_steps(length) or 0)
        if self.as_long_as is None:
            return length
        other = arms[self.as_long_as]
        return max(length, round(other.seconds(length, seconds) / seconds[self.step_kind]))

    def pretrain_steps(self, steps: int) -> int | None:
        return round(FIRST_STAGE_SHARE * steps) if self.two_stages else None

    @property
    def step_kind(self) -> str:
        """The kind of step that the (second) stage is timed as."""
        return f"supervised_{self.branches}" if self.objective == "supervised" else self.objective

    def seconds(self, length: int, seconds: dict[str, float]) -> float:
        """Training time, without evaluation and saving."""
        first = self.pretrain_steps(length) or 0
        return first * seconds[f"supervised_{self.branches}"] + (length - first) * seconds[self.step_kind]


ARMS = {
    # Today's plain supervised training, and the control: the same with the labeled side of every method below.
    "plain": Arm("supervised", PLAIN, branches=1),
    "plain_equal_time": Arm("supervised", PLAIN, branches=1, as_long_as="recommended"),
    "control": Arm("supervised", CONTROL, branches=1),
    "control_equal_time": Arm("supervised", CONTROL, branches=1, as_long_as="recommended"),
    "all_labels": Arm("supervised", CONTROL, branches=1),
    # What `cps-hf train DIR` chooses: CPS + CutMix from a supervised pair.
    "recommended": Arm("cps", STAGES | {k: v for k, v in UNLABELED.items() if k != "objective"}, two_stages=True),
    # As published, from ImageNet weights alone; compared with `plain`.
    "cps_published": Arm("cps", PLAIN | {"weight": 1.5, "cutmix": True}),
    # The other methods with their papers' settings, from a supervised pair (or network) like `recommended`.
    "cps_averaged": Arm("cps_averaged", STAGES | {"ema_decay": 0.996}, two_stages=True),
    "mean_teacher": Arm("mean_teacher", STAGES, branches=1, two_stages=True),
    "fixmatch": Arm("fixmatch", STAGES, branches=1, two_stages=True),
    "unimatch": Arm("unimatch", STAGES, branches=1, two_stages=True),
    "unimatch_v2": Arm("unimatch_v2", STAGES, branches=1, two_stages=True),
    "cpc": Arm("cpc", STAGES, two_stages=True),
    "pseudoseg": Arm("pseudoseg", STAGES, branches=1, two_stages=True),
    # A new network learns what the finished pair of `recommended` predicts.
    "fixed_teacher": Arm("fixed_teacher", CONTROL, branches=1, labelers="recommended"),
}
