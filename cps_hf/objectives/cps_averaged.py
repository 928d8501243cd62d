"""CPS with averaged teachers: each of two networks learns from the other's exponential moving average.

Cross Pseudo Supervision (arXiv 2106.01226) contributes two networks of different initialisation that teach each other.
UniMatch V2 (arXiv 2410.10777) contributes averaged teachers, whose confident predictions for the weak view are the
labels of two strong views with complementary features. No paper has this combination. Each part can be switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..functional import IGNORE_INDEX, pseudo_label
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, one_box, ramp
from .cps import CrossPseudoSupervision, agreement
from .unimatch_v2 import TWO_VIEWS, UniMatchV2, check_pairs_alone, complementary_logits, mixed_views

TEACHERS = ("averages", "branches", "own_average")


@dataclass(frozen=True, kw_only=True)
class AveragedCPS(Objective):
    """L = Ls + weight * Lcps, both summed over branches.

    Lcps is a branch's cross entropy, averaged over strong views that are CutMixed with separate masks. The labels are
    the confident predictions of the other branch's average for the weak view. The trainer updates the averages as
    `CPSConfig.ema_decay` says (UniMatch V2 has 0.996); they predict in evaluation mode. With n branches, each is
    taught by the averages of all others, and its loss is the mean over these n - 1 teachers.

    Args:
        weight: the weight of Lcps.
        teachers: "averages": the other branches' averages. "branches": the other branches themselves, in training
            mode, as in CPS; no averages are needed then. "own_average": a branch's own average, so that each branch is
            trained independently, as in UniMatch V2.
        strong_views: the number of strong views per image, 0, 1 or 2. With 0, the CutMixed weak view is used.
        confidence_threshold: train on a pixel only if the teacher's probability of its prediction is at least this.
            0.95, as in UniMatch V2; 0, as in CPS: on all pixels. The loss is always divided by the number of all valid
            pixels.
        cutmix: the probability of CutMixing an image with one box: 2 to 40 % of its area, its height 0.3 to 3.3 times
            its width (as shares of the image's).
        complementary_dropout: in this share of images, each channel of the backbone's feature maps is doubled in one
            of the two views and zeroed in the other. 0.5, as in UniMatch V2; 0: no dropout, which is required with
            fewer than two strong views.
        class_balance: weight each pixel of the unlabeled term by its pseudo label's frequency in the batch to the
            power of minus this. 0: all pixels equal; 1: all classes equal.
        ramp_up: the share of training over which `weight` grows linearly to its full value.
        unlabeled_loss: "cross_entropy"; or "set", the networks' own set loss on masks made from the pseudo labels,
            which requires `labeled_loss="set"`.
    """

    weight: float = 1.0
    teachers: str = "averages"
    strong_views: int = 2
    confidence_threshold: float = 0.95
    cutmix: float = 0.5
    complementary_dropout: float = 0.5
    class_balance: float = 0.0
    ramp_up: float = 0.0
    unlabeled_loss: str = "cross_entropy"

    min_branches: ClassVar[int] = 2
    citation: ClassVar[str] = f"{CrossPseudoSupervision.citation}\n{UniMatchV2.citation}"

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "confidence_threshold", "cutmix", "complementary_dropout", "class_balance", "ramp_up")
        if self.teachers not in TEACHERS:
            known = ", ".join(f'"{name}"' for name in TEACHERS)
            raise ValueError(f"`teachers` must be one of {known}, got {self.teachers!r}.")
        if self.strong_views not in (0, 1, 2):
            raise ValueError(f"`strong_views` must be 0, 1 or 2, got {self.strong_views}.")
        if self.complementary_dropout > 0 and self.strong_views < 2:
            raise ValueError(
                f"`complementary_dropout` needs two views and `strong_views` is {self.strong_views}: set "
                "`complementary_dropout` to 0, or `strong_views` to 2."
            )
        check_pairs_alone(self)

    @property
    def averages(self) -> bool:
        return self.teachers != "branches"

    @property
    def _taught(self) -> tuple[tuple[str, str], ...]:
        """The views to train on, with the name of each one's masks."""
        return TWO_VIEWS[: self.strong_views] or (("weak", "cutmix_mask"),)

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(["weak", *(name for pair in zip(*self._taught, strict=True) for name in pair)]))

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        return one_box(self.cutmix)

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, averages=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        teachers = branches if self.teachers == "branches" else averages
        (images, valid, labels), agreed = self._labeled_by(teachers, unlabeled)
        count = unlabeled.num_pixels
        supervised_loss = cps_loss = 0.0
        for index, branch in enumerate(branches):
            labeled_logits, logits = complementary_logits(self, branch, labeled.pixel_values, images)
            supervised_loss = supervised_loss + self.supervised_loss(labeled_logits, labeled)
            losses = [
                self.pseudo_label_loss(logits, by_teacher, valid=valid, count=len(self._taught) * count)
                for other, by_teacher in enumerate(labels)
                if (other == index) == (self.teachers == "own_average")
            ]
            cps_loss = cps_loss + sum(losses) / len(losses)
        taught = sum((valid & (one != IGNORE_INDEX)).sum() for one in labels) / (len(self._taught) * len(labels))
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            supervised_loss + factor * cps_loss,
            {
                "supervised_loss": supervised_loss.detach() / len(branches),
                "cps_loss": cps_loss.detach() / len(branches),
                "agreement": agreed,
                "mask_ratio": taught / count.clamp(min=1e-9),
            },
        )

    @torch.no_grad()
    def _labeled_by(self, teachers, unlabeled):
        """The mixed views to train on, their labels by teacher, and the teachers' agreement."""
        logits = [one(unlabeled.weak) for one in teachers]
        own = [self._pseudo_label(one) for one in logits]
        partners = unlabeled.partner_targets(own, lambda x: [self._pseudo_label(one(x)) for one in teachers])
        mixed = mixed_views(unlabeled, self._taught, own, partners, **self.cutmix_masks)
        return mixed, agreement([pseudo_label(one) for one in logits], unlabeled)

    def _pseudo_label(self, logits):
        return pseudo_label(logits, confidence_threshold=self.confidence_threshold)
