"""Stops a run whose scores no longer improve."""

from __future__ import annotations

import logging

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)


class EarlyStopping(TrainerCallback, ExportableState):
    """Stops a run after a number of evaluations in a row without a better score. Checkpoints keep the count.

    transformers' EarlyStoppingCallback compares with the run's best score. It would therefore stop a second stage that
    starts below the best score of the first. Here the first stage is neither counted nor compared with.

    Args:
        patience: the number of evaluations.
        border: the steps of the first stage; 0 if there is only one stage.
    """

    def __init__(self, patience: int, border: int = 0):
        self.patience, self.border = patience, border
        self.best: float | None = None
        self.since = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_metric is None:  # resumed with another evaluation: its scores are not compared with earlier ones
            self.best, self.since = None, 0
        if self.since >= self.patience:  # resumed after it had stopped
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = (metrics or {}).get(f"eval_{args.metric_for_best_model}")
        if value is None or state.global_step <= self.border:
            return
        if self.best is None or value > self.best:
            self.best, self.since = value, 0
            return
        self.since += 1
        if self.since >= self.patience and not control.should_training_stop:
            control.should_training_stop = True
            logger.info(
                "Early stopping at step %d of %d: `%s` was no better than %.4f in %d evaluations "
                "(`early_stopping_patience`).",
                state.global_step,
                state.max_steps,
                args.metric_for_best_model,
                self.best,
                self.since,
            )

    def state(self) -> dict:
        return {
            "args": {"patience": self.patience, "border": self.border},
            "attributes": {"best": self.best, "since": self.since},
        }
