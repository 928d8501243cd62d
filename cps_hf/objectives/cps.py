"""Cross Pseudo Supervision (Chen, Yuan, Zeng, Wang; CVPR 2021; arXiv 2106.01226).

Two networks of different initialisation see the same image; each is trained on the other's one-hot prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..losses import IGNORE_INDEX, balanced_class_weights, pixel_cross_entropy, pseudo_label
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


@dataclass(frozen=True, kw_only=True)
class CrossPseudoSupervision(Objective):
    """L = Ls + weight * Lcps (section 3.1, equations 1 to 4).

    Args:
        weight: the paper's lambda. The release has 1.5 (VOC) and 6 (Cityscapes), with CutMix 1 and 5.
        cutmix: true: Lcps on mixed unlabeled images; the pseudo labels come from the unmixed images and are mixed
            like them. False: the paper's plain CPS.
        on_labeled: whether Lcps is on the labeled images too. None: as in the release, without CutMix only.
        cutmix_partner: "neighbour": another image of the batch. "itself": another crop of the same image, which is
            what the release's two loaders with one seed come to.
        teach_padding: whether pixels that padding made teach and are counted, as in the release.
        loss_divisor: what the whole loss is divided by. The release divides by the number of processes once too often
            (4 on VOC, 8 on Cityscapes); with SGD that is a smaller learning rate and a larger weight decay.
        warm_up: the share of training at whose start Lcps is left out. The paper has none.
        ramp_up: the share of training, after it, over which `weight` grows linearly to its value. The paper has none:
            its networks start from ImageNet. Those that start from nothing predict the commonest class everywhere at
            first, and without a ramp-up confirm each other in that.
        confidence_threshold: a pixel teaches only where the teacher's probability of its prediction is at least this.
            0, as in the paper: everywhere. The loss is still divided by all valid pixels.
        class_balance: weigh a pixel by its pseudo label's frequency in the batch to the power of minus this, so that
            rare classes are not unlearned. 0, as in the paper: all pixels alike; 1: all classes alike.

    With n branches each is taught by all others, and its loss is the mean over its n - 1 teachers.
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

    def __call__(self, branches, labeled, unlabeled, *, teacher=None, progress=0.0) -> ObjectiveOutput:
        labeled_logits = [branch(labeled["pixel_values"]) for branch in branches]
        supervised_loss = sum(self.supervised_loss(logits, labeled) for logits in labeled_logits)  # eq. 1
        on_unlabeled = self._on_mixed_images if self.cutmix else self._on_plain_images
        total, count, agreement = on_unlabeled(branches, unlabeled)  # eq. 2, summed over pixels
        if self.on_labeled if self.on_labeled is not None else not self.cutmix:  # eq. 3: labeled and unlabeled
            where, labeled_count = self._pixels(labeled, labeled["pixel_values"])
            total = total + self._cross_teaching(labeled_logits, self._pseudo_labels(labeled_logits), where)
            count = count + labeled_count
        cps_loss = total / torch.as_tensor(count).clamp(min=1e-9)
        factor = self.weight * ramp(progress, warm_up=self.warm_up, ramp_up=self.ramp_up)
        loss = (supervised_loss + factor * cps_loss) / self.loss_divisor  # eq. 4
        return ObjectiveOutput(
            loss,
            {
                "supervised_loss": supervised_loss.detach(),
                "cps_loss": cps_loss.detach(),
                "agreement": agreement,
            },
        )

    def _on_plain_images(self, branches, unlabeled):
        """Plain CPS: each image teaches and is taught as it is."""
        logits = [branch(unlabeled["weak"]) for branch in branches]
        where, count = self._pixels(unlabeled, unlabeled["weak"])
        total = self._cross_teaching(logits, self._pseudo_labels(logits), where)
        return total, count, agreement(logits, unlabeled)

    def _on_mixed_images(self, branches, unlabeled):
        """CPS + CutMix: one pseudo-label pass a branch on the weak views, one pass on the mixed images."""
        if self.cutmix_partner == "itself":
            unlabeled = {**unlabeled, "partner_weak": unlabeled["second_crop"]}
            unlabeled["partner_valid"] = unlabeled["second_valid"]
        with torch.no_grad():  # batch norm stays in train mode, as in the release
            weak_logits = [branch(unlabeled["weak"]) for branch in branches]
            own = self._pseudo_labels(weak_logits)
            partners = partner_targets(unlabeled, own, lambda x: self._pseudo_labels([b(x) for b in branches]))
        mixed, mixed_valid, pseudo_labels = cutmix_view(unlabeled, "weak", own, partners)
        where, count = self._pixels(unlabeled, mixed, mixed_valid)
        logits = [branch(mixed) for branch in branches]
        return self._cross_teaching(logits, pseudo_labels, where), count, agreement(weak_logits, unlabeled)

    def _pseudo_labels(self, logits):
        return [pseudo_label(one, confidence_threshold=self.confidence_threshold) for one in logits]

    def _pixels(self, batch, images, valid=None):
        """Which pixels teach, bool (B, H, W), and by how many the sum over them is divided.

        Mixing moves valid pixels between images; the count of the global batch stands for both.
        """
        if self.teach_padding:
            everywhere = torch.ones_like(images[:, 0], dtype=torch.bool)
            return everywhere, everywhere.numel()
        return valid_pixels(batch, images) if valid is None else valid, num_pixels(batch, images)

    def _cross_teaching(self, logits, pseudo_labels, where):
        """Each branch on the pseudo labels of all others (eq. 2; for n branches the mean over n - 1 teachers), summed
        over pixels."""
        losses = [
            pixel_cross_entropy(
                student, labels, valid=where, count=1, class_weights=self._class_weights(labels, where, student)
            )
            for i, student in enumerate(logits)
            for j, labels in enumerate(pseudo_labels)
            if i != j
        ]
        return sum(losses) / (len(logits) - 1)

    def _class_weights(self, labels, where, student):
        if self.class_balance == 0:
            return None
        where = where & (labels != IGNORE_INDEX)
        return balanced_class_weights(labels, where, student.shape[1], power=self.class_balance)


def agreement(logits, batch):
    """The share of valid pixels for which all branches predict the same class; logits are a list of (B, C, H, W)."""
    first, *others = (pseudo_label(one) for one in logits)
    same = valid_pixels(batch, first.unsqueeze(1)).clone()
    for other in others:
        same &= first == other
    return same.sum() / torch.as_tensor(num_pixels(batch, first.unsqueeze(1))).clamp(min=1e-9)
