"""Self-training with strong views: trained networks, which stay fixed, make labels for new ones.

As in Noisy Student (Xie et al., CVPR 2020) and ST++ (Yang et al., CVPR 2022), the teacher sees the unchanged image and
the student a strong view of it. Here the strong view is also CutMixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..functional import (
    IGNORE_INDEX,
    mirrored,
    probabilities,
    pseudo_label,
    soft_cross_entropy,
)
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, one_box, ramp


@dataclass(frozen=True, kw_only=True)
class FixedTeacher(Objective):
    """L = Ls + weight * Lu, summed over branches, which are trained independently.

    Lu is the cross entropy of a branch's prediction for the CutMixed strong view. The label is the labelers'
    prediction for the weak view: the mean of their probabilities. The loss is summed over the pixels where it is
    confident and divided by the number of valid pixels.

    Args:
        labelers: trained networks: folders of exported branches, or Hub ids. They are loaded at the start of the run
            and never change. If `None`, labels were made before (`cps_hf.training.self_training`) and are in the
            unlabeled set's column "pseudo_label".
        weight: the weight of Lu.
        flip: let the labelers also predict the mirrored weak view, and average both. Only with `labelers`.
        soft: use the labelers' probabilities as labels instead of their most likely class. Only with `labelers`.
        confidence_threshold: train on a pixel only if the labelers' probability of their most likely class is at least
            this. 0: on all pixels. Only with `labelers`.
        cutmix: the probability of CutMixing an image with one box: 2 to 40 % of its area, its height 0.3 to 3.3 times
            its width (as shares of the image's).
        class_balance: weight each pixel of Lu by its pseudo label's frequency in the batch to the power of minus this.
            0: all pixels equal; 1: all classes equal. Not with `soft`. (`class_weights` apply to Ls only.)
        ramp_up: the share of training over which `weight` grows linearly to its full value.
        unlabeled_loss: "cross_entropy"; or "set", the networks' own set loss on masks made from the pseudo labels,
            which requires `labeled_loss="set"`. Not with `soft`.
    """

    labelers: list[str] = field(default_factory=list, metadata={"on_resume": "free"})  # a checkpoint has their hashes
    weight: float = 1.0
    flip: bool = True
    soft: bool = False
    confidence_threshold: float = 0.0
    cutmix: float = 0.5
    class_balance: float = 0.0
    ramp_up: float = 0.0
    unlabeled_loss: str = "cross_entropy"

    citation: ClassVar[str] = """@inproceedings{xie2020self,
  title     = {Self-Training with Noisy Student Improves {ImageNet} Classification},
  author    = {Xie, Qizhe and Luong, Minh-Thang and Hovy, Eduard and Le, Quoc V.},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2020}
}
@inproceedings{yang2022st,
  title     = {{ST++}: Make Self-Training Work Better for Semi-Supervised Semantic Segmentation},
  author    = {Yang, Lihe and Zhuo, Wei and Qi, Lei and Shi, Yinghuan and Gao, Yang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}"""

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "confidence_threshold", "cutmix", "class_balance", "ramp_up")
        if self.soft and self.class_balance > 0:
            raise ValueError("`class_balance` counts hard labels: set `class_balance` to 0, or remove `soft`.")
        if self.soft and self.unlabeled_loss == "set":
            raise ValueError('`unlabeled_loss="set"` makes masks of hard labels: leave `soft` out.')
        if not self.labelers and (self.soft or self.confidence_threshold > 0):
            raise ValueError(
                "`soft` and `confidence_threshold` apply to labels that networks make during training: name these "
                "networks with `labelers`. (Labels that were made before have their own threshold.)"
            )

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak" if self.labelers else "pseudo_labels", "strong", "cutmix_mask")

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        return one_box(self.cutmix)

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, labelers=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        count = unlabeled.num_pixels
        images, valid, (target, confident) = self._mixed(labelers, unlabeled)
        taught = valid & confident
        supervised_loss = unsupervised_loss = 0.0
        for branch in branches:
            labeled_logits, logits = self.logits(branch, labeled.pixel_values, images)
            supervised_loss = supervised_loss + self.supervised_loss(labeled_logits, labeled)
            if self.soft:
                loss = soft_cross_entropy(logits, target, valid=taught, count=count)
            else:
                loss = self.pseudo_label_loss(logits, target, valid=taught, count=count)
            unsupervised_loss = unsupervised_loss + loss
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            supervised_loss + factor * unsupervised_loss,
            {
                "supervised_loss": supervised_loss.detach() / len(branches),
                "unsupervised_loss": unsupervised_loss.detach() / len(branches),
                "mask_ratio": taught.sum() / count.clamp(min=1e-9),
            },
        )

    @torch.no_grad()
    def _mixed(self, labelers, unlabeled):
        """The CutMixed strong view, its valid pixels, its target, and where the target is confident."""
        if self.labelers:
            own = self._labels(labelers, unlabeled.weak)
            partners = unlabeled.partner_targets(own, lambda images: self._labels(labelers, images))
        else:
            own, partners = (
                [labels, labels != IGNORE_INDEX]
                for labels in (unlabeled.pseudo_labels, unlabeled.partner("pseudo_labels"))
            )
        return unlabeled.cutmix("strong", own, partners, **self.cutmix_masks)

    def _labels(self, labelers, images):
        """The target of images, and where it is confident."""
        logits = [labeler(images) for labeler in labelers]
        if self.flip:
            logits += [mirrored(labeler(images.flip(-1))) for labeler in labelers]
        if not self.soft:
            labels = pseudo_label(*logits, confidence_threshold=self.confidence_threshold)
            return [labels, labels != IGNORE_INDEX]
        target = probabilities(*logits)
        return [target, target.amax(1) >= self.confidence_threshold]
