"""Decides which branch of which step `OUT/best` contains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..config import CPSConfig
from ..metrics.bootstrap import paired_bootstrap
from . import comparison
from .export import BranchExporter
from .late import Late
from .stages import Stages
from .state import RunState

logger = logging.getLogger(__name__)


class BestBranch:
    """Maintains `OUT/best` and its description in the state.

    In a run with one stage, it is the branch with the highest score of all evaluations. With a supervised first stage,
    the choice starts again with the second stage, whose network becomes `best` even if it scores a little lower, since
    that may be chance. Only if the second stage's best network is worse than the supervised one beyond chance is
    `best` the supervised one at the end, with a warning. All processes call every method.
    """

    def __init__(self, args: CPSConfig, stages: Stages, state: RunState, exporter: BranchExporter, late: Late):
        self.stages, self.state, self.exporter, self.late = stages, state, exporter, late
        self.metric = args.metric_for_best_model
        self.folder = Path(args.output_dir) / "best"

    def row_of(self, scores: Mapping[str, Mapping[str, Any]]) -> str:
        """The row of the best single network."""
        return max((row for row in scores if row != "mean"), key=lambda row: scores[row][self.metric])

    def keep(self) -> None:
        """Make the best branch of the newest scores `OUT/best` if it is better than the previous one."""
        state, border = self.state, self.stages.border
        if not state.scores:
            return
        row = self.row_of(state.scores)
        opens_stage = bool(state.best) and state.best["step"] <= border < state.global_step
        if state.best_metric is None or state.scores[row][self.metric] > state.best_metric or opens_stage:
            counts = state.image_counts.get(row) if border else None
            packed = {} if counts is None else comparison.pack(counts)
            self._replace(
                partial(self.exporter.export, row, self.folder), state.scores, row, state.global_step, packed
            )

    def settle(self) -> None:
        """At the end of the second stage, decide whether `OUT/best` is its network or the supervised one."""
        state, border = self.state, self.stages.border
        supervised = state.stages.get("supervised")
        if not (supervised and state.supervised_counts and state.best_counts and state.best["step"] > border):
            return
        row, second = self.row_of(supervised), state.best
        before, after = (comparison.unpack(packed) for packed in (state.supervised_counts[row], state.best_counts))
        found = paired_bootstrap(before, after, metric=self.metric)
        if found.beyond_chance >= 0:
            return
        if not self.exporter.has_supervised(row):
            logger.warning(
                "The second stage's best network is worse beyond chance than %s of the supervised stage, but %s is "
                "missing, so best/ stays %s of step %d.",
                *(row, self.exporter.supervised[row], second["branch"], second["step"]),
            )
            return
        with self.late.attempt("best"):
            copy = partial(self.exporter.copy_supervised, row, self.folder)
            self._replace(copy, supervised, row, border, state.supervised_counts[row])
            logger.warning(
                "best/ is %s of the supervised stage: the second stage's best network, %s of step %d, is worse beyond "
                "chance, %s %+.1f points (95 %% interval %+.1f to %+.1f).",
                *(row, second["branch"], second["step"], self.metric),
                *(100 * value for value in (found.difference, found.low, found.high)),
            )

    def _replace(
        self, write: Callable[[], None], scores: Mapping[str, Any], row: str, step: int, counts: dict[str, Any]
    ) -> None:
        """Change the state first, since the card reads it. If writing fails, `best` is still the previous one."""
        names = ("best_metric", "best_global_step", "best", "best_counts")
        before = {name: getattr(self.state, name) for name in names}
        best = {**scores, "step": step, "branch": row}
        try:
            for name, value in zip(names, (scores[row][self.metric], step, best, counts), strict=True):
                setattr(self.state, name, value)
            write()
        except BaseException:
            for name, value in before.items():
                setattr(self.state, name, value)
            raise
