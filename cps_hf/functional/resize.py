"""Bilinear resizing of some rows of maps, equal to `F.interpolate` on whole maps, for piecewise losses and windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BY_LINES = {"cpu": True, "cuda": False}
"""By device, whether columns are resized as lines, one per class and row. On GPUs, torch's kernel for lines
uses one thread per column and takes 30 times as long as the one for images (benchmarks/LOG.md)."""


def source_rows(height: int, target: int, rows: slice, *, align_corners: bool = False) -> slice:
    """The source rows that are needed for some target rows. Computed on the host, so no device synchronisation.

    Args:
        height, target: the number of rows in the source and in the target. rows: of the target, at least one.
    """
    if height == target:
        return rows
    scale, offset = _positions(height, target, align_corners)
    first = min(int(max(scale * rows.start + offset, 0)), height - 1)
    last = min(int(max(scale * (rows.stop - 1) + offset, 0)) + 1, height - 1)
    return slice(first, last + 1)


def resize_rows(
    source: Tensor, rows: slice, *, first: int, height: int, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """Some rows of maps that are resized from (height, w) to `size` (H, W).

    Args:
        source: (B, C, h, w) float, rows of the maps from number `first` on: those from `source_rows`, or more.
        rows: of the resized maps.

    Returns:
        (B, C, rows, W). Gradients flow into `source`.
    """
    by_lines = BY_LINES.get(source.device.type, False)
    if rows == slice(0, size[0]) and source.shape[2] == height and not by_lines:
        return F.interpolate(source, size=size, mode="bilinear", align_corners=align_corners)
    if height == size[0]:
        source = source[:, :, rows.start - first : rows.stop - first]
    else:
        scale, offset = _positions(height, size[0], align_corners)
        numbers = torch.arange(rows.start, rows.stop, device=source.device, dtype=torch.float64)
        position = (numbers * scale + offset).clamp(min=0)
        above = position.long().clamp(max=height - 1)
        below = (above + 1).clamp(max=height - 1)
        share = (position - above).unsqueeze(1).to(source.dtype)
        source = torch.lerp(source.index_select(2, above - first), source.index_select(2, below - first), share)
    *others, width = source.shape
    if width == size[1]:
        return source
    if not by_lines:
        return F.interpolate(source, size=(others[-1], size[1]), mode="bilinear", align_corners=align_corners)
    lines = F.interpolate(source.reshape(1, -1, width), size=size[1], mode="linear", align_corners=align_corners)
    return lines.view(*others, size[1])


def _positions(height: int, target: int, align_corners: bool) -> tuple[float, float]:
    """Target row y is at scale * y + offset in source rows."""
    if align_corners:
        return (height - 1) / max(target - 1, 1), 0.0
    return height / target, 0.5 * height / target - 0.5
