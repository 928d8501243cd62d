"""What a run knows of itself, in one place: saved with each checkpoint, and read by callbacks as their `state`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerState

from ..metrics.bootstrap import ImageCounts
from .reporting import Averages, Stopwatch


@dataclass
class RunState(TrainerState):
    """transformers' `TrainerState`, whose `global_step`, `max_steps`, `best_metric` and `log_history` callbacks know,
    and what is ours.

    Args:
        first_step: 0, or the step that was resumed from.
        scores: the newest evaluation's, by row (a name of `TrainingModule.networks`, or "mean"): what
            `IoUCounter.compute` gives.
        best: the best evaluation's rows, and its "step" and "branch"; empty before there is one.
        agreement: the share of pixels for which all branches predict one class, at the "start" and at the "end".
        commonest_class: the share of the commonest class among the predictions on these pixels, likewise.
        image_counts: the newest evaluation's counts of each image by row (`Evaluator.image_counts`); not saved.
        stages: with `pretrain_steps`, the scores at the end of the "supervised" stage, as `scores` are.
        watch: what `cps_hf.training.watch.Watch` has seen.
        unlabeled_weight: with `unlabeled_weight="auto"`, the factor on the unlabeled term from the next step on.
        unlabeled_end: with `unlabeled_weight="auto"`, the last step that read unlabeled images, once the factor is 0.
        supervised_counts: that stage's counts of each image by row, as `comparison.pack` gives them.
        supervised_seconds: of training, at that stage's end.
        best_counts: those of the best branch at its best step, in the second stage; empty before there is one.
        comparison: the second stage against the first by the newest scores (`comparison.compare`).
        skipped_steps: how many steps were left out since a number was not finite.
        one_class: by branch, the share of the steps since the last log in which it predicted one class everywhere.
        pending: what is still to be done at this step: {"log": the record to log or None, "evaluate": bool, "best":
            whether the scores are to be compared with the best ones}; empty: nothing. Weights are saved before that,
            so that nothing of it can cost them.
        absent_classes: by "training" and "evaluation", the named classes of which no pixel was found before step 1;
            not saved.
        averages: the means of what is logged.
        stopwatch: the seconds and images of training.
    """

    first_step: int = 0
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
        """What a checkpoint keeps: JSON values only."""
        return {
            "step": self.global_step,
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
        """Bring back what `state_dict` gave.

        Args:
            same_choice: whether the best branch is still chosen in the same way; else it is found anew.
            same_set: whether the evaluation is the same; else the old scores are not this run's.
        """
        self.global_step = self.first_step = saved["step"]
        self.agreement, self.skipped_steps = saved["agreement"], saved["skipped_steps"]
        self.commonest_class = saved.get("commonest_class", {})
        self.pending = saved.get("pending", {})  # checkpoints of before version 0.2 have none
        self.unlabeled_weight = saved.get("unlabeled_weight", 1.0)  # older checkpoints have none
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
