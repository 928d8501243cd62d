"""What an objective is given of the data: a batch of labeled images and one of unlabeled images, by view.

A batch completes itself when it is made, so a formula need not ask what is there: without `valid` every pixel is
valid, and what sums are divided by is counted here. The trainer puts the counts of the whole optimizer step in their
place, which makes the gradient the same on one process, on several and with accumulated steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..functional import IGNORE_INDEX, count_targets, draw_cutmix_masks, mix, swap_neighbours


@dataclass(kw_only=True, eq=False)
class Batch:
    """What labeled and unlabeled batches have in common. `dataclasses.replace` takes the counts along.

    Args:
        valid: bool (B, H, W), false on padding. None: true everywhere.
        num_pixels: what a sum over valid pixels is divided by, a scalar. None: their number.

    Raises:
        ValueError: there is no image.
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
        """What the batch holds, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(kw_only=True, eq=False)
class LabeledBatch(Batch):
    """Images and their labels.

    Args:
        pixel_values: float (B, 3, H, W), normalised.
        labels: long (B, H, W), 255 where ignored.
        num_labels: what a sum over labeled pixels is divided by, a scalar. None: the number of those not ignored.
        num_targets: what a sum over targets is divided by, a scalar. A target is a class that an image's labels
            contain. None: their number.
        class_counts: pixels by class of the whole labeled set, float (C,), which class weights are made of. None:
            those of this batch are counted, where weights are asked for.
        over_processes: gives the mean over processes of a tensor of sums, for a loss that is no sum over pixels. Left
            out: this process is the only one.
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
        if self.num_targets is None:
            self.num_targets = count_targets(self.labels).sum()


@dataclass(kw_only=True, eq=False)
class UnlabeledBatch(Batch):
    """The views that the objective asks for (`Objective.views`) of unlabeled images; the others are None.

    Args:
        weak: float (B, 3, H, W), normalised: the images cropped, scaled and flipped.
        strong, strong_2: the same crops with colour jitter, grey and blur, each drawn for itself.
        second_crop: another crop of the same images, valid where `second_valid` is true.
        pseudo_labels: long (B, H, W), labels of the crops that were made before training, 255 where there is none.
        cutmix_mask, cutmix_mask_2: bool (B, H, W), true where `cutmix` takes the partner's pixel. None: drawn there.
        partner_weak, partner_strong, partner_strong_2, partner_pseudo_labels, partner_valid: what the images are mixed
            with. None: the neighbour in the batch, which a batch of an odd size has not for all.
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
        """The targets of the weak views' partners: `own` ones swapped; those that were sent along are predicted."""
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
        """A view mixed with its partners, and the targets alike.

        Args:
            view: which images. mask: which masks they are mixed by; drawn, by `draw_cutmix_masks(**drawn)`, when the
                batch has none.
            own, partners: targets (B, H, W) or (B, C, H, W) of the images and of their partners.

        Returns:
            The mixed images (B, 3, H, W), where they are valid, bool (B, H, W), and the mixed targets.
        """
        images, masks = getattr(self, view), getattr(self, mask)
        if masks is None:
            masks = draw_cutmix_masks(*images[:, 0].shape, **drawn).to(images.device)
        mixed = [mix(a, b, masks) for a, b in zip(own, partners, strict=True)]
        return mix(images, self.partner(view), masks), mix(self.valid, self.partner("valid"), masks), mixed
