"""`unlabeled_weight`: the run's factor on the method's unlabeled term, and the rule that lowers it.

The rule of "auto": it starts at 1 and is halved at each evaluation where the best network's mean IoU has fallen
(`cps_hf.training.watch.Level`). Below 1/8 it becomes 0, and the run continues on the labeled images alone. It never
increases. It only depends on the scores, so it is the same on all processes and in resumed runs.
"""

from __future__ import annotations

import inspect
import logging

from ..config import CPSConfig
from ..objectives import Objective
from .state import RunState

logger = logging.getLogger(__name__)

LEAST = 1 / 8


def check(args: CPSConfig, objective: Objective, eval_dataset) -> None:
    """Raise a ValueError if the setting would have no effect."""
    if args.unlabeled_weight == 1:
        return
    given, name = f"`unlabeled_weight={args.unlabeled_weight!r}`", type(objective).__name__
    if not objective.views:
        raise ValueError(f"{given} would be ignored: {name} has no unlabeled term. Remove it.")
    if args.unlabeled_weight == "auto" and eval_dataset is None:
        raise ValueError(f"{given} needs evaluations: pass `eval_dataset`.")
    parameters = inspect.signature(objective.__call__).parameters.values()
    if not any(p.name == "unlabeled_weight" or p.kind == p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{given}: {name}.__call__ has no argument `unlabeled_weight`. Add `unlabeled_weight=1.0` to its keyword "
            "arguments and multiply its unlabeled term by it, or remove the setting."
        )


class UnlabeledWeight:
    """The factor of a run.

    Args:
        state: the run's state, which stores the rule's current value.
    """

    def __init__(self, args: CPSConfig, state: RunState):
        self.args, self.state = args, state

    @property
    def is_auto(self) -> bool:
        return self.args.unlabeled_weight == "auto"

    @property
    def value(self) -> float:
        """The factor for the next step."""
        return self.state.unlabeled_weight if self.is_auto else float(self.args.unlabeled_weight)

    def lower(self) -> None:
        """Lower the factor, because the mean IoU has fallen."""
        state = self.state
        state.unlabeled_weight /= 2
        if state.unlabeled_weight < LEAST:
            state.unlabeled_weight, state.unlabeled_end = 0.0, state.global_step
            logger.warning(
                "Step %d: `unlabeled_weight` is 0 from here on: the run continues without unlabeled images.",
                state.global_step,
            )
        else:
            logger.warning("Step %d: `unlabeled_weight` is halved to %g.", state.global_step, state.unlabeled_weight)
