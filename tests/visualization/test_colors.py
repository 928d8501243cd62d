"""Display colours: distinguishable for everyone, and each as far as possible from all before it."""

import numpy as np
import pytest

from cps_hf.visualization import AGREEMENT, palette


@pytest.mark.parametrize(("count", "apart"), [(8, 15), (12, 15), (19, 15), (30, 13), (60, 8)])
def test_colours_are_distinguishable_with_colour_blindness(count, apart):
    """Distances in CIELAB; a distance of 2 is just visible."""
    views = {
        "usual": np.eye(3),
        "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    }
    for matrix in views.values():
        looks = [lab_of(color, np.array(matrix)) for color in palette(count)]
        nearest = min(np.linalg.norm(a - b) for i, a in enumerate(looks) for b in looks[:i])
        assert nearest > apart
    voc = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    looks = [lab_of(color, np.array(views["no red"])) for color in voc]
    assert np.linalg.norm(looks[2] - looks[3]) < 5, "the test could not tell good colours from bad"
    assert palette(count) == palette(min(255, count + 7))[:count]


def test_the_colours_of_agreement_are_distinguishable():
    blind = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    no_blue = [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    for matrix in (np.eye(3), np.array(blind), np.array(no_blue)):
        looks = [lab_of(color, matrix) for color in AGREEMENT.values()]
        assert min(np.linalg.norm(a - b) for i, a in enumerate(looks) for b in looks[:i]) > 25


def lab_of(color, matrix):
    """CIELAB written out, one colour at a time."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    r, g, b = np.clip(matrix @ linear, 0, 1)
    x, y, z = 0.4124 * r + 0.3576 * g + 0.1805 * b, 0.2126 * r + 0.7152 * g + 0.0722 * b, 0.0193 * r + 0.1192 * g
    z += 0.9505 * b
    f = [t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x / 0.9505, y, z / 1.089)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("count", [1, 2, 8, 9, 19, 150, 255])
def test_class_colours_are_unique_and_not_white(count):
    colors = palette(count)
    assert len(colors) == len(set(colors)) == count and (255, 255, 255) not in colors
    assert not set(colors) & set(AGREEMENT.values())


# How colours look without red, green or blue cones, in linear RGB (Machado, Oliveira, Fernandes; IEEE TVCG 2009).
SEEN = [
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
]


def looks_of(colors):
    """(n, 3) of 0 to 255 -> CIELAB as seen by the four kinds of eyes, (n, 4, 3)."""
    srgb = np.asarray(colors) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.stack([linear @ np.array(matrix).T for matrix in SEEN], 1).clip(0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = seen @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def distance_to(color, looks):
    """The distance of one colour from each of many, for the eyes that distinguish them least."""
    return np.sqrt(((looks - color) ** 2).sum(-1)).min(-1)


def test_each_colour_is_as_far_as_possible_from_the_others():
    steps = np.linspace(0, 255, 12).round()
    candidates = looks_of(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3))
    chosen = looks_of([(255, 255, 255), *palette(255)])
    nearest = np.full(len(candidates), np.inf)
    for index, color in enumerate(chosen):
        if index > 8:  # after white and Okabe and Ito's
            assert distance_to(color, chosen[:index]).min() == pytest.approx(nearest.max(), abs=1e-6)
        nearest = np.minimum(nearest, distance_to(color, candidates))
    apart = [distance_to(color, chosen[:index]).min() for index, color in enumerate(chosen) if index]
    assert min(apart[:20]) > 15 and min(apart) > 2, "a distance of 2 can just be seen"
