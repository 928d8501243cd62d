"""UniMatch V2 (Yang, Zhao, Zhao; TPAMI 2025; arXiv 2410.10777).

An averaged teacher labels the weak view. The student learns these labels on two strong views with complementary
feature
dropout: each view has the channels that the other lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..functional import IGNORE_INDEX, pseudo_label
from .base import (
    Objective,
    ObjectiveOutput,
    check_not_negative,
    check_shares,
    one_box,
    ramp,
    warmed_up,
)

TWO_VIEWS = (("strong", "cutmix_mask"), ("strong_2", "cutmix_mask_2"))


@dataclass(frozen=True, kw_only=True)
class UniMatchV2(Objective):
    """L = (Ls + weight * (s1 + s2) / 2) / 2.

    s1 and s2 are the cross entropy of the student's predictions for two strong views, CutMixed with separate masks.
    The labels are the teacher's confident predictions for the weak view. The student sees both views in one pass, with
    complementary dropout. The trainer keeps the teacher, an average of branch 0's parameters and buffers, which
    predicts in evaluation mode.

    Args:
        weight: the weight of the unlabeled terms; 1 in the paper's formula.
        confidence_threshold: train on a pixel only if the teacher's probability of its prediction is at least this.
        cutmix: the probability of CutMixing an image with one box: 2 to 40 % of its area, its height 0.3 to 3.3 times
            its width (as shares of the image's).
        complementary_dropout: in this share of images, each channel of the backbone's feature maps is doubled in one
            of the two views and zeroed in the other. 0.5, as in the paper; 0: no dropout.
        class_balance: weight each pixel of the unlabeled term by its pseudo label's frequency in the batch to the
            power of minus this. 0, as in the paper: all pixels equal; 1: all classes equal.
        decay: the decay of the teacher's average. Early in training it is at most 1 - 1 / (t + 1).
        ramp_up: the share of training over which `weight` grows linearly to its full value.
        unlabeled_loss: "cross_entropy"; or "set", the networks' own set loss on masks made from the pseudo labels,
            which requires `labeled_loss="set"`.
    """

    weight: float = 1.0
    confidence_threshold: float = 0.95
    cutmix: float = 0.5
    complementary_dropout: float = 0.5
    class_balance: float = 0.0
    decay: float = 0.996
    ramp_up: float = 0.0
    unlabeled_loss: str = "cross_entropy"

    teacher: ClassVar[bool] = True
    citation: ClassVar[str] = """@article{yang2025unimatchv2,
  title   = {UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation},
  author  = {Yang, Lihe and Zhao, Zhen and Zhao, Hengshuang},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence (TPAMI)},
  year    = {2025}
}"""

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(
            self, "confidence_threshold", "cutmix", "complementary_dropout", "class_balance", "decay", "ramp_up"
        )
        check_pairs_alone(self)

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak", "strong", "strong_2", "cutmix_mask", "cutmix_mask_2")

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        return one_box(self.cutmix)

    def ema_decay(self, step: int) -> float:
        """The teacher's decay after optimizer step `step` (1, 2, ...)."""
        return warmed_up(self.decay, step)

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        (student,) = branches  # the trainer raises for more than one
        count = unlabeled.num_pixels
        with torch.no_grad():
            own = self._pseudo_labels(teacher, unlabeled.weak)
            partners = unlabeled.partner_targets(own, lambda images: self._pseudo_labels(teacher, images))
        images, valid, (labels,) = mixed_views(unlabeled, TWO_VIEWS, own, partners, **self.cutmix_masks)
        labeled_logits, logits = complementary_logits(self, student, labeled.pixel_values, images)
        supervised_loss = self.supervised_loss(labeled_logits, labeled)
        strong_loss = self.pseudo_label_loss(logits, labels, valid=valid, count=2 * count)  # (s1 + s2) / 2
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            (supervised_loss + factor * strong_loss) / 2,
            {
                "supervised_loss": supervised_loss.detach(),
                "strong_loss": strong_loss.detach(),
                "mask_ratio": (unlabeled.valid & (own[0] != IGNORE_INDEX)).sum() / count.clamp(min=1e-9),
            },
        )

    def _pseudo_labels(self, teacher, images):
        return [pseudo_label(teacher(images), confidence_threshold=self.confidence_threshold)]


def check_pairs_alone(objective) -> None:
    """Complementary dropout pairs the two halves of a pass, which therefore cannot contain anything else."""
    if objective.joint_forward and objective.complementary_dropout > 0:
        raise ValueError(
            "`joint_forward` joins labeled images to pairs of views, but `complementary_dropout` needs pairs only: "
            "set `complementary_dropout` to 0, or remove `joint_forward`."
        )


def complementary_logits(objective, branch, labeled_images, images):
    """A branch's logits of labeled images and of views. Only the views get the objective's complementary dropout."""
    if objective.complementary_dropout == 0:
        return objective.logits(branch, labeled_images, images)
    return branch(labeled_images), branch(images, complementary_dropout=objective.complementary_dropout)


def mixed_views(unlabeled, views, own, partners, **drawn):
    """Views of the same images, each CutMixed with separate masks, in one batch, ordered by view.

    Args:
        views: pairs of a view's name and its masks' name. own, partners, drawn: as in `UnlabeledBatch.cutmix`.

    Returns:
        The images (views * B, 3, H, W), their valid pixels, and each of the targets in the same layout.
    """
    mixed = [unlabeled.cutmix(view, own, partners, mask=mask, **drawn) for view, mask in views]
    images, valid, targets = zip(*mixed, strict=True)
    return torch.cat(images), torch.cat(valid), [torch.cat(one) for one in zip(*targets, strict=True)]
