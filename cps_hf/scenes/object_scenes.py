"""Drawn object scenes with VOC's class ids: one to four objects, near ones over far ones, on a textured background."""

from __future__ import annotations

import numpy as np

from ..functional import IGNORE_INDEX
from .canvas import Canvas, check_scene, jitter, mixed, paint, photograph
from .object_shapes import SHAPES, Pen, person

_OBJECT_KIND = 2
_GROUNDS = (
    ("grass", (92, 132, 62)), ("grass", (150, 140, 80)), ("waves", (66, 112, 140)), ("waves", (40, 70, 90)),
    ("planks", (150, 112, 76)), ("grain", (120, 118, 116)), ("blotch", (200, 184, 146)), ("weave", (140, 80, 74)),
    ("plaster", (226, 228, 232)), ("leaves", (64, 90, 48)),
)  # fmt: skip
_WALLS = (
    ("grain", (130, 174, 220)), ("blotch", (200, 206, 212)), ("leaves", (70, 100, 54)), ("plaster", (214, 200, 170)),
    ("brick", (158, 92, 72)), ("ribs", (190, 180, 196)), ("grain", (236, 190, 140)), ("planks", (120, 90, 66)),
    ("weave", (120, 140, 130)), ("blotch", (60, 66, 84)),
)  # fmt: skip


def draw_object_scene(index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One object scene. The same (seed, index) always gives the same scene. Sizes and orientations vary.

    Returns:
        the image, uint8 (H, W, 3), and the labels, uint8 (H, W): 0 background, 1 to 20 VOC's classes, 255 along
        object borders.

    Raises:
        ValueError: `index` or `seed` is negative.
    """
    check_scene(index, seed)
    rng = np.random.default_rng(np.random.SeedSequence([seed, _OBJECT_KIND, index]))
    height, width = _size(rng)
    canvas = Canvas((height, width), 0, rng)
    horizon = _background(canvas, rng)
    count = int(rng.choice([1, 2, 3, 4], p=[0.35, 0.35, 0.2, 0.1]))
    share = rng.uniform(0.65, 1.0) if count == 1 else rng.uniform(0.45, 0.75)
    halves = np.sort(share / 2 * min(height, width) * rng.uniform(0.7, 1.15, count))  # far (small) ones first
    # As in VOC, people are the most common.
    classes = rng.integers(len(SHAPES), size=count)
    classes[rng.random(count) < 0.15] = SHAPES.index(person)
    for instance, (half, kind) in enumerate(zip(halves, classes, strict=True), start=1):
        x = rng.uniform(0.6 * half, width - 0.6 * half)
        y = np.clip(rng.normal(max(horizon, 0.55 * height), 0.1 * height), 0.7 * half, height - 0.6 * half)
        _shade(canvas, x, y + 0.85 * half, half, rng)
        canvas.begin(int(kind) + 1, instance=instance)
        SHAPES[kind](Pen(canvas, rng, (x, y), half, rng.normal(0, 0.09), int(rng.choice([-1, 1]))))
    image = photograph(canvas.picture(), rng, noise=6)
    labels = canvas.plane("labels")
    labels[_borders(canvas.plane("instances"))] = IGNORE_INDEX
    return image, labels


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width): landscape, portrait or square, including odd numbers."""
    long_side = int(rng.integers(112, 169))
    short_side = round(long_side / float(rng.choice([1.0, 1.2, 4 / 3, 1.5], p=[0.12, 0.18, 0.45, 0.25])))
    return (short_side, long_side) if rng.random() < 0.65 else (long_side, short_side)


def _background(canvas: Canvas, rng: np.random.Generator) -> float:
    """A wall or sky above a ground, with unlabeled clutter on both. Returns where they meet."""
    height, width = canvas.height, canvas.width
    horizon = height * rng.uniform(0.25, 0.75)
    canvas.begin(0)
    (kind, upper), (ground_kind, lower) = _WALLS[rng.integers(len(_WALLS))], _GROUNDS[rng.integers(len(_GROUNDS))]
    upper, lower = jitter(rng, upper, 18), jitter(rng, lower, 18)
    canvas.rectangle((0, 0, width, horizon + 1), upper, grain=(kind, rng.uniform(6, 26)))
    canvas.rectangle((0, horizon, width, height), lower, grain=(ground_kind, rng.uniform(6, 26)))
    for _ in range(rng.poisson(2.5)):
        x, y = rng.uniform(0, width), rng.normal(horizon, 0.2 * height)
        w, h = rng.uniform(3, 0.25 * width), rng.uniform(3, 0.25 * height)
        color = mixed(paint(rng), upper if y < horizon else lower, rng.uniform(0.1, 0.7))
        grain = (("plaster", "leaves", "planks", "grain")[rng.integers(4)], rng.uniform(3, 20))
        if rng.random() < 0.5:
            canvas.rectangle((x - w, y - h, x + w, y + h), color, grain=grain)
        else:
            canvas.ellipse((x - w, y - h, x + w, y + h), color, grain=grain)
    return horizon


def _shade(canvas: Canvas, x: float, y: float, half: float, rng: np.random.Generator) -> None:
    around = 2 * np.pi * np.arange(16) / 16
    points = [(x + 0.8 * half * np.cos(a), y + 0.15 * half * np.sin(a)) for a in around]
    canvas.darken(points, rng.uniform(0.0, 0.5))


def _borders(instances: np.ndarray) -> np.ndarray:
    """Where an instance meets another one or the background, one pixel on either side: bool (H, W)."""
    borders = np.zeros(instances.shape, bool)
    across, down = instances[:, 1:] != instances[:, :-1], instances[1:] != instances[:-1]
    borders[:, 1:] |= across
    borders[:, :-1] |= across
    borders[1:] |= down
    borders[:-1] |= down
    return borders
