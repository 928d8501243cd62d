"""From images to full-size logits and class maps: whole images or sliding windows, several scales, with flips.

Works with any callable `(pixel_values (B, 3, H, W)) -> logits (B, C, H, W)`: a `Branch`, or `as_logits_fn(model)`.
For a list of such callables, the mean of their probabilities is used.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import StridedLogits, resize_rows, source_rows
from ..modeling.branches import Branch

LogitsFn = Callable[[Tensor], Tensor]
STRIP = 12  # rows to process at a time, where copies of whole maps would need too much memory
BAND = 2**28  # numbers of 4 bytes: if an image's maps are larger, `predict_each` keeps only one set of them


def as_logits_fn(model: nn.Module) -> LogitsFn:
    """Any transformers segmentation model, in evaluation mode, as a callable: float32 logits at the input's size."""
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
    """Compute logits (B, C, H, W) of normalised images (B, 3, H, W).

    With one network, one scale and no flip, its logits are returned unchanged. Otherwise the soft-max maps of all
    passes are averaged at the maps' size, and the logarithm of the mean is returned (whose soft-max is the mean).

    In addition to the network's own needs, memory holds the images, one set of full-size maps and, with "sliding", the
    rows of one window, whatever the options (benchmarks/inference_memory.py). Whole images' logits of a `Branch` are
    resized once, from the model's own size to `target_size`; those of other callables, from the size of their input.

    Args:
        logits_fn: one callable, or several.
        pixel_values: the images; or, for several callables with different image processors, the same images once for
            each.
        target_size: (height, width) of the maps, e.g. the label's. If `None`, the (first) images' size.
        mode: "whole" (a network that only accepts one size, such as EoMT, gets windows of that size with a stride of
            two thirds), or "sliding": windows of `crop_size` every `stride` pixels, with the last ones shifted to end
            with the image. An image smaller than the window is padded with zeros (the mean colour) on all sides, as in
            the CPS release, and as training pads its crops.
        crop_size, stride: (height, width) in pixels, for "sliding". They are the same at every scale.
        average: divide summed logits by the number of windows that saw a pixel. If false, sum them, as in the CPS
            release.
        window_batch_size: windows per forward pass: windows that start at the same row, of all images of the batch.
        scales: factors of height and width at which the images are predicted.
        flip: also predict the mirrored images.

    Raises:
        ValueError: the mode does not exist, windows would leave gaps, there is no scale, networks have different
            classes, or a callable does not return logits at the size of its input.
    """
    networks, inputs, size = _checked(logits_fn, pixel_values, target_size)
    opts = _Options(mode, crop_size, stride, average, window_batch_size, scales, flip)
    return _maps(networks, inputs, opts, size, slice(0, size[0]))


def predict(
    logits_fn: LogitsFn | Sequence[LogitsFn], pixel_values: Tensor | Sequence[Tensor], **options: Any
) -> Tensor:
    """Class ids, long (B, H, W), of normalised images (B, 3, H, W).

    Args:
        options: those of `predict_logits`; logits are resized to its `target_size` before the arg max.
    """
    return class_ids(predict_logits(logits_fn, pixel_values, **options))


def check_options(**options: Any) -> None:
    """Raise the `ValueError` of invalid options of `predict_logits`, before there is an image."""
    _Options(**options)


def class_ids(logits: Tensor) -> Tensor:
    """The arg max over classes, long (B, H, W), of logits or probabilities (B, C, H, W), a few rows at a time."""
    ids = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=torch.long, device=logits.device)
    for target, rows in zip(ids.split(STRIP, dim=1), logits.split(STRIP, dim=2), strict=True):
        target.copy_(rows.argmax(1))
    return ids


