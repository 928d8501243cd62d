"""Supervised training on the labeled images alone: the baseline that every method here must beat."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Objective, ObjectiveOutput


@dataclass(frozen=True, kw_only=True)
class Supervised(Objective):
    """Each branch is trained on the labels by itself; two branches are two independent networks in one run."""

    def __post_init__(self):
        super().__post_init__()
        if self.joint_forward:
            raise ValueError(
                "`joint_forward` joins labeled and unlabeled images, and Supervised has no unlabeled ones."
            )

    def __call__(self, branches, labeled, unlabeled=None, *, teacher=None, progress=0.0) -> ObjectiveOutput:
        losses = [self.supervised_loss(branch(labeled.pixel_values), labeled) for branch in branches]
        loss = sum(losses)
        return ObjectiveOutput(loss, {"supervised_loss": loss.detach()})
