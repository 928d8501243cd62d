"""The stages of a run: with `pretrain_steps`, supervised branches come first, and the method starts from them.

Everything about a stage is a function of the step. A run that is resumed before, at or after the border therefore
equals an uninterrupted run. The checkpoint at the border still belongs to the first stage; the second one begins
before the next step.
"""

from __future__ import annotations

from ..config import CPSConfig
from ..objectives import Objective, Supervised
from .state import RunState


class Stages:
    """Which objective is active at a step, and the progress of its stage.

    Attributes:
        border: the number of steps in the first stage; 0 if there is only one stage.
    """

    def __init__(self, args: CPSConfig, objective: Objective, state: RunState):
        self.args, self.objective, self.state = args, objective, state
        self.border = args.pretrain_steps or 0
        needed = self.border or args.unlabeled_weight == "auto"
        self.supervised = Supervised.of(objective) if needed else objective

    def is_first(self, step: int) -> bool:
        """Whether the step after `step` belongs to the supervised stage."""
        return step < self.border

    def is_border(self, step: int) -> bool:
        """Whether the supervised stage ends with this step."""
        return 0 < step == self.border

    @property
    def unlabeled_end(self) -> int | None:
        """The last step that read unlabeled images, if `unlabeled_weight="auto"` ended their use."""
        return self.state.unlabeled_end if self.args.unlabeled_weight == "auto" else None

    def reads_unlabeled(self, step: int) -> bool:
        """Whether the step after `step` reads unlabeled images."""
        return bool(self.objective.views) and not self.is_first(step) and not self.has_ended(step)

    def has_ended(self, step: int) -> bool:
        """Whether the step after `step` would read unlabeled images, but no longer does."""
        return self.unlabeled_end is not None and step >= self.unlabeled_end

    def objective_of(self, step: int) -> Objective:
        """The method of the stage that the step after `step` belongs to."""
        return self.supervised if self.is_first(step) else self.objective

    def objective_after(self, step: int) -> Objective:
        """The objective that is used for the step after `step`."""
        return self.supervised if self.has_ended(step) else self.objective_of(step)

    def progress(self, step: int) -> float:
        """The share of the stage that is completed."""
        if self.is_first(step):
            return step / self.border
        return (step - self.border) / (self.args.max_steps - self.border)

    def masks_annealed(self, step: int) -> float:
        """How much of the annealing of EoMT's masked attention is done after `step`, in [0, 1]. It ends with the first
        stage, whose branches are finished networks."""
        return min(1.0, step / (self.border or self.args.max_steps))

    def steps_of(self, stream: str, step: int) -> int:
        """How many steps up to `step` have read the "labeled" or the "unlabeled" stream."""
        if stream == "labeled":
            return step
        return max(0, (step if self.unlabeled_end is None else min(step, self.unlabeled_end)) - self.border)

    def describe(self, step: int) -> str:
        """The stage of the step after `step`, as text; empty with one stage that is not over."""
        if self.has_ended(step):
            return "supervised, as unlabeled images did harm"
        if not self.border:
            return ""
        return "stage 1 of 2: supervised" if self.is_first(step) else f"stage 2 of 2: {type(self.objective).__name__}"

    def describe_briefly(self, step: int) -> str:
        """The same in one or two words, for the progress bar and for lines with numbers."""
        if self.has_ended(step):
            return "labels only"
        if not self.border:
            return ""
        return "stage 1/2" if self.is_first(step) else "stage 2/2"