@torch.no_grad()
def predict_each(
    networks: Sequence[LogitsFn], pixel_values: Tensor | Sequence[Tensor], *, num_labels: int, **options: Any
) -> list[Tensor]:
    """Class ids (B, H, W) of each network and, if there are several, of the mean of their probabilities as the last.

    uint8, or long if there are more than 255 classes.

    A large image, whose maps have more than `BAND` numbers, also needs only one set of maps. With one scale and no
    flip, this is the sum over the networks, to which each adds a few rows at a time. Otherwise each network needs its
    own maps, so the image is predicted in bands of rows; windows and whole images needed by two bands are predicted
    twice.

    Args:
        num_labels: the networks' number of classes.
        options: those of `predict_logits`.
    """
    networks, inputs, size = _checked(networks, pixel_values, options.pop("target_size", None))
    opts = _Options(**options)
    numbers = num_labels * size[0] * size[1]
    bands = min(size[0], -(-numbers // BAND)) if not opts.once else 1
    shape = (len(inputs[0]), *size)
    dtype = torch.uint8 if num_labels <= 255 else torch.long
    found = [inputs[0].new_empty(shape, dtype=dtype) for _ in range(len(networks) + (len(networks) > 1))]
    for first, end in itertools.pairwise(size[0] * i // bands for i in range(bands + 1)):
        total = inputs[0].new_zeros((len(inputs[0]), num_labels, end - first, size[1]), dtype=torch.float32)
        for ids, network, images in zip(found, networks, inputs, strict=False):
            if opts.once and numbers > BAND:
                parts = _pass(network, images, opts, 1.0, False, size, slice(first, end))
            else:
                parts = [(slice(first, end), _maps([network], [images], opts, size, slice(first, end)))]
            for rows, logits in parts:
                ids[:, rows] = class_ids(logits)
                if len(networks) > 1:
                    add_probabilities(total[:, :, rows.start - first : rows.stop - first], logits)
            del parts, logits  # before the next network makes its own
        if len(networks) > 1:
            found[-1][:, first:end] = class_ids(total)
    return found


@torch.no_grad()
def predict_rows(
    networks: Sequence[LogitsFn],
    views: Sequence[Callable[[slice], Tensor]],
    size: tuple[int, int],
    **options: Any,
) -> Iterator[tuple[slice, Tensor]]:
    """Class ids of an image that does not fit into memory, from top to bottom: (rows, uint8 (rows, W)).

    The ids equal those of `predict_logits` with sliding windows. Memory holds the rows of one window: those of the
    image, and for each network (twice with `flip`) classes x window height x image width logits.

    Args:
        views: for each network, rows of the image from its image processor: slice -> float (1, 3, rows, W).
        size: height and width of the image.
        options: those of `predict_logits`, with `mode="sliding"` and one scale.

    Raises:
        ValueError: as in `predict_logits`; or another mode, several scales, or more than 255 classes.
    """
    opts = _Options(**options)
    if opts.mode != "sliding" or tuple(opts.scales) != (1,):
        raise ValueError("Prediction by rows only supports sliding windows at the image's own size: no scales.")
    passes = [
        _pass_of_rows(network, view, opts, mirrored, size)
        for network, view in zip(networks, views, strict=True)
        for _, mirrored in opts.versions
    ]
    first = 0
    for strips in zip(*passes, strict=True):
        total = strips[0]
        if len(strips) > 1:
            if len({strip.shape[1] for strip in strips}) > 1:
                raise ValueError(f"The networks have {' and '.join(str(s.shape[1]) for s in strips)} classes.")
            total = sum(strip.float().softmax(1) for strip in strips)
        if total.shape[1] > 255:
            raise ValueError(f"Class ids of {total.shape[1]} classes do not fit into an 8-bit mask.")
        ids = total.argmax(1)[0].to(torch.uint8)
        yield slice(first, first + len(ids)), ids
        first += len(ids)


def _pass_of_rows(
    network: LogitsFn, view: Callable[[slice], Tensor], opts: _Options, mirrored: bool, size: tuple[int, int]
) -> Iterator[Tensor]:
    def seen(rows: slice) -> Tensor:
        return view(rows).flip(-1) if mirrored else view(rows)

    for strip in _slide(network, seen, opts, size, slice(0, size[0])):
        yield strip.flip(-1) if mirrored else strip


@torch.no_grad()
def add_probabilities(total: Tensor | None, logits: Tensor) -> Tensor:
    """`total` plus the soft-max of the logits (B, C, H, W). If `total` is `None`, the soft-max, which overwrites the
    logits.

    A sum over networks therefore needs one set of maps in addition to the newest logits. Both are processed a few rows
    at a time.
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


@dataclass(frozen=True)
class _Options:
    """The options of `predict_logits`, checked."""

    mode: str = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    average: bool = True
    window_batch_size: int = 4
    scales: Sequence[float] = (1.0,)
    flip: bool = False

    def __post_init__(self):
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"`scales` must be one or more positive factors, got {self.scales}.")
        if self.mode not in ("whole", "sliding"):
            raise ValueError(f'`mode` must be "whole" or "sliding", got {self.mode!r}.')
        if self.window_batch_size < 1:
            raise ValueError(f"`window_batch_size` must be at least 1, got {self.window_batch_size}.")
        if self.mode == "whole":
            return
        for name, value in (("crop_size", self.crop_size), ("stride", self.stride)):
            if value is None or len(value) != 2 or min(value) < 1:
                raise ValueError(f'`{name}` must be (height, width) in pixels with `mode="sliding"`, got {value}.')
        if self.stride[0] > self.crop_size[0] or self.stride[1] > self.crop_size[1]:
            raise ValueError(
                f"`stride` {tuple(self.stride)} must not exceed `crop_size` {tuple(self.crop_size)}: pixels would be "
                "missed."
            )

    @property
    def versions(self) -> list[tuple[float, bool]]:
        """The inputs of a network: (scale, mirrored)."""
        return list(itertools.product(self.scales, (False, True) if self.flip else (False,)))

    @property
    def once(self) -> bool:
        """Whether a network sees the images once and unchanged."""
        return self.versions == [(1, False)]


def _checked(logits_fn, pixel_values, target_size) -> tuple[list[LogitsFn], list[Tensor], tuple[int, int]]:
    """The networks, the images of each, and the size of the maps."""
    networks = list(logits_fn) if isinstance(logits_fn, Sequence | nn.ModuleList) else [logits_fn]
    inputs = [pixel_values] * len(networks) if isinstance(pixel_values, Tensor) else list(pixel_values)
    if not networks:
        raise ValueError("`logits_fn` is an empty list: pass at least one network.")
    if len(inputs) != len(networks):
        raise ValueError(
            f"`pixel_values` has {len(inputs)} entries for {len(networks)} networks: pass one per network."
        )
    if target_size is not None and (len(target_size) != 2 or min(target_size) < 1):
        raise ValueError(f"`target_size` must be (height, width) in pixels, got {target_size}.")
    return networks, inputs, tuple(inputs[0].shape[-2:] if target_size is None else target_size)


def _maps(
    networks: list[LogitsFn], inputs: list[Tensor], opts: _Options, size: tuple[int, int], wanted: slice
) -> Tensor:
    """The result of `predict_logits` for the wanted rows."""
    alone, versions = opts.once and len(networks) == 1, opts.versions
    as_it_is = wanted == slice(0, size[0]) and tuple(inputs[0].shape[-2:]) == size
    if alone and as_it_is and _options_for(opts, networks[0], size).mode == "whole":
        return _logits(networks[0], inputs[0])
    maps = None
    for network, images in zip(networks, inputs, strict=True):
        for scale, mirrored in versions:
            for rows, logits in _pass(network, images, opts, scale, mirrored, size, wanted):
                if maps is None:
                    shape = (*logits.shape[:2], wanted.stop - wanted.start, size[1])
                    maps = logits.new_zeros(shape, dtype=logits.dtype if alone else torch.float32)
                if logits.shape[1] != maps.shape[1]:
                    raise ValueError(f"The networks have {maps.shape[1]} and {logits.shape[1]} classes.")
                part = maps[:, :, rows.start - wanted.start : rows.stop - wanted.start]
                part += logits if alone else logits.float().softmax(1)
    if alone:
        return maps
    # A probability that is zero in float32 must not become -inf: resizing would turn it into NaN.
    return maps.div_(len(networks) * len(versions)).clamp_min_(torch.finfo(maps.dtype).tiny).log_()


def _pass(
    network: LogitsFn,
    images: Tensor,
    opts: _Options,
    scale: float,
    mirrored: bool,
    size: tuple[int, int],
    wanted: slice,
) -> Iterator[tuple[slice, Tensor]]:
    """One network's logits of one version of the images, at most `STRIP` rows at a time: (rows of the maps,
    logits)."""
    seen = tuple(max(1, round(side * scale)) if scale != 1 else side for side in images.shape[-2:])
    view, align_corners = partial(_view, images, seen, mirrored), False
    opts, as_logits = _options_for(opts, network, seen), None
    if opts.mode == "sliding":
        height = seen[0]
        strips = _slide(network, view, opts, seen, source_rows(height, size[0], wanted))
    else:
        full = view(slice(0, seen[0]))
        logits = _strided(network, full)
        height, align_corners = logits.values.shape[2], logits.align_corners
        needed = source_rows(height, size[0], wanted, align_corners=align_corners)
        as_logits = logits._replace(values=None).logits_of
        strips = iter(logits.values[:, :, needed].split(STRIP, dim=2))
        del logits
    for rows, logits in _resized(strips, height, size, wanted, align_corners):
        logits = logits if as_logits is None else as_logits(logits)
        yield rows, logits.flip(-1) if mirrored else logits


def _options_for(opts: _Options, network: LogitsFn, size: tuple[int, int]) -> _Options:
    """The options for a network and images of this size: a `Branch` of one input size uses windows for other sizes."""
    window = network.window if isinstance(network, Branch) else None
    if opts.mode == "sliding" or window is None or window == tuple(size):
        return opts
    return replace(opts, mode="sliding", crop_size=window, stride=default_stride(window), average=True)


def _view(images: Tensor, size: tuple[int, int], mirrored: bool, rows: slice) -> Tensor:
    """Rows of the images as a network sees them: resized, and mirrored or not."""
    if tuple(images.shape[-2:]) == size:
        return images[:, :, rows].flip(-1) if mirrored else images[:, :, rows]
    seen = images.new_empty((*images.shape[:2], rows.stop - rows.start, size[1]))
    # Strip by strip: interpolating the whole takes as much memory again.
    source = images[:, :, source_rows(images.shape[-2], size[0], rows)].split(STRIP, dim=2)
    for part, pixels in _resized(iter(source), images.shape[-2], size, rows):
        seen[:, :, part.start - rows.start : part.stop - rows.start] = pixels.flip(-1) if mirrored else pixels
    return seen


def _logits(network: LogitsFn, images: Tensor) -> Tensor:
    logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[-2:] != images.shape[-2:]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`logits_fn` must return logits (B, C, H, W) at its input's size {tuple(images.shape[-2:])}, "
            f"got {found}. Wrap a transformers model: as_logits_fn(model)."
        )
    return logits


def _strided(network: LogitsFn, images: Tensor) -> StridedLogits:
    """The logits before resizing: of a `Branch` at the model's own size, of another callable at its input's."""
    if isinstance(network, Branch):
        return network.strided(images)
    return StridedLogits(_logits(network, images), tuple(images.shape[-2:]))


def _slide(network: LogitsFn, view, opts: _Options, size: tuple[int, int], wanted: slice) -> Iterator[Tensor]:
    """Stitched logits of the wanted rows of images of this size, from top to bottom, at most `STRIP` rows at a time.

    Rows are finished when no later window reaches them, so only the rows of one window are kept, of pixels and logits.
    `view(rows)` returns the images' rows.
    """
    crop, (height, width) = opts.crop_size, size
    missing_rows, missing_columns = max(0, crop[0] - height), max(0, crop[1] - width)
    top, left = missing_rows // 2, missing_columns // 2
    row_starts = _starts(height + missing_rows, crop[0], opts.stride[0])
    column_starts = _starts(width + missing_columns, crop[1], opts.stride[1])
    sums, first, end = None, wanted.start + top, wanted.stop + top  # `sums`: of the rows from `row` on
    needed = [row for row in row_starts if row + crop[0] > first and row < end]
    for row, following in itertools.pairwise([*needed, end]):
        pixels = view(slice(max(row - top, 0), min(row - top + crop[0], height)))
        if missing_rows or missing_columns:
            pixels = F.pad(pixels, (left, missing_columns - left, top, missing_rows - top))
        if sums is None:
            # The number of windows that see a pixel is the product of those that see its row and its column.
            seen_rows = _seen(row_starts, crop[0], pixels.device)[:, None]
            seen_columns = _seen(column_starts, crop[1], pixels.device)
        windows = [(image, column) for column in column_starts for image in range(len(pixels))]
        for begin in range(0, len(windows), opts.window_batch_size):
            some = windows[begin : begin + opts.window_batch_size]
            logits = _logits(network, torch.stack([pixels[image, :, :, x : x + crop[1]] for image, x in some]))
            if sums is None:
                sums = logits.new_zeros(len(pixels), logits.shape[1], crop[0], pixels.shape[-1])
            for (image, x), window in zip(some, logits, strict=True):
                sums[image, :, :, x : x + crop[1]] += window
        del pixels, logits
        for begin in range(max(first, row), following, STRIP):
            rows = slice(begin, min(begin + STRIP, following))
            strip = sums[:, :, rows.start - row : rows.stop - row]
            strip = strip / (seen_rows[rows] * seen_columns) if opts.average else strip.clone()
            yield strip[..., left : left + width]
        _move_up(sums, following - row)


def _move_up(sums: Tensor, by: int) -> None:
    """In place, a few rows at a time, since source and target overlap; zeros come in from below."""
    for begin in range(by, sums.shape[2], STRIP):
        rows = sums[:, :, begin : begin + STRIP].clone()
        sums[:, :, begin - by : begin - by + rows.shape[2]] = rows
    sums[:, :, max(sums.shape[2] - by, 0) :] = 0


def _seen(starts: list[int], crop: int, device: torch.device) -> Tensor:
    """How many windows that begin at `starts` contain each row (or column)."""
    seen = torch.zeros(starts[-1] + crop, device=device)
    for start in starts:
        seen[start : start + crop] += 1
    return seen


def _resized(
    strips: Iterator[Tensor], height: int, size: tuple[int, int], wanted: slice, align_corners: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Maps that arrive a few rows at a time, resized as `F.interpolate` resizes the whole: (target rows, their maps).

    Args:
        strips: the rows that `source_rows` names, of maps of this height.
    """

    def needed(row: int) -> slice:
        return source_rows(height, size[0], slice(row, row + 1), align_corners=align_corners)

    # Source rows that are still needed, the first one's number, target rows made.
    kept, first, done = None, needed(wanted.start).start, wanted.start
    for strip in strips:
        kept = strip if kept is None else torch.cat([kept, strip], 2)
        there = first + kept.shape[2]
        ready = bisect.bisect_right(range(wanted.stop), there, lo=done, key=lambda row: needed(row).stop)
        for start in range(done, ready, STRIP):
            rows = slice(start, min(start + STRIP, ready))
            yield rows, resize_rows(kept, rows, first=first, height=height, size=size, align_corners=align_corners)
        done = ready
        if done < wanted.stop:
            drop = min(needed(done).start - first, kept.shape[2])
            kept, first = kept[:, :, drop:], first + drop


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, and one that ends with the image."""
    starts = list(range(0, side - crop + 1, stride))
    return starts if starts[-1] == side - crop else [*starts, side - crop]
