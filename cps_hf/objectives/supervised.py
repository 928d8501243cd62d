"""Supervised training on the labeled images alone: the baseline for every method here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .base import Objective, ObjectiveOutput


@dataclass(frozen=True, kw_only=True)
class Supervised(Objective):
    """Each branch is trained on the labels. Two branches are two independent networks in one run."""

    def __post_init__(self):
        super().__post_init__()
        if self.joint_forward:
            raise ValueError(
                "`joint_forward` joins labeled and unlabeled images, but Supervised uses no unlabeled ones."
            )

    @classmethod
    def of(cls, objective: Objective) -> Supervised:
        """The labeled part of a method: the same loss on the same labels, without unlabeled images. A method that
        overrides `supervised_loss` keeps that loss."""
        shared = [field.name for field in fields(Objective) if field.name != "joint_forward"]
        part = cls(**{name: getattr(objective, name) for name in shared})
        if type(objective).supervised_loss is not Objective.supervised_loss:
            object.__setattr__(part, "supervised_loss", objective.supervised_loss)  # the dataclass is frozen
        return part

    def __call__(
        self, branches, labeled, unlabeled=None, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        losses = [self.supervised_loss(branch(labeled.pixel_values), labeled) for branch in branches]
        loss = sum(losses)
        return ObjectiveOutput(loss, {"supervised_loss": loss.detach() / len(branches)})
