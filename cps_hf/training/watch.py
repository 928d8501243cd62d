"""Monitors pseudo labels: at each evaluation, how many are correct and which classes they contain. Warns when they
begin to do harm.

A score counts as fallen, and a class as vanished, only after two evaluations in a row: one alone may be chance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from ..data.table import first_few
from .health import PIXELS
from .state import RunState

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""A score that is less than this below its reference has not fallen."""
VANISHED = 0.1
"""A class is missing in the pseudo labels if its share of them is below this times its share of the labels."""

SUPERVISED, BEFORE = "at the end of the supervised stage", "in two evaluations in a row before"


class Level:
    """A score and its reference: the supervised stage's score, or the best that two evaluations in a row reached.

    (The best of all evaluations is the luckiest one: a run that makes no progress is usually below it.)

    Args:
        memory: JSON values to store the state in: "reference", "whose" (`SUPERVISED` or `BEFORE`), and "last", the
            newest score.
    """

    def __init__(self, memory: dict[str, Any]):
        self.memory = memory

    def begin(self, reference: float) -> None:
        """Start from the supervised stage's final score."""
        self.memory.update(reference=reference, whose=SUPERVISED, last=None)

    def has_fallen(self, score: float) -> bool:
        """Whether this score and the previous one are below the reference by more than `TOLERANCE`."""
        last, reference = self.memory.get("last"), self.memory.get("reference")
        self.memory["last"] = score
        if last is None:
            return False
        if reference is not None and max(last, score) < reference - TOLERANCE:
            return True
        if self.memory.get("whose") != SUPERVISED:
            reached = min(last, score)
            self.memory.update(reference=reached if reference is None else max(reference, reached), whose=BEFORE)
        return False

    def in_words(self) -> str:
        last, reference = self.memory["last"], self.memory["reference"]
        return f"{100 * last:.1f} % now and {100 * reference:.1f} % {self.memory['whose']}"


class Watch:
    """Monitors the evaluations of a run that learns from unlabeled images. All processes call it, with equal numbers.

    Args:
        state: the run's state; its `watch` stores the memory as JSON values.
        names: the class names.
        labeling: the networks whose predictions are pseudo labels (`TrainingModule.labeling`).
        acts: whether the unlabeled term's weight is lowered automatically.
    """

    def __init__(self, state: RunState, names: Sequence[str], labeling: Sequence[str], *, acts: bool = False):
        self.state, self.names, self.labeling, self.acts = state, names, labeling, acts

    def begin(self, agreed_accuracy: float | None) -> None:
        """Start with `state.scores` at the end of the supervised stage."""
        for name, score in self._scores(agreed_accuracy).items():
            self._level(name).begin(score)

    def look(self, agreed_accuracy: float | None) -> tuple[dict[str, float], bool]:
        """Process `state.scores`, a new evaluation of the method's stage, and warn about new problems.

        Returns:
            What to log: each class's share of the pseudo labels since the last evaluation, and of the labels in the
            method's stage so far; and whether the best network's mean IoU has fallen.
        """
        fallen = [name for name, score in self._scores(agreed_accuracy).items() if self._level(name).has_fallen(score)]
        for name in self._new("fallen", fallen):
            self._warn(f"{self._what(name)}: {self._level(name).in_words()}.")
        shares = self._shares()
        if shares:
            self._look_at_classes(shares)
        logs = {f"pseudo_label_share/{name}": taught for name, (taught, _) in shares.items()}
        return logs | {f"label_share/{name}": labeled for name, (_, labeled) in shares.items()}, "mean_iou" in fallen

    def _look_at_classes(self, shares: dict[str, tuple[float, float]]) -> None:
        watch = self.state.watch
        watch["shares"] = {name: {"pseudo_labels": a, "labels": b} for name, (a, b) in shares.items()}
        missing = [name for name, (taught, labeled) in shares.items() if taught < VANISHED * labeled]
        vanished, watch["missing"] = [name for name in missing if name in watch.get("missing", [])], missing
        if new := self._new("vanished", vanished):
            said = [f"{n} ({100 * shares[n][0]:.3g} % of pixels instead of {100 * shares[n][1]:.3g} %)" for n in new]
            self._warn(f"Classes of the labels have vanished from the pseudo labels: {first_few(said)}.")

    def _new(self, kind: str, names: list[str]) -> list[str]:
        """The names that were not affected at the previous evaluation: a problem is reported once, and again after a
        recovery."""
        before, self.state.watch[kind] = self.state.watch.get(kind, []), names
        return [name for name in names if name not in before]

    def _scores(self, agreed_accuracy: float | None) -> dict[str, float]:
        """The mean IoU of the best network, and the share of correct pseudo labels."""
        scores = self.state.scores
        found = {"mean_iou": max(one["mean_iou"] for row, one in scores.items() if row != "mean")}
        if agreed_accuracy is not None:
            found["right"] = agreed_accuracy
        elif self.labeling:  # otherwise the labels never change
            found["right"] = scores[self.labeling[0]]["overall_accuracy"]
        return {name: score for name, score in found.items() if not math.isnan(score)}

    def _shares(self) -> dict[str, tuple[float, float]]:
        """By class, its shares of the pseudo labels and of the labels. Labels are counted over the whole stage, since
        a rare class is not in every batch. Empty if there was no pseudo label."""
        watch, counts = self.state.watch, self.state.averages.take_counts()
        none = [0.0] * len(self.names)
        taught, labeled = (counts.get(f"{PIXELS}{what}", none) for what in ("pseudo_labels", "labels"))
        labeled = watch["label_pixels"] = [
            a + b for a, b in zip(watch.get("label_pixels", none), labeled, strict=True)
        ]
        if not sum(taught) or not sum(labeled):
            return {}
        pairs = ((a / sum(taught), b / sum(labeled)) for a, b in zip(taught, labeled, strict=True))
        return dict(zip(self.names, pairs, strict=True))

    def _level(self, name: str) -> Level:
        return Level(self.state.watch.setdefault("levels", {}).setdefault(name, {}))

    def _what(self, name: str) -> str:
        if name == "mean_iou":
            return "The mean IoU of the best network has fallen"
        if len(self.labeling) > 1:
            return "Where the networks that make pseudo labels agree, they are less often right on evaluation images"
        return f"The network that makes pseudo labels, {self.labeling[0]}, is less often right on evaluation images"

    def _warn(self, text: str) -> None:
        step, two_stages = self.state.global_step, self._level("mean_iou").memory.get("whose") == SUPERVISED
        helps = [] if self.acts else ["a smaller `weight` of the method", '`unlabeled_weight="auto"`']
        helps += [] if two_stages else ["supervised steps first (`pretrain_steps`)"]
        helps += ["`class_weights` and `class_balance`, for rare classes"]
        self.state.watch.setdefault("warnings", []).append({"step": step, "text": text})
        logger.warning("Step %d: %s Unlabeled images may do harm. What can help: %s.", step, text, "; ".join(helps))


def watched(state: RunState) -> dict[str, Any]:
    """For results.json: the share of correct pseudo labels and its reference, the classes' shares, the warnings."""
    right = state.watch.get("levels", {}).get("right", {})
    return {
        "right": {"last": right.get("last"), "reference": right.get("reference")},
        "shares": state.watch.get("shares", {}),
        "warnings": state.watch.get("warnings", []),
    }
