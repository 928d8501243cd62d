"""Cross Pseudo Supervision (Chen, Yuan, Zeng, Wang; CVPR 2021; arXiv 2106.01226).

Two networks with different initialisations see the same image; each is trained on the other's one-hot prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..functional import pseudo_label
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, ramp


@dataclass(frozen=True, kw_only=True)
class CrossPseudoSupervision(Objective):
    """L = Ls + weight * Lcps (section 3.1, equations 1 to 4).

    Args:
        weight: the paper's lambda. The release has 1.5 (VOC) and 6 (Cityscapes), or with CutMix 1 and 5.
        cutmix: if true, Lcps is computed on CutMixed unlabeled images: pseudo labels are predicted for the unmixed
            images and then mixed like them. If false, the paper's plain CPS.
        on_labeled: whether Lcps includes the labeled images. If `None`, only without CutMix, as in the release.
        cutmix_partner: "neighbour": another image of the batch. "itself": another crop of the same image, which is
            what the release's two loaders with equal seeds produce.
        teach_padding: whether to train on padding pixels and count them, as the release does.
        loss_divisor: divides the whole loss. The release divides by the number of processes once too often (4 on VOC,
            8 on Cityscapes); with SGD this equals a smaller learning rate and a larger weight decay.
        warm_up: the share of training before Lcps is used. The paper has none.
        ramp_up: the share of training, after `warm_up`, over which `weight` grows linearly to its full value. The
            paper has none: its networks start from ImageNet weights. Networks trained from scratch first predict the
            most common class everywhere and, without a ramp-up, confirm each other in this.
        confidence_threshold: train on a pixel only if the teacher's probability of its prediction is at least this. 0,
            as in the paper: on all pixels. The loss is still divided by the number of all valid pixels.
        class_balance: weight each pixel by its pseudo label's frequency in the batch to the power of minus this, so
            that rare classes are not unlearned. 0, as in the paper: all pixels equal; 1: all classes equal. (The
            labeled loss has its own weights, `class_weights`.)
        unlabeled_loss: "cross_entropy"; or "set", the networks' own set loss on masks made from the pseudo labels,
            which requires `labeled_loss="set"`.

    With n branches, each is taught by all others, and its loss is the mean over its n - 1 teachers.
    """

    weight: float = 1.0
    cutmix: bool = True
    on_labeled: bool | None = None
    cutmix_partner: str = "neighbour"
    teach_padding: bool = False
    loss_divisor: float = 1.0
    warm_up: float = 0.0
    ramp_up: float = 0.0
    confidence_threshold: float = 0.0
    class_balance: float = 0.0
    unlabeled_loss: str = "cross_entropy"

    min_branches: ClassVar[int] = 2
    citation: ClassVar[str] = """@inproceedings{chen2021cps,
  title     = {Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision},
  author    = {Chen, Xiaokang and Yuan, Yuhui and Zeng, Gang and Wang, Jingdong},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2021}
}"""

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight")
        check_shares(self, "warm_up", "ramp_up", "confidence_threshold", "class_balance")
        if self.warm_up + self.ramp_up > 1 + 1e-9:  # rounding: 0.9 + 0.1 may be more
            raise ValueError(
                f"`warm_up` and `ramp_up` are shares of training and must not exceed 1 together, got {self.warm_up} "
                f"and {self.ramp_up}: `weight` would never reach its full value."
            )
        if self.loss_divisor <= 0:
            raise ValueError(f"`loss_divisor` must be positive, got {self.loss_divisor}.")
        if self.cutmix_partner not in ("neighbour", "itself"):
            raise ValueError(f'`cutmix_partner` must be "neighbour" or "itself", got {self.cutmix_partner!r}.')
        if self.cutmix_partner == "itself" and not self.cutmix:
            raise ValueError('`cutmix_partner="itself"` needs `cutmix=True`.')

    @property
    def views(self) -> tuple[str, ...]:
        if not self.cutmix:
            return ("weak",)
        return (
            ("weak", "cutmix_mask") if self.cutmix_partner == "neighbour" else ("weak", "second_crop", "cutmix_mask")
        )

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        if self.cutmix:  # pseudo labels of the unmixed images, before the passes with gradient
            images, valid, pseudo_labels, agreed = self._mixed(branches, unlabeled)
        else:
            images, valid = unlabeled.weak, unlabeled.valid
        passes = [self.logits(branch, labeled.pixel_values, images) for branch in branches]
        labeled_logits, logits = zip(*passes, strict=True)
        if not self.cutmix:
            pseudo_labels, agreed = self._pseudo_labels(logits, unlabeled)
        supervised_loss = sum(self.supervised_loss(one, labeled) for one in labeled_logits)  # eq. 1
        where, count = self._pixels(unlabeled, valid)
        total = self._cross_teaching(logits, pseudo_labels, where)  # eq. 2, summed over pixels
        if self.on_labeled if self.on_labeled is not None else not self.cutmix:  # eq. 3: labeled and unlabeled
            where, labeled_count = self._pixels(labeled, labeled.valid)
            labels, _ = self._pseudo_labels(labeled_logits, labeled)
            total, count = total + self._cross_teaching(labeled_logits, labels, where), count + labeled_count
        cps_loss = total / torch.as_tensor(count).clamp(min=1e-9)
        factor = self.weight * unlabeled_weight * ramp(progress, warm_up=self.warm_up, ramp_up=self.ramp_up)
        loss = (supervised_loss + factor * cps_loss) / self.loss_divisor  # eq. 4
        return ObjectiveOutput(
            loss,
            {
                "supervised_loss": supervised_loss.detach() / len(branches),
                "cps_loss": cps_loss.detach() / len(branches),
                "agreement": agreed,
            },
        )

    @torch.no_grad()  # batch norm stays in train mode, as in the release
    def _mixed(self, branches, unlabeled):
        """CutMix: the mixed images, their valid pixels, pseudo labels by branch, and the branches' agreement.

        One pass per branch over the weak views labels both images of every pair.
        """
        if self.cutmix_partner == "itself":
            unlabeled = replace(unlabeled, partner_weak=unlabeled.second_crop, partner_valid=unlabeled.second_valid)
        own, agreed = self._predicted(branches, unlabeled.weak, unlabeled)
        partners = unlabeled.partner_targets(own, lambda images: self._predicted(branches, images, unlabeled)[0])
        return *unlabeled.cutmix("weak", own, partners, **self.cutmix_masks), agreed

    def _predicted(self, branches, images, unlabeled):
        return self._pseudo_labels([branch(images) for branch in branches], unlabeled)

    def _pseudo_labels(self, logits, batch):
        """The pseudo labels (B, H, W) by branch, and the branches' agreement on the batch."""
        classes = [pseudo_label(one) for one in logits]
        if self.confidence_threshold == 0:
            return classes, agreement(classes, batch)
        threshold = self.confidence_threshold
        return [pseudo_label(one, confidence_threshold=threshold) for one in logits], agreement(classes, batch)

    def _pixels(self, batch, valid):
        """The pixels to train on, bool (B, H, W), and the divisor of the sum over them.

        Mixing moves valid pixels between images, but the count of the global batch is the same before and after.
        """
        if self.teach_padding:
            return torch.ones_like(valid), valid.numel()
        return valid, batch.num_pixels

    def _cross_teaching(self, logits, pseudo_labels, where):
        """The loss of each branch on the pseudo labels of all others, summed over pixels (eq. 2; for n branches, the
        mean over n - 1 teachers)."""
        losses = [
            self.pseudo_label_loss(student, labels, valid=where, count=1)
            for i, student in enumerate(logits)
            for j, labels in enumerate(pseudo_labels)
            if i != j
        ]
        return sum(losses) / (len(logits) - 1)


def agreement(predictions, batch):
    """The share of valid pixels where all branches predict the same class. `predictions`: a list of (B, H, W)."""
    first, *others = predictions
    same = batch.valid.clone()
    for other in others:
        same &= first == other
    return same.sum() / batch.num_pixels.clamp(min=1e-9)
