"""Outlines of masks: exact without a tolerance; with one, only pixels near a boundary change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from cps_hf.annotations.outlines import trace, without_specks
from cps_hf.annotations.shapes import polygon


def masks(most=9, classes=3):
    sizes = some.tuples(some.integers(1, most), some.integers(1, most), some.integers(0, 2**32 - 1))
    return sizes.map(lambda s: np.random.default_rng(s[2]).integers(0, classes, s[:2]).astype(np.uint8))


def blobs(seed, height=40, width=50, classes=3):
    """A mask of smooth regions."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    a, b, phase, weight = rng.random((4, classes, 6, 1, 1))
    return (weight * np.sin(a * x / 2 + b * y / 2 + 6 * phase)).sum(1).argmax(0).astype(np.uint8)


def filled(outlines, shape):
    """(the mask filled by the outlines' rings, how many rings contain each pixel)."""
    ids, count = np.full(shape, 99), np.zeros(shape, int)
    for outline in outlines:
        region = polygon([outline.ring], *shape)
        ids[region.window][region.pixels] = outline.class_id
        count[region.window] += region.pixels
    return ids, count


def regions(ids):
    """Regions connected by pixel sides, flood-filled one by one: {class: [pixels of each]}."""
    left, found = {(y, x) for y, x in np.ndindex(ids.shape)}, []
    while left:
        todo, region = [next(iter(left))], []
        left.discard(todo[0])
        while todo:
            y, x = todo.pop()
            region.append((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left and ids[near] == ids[y, x]:
                    left.discard(near)
                    todo.append(near)
        found.append((int(ids[region[0]]), len(region)))
    return sorted(found)


@settings(max_examples=60)
@given(masks())
def test_without_a_tolerance_each_region_is_restored_exactly(ids):
    outlines = trace(ids)
    back, count = filled(outlines, ids.shape)
    assert np.array_equal(back, ids) and (count == 1).all()
    assert sorted((o.class_id, o.area) for o in outlines) == regions(ids)
    for o in outlines:
        assert polygon([o.outer, *o.holes], *ids.shape).area == o.area


@pytest.mark.parametrize("tolerance", [0.75, 1, 2, 4])
def test_with_a_tolerance_only_pixels_near_a_boundary_change(tolerance):
    for seed in range(4):
        ids = blobs(seed)
        exact, simplified = trace(ids), trace(ids, tolerance=tolerance)
        changed = np.argwhere(filled(simplified, ids.shape)[0] != ids)[:, ::-1] + 0.5
        rings = [ring for o in exact for ring in (o.outer, *o.holes)]
        starts, ends = np.concatenate(rings), np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
        assert to_lines(changed, starts, ends).max(initial=0) <= tolerance + 1e-6
        points = [sum(len(o.ring) for o in outlines) for outlines in (exact, simplified)]
        assert points[1] < 0.7 * points[0]


def to_lines(points, starts, ends):
    """The distance of each point to the nearest of some line segments of nonzero length."""
    offset, along = points[:, None] - starts, ends - starts
    share = ((offset * along).sum(-1) / (along**2).sum(-1)).clip(0, 1)
    return np.linalg.norm(offset - share[..., None] * along, axis=-1).min(axis=1, initial=np.inf)


def test_no_gap_opens_between_neighbors():
    ids = blobs(3, 60, 80)
    back, count = filled(trace(ids, tolerance=1), ids.shape)
    assert (count == 1).mean() > 0.999 and (back == ids).mean() > 0.95


def test_a_cut_to_a_hole_encloses_no_area():
    ids = np.zeros((12, 14), np.uint8)
    ids[1:11, 1:13] = 1
    ids[3:5, 3:5] = ids[6:9, 5:11] = 2
    ids[7, 7] = 1
    ring, inner = (
        [o for o in trace(ids) if o.class_id == 1 and o.area > 1][0],
        [o for o in trace(ids) if o.class_id == 2],
    )
    assert len(ring.holes) == 2 and ring.area == 120 - 4 - 18 and len(inner) == 2 and ring.outer.shape == (4, 2)
    assert polygon([ring.ring], 12, 14).area == ring.area


def test_small_regions_survive_simplification_or_are_filled():
    ids = np.zeros((30, 30), np.uint8)
    ids[10, 10] = 1
    ids[20:22, 20:22] = 2
    assert sorted(o.area for o in trace(ids, tolerance=3) if o.class_id) == [1, 4]
    assert np.flatnonzero(without_specks(ids, 4)).size == 4 and not without_specks(ids, 5).any()
    assert np.array_equal(without_specks(ids, 1), ids)
    checkers = np.indices((6, 6)).sum(0) % 2
    assert np.array_equal(without_specks(checkers, 5), checkers)  # all regions are small
    halves = np.zeros((5, 9), np.uint8)
    halves[:, 5:] = 1
    halves[2, 4:6] = 2
    assert set(np.unique(without_specks(halves, 3))) == {0, 1}


@settings(max_examples=60)
@given(masks(most=12), some.integers(0, 8))
def test_no_small_region_is_left_unless_all_are_small(ids, least):
    done = without_specks(ids, least)
    if not np.array_equal(done, ids):
        assert min(area for _, area in regions(done)) >= least
