"""Outlines of the regions of a mask, exact or simplified, such that neighbors keep sharing their edges.

Outlines run along the edges between pixels, so that `shapes.polygon` fills exactly the region again. They are
simplified (Douglas and Peucker, 1973) in arcs, from one point where three regions meet to the next. Both neighbors of
an arc keep the same points, so that no gap opens between them. No point of an outline moves by more than the
tolerance, so a pixel whose center is farther than that from every boundary keeps its class.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

# Directions right, down, left, up, in (x, y); the region is on the right-hand side.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
_NO_CLASS = -1  # around the image


@dataclass(frozen=True)
class Outline:
    """A region of one class whose pixels are connected by their sides.

    Attributes:
        class_id: its class.
        ring: (N, 2), x and y in pixels. For a region with holes, a cut leads to each hole and back, so that a single
            closed line surrounds the region, for tools without holes.
        outer: (N, 2), the outline alone. holes: the outlines of its holes.
        area: pixels of the region, before simplification.
    """

    class_id: int
    ring: np.ndarray
    outer: np.ndarray
    holes: tuple[np.ndarray, ...]
    area: int


def trace(ids: np.ndarray, *, tolerance: float = 0) -> list[Outline]:
    """The outlines of all regions of a mask, from the upper left. Regions that vanish by simplification are omitted.

    Args:
        ids: (H, W), up to 255; each value has its own regions.
        tolerance: how far a point may move, in pixels; 0 is exact.
    """
    height, width = ids.shape
    padded = np.full((height + 2, width + 2), _NO_CLASS, np.int16)
    padded[1:-1, 1:-1] = ids
    loops, of_edge = _loops(padded)
    junctions = _junctions(padded)
    outers: dict[int, list[int]] = {}
    holes: dict[int, list[int]] = defaultdict(list)
    areas = [_signed_area(loop) for loop in loops]
    for i, area in enumerate(areas):
        if area > 0:
            outers[i] = []
    for i, area in enumerate(areas):
        if area < 0:
            holes[_outer_of(i, loops, areas, of_edge, padded)].append(i)
    found = []
    for i in outers:
        outer = _simplified(loops[i], junctions, tolerance)
        inner = [_simplified(loops[j], junctions, tolerance) for j in holes[i]]
        inner = [ring for ring in inner if len(ring) > 2]
        if len(outer) < 3:
            continue
        x, y = loops[i][0]  # an outer loop begins at the upper left corner of its first pixel
        class_id = int(padded[y + 1, x + 1])
        area = int(areas[i] + sum(areas[j] for j in holes[i]))
        found.append(Outline(class_id, _one_ring(outer, inner), outer, tuple(inner), area))
    return found


def without_specks(ids: np.ndarray, least: int) -> np.ndarray:
    """The mask without regions of fewer than `least` pixels: each of their pixels takes a neighbor's class.

    A mask that consists only of such regions is returned unchanged.
    """
    regions = _regions(ids)
    is_speck = np.bincount(regions.ravel())[regions] < least
    if not is_speck.any() or is_speck.all():
        return ids
    filled = np.where(is_speck, _NO_CLASS, ids.astype(np.int16))
    while (filled == _NO_CLASS).any():
        around = np.pad(filled, 1, constant_values=_NO_CLASS)
        for neighbour in (around[:-2, 1:-1], around[1:-1, :-2], around[1:-1, 2:], around[2:, 1:-1]):
            filled = np.where(filled == _NO_CLASS, neighbour, filled)
    return filled.astype(ids.dtype)


# ------------------------------------------------------------------------------------------------ following edges


def _loops(padded: np.ndarray) -> tuple[list[list[tuple[int, int]]], dict[tuple[int, int], int]]:
    """All closed boundaries of every region, point by point, and an index: the loop that goes upwards along a pixel's
    left side, by the pixel's x and row.

    If two regions of one class touch only at a corner, each loop keeps to its own pixels.
    """
    labels, stride = padded.ravel().tolist(), padded.shape[1]
    begins = np.argwhere(padded[1:-1, 1:-1] != padded[:-2, 1:-1]).tolist()
    seen: set[tuple[int, int]] = set()  # upper sides of pixels that a loop has passed
    loops, upwards = [], {}
    # From a point (x, y), the padded index of the pixels ahead, on the right and on the left, by direction.
    ahead = ((stride + 1, 1), (stride, stride + 1), (0, stride), (1, 0))
    for row, column in begins:
        if (row, column) in seen:
            continue
        own = labels[(row + 1) * stride + column + 1]
        x, y, direction, loop = column, row, 0, []
        while not (direction == 0 and (y, x) in seen):
            loop.append((x, y))
            if direction == 0:
                seen.add((y, x))
            elif direction == 3:
                upwards[x, y - 1] = len(loops)
            x, y = x + _STEPS[direction][0], y + _STEPS[direction][1]
            at = y * stride + x
            right, left = ahead[direction]
            if labels[at + right] != own:
                direction = (direction + 1) % 4
            elif labels[at + left] == own:
                direction = (direction - 1) % 4
        loops.append(loop)
    return loops, upwards


def _signed_area(loop: list[tuple[int, int]]) -> float:
    """The pixels that a loop surrounds; negative for the loop of a hole."""
    x, y = np.array(loop).T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def _outer_of(i: int, loops, areas, of_edge: dict[tuple[int, int], int], padded: np.ndarray) -> int:
    """The outer loop of the region that contains the hole `i`.

    Walk from the hole's leftmost side to the left, through the region's pixels, to the next boundary. It belongs to
    the outer loop, or to another hole that is farther to the left.
    """
    while areas[i] < 0:
        x, y = min(loops[i])
        # The hole's upper left pixel is (x, y); the pixel to its left belongs to the region.
        own = padded[y + 1, x]
        while padded[y + 1, x] == own:
            x -= 1
        i = of_edge[x, y]
    return i


def _junctions(padded: np.ndarray) -> np.ndarray:
    """bool (H + 1, W + 1): points where more than two boundaries meet."""
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    cracks = (a != b).astype(np.int8) + (b != d) + (d != c) + (c != a)
    return cracks > 2


# ------------------------------------------------------------------------------------------------ simplifying


def _simplified(loop: list[tuple[int, int]], junctions: np.ndarray, tolerance: float) -> np.ndarray:
    """(N, 2) of a closed loop. With fewer than three points, nothing is left of it."""
    points = np.array(loop)
    is_junction = junctions[points[:, 1], points[:, 0]]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    is_corner = (before != after).any(axis=1)
    points, is_junction = points[is_corner | is_junction], is_junction[is_corner | is_junction]
    if tolerance <= 0:
        return points.astype(float)
    if not is_junction.any():  # an isolated ring; both of its sides must begin at the same point
        return _arc(np.roll(points, -int(np.lexsort(points.T)[0]), axis=0), tolerance)
    points = np.roll(points, -int(is_junction.argmax()), axis=0)
    starts = np.flatnonzero(np.roll(is_junction, -int(is_junction.argmax())))
    closed = np.concatenate([points, points[:1]])
    ends = [*starts[1:], len(points)]
    return np.concatenate([_open_arc(closed[a : b + 1], tolerance) for a, b in zip(starts, ends, strict=True)])


def _arc(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """A ring that begins at the same point on both sides; small rings are kept unchanged."""
    kept = _open_arc(np.concatenate([ring, ring[:1]]), tolerance)
    return kept if len(kept) > 2 else ring.astype(float)


def _open_arc(points: np.ndarray, tolerance: float) -> np.ndarray:
    """The kept points of an arc, without its last point, which is the next arc's first.

    An arc is always simplified from the same end, regardless of the side it is visited from.
    """
    backwards = points[::-1]
    turned = tuple(points.ravel().tolist()) > tuple(backwards.ravel().tolist())
    kept = _kept(backwards if turned else points, tolerance)
    return points[kept[::-1] if turned else kept][:-1].astype(float)


def _kept(points: np.ndarray, tolerance: float) -> np.ndarray:
    """The points that Douglas and Peucker's algorithm keeps: bool (N,)."""
    kept = np.zeros(len(points), bool)
    kept[[0, -1]] = True
    todo = [(0, len(points) - 1)]
    while todo:
        first, last = todo.pop()
        if last - first < 2:
            continue
        start, along = points[first], points[last] - points[first]
        between = points[first + 1 : last] - start
        length = int(along @ along)
        share = (between @ along / length).clip(0, 1) if length else np.zeros(len(between))
        distance = np.hypot(*(between - share[:, None] * along).T)
        farthest = int(distance.argmax())
        if distance[farthest] > tolerance:
            middle = first + 1 + farthest
            kept[middle] = True
            todo += [(first, middle), (middle, last)]
    return kept


