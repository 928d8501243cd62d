"""Mean Teacher (Tarvainen, Valpola; NeurIPS 2017; arXiv 1703.01780), for segmentation.

The student sees a perturbed image. It learns to match the probabilities that its own moving average predicts for the
unperturbed image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..functional import IGNORE_INDEX, probabilities, pseudo_label, soft_target, squared_difference
from .base import (
    Objective,
    ObjectiveOutput,
    check_not_negative,
    check_shares,
    ramp,
    soft_label_weights,
    warmed_up,
)

PERTURBATIONS = ("cutmix", "jitter", "noise")


@dataclass(frozen=True, kw_only=True)
class MeanTeacher(Objective):
    """L = Ls + weight * c * J, J the mean over pixels and classes of (p_student(perturbed x) - p_teacher(x))^2.

    x is the weak view of the unlabeled images. Labeled images are never perturbed and only used in Ls. c is the share
    of pixels where the teacher is confident (French et al.; BMVC 2020; arXiv 1906.01916), in a micro-batch over all
    processes. Like Dice, it is a mean that multiplies another one. The loss therefore depends on how a step is split
    into micro-batches, but not on how these are split over processes.

    The trainer keeps the teacher, an average of branch 0's parameters and buffers, in float32 whatever their `dtype`
    is. It predicts in evaluation mode.

    Args:
        weight: the weight of the consistency. If `None`, the number of classes, as for CutMix in French et al., who
            sum the squared difference over classes. (Tarvainen and Valpola have 100 for 10 classes, with a ramp-up
            instead of c; the CPS release has 100 for VOC's 21, with both networks seeing the same image.)
        decay: the decay of the teacher's average. Early in training it is at most 1 - 1 / (t + 1).
        perturbation: how the student's unlabeled images are perturbed. "cutmix": weak views are CutMixed, and the
            teacher's probabilities in the same way. This helps most in French et al., who find that small changes of
            an image say little about segmentation, since its classes are not separated in pixel space. "jitter": the
            strong view (colour jitter, grayscale, blur). "noise": Gaussian noise (Tarvainen and Valpola).
        noise_std: the noise's standard deviation, in units of normalised pixel values. Tarvainen and Valpola have
            0.15. Only with "noise".
        confidence_threshold: the teacher is confident if the probability of its prediction is at least this. 0.97, as
            in French et al.; with 0, c is 1.
        class_balance: weight each pixel of the unlabeled term by the frequency in the batch of its target's most
            likely class, to the power of minus this. 0, as in the papers: all pixels equal; 1: all classes equal.
        ramp_up: the share of training over which `weight` grows linearly to its full value. Tarvainen and Valpola have
            a quarter of training, with the shape exp(-5 (1 - x)^2); French et al. use only c.
    """

    weight: float | None = None
    decay: float = 0.99
    perturbation: str = "cutmix"
    noise_std: float = 0.15
    confidence_threshold: float = 0.97
    class_balance: float = 0.0
    ramp_up: float = 0.25

    teacher: ClassVar[bool] = True
    citation: ClassVar[str] = """@inproceedings{tarvainen2017mean,
  title     = {Mean Teachers Are Better Role Models: Weight-Averaged Consistency Targets Improve Semi-Supervised Deep Learning Results},
  author    = {Tarvainen, Antti and Valpola, Harri},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2017}
}
@inproceedings{french2020semi,
  title     = {Semi-Supervised Semantic Segmentation Needs Strong, Varied Perturbations},
  author    = {French, Geoff and Laine, Samuli and Aila, Timo and Mackiewicz, Michal and Finlayson, Graham},
  booktitle = {British Machine Vision Conference (BMVC)},
  year      = {2020}
}"""  # noqa: E501

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "noise_std", *([] if self.weight is None else ["weight"]))
        check_shares(self, "decay", "confidence_threshold", "class_balance", "ramp_up")
        if self.perturbation not in PERTURBATIONS:
            known = ", ".join(f'"{name}"' for name in PERTURBATIONS)
            raise ValueError(f"`perturbation` must be one of {known}, got {self.perturbation!r}.")

    @property
    def least_confidence(self) -> float:
        return 0.0  # the threshold weights the sum over all pixels

    @property
    def views(self) -> tuple[str, ...]:
        return {"cutmix": ("weak", "cutmix_mask"), "jitter": ("weak", "strong"), "noise": ("weak",)}[self.perturbation]

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        # French et al., section 4.1: one box of half the image, of any form.
        return {"boxes": 1, "area": (0.5, 0.5)} if self.perturbation == "cutmix" else {}

    def ema_decay(self, step: int) -> float:
        """The teacher's decay after optimizer step `step` (1, 2, ...)."""
        return warmed_up(self.decay, step)

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        (student,) = branches  # the trainer raises for more than one
        images, valid, target, confident = self._perturbed(teacher, unlabeled)
        labeled_logits, logits = self.logits(student, labeled.pixel_values, images)
        supervised_loss = self.supervised_loss(labeled_logits, labeled)
        weights = soft_label_weights(logits, target, valid, self.class_balance)
        consistency_loss = squared_difference(
            logits, target, valid=valid, count=unlabeled.num_pixels, class_weights=weights
        )
        confident, seen = labeled.over_processes(torch.stack([(confident & valid).sum(), valid.sum()]).float())
        share = confident / seen.clamp(min=1e-9)
        weight = logits.shape[1] if self.weight is None else self.weight
        factor = weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        return ObjectiveOutput(
            supervised_loss + factor * share * consistency_loss,
            {
                "supervised_loss": supervised_loss.detach(),
                "consistency_loss": consistency_loss.detach(),
                "mask_ratio": share,
            },
        )

    @torch.no_grad()
    def _perturbed(self, teacher, unlabeled):
        """What the student sees, its valid pixels, the target, and where the teacher is confident."""
        logits = teacher(unlabeled.weak)
        if self.perturbation == "cutmix":
            own = self._mixable(logits)
            partners = unlabeled.partner_targets(own, lambda images: self._mixable(teacher(images)))
            images, valid, (target, confident) = unlabeled.cutmix("weak", own, partners, **self.cutmix_masks)
            return images, valid, target, confident
        if self.perturbation == "jitter":
            images = unlabeled.strong
        else:
            images = unlabeled.weak + self.noise_std * torch.randn_like(unlabeled.weak)
        return images, unlabeled.valid, soft_target(logits), self._confident(logits)

    def _mixable(self, logits):
        return [probabilities(logits), self._confident(logits)]

    def _confident(self, logits):
        return pseudo_label(logits, confidence_threshold=self.confidence_threshold) != IGNORE_INDEX
