"""UniMatch (Yang, Qi, Feng, Zhang, Shi; CVPR 2023; arXiv 2208.09910).

FixMatch with two strong views per image, and a third stream with perturbed features instead of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..functional import IGNORE_INDEX, pseudo_label
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, one_box, ramp


@dataclass(frozen=True, kw_only=True)
class UniMatch(Objective):
    """L = (Ls + weight * (s1 / 4 + s2 / 4 + fp / 2)) / 2 (section 3.4; its mu and lambda are 0.5).

    s1 and s2 are FixMatch's loss on two strong views with separate CutMix masks. fp is the loss on the weak view with
    dropped channels in the backbone's feature maps. The labels of all three are the prediction for the weak view.

    Args:
        weight: the weight of the unlabeled terms; 1 in the paper's formula.
        confidence_threshold: the threshold: 0.95 on VOC, 0 on Cityscapes.
        cutmix: the probability of CutMixing an image with one box: 2 to 40 % of its area, its height 0.3 to 3.3 times
            its width (as shares of the image's).
        feature_dropout: the probability of dropping a channel of the backbone's feature maps.
        class_balance: weight each pixel of the unlabeled term by its pseudo label's frequency in the batch to the
            power of minus this. 0, as in the paper: all pixels equal; 1: all classes equal.
        ramp_up: the share of training over which `weight` grows linearly to its full value.
        unlabeled_loss: "cross_entropy"; or "set", the networks' own set loss on masks made from the pseudo labels,
            which requires `labeled_loss="set"`.
    """

    weight: float = 1.0
    confidence_threshold: float = 0.95
    cutmix: float = 0.5
    feature_dropout: float = 0.5
    class_balance: float = 0.0
    ramp_up: float = 0.0
    unlabeled_loss: str = "cross_entropy"

    citation: ClassVar[str] = """@inproceedings{yang2023unimatch,
  title     = {Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation},
  author    = {Yang, Lihe and Qi, Lei and Feng, Litong and Zhang, Wayne and Shi, Yinghuan},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}"""

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "confidence_threshold", "cutmix", "class_balance", "ramp_up")
        if not 0 <= self.feature_dropout < 1:
            raise ValueError(f"`feature_dropout` must be 0 or more and less than 1, got {self.feature_dropout}.")

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak", "strong", "strong_2", "cutmix_mask", "cutmix_mask_2")

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        return one_box(self.cutmix)

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        weak, valid, count = unlabeled.weak, unlabeled.valid, unlabeled.num_pixels
        supervised_loss = strong_loss = feature_loss = taught = 0.0
        for branch in branches:  # each independently
            with torch.no_grad():
                own = self._pseudo_labels(branch, weak)
                partners = unlabeled.partner_targets(own, lambda x, branch=branch: self._pseudo_labels(branch, x))
            views = [
                unlabeled.cutmix(view, own, partners, mask=mask, **self.cutmix_masks)
                for view, mask in (("strong", "cutmix_mask"), ("strong_2", "cutmix_mask_2"))
            ]
            images = [labeled.pixel_values, *(mixed for mixed, _, _ in views)]
            labeled_logits, *strong_logits = self.logits(branch, *images)
            supervised_loss = supervised_loss + self.supervised_loss(labeled_logits, labeled)
            for logits, (_, mixed_valid, (labels,)) in zip(strong_logits, views, strict=True):  # s1 and s2
                strong_loss = strong_loss + self.pseudo_label_loss(logits, labels, valid=mixed_valid, count=count) / 2
            perturbed = branch(weak, feature_dropout=self.feature_dropout)  # fp
            feature_loss = feature_loss + self.pseudo_label_loss(perturbed, own[0], valid=valid, count=count)
            taught = taught + (valid & (own[0] != IGNORE_INDEX)).sum()
        unsupervised_loss = 0.5 * strong_loss + 0.5 * feature_loss
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            (supervised_loss + factor * unsupervised_loss) / 2,
            {
                "supervised_loss": supervised_loss.detach() / len(branches),
                "strong_loss": strong_loss.detach() / len(branches),
                "feature_loss": feature_loss.detach() / len(branches),
                "mask_ratio": taught / (len(branches) * count.clamp(min=1e-9)),
            },
        )

    def _pseudo_labels(self, branch, images):
        return [pseudo_label(branch(images), confidence_threshold=self.confidence_threshold)]
