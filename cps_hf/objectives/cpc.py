"""Cross probability consistency: what CPS is compared with in its paper (section 4.5 of arXiv 2106.01226).

As CPS, but a branch is drawn towards the other's soft-max probabilities instead of its one-hot prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..losses import squared_difference
from .base import (
    Objective,
    ObjectiveOutput,
    check_not_negative,
    check_shares,
    cutmix_view,
    num_pixels,
    partner_targets,
    ramp,
    valid_pixels,
)
from .cps import CrossPseudoSupervision, agreement


@dataclass(frozen=True, kw_only=True)
class CrossProbabilityConsistency(Objective):
    """L = Ls + weight * Lcpc, Lcpc the mean over pixels and classes of (p1 - sg(p2))^2 + (p2 - sg(p1))^2.

    sg stops the gradient; without CutMix that is the gradient of (p1 - p2)^2.

    Args:
        weight: the paper gives none; 100 is the release's for the same loss in Mean Teacher.
        cutmix: true: Lcpc on mixed unlabeled images, the probabilities mixed like them. False: on labeled and
            unlabeled images together.
        ramp_up: the share of training over which `weight` grows linearly to its value.
    """

    weight: float = 100.0
    cutmix: bool = False
    ramp_up: float = 0.0

    min_branches: ClassVar[int] = 2
    citation: ClassVar[str] = CrossPseudoSupervision.citation

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "ramp_up")

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak", "cutmix_mask") if self.cutmix else ("weak",)

    def __call__(self, branches, labeled, unlabeled, *, teacher=None, progress=0.0) -> ObjectiveOutput:
        logits = [branch(labeled["pixel_values"]) for branch in branches]
        supervised_loss = sum(self.supervised_loss(one, labeled) for one in logits)
        count = num_pixels(unlabeled, unlabeled["weak"])
        if self.cutmix:
            with torch.no_grad():
                weak_logits = [branch(unlabeled["weak"]) for branch in branches]
                own = _probabilities(weak_logits)
                partners = partner_targets(unlabeled, own, lambda x: _probabilities([b(x) for b in branches]))
            mixed, valid, targets = cutmix_view(unlabeled, "weak", own, partners)
            logits = [branch(mixed) for branch in branches]
        else:
            weak_logits = [branch(unlabeled["weak"]) for branch in branches]
            logits = [torch.cat(pair) for pair in zip(logits, weak_logits, strict=True)]
            targets = _probabilities(logits)
            images = labeled["pixel_values"], unlabeled["weak"]
            valid = torch.cat([valid_pixels(b, x) for b, x in zip((labeled, unlabeled), images, strict=True)])
            count = count + num_pixels(labeled, labeled["pixel_values"])
        losses = [
            squared_difference(student, target, valid=valid, count=count)
            for i, student in enumerate(logits)
            for j, target in enumerate(targets)
            if i != j
        ]
        cpc_loss = sum(losses) / (len(logits) - 1)
        return ObjectiveOutput(
            supervised_loss + self.weight * ramp(progress, ramp_up=self.ramp_up) * cpc_loss,
            {
                "supervised_loss": supervised_loss.detach(),
                "cpc_loss": cpc_loss.detach(),
                "agreement": agreement(weak_logits, unlabeled),
            },
        )


def _probabilities(logits):
    return [one.detach().float().softmax(1) for one in logits]
