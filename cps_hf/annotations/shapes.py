"""Rasterize shapes by one rule: a pixel belongs to a shape if the shape contains the pixel's center.

Coordinates are (x, y) in pixels from the image's upper left corner. The first pixel's center is (0.5, 0.5), and a
rectangle from (0, 0) to (10, 10) has 100 pixels. The inside follows the even-odd rule, as in LabelMe and COCO: an area
that an outline surrounds twice is outside. If two shapes share an edge, each pixel belongs to exactly one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Region(NamedTuple):
    """The pixels of a shape inside its image.

    Attributes:
        top, left: position of the window. pixels: bool (H, W), the window.
        cut: whether the shape extends beyond its image by more than a pixel.
    """

    top: int
    left: int
    pixels: np.ndarray
    cut: bool = False

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.pixels))

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.pixels.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def polygon(rings: Sequence[np.ndarray], height: int, width: int) -> Region:
    """The inside of closed outlines, (N, 2) each: a part and its holes, or parts that do not overlap."""
    starts = np.concatenate(rings)
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    (top, left), (bottom, right), cut = _window(starts, 0, height, width)
    rows, columns = bottom - top, right - left
    # Every edge runs downwards, so that both sides of a shared edge compute the same crossings.
    down = (starts[:, 1] <= ends[:, 1])[:, None]
    (x0, y0), (x1, y1) = np.where(down, starts, ends).T, np.where(down, ends, starts).T
    first = np.ceil(y0 - 0.5).clip(top, bottom).astype(int)
    count = np.ceil(y1 - 0.5).clip(top, bottom).astype(int) - first
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = (x1 - x0)[edge] / (y1 - y0)[edge]  # edges between two rows of centers are already excluded
    crossing = x0[edge] + (row + 0.5 - y0[edge]) * slope
    column = np.ceil(crossing - 0.5).clip(left, right).astype(int)
    at = (row - top) * (columns + 1) + column - left
    crossings = np.bincount(at, minlength=rows * (columns + 1)).reshape(rows, columns + 1)
    return Region(top, left, np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1, cut)


def rectangle(a: Sequence[float], b: Sequence[float], height: int, width: int, *, degrees: float = 0) -> Region:
    """A rectangle between two opposite corners, rotated clockwise about its center."""
    (x0, y0), (x1, y1) = a, b
    corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)
    center = corners.mean(axis=0)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = corners if degrees == 0 else (corners - center) @ np.array([(cos, sin), (-sin, cos)]) + center
    return polygon([turned], height, width)


def ellipse(center: Sequence[float], radii: Sequence[float], height: int, width: int, *, degrees: float = 0) -> Region:
    """An ellipse (with equal radii, a circle), rotated clockwise about its center."""
    (cx, cy), (rx, ry) = center, radii
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    reach = np.hypot(rx * cos, ry * sin), np.hypot(rx * sin, ry * cos)
    (top, left), (bottom, right), cut = _window(np.array([center]), reach, height, width)
    y, x = np.ogrid[top:bottom, left:right]
    x, y = x + 0.5 - cx, y + 0.5 - cy
    if min(rx, ry) <= 0:
        return Region(top, left, np.zeros((bottom - top, right - left), bool), cut)
    along, across = x * cos + y * sin, y * cos - x * sin
    return Region(top, left, (along / rx) ** 2 + (across / ry) ** 2 <= 1, cut)


def line(points: np.ndarray, thickness: float, height: int, width: int) -> Region:
    """All pixels within half the thickness of a line through points (N, 2); a disc for a single point."""
    radius = thickness / 2
    (top, left), (bottom, right), _ = _window(points, radius, height, width)
    y, x = np.ogrid[top:bottom, left:right]
    x, y = x + 0.5, y + 0.5
    pixels = np.zeros((bottom - top, right - left), bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] if len(points) > 1 else points, strict=False):
        length = (bx - ax) ** 2 + (by - ay) ** 2
        share = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / (length or 1)
        share = share.clip(0, 1)
        pixels |= (x - ax - share * (bx - ax)) ** 2 + (y - ay - share * (by - ay)) ** 2 <= radius**2
    return Region(top, left, pixels, _window(points, 0, height, width)[2])


def discs(points: np.ndarray, thickness: float, height: int, width: int) -> Region:
    """A disc around each of the points (N, 2)."""
    return union([line(point[None], thickness, height, width) for point in points])


def bitmap(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> Region:
    """A mask (H, W) whose upper left pixel is at (top, left), which may be outside the image."""
    bottom, right = top + pixels.shape[0], left + pixels.shape[1]
    cut = top < 0 or left < 0 or bottom > height or right > width
    inside = pixels[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    return Region(max(top, 0), max(left, 0), inside.astype(bool), cut)


def union(regions: Sequence[Region]) -> Region:
    """All pixels of several regions."""
    if len(regions) == 1:
        return regions[0]
    top, left = min(r.top for r in regions), min(r.left for r in regions)
    bottom = max(r.top + r.pixels.shape[0] for r in regions)
    right = max(r.left + r.pixels.shape[1] for r in regions)
    whole = Region(top, left, np.zeros((bottom - top, right - left), bool), any(r.cut for r in regions))
    for r in regions:
        height, width = r.pixels.shape
        whole.pixels[r.top - top : r.top - top + height, r.left - left : r.left - left + width] |= r.pixels
    return whole


def _window(points: np.ndarray, reach, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """(top, left), (bottom, right) of the area within `reach` of the points and in the image; whether it is cut."""
    low, high = points.min(axis=0) - reach, points.max(axis=0) + reach
    most = np.array([width, height])
    (left, top), (right, bottom) = np.floor(low).clip(0, most), np.ceil(high).clip(0, most)
    cut = bool((low < -1).any() or (high > most + 1).any())
    return (int(top), int(left)), (int(bottom), int(right)), cut
