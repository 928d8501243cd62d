"""Mean Teacher (Tarvainen, Valpola; NeurIPS 2017; arXiv 1703.01780), for segmentation.

The student is drawn towards the probabilities of its own average over steps, both looking at a perturbed image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..functional import soft_target, squared_difference
from .base import Objective, ObjectiveOutput, check_not_negative, check_shares, ramp


@dataclass(frozen=True, kw_only=True)
class MeanTeacher(Objective):
    """L = Ls + weight * J, J the mean over pixels and classes of (p_student(x + n) - p_teacher(x + n'))^2 (section 2).

    The trainer keeps the teacher, an average of branch 0's parameters and buffers, in float32 whatever `dtype` these
    have. It predicts in evaluation mode.

    Args:
        weight: of the consistency. 100, as the CPS release has it for VOC.
        decay: of the teacher's average; at the start it is less, 1 - 1 / (t + 1).
        perturbation: "noise": Gaussian noise on labeled and unlabeled images, for student and teacher anew. "jitter":
            two strong views (colour jitter, grey, blur) of the unlabeled images. The release shows both the same clean
            image.
        noise_std: of the noise, in units of normalised pixel values. Only with "noise".
        ramp_up: the share of training over which `weight` grows linearly to its value.
    """

    weight: float = 100.0
    decay: float = 0.99
    perturbation: str = "noise"
    noise_std: float = 0.15
    ramp_up: float = 0.0

    teacher: ClassVar[bool] = True
    citation: ClassVar[str] = """@inproceedings{tarvainen2017mean,
  title     = {Mean Teachers Are Better Role Models: Weight-Averaged Consistency Targets Improve Semi-Supervised Deep Learning Results},
  author    = {Tarvainen, Antti and Valpola, Harri},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2017}
}"""  # noqa: E501

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "weight", "noise_std")
        check_shares(self, "decay", "ramp_up")
        if self.perturbation not in ("noise", "jitter"):
            raise ValueError(f'`perturbation` must be "noise" or "jitter", got {self.perturbation!r}.')

    @property
    def views(self) -> tuple[str, ...]:
        return ("weak",) if self.perturbation == "noise" else ("strong", "strong_2")

    def ema_decay(self, step: int) -> float:
        """The teacher's decay after optimizer step `step` (1, 2, ...): a true mean at first, then `decay`."""
        return min(1 - 1 / (step + 1), self.decay)

    def __call__(self, branches, labeled, unlabeled, *, teacher=None, progress=0.0) -> ObjectiveOutput:
        (student,) = branches  # the trainer refuses more
        if self.perturbation == "noise":
            batches, images = [labeled, unlabeled], [labeled.pixel_values, unlabeled.weak]
            supervised_logits, *_ = logits = self.logits(student, *map(self._noisy, images))
            seen_by_teacher = [*map(self._noisy, images)]
        else:
            batches, seen_by_teacher = [unlabeled], [unlabeled.strong_2]
            supervised_logits, *logits = self.logits(student, labeled.pixel_values, unlabeled.strong)
        supervised_loss = self.supervised_loss(supervised_logits, labeled)
        with torch.no_grad():
            targets = [soft_target(one) for one in self.logits(teacher, *seen_by_teacher)]
        count = sum(batch.num_pixels for batch in batches)
        consistency_loss = sum(
            squared_difference(own, target, valid=batch.valid, count=count)
            for own, target, batch in zip(logits, targets, batches, strict=True)
        )
        return ObjectiveOutput(
            supervised_loss + self.weight * ramp(progress, ramp_up=self.ramp_up) * consistency_loss,
            {"supervised_loss": supervised_loss.detach(), "consistency_loss": consistency_loss.detach()},
        )

    def _noisy(self, images):
        return images + self.noise_std * torch.randn_like(images)
