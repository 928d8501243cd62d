"""The stages of a run: with `pretrain_steps` supervised branches first, from which the method then starts.

What depends on the stage is a function of the step, so a run that is resumed on either side of the border, or at it,
is the run that was never stopped. The checkpoint of the border's step is still the first stage's; the second begins
before the next step.
"""

from __future__ import annotations

from ..config import CPSConfig
from ..objectives import Objective, Supervised


class Stages:
    """Which objective acts at a step, and how far its stage has come.

    Attributes:
        border: the first stage's steps; 0: there is one stage.
    """

    def __init__(self, args: CPSConfig, objective: Objective):
        self.args, self.objective = args, objective
        self.border = args.pretrain_steps or 0
        self.supervised = Supervised.of(objective) if self.border else objective

    def is_first(self, step: int) -> bool:
        """Whether the step after `step` belongs to the supervised stage."""
        return step < self.border

    def is_border(self, step: int) -> bool:
        """Whether the supervised stage ends with this step."""
        return 0 < step == self.border

    def objective_after(self, step: int) -> Objective:
        """What the step after `step` is taken with."""
        return self.supervised if self.is_first(step) else self.objective

    def progress(self, step: int) -> float:
        """The share of its stage that is done."""
        if self.is_first(step):
            return step / self.border
        return (step - self.border) / (self.args.max_steps - self.border)

    def steps_of(self, stream: str, step: int) -> int:
        """How many steps up to `step` have read the "labeled" or the "unlabeled" stream."""
        return step if stream == "labeled" else max(0, step - self.border)

    def describe(self, step: int) -> str:
        """What the step after `step` belongs to, for people; empty with one stage."""
        if not self.border:
            return ""
        return "stage 1 of 2: supervised" if self.is_first(step) else f"stage 2 of 2: {type(self.objective).__name__}"