def _one_ring(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """One closed line: a cut leads from the outline to each hole and back the same way, and encloses no area."""
    ring = outer
    for hole in holes:
        start = hole[np.lexsort(hole.T[::-1])[0]]
        hole = np.roll(hole, -int((hole == start).all(axis=1).argmax()), axis=0)
        at = int(((ring - start) ** 2).sum(axis=1).argmin())
        ring = np.concatenate([ring[: at + 1], hole, hole[:1], ring[at:]])
    return ring


def _regions(ids: np.ndarray) -> np.ndarray:
    """A number for each region, int (H, W): the lowest number spreads across shared pixel sides."""
    height, width = ids.shape
    numbers = np.arange(height * width)
    flat = numbers.reshape(height, width)
    pairs = [
        np.stack([flat[:, :-1][ids[:, :-1] == ids[:, 1:]], flat[:, 1:][ids[:, :-1] == ids[:, 1:]]]),
        np.stack([flat[:-1][ids[:-1] == ids[1:]], flat[1:][ids[:-1] == ids[1:]]]),
    ]
    a, b = np.concatenate(pairs, axis=1)
    while True:
        low, high = np.minimum(numbers[a], numbers[b]), np.maximum(numbers[a], numbers[b])
        differs = low != high
        if not differs.any():
            return np.unique(numbers, return_inverse=True)[1].reshape(height, width)
        np.minimum.at(numbers, high[differs], low[differs])
        while not np.array_equal(shorter := numbers[numbers], numbers):
            numbers = shorter
