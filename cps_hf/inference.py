"""From images to full-size logits: whole images or sliding windows, several scales, flipped too.

Works on any callable `(pixel_values (B, 3, H, W)) -> logits (B, C, H, W)`: a `Branch`, or `as_logits_fn(model)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LogitsFn = Callable[[Tensor], Tensor]


def as_logits_fn(model: nn.Module) -> LogitsFn:
    """Any segmentation model of transformers as a callable that gives float32 logits at the input's size."""
    from .modeling.branches import Branch

    return Branch(model).eval()


@torch.no_grad()
def predict_logits(
    logits_fn: LogitsFn,
    pixel_values: Tensor,
    *,
    mode: str = "whole",
    crop_size: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    average: bool = True,
    window_batch_size: int = 4,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Logits (B, C, H, W) of normalised images (B, 3, H, W).

    Args:
        mode: "whole", or "sliding": windows of `crop_size` every `stride` pixels, the last ones shifted so that they
            end with the image. An image smaller than the window is padded with zeros (the mean colour).
        crop_size, stride: (height, width) in pixels; for "sliding".
        average: divide summed logits by how many windows saw a pixel. False: sum them, as the CPS release does.
        window_batch_size: windows a forward pass.
        scales: the image is also predicted at these sizes; log-probabilities of the mean soft-max come back when there
            is more than one, or with `flip`.
        flip: also predict the mirrored image.

    Raises:
        ValueError: a mode that does not exist, or windows that would leave gaps.
    """
    if mode not in ("whole", "sliding"):
        raise ValueError(f'`mode` must be "whole" or "sliding", got {mode!r}.')
    if mode == "sliding":
        _check_windows(crop_size, stride)

    def at_one_size(images: Tensor) -> Tensor:
        if mode == "whole":
            return logits_fn(images)
        return _slide(logits_fn, images, crop_size, stride, average, window_batch_size)

    if tuple(scales) == (1.0,) and not flip:
        return at_one_size(pixel_values)
    probs, count = 0, 0
    size = pixel_values.shape[-2:]
    for scale in scales:
        images = pixel_values
        if scale != 1:
            scaled = [max(1, round(side * scale)) for side in size]
            images = F.interpolate(images, size=scaled, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            logits = at_one_size(images.flip(-1) if mirrored else images)
            logits = logits.flip(-1) if mirrored else logits
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            probs, count = probs + logits.softmax(1), count + 1
    return (probs / count).log()


def _check_windows(crop_size, stride) -> None:
    for name, value in (("crop_size", crop_size), ("stride", stride)):
        if value is None or len(value) != 2 or min(value) < 1:
            raise ValueError(f'`{name}` must be (height, width) in pixels with `mode="sliding"`, got {value}.')
    if stride[0] > crop_size[0] or stride[1] > crop_size[1]:
        raise ValueError(
            f"`stride` {tuple(stride)} must not exceed `crop_size` {tuple(crop_size)}: pixels would be missed."
        )


def _slide(logits_fn, images, crop_size, stride, average, window_batch_size) -> Tensor:
    height, width = images.shape[-2:]
    padding = [max(0, crop - side) for crop, side in zip(crop_size, (height, width), strict=True)]
    images = F.pad(images, (0, padding[1], 0, padding[0]))
    corners = [
        (top, left)
        for top in _starts(images.shape[-2], crop_size[0], stride[0])
        for left in _starts(images.shape[-1], crop_size[1], stride[1])
    ]
    total, seen = None, images.new_zeros(images.shape[-2:])
    for first in range(0, len(corners), window_batch_size):
        some = corners[first : first + window_batch_size]
        windows = torch.cat([images[..., top : top + crop_size[0], left : left + crop_size[1]] for top, left in some])
        for (top, left), logits in zip(some, logits_fn(windows).chunk(len(some)), strict=True):
            if total is None:
                total = logits.new_zeros(images.shape[0], logits.shape[1], *images.shape[-2:])
            total[..., top : top + crop_size[0], left : left + crop_size[1]] += logits
            seen[top : top + crop_size[0], left : left + crop_size[1]] += 1
    if average:
        total /= seen
    return total[..., :height, :width]


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, and one that ends with the image."""
    starts = list(range(0, side - crop + 1, stride))
    return starts if starts[-1] == side - crop else [*starts, side - crop]
