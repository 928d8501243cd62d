"""What lines a drawn street on `side` (-1 left, 1 right), at X meters, from Z = `near` to `far`."""

from __future__ import annotations

import numpy as np

from .canvas import scaled
from .street_objects import ID, Stage, foliage, glass


def building(stage: Stage, side: int, x: float, near: float, far: float) -> None:
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    height, floor = rng.uniform(4, 18), rng.uniform(2.8, 3.8)
    wall = stage.paint("building")
    grain = (("brick", "plaster", "planks", "grain")[rng.integers(4)], rng.uniform(5, 24))
    canvas.begin(ID["building"], z=near)
    outer = x + side * 12
    canvas.polygon(camera.quad((x, outer), (0, height), near), scaled(wall, rng.uniform(0.75, 1.1)), grain=grain)
    if rng.random() < 0.4:  # a gable
        gable = [camera.project(x, height, near), camera.project(x + side * 6, height + rng.uniform(2, 4), near)]
        canvas.polygon([*gable, camera.project(outer, height, near)], stage.paint(), grain=("planks", 12))
    canvas.begin(ID["building"], z=(near + far) / 2)
    canvas.polygon(camera.wall(x, (0, height), (near, far)), wall, grain=grain)
    pane, frame = glass(stage), stage.paint() if rng.random() < 0.4 else None
    w, h = rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.75)
    bays = max(1, int((far - near) / rng.uniform(1.8, 4)))
    step = (far - near) / bays
    for row in range(int(height / floor)):
        low = row * floor + floor * (1 - h) / 2
        for bay in range(bays):
            z = near + step * (bay + (1 - w) / 2)
            if z > 45:
                break
            color = glass(stage) if rng.random() < 0.3 else pane
            if frame is not None:
                ys, zs = (low - 0.15, low + floor * h + 0.15), (z - 0.1, z + step * w + 0.1)
                canvas.polygon(camera.wall(x, ys, zs), frame)
            canvas.polygon(camera.wall(x, (low, low + floor * h), (z, z + step * w)), color)
    if rng.random() < 0.3:  # an awning or a shop sign
        canvas.polygon(camera.wall(x, (floor * 0.85, floor * 1.05), (near, far)), stage.paint())


def wall(stage: Stage, side: int, x: float, near: float, far: float) -> None:
    """Windowless, low, with a cap."""
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    height, color = rng.uniform(1.4, 3.2), stage.paint("wall")
    grain = (("brick", "plaster", "blotch")[rng.integers(3)], rng.uniform(6, 26))
    canvas.begin(ID["wall"], z=near)
    canvas.polygon(camera.quad((x, x + side * 0.4), (0, height), near), scaled(color, 0.8))
    canvas.begin(ID["wall"], z=(near + far) / 2)
    canvas.polygon(camera.wall(x, (0, height), (near, far)), color, grain=grain)
    canvas.polygon(camera.wall(x, (height * 0.92, height), (near, far)), scaled(color, rng.uniform(0.6, 1.4)))


def fence(stage: Stage, side: int, x: float, near: float, far: float) -> None:
    """Boards, or bars and rails. The background shows through the bars but is labeled fence."""
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    height, color = rng.uniform(0.9, 2.8), stage.paint("fence")
    canvas.begin(ID["guard rail" if height < 1.0 else "fence"], z=(near + far) / 2)
    boards = rng.random() < 0.5
    planks = ("planks", rng.uniform(14, 34)) if boards else None
    canvas.polygon(camera.wall(x, (0, height), (near, far)), color if boards else None, grain=planks)
    color = scaled(color, 0.8) if boards else color
    gap, bar = rng.uniform(0.35, 0.8), rng.uniform(0.12, 0.25)
    z = near
    while z < min(far, 40):
        canvas.polygon(camera.wall(x, (0, height), (z, z + bar)), color)
        z += gap * max(1.0, z / 12)
    for level in rng.choice([0.15, 0.5, 0.9, 0.97], 2, replace=False):
        canvas.polygon(camera.wall(x, (height * level, height * level + 0.12), (near, far)), color)
    if rng.random() < 0.3:  # crossing wires
        for z in np.arange(near, min(far, 30), 1.2):
            canvas.line([camera.project(x, 0, z), camera.project(x, height, z + 1.2)], color, 0.5)


def hedge(stage: Stage, side: int, x: float, near: float, far: float) -> None:
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    height, leaf, grain = rng.uniform(0.8, 4.5), foliage(stage), ("leaves", rng.uniform(16, 40))
    canvas.begin(ID["vegetation"], z=near)
    canvas.polygon(camera.quad((x, x + side * 3), (0, height), near), scaled(leaf, 0.85), grain=grain)
    tops = [(z, height * rng.uniform(0.75, 1.25)) for z in np.linspace(near, far, 7)]
    outline = [camera.project(x, 0, near), *(camera.project(x, y, z) for z, y in tops), camera.project(x, 0, far)]
    canvas.polygon(outline, leaf, grain=grain)
