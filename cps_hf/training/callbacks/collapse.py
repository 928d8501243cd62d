"""Warns when a branch predicts one class everywhere."""

from __future__ import annotations

import logging
import math

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

COLLAPSE_STEPS = 100
COLLAPSE_SHARE = 0.05  # of a run: branches trained from scratch predict one class for a while
FOUND = 0.01  # of a class's pixels: below this share, the class counts as not found


class CollapseCallback(TrainerCallback):
    """Warns when a branch predicts a single class for all its unlabeled images over many steps, or when an evaluation
    shows that a branch only finds one class.

    (A resumed run starts counting again: earlier observations are not saved.)
    """

    def __init__(self):
        self._last_step = 0
        self._since: dict[str, int] = {}  # branch -> the last step at which it predicted several classes
        self._warned: set[str] = set()
        self._found: set[str] = set()  # branches that had collapsed in the last evaluation

    def on_train_begin(self, args, state, control, **kwargs):
        self._last_step, self._since, self._warned = state.global_step, {}, set()
        self._found = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):  # scores only: no step was taken since the last log
            return
        step, last_step, self._last_step = state.global_step, self._last_step, state.global_step
        patience = max(COLLAPSE_STEPS, int(COLLAPSE_SHARE * state.max_steps))
        for branch, share in state.one_class.items():
            if share < 0.99999:  # a mean of ones, to rounding
                self._since[branch] = step
                self._warned.discard(branch)
            elif step - self._since.setdefault(branch, last_step) >= patience and branch not in self._warned:
                self._warned.add(branch)
                logger.warning(
                    "Branch %s has predicted one single class for all unlabeled images for %d steps: it has "
                    "collapsed, and its pseudo labels reinforce this. Start from pretrained weights (`backbone`), "
                    "lower `learning_rate` or the method's `weight`, let the weight grow (`ramp_up`), give rare "
                    "classes more weight (`class_balance`), and check that the labels contain more than one class.",
                    branch,
                    step - self._since[branch],
                )

    def on_evaluate(self, args, state, control, **kwargs):
        for row, scores in state.scores.items():
            branch = row.removeprefix("branch_")
            if not branch.isdigit():
                continue
            recalls = [value for value in scores["per_category_accuracy"] if not math.isnan(value)]
            known = sum(value >= FOUND for value in recalls)
            if len(recalls) < 2 or known > 1:
                self._found.discard(branch)
            elif branch not in self._found | self._warned:
                self._found.add(branch)
                logger.warning(
                    "Step %d: branch %s finds %s of the %d classes of the evaluation images: its predictions have "
                    "collapsed, and branches that predict one class everywhere agree on everything. It may recover. "
                    "If it does not, start from pretrained weights (`backbone`), train on the labels alone first "
                    "(`pretrain_steps`), or give rare classes more weight (`class_weights`).",
                    state.global_step,
                    branch,
                    "only one" if known else "none",
                    len(recalls),
                )
