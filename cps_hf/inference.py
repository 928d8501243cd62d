"""From images to full-size logits and class maps: whole images or sliding windows, several scales, flipped too.

Works on any callable `(pixel_values (B, 3, H, W)) -> logits (B, C, H, W)`: a `Branch`, or `as_logits_fn(model)`.
A list of such callables is asked for the mean of their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LogitsFn = Callable[[Tensor], Tensor]


def as_logits_fn(model: nn.Module) -> LogitsFn:
    """Any segmentation model of transformers, put in evaluation mode, as a callable: float32 logits of input size."""
    from .modeling.branches import Branch

    return Branch(model).eval()


@torch.no_grad()
def predict_logits(
    logits_fn: LogitsFn | Sequence[LogitsFn],
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

    One network, one scale and no flip: its logits as they are. Else the soft-max maps of all passes are averaged, each
    at the images' size, and their logarithm comes back (whose soft-max is the mean again).

    Args:
        logits_fn: one callable, or several.
        mode: "whole", or "sliding": windows of `crop_size` every `stride` pixels, the last ones shifted so that they
            end with the image. An image smaller than the window is padded with zeros (the mean colour) on all sides,
            as the CPS release pads it, and as training pads its crops.
        crop_size, stride: (height, width) in pixels; for "sliding". They stay the same at every scale.
        average: divide summed logits by how many windows saw a pixel. False: sum them, as the CPS release does.
        window_batch_size: windows a forward pass, the images of the batch counted together.
        scales: factors of height and width at which the images are predicted.
        flip: also predict the mirrored images.

    Raises:
        ValueError: a mode that does not exist, windows that would leave gaps, no scale, or a callable that does not
            return logits of the size of its input.
    """
    networks = list(logits_fn) if isinstance(logits_fn, Sequence | nn.ModuleList) else [logits_fn]
    _check_options(networks, mode, crop_size, stride, window_batch_size, scales)

    def at_one_size(network: LogitsFn, images: Tensor) -> Tensor:
        if mode == "whole":
            return _logits(network, images)
        return _slide(network, images, crop_size, stride, average, window_batch_size)

    if len(networks) == 1 and tuple(scales) == (1.0,) and not flip:
        return at_one_size(networks[0], pixel_values)
    probs, count = None, 0
    for images, mirrored in _versions(pixel_values, scales, flip):
        for network in networks:
            logits = at_one_size(network, images)
            logits = logits.flip(-1) if mirrored else logits
            if logits.shape[-2:] != pixel_values.shape[-2:]:
                logits = F.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)
            more = logits.float().softmax(1)
            probs = more if probs is None else probs.add_(more)
            count += 1
    # A probability that is zero in float32 must not become -inf: resizing would make NaN of it.
    return probs.div_(count).clamp_min_(torch.finfo(probs.dtype).tiny).log_()


def predict(
    logits_fn: LogitsFn | Sequence[LogitsFn],
    pixel_values: Tensor,
    *,
    target_size: tuple[int, int] | None = None,
    **options: Any,
) -> Tensor:
    """Class ids, long (B, H, W), of normalised images (B, 3, H, W).

    Args:
        target_size: (height, width) of the maps, e.g. the label's; logits are resized to it before the arg max, one
            image at a time. None: the images' size.
        options: those of `predict_logits`.
    """
    logits = predict_logits(logits_fn, pixel_values, **options)
    if target_size is None or tuple(target_size) == tuple(logits.shape[-2:]):
        return logits.argmax(1)
    resized = (
        F.interpolate(one[None], size=tuple(target_size), mode="bilinear", align_corners=False) for one in logits
    )
    return torch.cat([one.argmax(1) for one in resized])


def _check_options(networks, mode, crop_size, stride, window_batch_size, scales) -> None:
    if not networks:
        raise ValueError("`logits_fn` is an empty list: give at least one network.")
    if not scales or min(scales) <= 0:
        raise ValueError(f"`scales` must be one or more positive factors, got {scales}.")
    if mode not in ("whole", "sliding"):
        raise ValueError(f'`mode` must be "whole" or "sliding", got {mode!r}.')
    if mode == "whole":
        return
    for name, value in (("crop_size", crop_size), ("stride", stride)):
        if value is None or len(value) != 2 or min(value) < 1:
            raise ValueError(f'`{name}` must be (height, width) in pixels with `mode="sliding"`, got {value}.')
    if stride[0] > crop_size[0] or stride[1] > crop_size[1]:
        raise ValueError(
            f"`stride` {tuple(stride)} must not exceed `crop_size` {tuple(crop_size)}: pixels would be missed."
        )
    if window_batch_size < 1:
        raise ValueError(f"`window_batch_size` must be at least 1, got {window_batch_size}.")


def _versions(pixel_values: Tensor, scales: Sequence[float], flip: bool) -> Iterator[tuple[Tensor, bool]]:
    """The images at every scale, as they are and mirrored: (images, whether they are mirrored)."""
    for scale in scales:
        images = pixel_values
        if scale != 1:
            size = [max(1, round(side * scale)) for side in pixel_values.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        yield images, False
        if flip:
            yield images.flip(-1), True


def _logits(network: LogitsFn, images: Tensor) -> Tensor:
    logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[-2:] != images.shape[-2:]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`logits_fn` must return logits (B, C, H, W) at its input's size {tuple(images.shape[-2:])}, "
            f"got {found}. Wrap a model of transformers: as_logits_fn(model)."
        )
    return logits


def _slide(network, images, crop_size, stride, average, window_batch_size) -> Tensor:
    batch, _, height, width = images.shape
    missing_rows, missing_columns = max(0, crop_size[0] - height), max(0, crop_size[1] - width)
    top, left = missing_rows // 2, missing_columns // 2
    images = F.pad(images, (left, missing_columns - left, top, missing_rows - top))
    windows = [
        (image, slice(row, row + crop_size[0]), slice(column, column + crop_size[1]))
        for row in _starts(images.shape[-2], crop_size[0], stride[0])
        for column in _starts(images.shape[-1], crop_size[1], stride[1])
        for image in range(batch)
    ]
    total = seen = None
    for first in range(0, len(windows), window_batch_size):
        some = windows[first : first + window_batch_size]
        logits = _logits(network, torch.stack([images[image, :, rows, columns] for image, rows, columns in some]))
        if total is None:
            total, seen = (logits.new_zeros(batch, channels, *images.shape[-2:]) for channels in (logits.shape[1], 1))
        for (image, rows, columns), window in zip(some, logits, strict=True):
            total[image, :, rows, columns] += window
            seen[image, :, rows, columns] += 1
    if average:
        total /= seen
    return total[..., top : top + height, left : left + width]


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, and one that ends with the image."""
    starts = list(range(0, side - crop + 1, stride))
    return starts if starts[-1] == side - crop else [*starts, side - crop]
