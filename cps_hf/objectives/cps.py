"""Cross Pseudo Supervision (Chen, Yuan, Zeng, Wang; CVPR 2021; arXiv 2106.01226).

Two networks of different initialisation see the same image; each is trained on the other's one-hot prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..cutmix import draw_cutmix_masks, mix, swap_neighbours
from ..losses import balanced_class_weights, pixel_cross_entropy, pseudo_label
from .base import Objective, ObjectiveOutput, num_pixels, valid_pixels


@dataclass(frozen=True, kw_only=True)
class CrossPseudoSupervision(Objective):
    """L = Ls + weight * Lcps (section 3.1, equations 1 to 4).

    Args:
        weight: the paper's lambda. The release has 1.5 (VOC) and 6 (Cityscapes), with CutMix 1 and 5.
        cutmix: true: Lcps on mixed unlabeled images only; the pseudo labels come from the unmixed images and are mixed
            like them. False: the paper's plain CPS, on labeled and unlabeled images together.
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
        if self.weight < 0:
            raise ValueError(f"`weight` must not be negative, got {self.weight}.")
        for name in ("warm_up", "ramp_up", "confidence_threshold", "class_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak", "cutmix_mask") if self.cutmix else ("weak",)

    def __call__(self, branches, labeled, unlabeled, *, teacher=None, progress=0.0) -> ObjectiveOutput:
        labeled_logits = [branch(labeled["pixel_values"]) for branch in branches]
        supervised_loss = sum(self.supervised_loss(logits, labeled) for logits in labeled_logits)  # eq. 1
        on_unlabeled = self._on_mixed_images if self.cutmix else self._on_both_batches
        cps_loss, agreement = on_unlabeled(branches, labeled, labeled_logits, unlabeled)  # eq. 2 and 3
        loss = supervised_loss + self.weight * self.ramp(progress) * cps_loss  # eq. 4
        return ObjectiveOutput(
            loss,
            {
                "supervised_loss": supervised_loss.detach(),
                "cps_loss": cps_loss.detach(),
                "agreement": agreement,
            },
        )

    def ramp(self, progress: torch.Tensor | float) -> torch.Tensor:
        """What `weight` is multiplied with: 0 while warming up, then linearly up to 1."""
        since = torch.as_tensor(progress) - self.warm_up
        if self.ramp_up == 0:
            return (since >= 0).float()
        return (since / self.ramp_up).clamp(0, 1)

    def _on_both_batches(self, branches, labeled, labeled_logits, unlabeled):
        """Plain CPS: the mean over the pixels of both batches together."""
        logits = [
            torch.cat([on_labeled, branch(unlabeled["weak"])])
            for branch, on_labeled in zip(branches, labeled_logits, strict=True)
        ]
        pseudo_labels = [pseudo_label(branch_logits) for branch_logits in logits]
        confident = [self._confident(branch_logits) for branch_logits in logits]
        unlabeled_valid = valid_pixels(unlabeled, unlabeled["weak"])
        valid = torch.cat([valid_pixels(labeled, labeled["pixel_values"]), unlabeled_valid])
        count = num_pixels(labeled, labeled["pixel_values"]) + num_pixels(unlabeled, unlabeled["weak"])
        first_unlabeled = labeled["pixel_values"].shape[0]
        agreement = _agreement([p[first_unlabeled:] for p in pseudo_labels], unlabeled_valid, unlabeled)
        return self._cross_teaching(logits, pseudo_labels, [valid & c for c in confident], count), agreement

    def _on_mixed_images(self, branches, labeled, labeled_logits, unlabeled):
        """CPS + CutMix: one pseudo-label pass a branch on the weak views, one pass on the mixed images."""
        weak = unlabeled["weak"]
        valid = valid_pixels(unlabeled, weak)
        partner_weak = unlabeled.get("partner_weak")
        with torch.no_grad():  # batch norm stays in train mode, as in the release
            weak_logits = [branch(weak) for branch in branches]
            pseudo_labels = [pseudo_label(logits) for logits in weak_logits]
            confident = [self._confident(logits) for logits in weak_logits]
            if partner_weak is None:  # an image's partner is its neighbour in the batch
                partner_weak, partner_valid = swap_neighbours(weak), swap_neighbours(valid)
                partner_labels = [swap_neighbours(p) for p in pseudo_labels]
                partner_confident = [swap_neighbours(c) for c in confident]
            else:  # an odd batch: the neighbour lies in another batch, so the stream sends it along
                partner_valid = unlabeled["partner_valid"]
                partner_logits = [branch(partner_weak) for branch in branches]
                partner_labels = [pseudo_label(logits) for logits in partner_logits]
                partner_confident = [self._confident(logits) for logits in partner_logits]
        mask = unlabeled.get("cutmix_mask")
        if mask is None:
            mask = draw_cutmix_masks(*weak[:, 0].shape).to(weak.device)
        mixed = mix(weak, partner_weak, mask)
        mixed_valid = mix(valid, partner_valid, mask)
        mixed_labels = [mix(own, other, mask) for own, other in zip(pseudo_labels, partner_labels, strict=True)]
        teaches = [
            mixed_valid & mix(own, other, mask) for own, other in zip(confident, partner_confident, strict=True)
        ]
        logits = [branch(mixed) for branch in branches]
        # Mixing moves valid pixels between images; the count of the global batch stands for both.
        loss = self._cross_teaching(logits, mixed_labels, teaches, num_pixels(unlabeled, weak))
        return loss, _agreement(pseudo_labels, valid, unlabeled)

    def _confident(self, logits: torch.Tensor) -> torch.Tensor:
        """bool (B, H, W): where the soft-max probability of the prediction reaches the threshold."""
        if self.confidence_threshold == 0:
            return torch.ones_like(logits[:, 0], dtype=torch.bool)
        logits = logits.detach().float()
        return (logits.amax(1) - logits.logsumexp(1)).exp() >= self.confidence_threshold

    def _cross_teaching(self, logits, pseudo_labels, teaches, count):
        """Each branch on the pseudo labels of all others (eq. 2; for n branches the mean over n - 1 teachers)."""
        losses = [
            pixel_cross_entropy(
                student, labels, valid=where, count=count, class_weights=self._class_weights(labels, where, student)
            )
            for i, student in enumerate(logits)
            for j, (labels, where) in enumerate(zip(pseudo_labels, teaches, strict=True))
            if i != j
        ]
        return sum(losses) / (len(logits) - 1)

    def _class_weights(self, labels, valid, student):
        if self.class_balance == 0:
            return None
        return balanced_class_weights(labels, valid, student.shape[1], power=self.class_balance)


def _agreement(pseudo_labels, valid, batch):
    """The share of valid unlabeled pixels on which all branches predict the same class."""
    same = valid.clone()
    for other in pseudo_labels[1:]:
        same &= other == pseudo_labels[0]
    return same.sum() / num_pixels(batch, valid).clamp(min=1e-9)
