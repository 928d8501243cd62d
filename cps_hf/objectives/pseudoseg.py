"""PseudoSeg (Zou et al.; ICLR 2021; arXiv 2010.09713), without its fusion with a Grad-CAM map.

The sharpened prediction for the weak view is the target of the strong view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..functional import soft_cross_entropy, soft_target
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, ramp, soft_label_weights


@dataclass(frozen=True, kw_only=True)
class PseudoSeg(Objective):
    """L = Ls + weight * CE(sharpen(p(weak)), p(strong)), where sharpen(p) is p^(1/T) over its sum (sections 3.1, 3.2).

    The targets are the decoder's own probabilities; the paper's fusion with a self-attention Grad-CAM map is omitted.

    Args:
        weight: the weight of the unlabeled term.
        temperature: T. With 1, probabilities are unchanged; towards 0, they become one-hot.
        class_balance: weight each pixel of the unlabeled term by the frequency in the batch of its target's most
            likely class, to the power of minus this. 0, as in the paper: all pixels equal; 1: all classes equal.
        ramp_up: the share of training over which `weight` grows linearly to its full value.
    """

    weight: float = 1.0
    temperature: float = 0.5
    class_balance: float = 0.0
    ramp_up: float = 0.0

    citation: ClassVar[str] = """@inproceedings{zou2021pseudoseg,
  title     = {PseudoSeg: Designing Pseudo Labels for Semantic Segmentation},
  author    = {Zou, Yuliang and Zhang, Zizhao and Zhang, Han and Li, Chun-Liang and Bian, Xiao and Huang, Jia-Bin and Pfister, Tomas},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021}
}"""  # noqa: E501

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "class_balance", "ramp_up")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak", "strong")

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        valid, count = unlabeled.valid, unlabeled.num_pixels
        supervised_loss = unsupervised_loss = 0.0
        for branch in branches:  # each independently
            with torch.no_grad():  # p^(1/T), normalised
                target = soft_target(branch(unlabeled.weak), temperature=self.temperature)
            labeled_logits, logits = self.logits(branch, labeled.pixel_values, unlabeled.strong)
            supervised_loss = supervised_loss + self.supervised_loss(labeled_logits, labeled)
            weights = soft_label_weights(logits, target, valid, self.class_balance)
            unsupervised_loss = unsupervised_loss + soft_cross_entropy(
                logits, target, valid=valid, count=count, class_weights=weights
            )
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            supervised_loss + factor * unsupervised_loss,
            {
                "supervised_loss": supervised_loss.detach() / len(branches),
                "unsupervised_loss": unsupervised_loss.detach() / len(branches),
            },
        )
