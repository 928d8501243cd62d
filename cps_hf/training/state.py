"""Everything a run knows about itself: saved with each checkpoint, and passed to callbacks as `state`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerState

from ..metrics.bootstrap import ImageCounts
from .reporting import Averages, Stopwatch


@dataclass
class RunState(TrainerState):
    """transformers' `TrainerState`, whose `global_step`, `max_steps`, `best_metric` and `log_history` callbacks use,
    with additional fields.

    Args:
        max_steps: the run's length. A callback may change it in `on_save` at the end of the first stage, to give the
            second stage another length.
        first_step: 0, or the step that was resumed from.
        planned_steps: the run's `max_steps` before a callback changed it; `None` if none did.
        scores: the newest evaluation's result of `IoUCounter.compute`, by row (a name of `TrainingModule.networks`, or
            "mean").
        best: the best evaluation's rows, and its "step" and "branch"; empty if there is none yet.
        agreement: the share of pixels where all branches predict the same class, at the "start" and at the "end".
        commonest_class: the share of the most common class in the predictions for these pixels, likewise.
        image_counts: the newest evaluation's counts per image by row (`Evaluator.image_counts`); not saved.
        stages: with `pretrain_steps`, the scores at the end of the "supervised" stage, in the format of `scores`.
        watch: the memory of `cps_hf.training.watch.Watch`.
        unlabeled_weight: with `unlabeled_weight="auto"`, the factor on the unlabeled term from the next step on.
        unlabeled_end: with `unlabeled_weight="auto"`, the last step that read unlabeled images, once the factor is 0.
        supervised_counts: that stage's counts per image by row, in the format of `comparison.pack`.
        supervised_seconds: the training time at that stage's end.
        best_counts: the counts of the best branch at its best step, in the second stage; empty if there is none yet.
        comparison: the second stage against the first by the newest scores (`comparison.compare`).
        skipped_steps: how many steps were skipped because a number was not finite.
        one_class: by branch, the share of the steps since the last log in which it predicted one class everywhere.
        pending: what is still to be done at this step: {"log": the record to log or None, "evaluate": bool, "best":
            whether to compare the scores with the best ones}; empty if nothing. Weights are saved before this work,
            so that its failure cannot lose them.
        absent_classes: by "training" and "evaluation", the named classes of which no pixel was found before step 1;
            not saved.
        averages: the means to be logged.
        stopwatch: the seconds and images of training.
    """

    first_step: int = 0
    planned_steps: int | None = None
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    commonest_class: dict[str, float] = field(default_factory=dict)
    image_counts: dict[str, ImageCounts] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)
    unlabeled_weight: float = 1.0
    unlabeled_end: int | None = None
    supervised_counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    supervised_seconds: float = 0.0
    best_counts: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    one_class: dict[str, float] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=dict)
    absent_classes: dict[str, list[str]] = field(default_factory=dict)
    averages: Averages = field(default_factory=Averages)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def state_dict(self) -> dict[str, Any]:
        """The contents of a checkpoint, as JSON values."""
        return {
            "step": self.global_step,
            "planned_steps": self.planned_steps,
            "scores": self.scores,
            "best": self.best,
            "best_metric": self.best_metric,
            "agreement": self.agreement,
            "commonest_class": self.commonest_class,
            "stages": self.stages,
            "watch": self.watch,
            "unlabeled_weight": self.unlabeled_weight,
            "unlabeled_end": self.unlabeled_end,
            "supervised_counts": self.supervised_counts,
            "supervised_seconds": self.supervised_seconds,
            "best_counts": self.best_counts,
            "comparison": self.comparison,
            "skipped_steps": self.skipped_steps,
            "pending": self.pending,
            "log_lines": len(self.log_history),
            "averages": self.averages.state_dict(),
            "stopwatch": self.stopwatch.total,
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, same_choice: bool = True, same_set: bool = True) -> None:
        """Restore the result of `state_dict`.

        Args:
            same_choice: whether the best branch is still chosen in the same way. If not, it is chosen again.
            same_set: whether the evaluation is the same. If not, the old scores are dropped.
        """
        self.global_step = self.first_step = saved["step"]
        self.planned_steps = saved.get("planned_steps")
        self.agreement, self.skipped_steps = saved["agreement"], saved["skipped_steps"]
        self.commonest_class = saved.get("commonest_class", {})
        self.pending = saved.get("pending", {})  # missing in checkpoints from before version 0.2
        self.unlabeled_weight = saved.get("unlabeled_weight", 1.0)  # missing in older checkpoints
        self.unlabeled_end = saved.get("unlabeled_end")
        self.watch = saved.get("watch", {}) if same_set else {}
        self.averages.load_state_dict(saved["averages"])
        self.stopwatch.total = saved["stopwatch"]
        self.scores = saved["scores"] if same_set else {}
        self.stages = saved.get("stages", {}) if same_set else {}
        self.supervised_seconds = saved.get("supervised_seconds", 0.0)
        for name in ("supervised_counts", "comparison"):
            setattr(self, name, saved.get(name, {}) if same_set else {})
        if same_choice:
            self.best_counts = saved.get("best_counts", {})
            self.best, self.best_metric = saved["best"], saved["best_metric"]
            self.best_global_step = saved["best"].get("step")
