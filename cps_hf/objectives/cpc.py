"""Cross probability consistency: the baseline of the CPS paper's comparison (section 4.5 of arXiv 2106.01226).

Like CPS, but a branch learns from the other's soft-max probabilities instead of its one-hot prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..functional import probabilities, pseudo_label, soft_target, squared_difference
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, ramp, soft_label_weights
from .cps import CrossPseudoSupervision, agreement


@dataclass(frozen=True, kw_only=True)
class CrossProbabilityConsistency(Objective):
    """L = Ls + weight * Lcpc, Lcpc the mean over pixels and classes of (p1 - sg(p2))^2 + (p2 - sg(p1))^2.

    sg stops the gradient; without CutMix this has the gradient of (p1 - p2)^2.

    Args:
        weight: the weight of Lcpc. The paper gives none; the release has 100 for the same loss in Mean Teacher.
        cutmix: if true, Lcpc is computed on CutMixed unlabeled images, with the probabilities mixed in the same way.
            If false, on labeled and unlabeled images together.
        class_balance: weight each pixel of the unlabeled term by the frequency in the batch of its target's most
            likely class, to the power of minus this. 0, as in the paper: all pixels equal; 1: all classes equal.
        ramp_up: the share of training over which `weight` grows linearly to its full value.
    """

    weight: float = 100.0
    cutmix: bool = False
    class_balance: float = 0.0
    ramp_up: float = 0.0

    min_branches: ClassVar[int] = 2
    citation: ClassVar[str] = CrossPseudoSupervision.citation

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "class_balance", "ramp_up")

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak", "cutmix_mask") if self.cutmix else ("weak",)

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        count = unlabeled.num_pixels
        if self.cutmix:  # probabilities of the unmixed images, before the passes with gradient
            images, valid, targets, classes = self._mixed(branches, unlabeled)
        else:
            images, valid = unlabeled.weak, unlabeled.valid
        passes = [self.logits(branch, labeled.pixel_values, images) for branch in branches]
        labeled_logits, logits = zip(*passes, strict=True)
        supervised_loss = sum(self.supervised_loss(one, labeled) for one in labeled_logits)
        if self.cutmix:
            terms = [(logits, targets, valid)]
        else:
            classes = [pseudo_label(one) for one in logits]
            terms = [(logits, map(soft_target, logits), valid)]
            terms.append((labeled_logits, map(soft_target, labeled_logits), labeled.valid))
            count = count + labeled.num_pixels
        losses = [
            squared_difference(
                student,
                target,
                valid=where,
                count=count,
                class_weights=soft_label_weights(student, target, where, self.class_balance),
            )
            for students, teachers, where in terms
            for j, target in enumerate(teachers)
            for i, student in enumerate(students)
            if i != j
        ]
        cpc_loss = sum(losses) / (len(logits) - 1)
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            supervised_loss + factor * cpc_loss,
            {
                "supervised_loss": supervised_loss.detach() / len(branches),
                "cpc_loss": cpc_loss.detach() / len(branches),
                "agreement": agreement(classes, unlabeled),
            },
        )

    @torch.no_grad()
    def _mixed(self, branches, unlabeled):
        """CutMix: the mixed images, their valid pixels, their targets by branch, and the classes before mixing."""
        logits = [branch(unlabeled.weak) for branch in branches]
        own = [probabilities(one) for one in logits]
        partners = unlabeled.partner_targets(own, lambda x: [probabilities(branch(x)) for branch in branches])
        return *unlabeled.cutmix("weak", own, partners, **self.cutmix_masks), [pseudo_label(one) for one in logits]
