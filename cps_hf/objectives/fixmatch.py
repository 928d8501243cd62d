"""FixMatch (Sohn et al.; NeurIPS 2020; arXiv 2001.07685), for segmentation as UniMatch's paper sets it up.

The confident predictions for the weak view are the labels of the CutMixed strong view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..functional import IGNORE_INDEX, pseudo_label
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, one_box, ramp


@dataclass(frozen=True, kw_only=True)
class FixMatch(Objective):
    """L = Ls + weight * Lu (section 2.2, equations 3 and 4).

    Lu is the mean over valid pixels of 1[max p(weak) >= threshold] CE(arg max p(weak), p(strong)).

    Args:
        weight: the weight of the unlabeled term.
        confidence_threshold: the threshold. UniMatch's paper has 0.95 on VOC and 0 on Cityscapes.
        cutmix: the probability of CutMixing an image with one box: 2 to 40 % of its area, its height 0.3 to 3.3 times
            its width (as shares of the image's).
        class_balance: weight each pixel of the unlabeled term by its pseudo label's frequency in the batch to the
            power of minus this. 0, as in the paper: all pixels equal; 1: all classes equal.
        ramp_up: the share of training over which `weight` grows linearly to its full value.
        unlabeled_loss: "cross_entropy"; or "set", the networks' own set loss on masks made from the pseudo labels,
            which requires `labeled_loss="set"`.
    """

    weight: float = 1.0
    confidence_threshold: float = 0.95
    cutmix: float = 0.5
    class_balance: float = 0.0
    ramp_up: float = 0.0
    unlabeled_loss: str = "cross_entropy"

    citation: ClassVar[str] = """@inproceedings{sohn2020fixmatch,
  title     = {FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence},
  author    = {Sohn, Kihyuk and Berthelot, David and Li, Chun-Liang and Zhang, Zizhao and Carlini, Nicholas and Cubuk, Ekin D. and Kurakin, Alex and Zhang, Han and Raffel, Colin},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2020}
}"""  # noqa: E501

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "confidence_threshold", "cutmix", "class_balance", "ramp_up")

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak", "strong", "cutmix_mask")

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        return one_box(self.cutmix)

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        count = unlabeled.num_pixels
        supervised_loss = unsupervised_loss = taught = 0.0
        for branch in branches:  # each independently
            with torch.no_grad():
                own = self._pseudo_labels(branch, unlabeled.weak)
                partners = unlabeled.partner_targets(own, lambda x, branch=branch: self._pseudo_labels(branch, x))
            mixed, valid, (labels,) = unlabeled.cutmix("strong", own, partners, **self.cutmix_masks)
            labeled_logits, logits = self.logits(branch, labeled.pixel_values, mixed)
            supervised_loss = supervised_loss + self.supervised_loss(labeled_logits, labeled)
            unsupervised_loss = unsupervised_loss + self.pseudo_label_loss(logits, labels, valid=valid, count=count)
            taught = taught + (valid & (labels != IGNORE_INDEX)).sum()
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            supervised_loss + factor * unsupervised_loss,
            {
                "supervised_loss": supervised_loss.detach() / len(branches),
                "unsupervised_loss": unsupervised_loss.detach() / len(branches),
                "mask_ratio": taught / (len(branches) * count.clamp(min=1e-9)),
            },
        )

    def _pseudo_labels(self, branch, images):
        return [pseudo_label(branch(images), confidence_threshold=self.confidence_threshold)]
