"""The batches that an objective receives: one of labeled images and one of unlabeled images, by view.

A batch fills in what is missing when it is created, so formulas need no special cases: without `valid`, every pixel is
valid, and the divisors of sums are counted. The trainer replaces these counts by those of the whole optimizer step.
The gradient is then the same with one process, with several, and with gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..functional import IGNORE_INDEX, draw_cutmix_masks, mix, swap_neighbours


@dataclass(kw_only=True, eq=False)
class Batch:
    """The common part of labeled and unlabeled batches. `dataclasses.replace` keeps the counts.

    Args:
        valid: bool (B, H, W), false on padding. If `None`, true everywhere.
        num_pixels: the divisor of a sum over valid pixels, a scalar. If `None`, their number.

    Raises:
        ValueError: the batch has no images.
    """

    valid: Tensor | None = None
    num_pixels: Tensor | None = None

    def __post_init__(self):
        if self.valid is None:
            images = next((tensor for tensor in self.tensors().values() if tensor.dim() == 4), None)
            if images is None:
                raise ValueError(f"{type(self).__name__} needs images, got {[*self.tensors()]}.")
            self.valid = images.new_ones((len(images), *images.shape[-2:]), dtype=torch.bool)
        if self.num_pixels is None:
            self.num_pixels = self.valid.sum()

    def tensors(self) -> dict[str, Tensor]:
        """The batch's tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(kw_only=True, eq=False)
class LabeledBatch(Batch):
    """Images and their labels.

    Args:
        pixel_values: float (B, 3, H, W), normalised.
        labels: long (B, H, W), 255 where ignored.
        num_labels: the divisor of a sum over labeled pixels, a scalar. If `None`, the number of pixels not ignored.
        num_targets: the divisor of the set loss's sum over targets, a scalar. A target is a class that occurs in an
            image's labels. If `None`, the loss counts this batch's.
        class_counts: the pixels per class of the whole labeled set, float (C,), for class weights. If `None`, they are
            counted in this batch when needed.
        over_processes: averages a tensor of sums over processes, for losses that are not sums over pixels. If omitted,
            this process is the only one.
    """

    pixel_values: Tensor
    labels: Tensor
    num_labels: Tensor | None = None
    num_targets: Tensor | None = None
    class_counts: Tensor | None = None
    over_processes: Callable[[Tensor], Tensor] = torch.clone

    def __post_init__(self):
        super().__post_init__()
        if self.num_labels is None:
            self.num_labels = (self.labels != IGNORE_INDEX).sum()


@dataclass(kw_only=True, eq=False)
class UnlabeledBatch(Batch):
    """The views of unlabeled images that the objective lists in `Objective.views`; the others are `None`.

    Args:
        weak: float (B, 3, H, W), normalised: the images after cropping, scaling and flipping.
        strong, strong_2: the same crops with colour jitter, grayscale and blur, drawn independently.
        second_crop: another crop of the same images, valid where `second_valid` is true.
        pseudo_labels: long (B, H, W), labels of the crops that were made before training, 255 where ignored.
        cutmix_mask, cutmix_mask_2: bool (B, H, W), true where `cutmix` takes the partner's pixel. If `None`, `cutmix`
            draws them.
        partner_weak, partner_strong, partner_strong_2, partner_pseudo_labels, partner_valid: what the images are mixed
            with. If `None`, the neighbour in the batch, which requires an even batch size.
    """

    weak: Tensor | None = None
    strong: Tensor | None = None
    strong_2: Tensor | None = None
    second_crop: Tensor | None = None
    second_valid: Tensor | None = None
    pseudo_labels: Tensor | None = None
    cutmix_mask: Tensor | None = None
    cutmix_mask_2: Tensor | None = None
    partner_weak: Tensor | None = None
    partner_strong: Tensor | None = None
    partner_strong_2: Tensor | None = None
    partner_pseudo_labels: Tensor | None = None
    partner_valid: Tensor | None = None

    def partner(self, view: str) -> Tensor:
        """What a view, "pseudo_labels" or "valid" is mixed with."""
        sent = getattr(self, f"partner_{view}")
        return swap_neighbours(getattr(self, view)) if sent is None else sent

    def partner_targets(
        self, own: Sequence[Tensor], predict: Callable[[Tensor], Sequence[Tensor]]
    ) -> Sequence[Tensor]:
        """The targets of the weak views' partners: swapped from `own`, or predicted if the batch has partner views."""
        if self.partner_weak is not None:
            return predict(self.partner_weak)
        return [swap_neighbours(target) for target in own]

    def cutmix(
        self,
        view: str,
        own: Sequence[Tensor],
        partners: Sequence[Tensor],
        *,
        mask: str = "cutmix_mask",
        **drawn: object,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mix a view with its partners, and the targets in the same way.

        Args:
            view: the images to mix. mask: the masks to mix them by; drawn by `draw_cutmix_masks(**drawn)` if the batch
                has none.
            own, partners: targets (B, H, W) or (B, C, H, W) of the images and of their partners.

        Returns:
            The mixed images (B, 3, H, W), their valid pixels, bool (B, H, W), and the mixed targets.
        """
        images, masks = getattr(self, view), getattr(self, mask)
        if masks is None:
            masks = draw_cutmix_masks(*images[:, 0].shape, **drawn).to(images.device)
        mixed = [mix(a, b, masks) for a, b in zip(own, partners, strict=True)]
        return mix(images, self.partner(view), masks), mix(self.valid, self.partner("valid"), masks), mixed
