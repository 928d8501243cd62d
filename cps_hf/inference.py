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

from .modeling.branches import Branch

LogitsFn = Callable[[Tensor], Tensor]
STRIP = 12  # rows that are worked on at a time, where copies of whole maps would cost memory


def as_logits_fn(model: nn.Module) -> LogitsFn:
    """Any segmentation model of transformers, put in evaluation mode, as a callable: float32 logits of input size."""
    return Branch(model).eval()


@torch.no_grad()
def predict_logits(
    logits_fn: LogitsFn | Sequence[LogitsFn],
    pixel_values: Tensor | Sequence[Tensor],
    *,
    target_size: tuple[int, int] | None = None,
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
    at the maps' size, and their logarithm comes back (whose soft-max is the mean again).

    Beside what the network itself needs, memory holds the images, one set of full-size maps, and with "sliding" the
    rows of one window, whatever the options (benchmarks/inference_memory.py). Whole images' logits of a `Branch` are
    resized once, from the model's own size to `target_size`; another callable's from the size of its input.

    Args:
        logits_fn: one callable, or several.
        pixel_values: the images; or, for several callables, the same images once for each, when their image processors
            differ.
        target_size: (height, width) of the maps, e.g. the label's. None: the (first) images' size.
        mode: "whole", or "sliding": windows of `crop_size` every `stride` pixels, the last ones shifted so that they
            end with the image. An image smaller than the window is padded with zeros (the mean colour) on all sides,
            as the CPS release pads it, and as training pads its crops.
        crop_size, stride: (height, width) in pixels; for "sliding". They stay the same at every scale.
        average: divide summed logits by how many windows saw a pixel. False: sum them, as the CPS release does.
        window_batch_size: windows a forward pass: those that start at one row, the images of the batch together.
        scales: factors of height and width at which the images are predicted.
        flip: also predict the mirrored images.

    Raises:
        ValueError: a mode that does not exist, windows that would leave gaps, no scale, networks that differ in their
            classes, or a callable that does not return logits of the size of its input.
    """
    networks = list(logits_fn) if isinstance(logits_fn, Sequence | nn.ModuleList) else [logits_fn]
    inputs = [pixel_values] * len(networks) if isinstance(pixel_values, Tensor) else list(pixel_values)
    _check_options(networks, inputs, target_size, mode, crop_size, stride, window_batch_size, scales)
    size = tuple(inputs[0].shape[-2:] if target_size is None else target_size)
    alone = len(networks) == 1 and tuple(scales) == (1.0,) and not flip
    if alone and mode == "whole" and tuple(inputs[0].shape[-2:]) == size:
        return _logits(networks[0], inputs[0])

    maps, passes = None, 0
    for network, own_input in zip(networks, inputs, strict=True):
        for images, mirrored in _versions(own_input, scales, flip):
            height, align_corners = images.shape[-2], False
            if mode == "sliding":
                strips = _slide(network, images, crop_size, stride, average, window_batch_size)
            elif isinstance(network, Branch):
                own = network(images, resize=False)
                strips, height, align_corners = iter(own.split(STRIP, dim=2)), own.shape[2], network.align_corners
                del own
            else:
                strips = iter(_logits(network, images).split(STRIP, dim=2))
            for rows, logits in _resized(strips, height, size, align_corners):
                logits = logits.flip(-1) if mirrored else logits
                if maps is None:
                    dtype = logits.dtype if alone else torch.float32
                    maps = logits.new_zeros((*logits.shape[:2], *size), dtype=dtype)
                if logits.shape[1] != maps.shape[1]:
                    raise ValueError(f"The networks differ: {maps.shape[1]} and {logits.shape[1]} classes.")
                maps[:, :, rows] += logits if alone else logits.float().softmax(1)
            passes += 1
    if alone:
        return maps
    # A probability that is zero in float32 must not become -inf: resizing would make NaN of it.
    return maps.div_(passes).clamp_min_(torch.finfo(maps.dtype).tiny).log_()


def predict(
    logits_fn: LogitsFn | Sequence[LogitsFn], pixel_values: Tensor | Sequence[Tensor], **options: Any
) -> Tensor:
    """Class ids, long (B, H, W), of normalised images (B, 3, H, W).

    Args:
        options: those of `predict_logits`; logits are resized to its `target_size` before the arg max.
    """
    return class_ids(predict_logits(logits_fn, pixel_values, **options))


def class_ids(logits: Tensor) -> Tensor:
    """The arg max over classes, long (B, H, W), of logits or probabilities (B, C, H, W), some rows at a time."""
    ids = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=torch.long, device=logits.device)
    for target, rows in zip(ids.split(STRIP, dim=1), logits.split(STRIP, dim=2), strict=True):
        target.copy_(rows.argmax(1))
    return ids


@torch.no_grad()
def add_probabilities(total: Tensor | None, logits: Tensor) -> Tensor:
    """`total` plus the soft-max of the logits (B, C, H, W); none: the soft-max, which takes the logits' place.

    A sum over networks so needs one set of maps beside the newest logits; both are worked on some rows at a time.
    """
    if total is None:
        total = logits if logits.dtype == torch.float32 else logits.float()
        for rows in total.split(STRIP, dim=2):
            rows.copy_(rows.softmax(1))
        return total
    for sums, rows in zip(total.split(STRIP, dim=2), logits.split(STRIP, dim=2), strict=True):
        sums += rows.float().softmax(1)
    return total


def default_stride(crop_size: Sequence[int]) -> tuple[int, ...]:
    """Two thirds of the window, rounded up, as in the CPS release: 534 for 800, 342 for 512."""
    return tuple(-(-2 * side // 3) for side in crop_size)


def _check_options(networks, inputs, target_size, mode, crop_size, stride, window_batch_size, scales) -> None:
    if not networks:
        raise ValueError("`logits_fn` is an empty list: give at least one network.")
    if len(inputs) != len(networks):
        raise ValueError(f"`pixel_values` has {len(inputs)} entries for {len(networks)} networks: one for each.")
    if target_size is not None and (len(target_size) != 2 or min(target_size) < 1):
        raise ValueError(f"`target_size` must be (height, width) in pixels, got {target_size}.")
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
            images = pixel_values.new_empty((*pixel_values.shape[:2], *size))
            # Strip by strip: interpolating the whole takes as much memory again.
            for rows, part in _resized(iter(pixel_values.split(STRIP, dim=2)), pixel_values.shape[-2], size):
                images[:, :, rows] = part
        yield images, False
        if flip and images is pixel_values:
            yield images.flip(-1), True
        elif flip:
            for rows in images.split(STRIP, dim=2):
                rows.copy_(rows.flip(-1))
            yield images, True


def _logits(network: LogitsFn, images: Tensor) -> Tensor:
    logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[-2:] != images.shape[-2:]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`logits_fn` must return logits (B, C, H, W) at its input's size {tuple(images.shape[-2:])}, "
            f"got {found}. Wrap a model of transformers: as_logits_fn(model)."
        )
    return logits


def _slide(network, images, crop_size, stride, average, window_batch_size) -> Iterator[Tensor]:
    """Stitched logits from the top row to the last, at most `STRIP` rows at a time.

    Rows are finished when no later window reaches them, so only those of one window are kept.
    """
    batch, _, height, width = images.shape
    missing_rows, missing_columns = max(0, crop_size[0] - height), max(0, crop_size[1] - width)
    top, left = missing_rows // 2, missing_columns // 2
    if missing_rows or missing_columns:
        images = F.pad(images, (left, missing_columns - left, top, missing_rows - top))
    row_starts = _starts(images.shape[-2], crop_size[0], stride[0])
    column_starts = _starts(images.shape[-1], crop_size[1], stride[1])
    # How many windows see a pixel is how many see its row times how many see its column.
    seen_rows = _seen(row_starts, crop_size[0], images.device)[:, None]
    seen_columns = _seen(column_starts, crop_size[1], images.device)
    windows = [(image, column) for column in column_starts for image in range(batch)]
    sums = None  # of the rows from `row` on
    for row, following in zip(row_starts, [*row_starts[1:], images.shape[-2]], strict=True):
        for first in range(0, len(windows), window_batch_size):
            some = windows[first : first + window_batch_size]
            crops = [images[i, :, row : row + crop_size[0], x : x + crop_size[1]] for i, x in some]
            logits = _logits(network, torch.stack(crops))
            if sums is None:
                sums = logits.new_zeros(batch, logits.shape[1], crop_size[0], images.shape[-1])
            for (image, x), window in zip(some, logits, strict=True):
                sums[image, :, :, x : x + crop_size[1]] += window
        finished, real = following - row, (max(top, row), min(top + height, following))
        for begin in range(*real, STRIP):
            rows = slice(begin, min(begin + STRIP, real[1]))
            strip = sums[:, :, rows.start - row : rows.stop - row]
            strip = strip / (seen_rows[rows] * seen_columns) if average else strip.clone()
            yield strip[..., left : left + width]
        for begin in range(
            finished, crop_size[0], STRIP
        ):  # move up what stays; a few rows, as source and target overlap
            rows = sums[:, :, begin : begin + STRIP].clone()
            sums[:, :, begin - finished : begin - finished + rows.shape[2]] = rows
        sums[:, :, crop_size[0] - finished :] = 0


def _seen(starts: list[int], crop: int, device: torch.device) -> Tensor:
    """How many windows that begin at `starts` see each row (or column)."""
    seen = torch.zeros(starts[-1] + crop, device=device)
    for start in starts:
        seen[start : start + crop] += 1
    return seen


def _resized(
    strips: Iterator[Tensor], height: int, size: tuple[int, int], align_corners: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Maps that come some rows at a time, resized as `F.interpolate` resizes the whole: (target rows, their maps).

    Bilinear: target row y lies between two source rows, at (y + 1/2) height / size[0] - 1/2, or with `align_corners`
    at y (height - 1) / (size[0] - 1).
    """
    at = torch.arange(size[0], dtype=torch.float64)
    if align_corners:
        at = at * (height - 1) / max(size[0] - 1, 1)
    else:
        at = ((at + 0.5) * height / size[0] - 0.5).clamp(0, height - 1)
    above = at.long()
    below = (above + 1).clamp(max=height - 1)
    kept, first, done = None, 0, 0  # source rows that are still needed, the first one's number, target rows made
    for strip in strips:
        kept = strip if kept is None else torch.cat([kept, strip], 2)
        ready = int(torch.searchsorted(below, first + kept.shape[2]))  # rows whose two source rows are there
        for start in range(done, ready, STRIP):
            rows = slice(start, min(start + STRIP, ready))
            if height == size[0]:
                part = kept[:, :, rows.start - first : rows.stop - first]
            else:
                a, b = ((of[rows] - first).to(kept.device) for of in (above, below))
                share = (at - above)[rows].to(kept)[:, None]
                part = torch.lerp(kept[:, :, a], kept[:, :, b], share)
            if part.shape[-1] != size[1]:
                part = F.interpolate(part, size=(part.shape[2], size[1]), mode="bilinear", align_corners=align_corners)
            yield rows, part
        done = ready
        if done < size[0]:
            drop = min(int(above[done]) - first, kept.shape[2])
            kept, first = kept[:, :, drop:], first + drop


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, and one that ends with the image."""
    starts = list(range(0, side - crop + 1, stride))
    return starts if starts[-1] == side - crop else [*starts, side - crop]
