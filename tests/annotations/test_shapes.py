"""Rasterized shapes: pixel centers, compared with matplotlib's point test and with COCO's library."""

import numpy as np
import pytest
from support.exports import inside

from cps_hf.annotations.shapes import bitmap, discs, ellipse, line, polygon, rectangle, union

HEIGHT, WIDTH = 37, 53


def whole(region, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), bool)
    mask[region.window] = region.pixels
    return mask


def star(rng, reach=20.0):
    """An outline around (26, 18) that does not cross itself and may leave the image."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 30)))
    radii = rng.uniform(2, reach, len(angles))
    return np.stack([26 + radii * np.cos(angles), 18 + radii * np.sin(angles)], 1)


def test_a_polygon_contains_the_pixel_centers_matplotlib_finds():
    rng = np.random.default_rng(0)
    for reach in (4, 20, 60):
        for _ in range(30):
            points = star(rng, reach)
            assert np.array_equal(whole(polygon([points], HEIGHT, WIDTH)), inside(points, HEIGHT, WIDTH))


def test_a_polygon_equals_cocos_except_on_its_edge():
    library = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for _ in range(20):
        points = star(rng)
        runs = library.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH)
        theirs = library.decode(library.merge(runs)).astype(bool)
        for row, column in np.argwhere(theirs != whole(polygon([points], HEIGHT, WIDTH))):
            starts, along = points, np.roll(points, -1, axis=0) - points
            offset = (column + 0.5, row + 0.5) - starts
            share = ((offset * along).sum(1) / (along**2).sum(1)).clip(0, 1)
            assert np.hypot(*(offset - share[:, None] * along).T).min() < 1.2


def test_the_even_odd_rule_and_holes():
    outer, inner = np.array([(2, 2), (12, 2), (12, 12), (2, 12)]), np.array([(4, 4), (8, 4), (8, 9), (4, 9)])
    region = polygon([outer, inner], HEIGHT, WIDTH)
    assert region.area == 100 - 20 and not whole(region)[4:9, 4:8].any()
    bow = np.array([(0, 0), (10, 0), (10, 10), (5, 10), (5, -5), (0, -5)])  # crosses itself
    assert np.array_equal(
        whole(polygon([np.concatenate([outer, outer[:1], inner, inner[:1]])], HEIGHT, WIDTH)), whole(region)
    )
    assert polygon([bow], HEIGHT, WIDTH).area == 50


def test_neighbors_split_the_pixels_on_their_common_edge():
    rng = np.random.default_rng(2)
    for _ in range(50):
        middle = rng.integers(0, 20, (5, 2)) / 2 + (20, 10)  # also through pixel centers
        left = np.concatenate([[(0, 0), (26, 0)], middle, [(26, 37), (0, 37)]])
        right = np.concatenate([[(26, 0), (53, 0), (53, 37), (26, 37)], middle[::-1]])
        a, b = (whole(polygon([points], HEIGHT, WIDTH)).astype(int) for points in (left, right))
        assert ((a + b) % 2 == 1).all()


def test_rectangles_circles_and_lines_have_their_areas():
    assert rectangle((2, 3), (12, 8), HEIGHT, WIDTH).area == rectangle((12, 8), (2, 3), HEIGHT, WIDTH).area == 50
    turned = rectangle((10, 10), (30, 20), HEIGHT, WIDTH, degrees=90)
    assert np.argwhere(whole(turned)).min(0).tolist() == [5, 15] and turned.area == 200
    assert np.array_equal(
        whole(rectangle((10, 10), (30, 20), HEIGHT, WIDTH, degrees=30)),
        whole(polygon([_turned((20, 15), (10, 10), (30, 20), 30)], HEIGHT, WIDTH)),
    )
    circle = ellipse((20, 18), (16.45, 16.45), HEIGHT, WIDTH)
    assert abs(circle.area - 850) < 10 and whole(circle)[18, 4] and not whole(circle)[18, 3]
    tilted = whole(ellipse((25, 18), (15, 5), HEIGHT, WIDTH, degrees=90))
    assert np.array_equal(tilted, whole(ellipse((25, 18), (5, 15), HEIGHT, WIDTH)))
    clockwise = whole(ellipse((25, 18), (15, 3), HEIGHT, WIDTH, degrees=30))  # to the lower right, since y points down
    assert clockwise[25, 37] and not clockwise[11, 37]
    stroke = whole(line(np.array([(10.0, 10.0), (30.0, 10.0), (30.0, 30.0)]), 4, HEIGHT, WIDTH))
    assert abs(stroke.sum() - (40 * 4 + 4 * np.pi)) < 12 and stroke[9, 20] and stroke[20, 31] and not stroke[13, 20]
    assert abs(discs(np.array([(5.0, 5.0), (40.0, 20.0)]), 10, HEIGHT, WIDTH).area - 2 * 25 * np.pi) < 8
    assert ellipse((5, 5), (0, 3), HEIGHT, WIDTH).area == 0


def _turned(center, a, b, degrees):
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    corners = np.array([a, (b[0], a[1]), b, (a[0], b[1])], float) - center
    return np.stack([corners[:, 0] * cos - corners[:, 1] * sin, corners[:, 0] * sin + corners[:, 1] * cos], 1) + center


@pytest.mark.parametrize(
    "draw",
    [
        lambda: polygon([np.array([(-30.0, -20), (10, -20), (10, 10), (-30, 10)])], HEIGHT, WIDTH),
        lambda: rectangle((-30, -20), (10, 10), HEIGHT, WIDTH),
        lambda: bitmap(np.ones((30, 40), bool), -20, -30, HEIGHT, WIDTH),
    ],
)
def test_shapes_outside_the_image_are_cut_and_marked(draw):
    assert whole(draw()).sum() == 100 and whole(draw())[:10, :10].all() and draw().cut
    assert not rectangle((0, 0), (53.4, 37), HEIGHT, WIDTH).cut


def test_a_shape_outside_the_image_has_no_pixels():
    for region in (
        polygon([np.array([(100.0, 100), (120, 100), (120, 120)])], HEIGHT, WIDTH),
        ellipse((-50, 10), (5, 5), HEIGHT, WIDTH),
        line(np.array([(200.0, 5.0)]), 10, HEIGHT, WIDTH),
        bitmap(np.ones((3, 3), bool), 50, 60, HEIGHT, WIDTH),
        polygon([np.array([(3.0, 3), (9, 3)])], HEIGHT, WIDTH),
    ):
        assert region.area == 0 and whole(region).shape == (HEIGHT, WIDTH)
    assert union([rectangle((0, 0), (2, 2), 9, 9), rectangle((1, 1), (4, 4), 9, 9)]).area == 4 + 9 - 1
