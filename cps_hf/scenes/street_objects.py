"""The objects in a drawn street. Each function paints one, at X meters to the right and Z meters ahead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.cityscapes import LABELS
from .canvas import SKINS, Canvas, Color, jitter, mixed, paint, scaled

ID = {label.name: label.id for label in LABELS}
SURFACES = ("grain", "plaster", "blotch", "ribs", "weave")


@dataclass(frozen=True)
class Camera:
    """A pinhole camera in a street that may bend: meters (X right, Y up from the ground, Z ahead) to pixels."""

    center: float
    horizon: float
    focal: float
    height: float
    bend: float = 0.0

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """The projection of a point, (x, y) in pixels."""
        scale = self.focal / z
        return self.center + scale * (x + self.bend * z * z), self.horizon + scale * (self.height - y)

    def quad(self, xs, ys, z: float) -> list[tuple[float, float]]:
        """An upright rectangle that faces the camera."""
        return [self.project(x, y, z) for x, y in ((xs[0], ys[0]), (xs[1], ys[0]), (xs[1], ys[1]), (xs[0], ys[1]))]

    def wall(self, x: float, ys, zs) -> list[tuple[float, float]]:
        """An upright rectangle along the street."""
        return [self.project(x, y, z) for y, z in ((ys[0], zs[0]), (ys[0], zs[1]), (ys[1], zs[1]), (ys[1], zs[0]))]

    def upright(self, x: float, z: float, outline) -> list[tuple[float, float]]:
        """An outline in meters (right, up) around the ground point (x, z), facing the camera."""
        return [self.project(x + dx, y, z) for dx, y in outline]


@dataclass
class Stage:
    """The state passed to every drawing function of a street."""

    canvas: Canvas
    camera: Camera
    rng: np.random.Generator
    light: float
    night: bool

    def paint(self, kind: str | None = None) -> Color:
        return scaled(paint(self.rng, kind), self.light)

    def lit(self, color: Color, amount: float = 8) -> Color:
        return scaled(jitter(self.rng, color, amount), self.light)

    def grain(self, low: float = 4, high: float = 20) -> tuple[str, float]:
        return SURFACES[self.rng.integers(len(SURFACES))], self.rng.uniform(low, high)

    def disc(self, x: float, y: float, z: float, radius: float, color, *, grain=None, ring: float = 0) -> None:
        """A circle; `radius` and `ring` in meters."""
        cx, cy = self.camera.project(x, y, z)
        r, width = radius * self.camera.focal / z, ring * self.camera.focal / z
        self.canvas.ellipse((cx - r, cy - r, cx + r, cy + r), color, grain=grain, ring=width)

    def rod(self, points, z: float, width: float, color) -> None:
        """A line through points (X, Y) in meters, `width` meters thick."""
        path = [self.camera.project(x, y, z) for x, y in points]
        self.canvas.line(path, color, width * self.camera.focal / z)

    def shadow(self, x: float, z: float, half_width: float, length: float) -> None:
        """A soft shadow on the ground."""
        corners = ((x - half_width, z - 0.3), (x + half_width, z - 0.3), (x + half_width, z + length), (x, z + length))
        points = [self.camera.project(px, 0, max(pz, 1)) for px, pz in corners]
        self.canvas.darken(points, self.rng.uniform(0.2, 0.55))


def pole(stage: Stage, x: float, z: float, *, height: float | None = None) -> float:
    """A thin pole, sometimes a lamp with an arm. Returns its height."""
    rng, canvas = stage.rng, stage.canvas
    tall = height or rng.uniform(3.5, 7)
    color, width = stage.paint("metal"), rng.uniform(0.2, 0.36)
    canvas.begin(ID["pole"], z=z)
    stage.rod([(x, 0), (x, tall)], z, width, color)
    if height is None and rng.random() < 0.6:
        reach = -np.sign(x) * rng.uniform(0.8, 2)
        stage.rod([(x, tall), (x + reach, tall + 0.2)], z, width * 0.8, color)
        lamp = (255, 236, 170) if stage.night else scaled(color, 0.9)
        stage.rod([(x + reach * 0.8, tall + 0.1), (x + reach * 1.1, tall + 0.15)], z, 0.25, lamp)
    return tall


def traffic_light(stage: Stage, x: float, z: float) -> None:
    """A dark, upright box of three lamps on a pole; the lit lamp and the frame vary."""
    rng, canvas = stage.rng, stage.canvas
    top = pole(stage, x, z, height=rng.uniform(2.6, 4))
    half, tall = rng.uniform(0.34, 0.5), rng.uniform(1.4, 2.0)
    canvas.begin(ID["traffic light"], z=z)
    canvas.polygon(
        stage.camera.quad((x - half, x + half), (top - tall * 0.5, top + tall * 0.5), z), stage.paint("metal")
    )
    inside = stage.lit((26, 28, 30))
    box = stage.camera.quad((x - half * 0.75, x + half * 0.75), (top - tall * 0.45, top + tall * 0.45), z)
    canvas.polygon(box, inside)
    lamps = [(228, 48, 40), (240, 180, 50), (60, 210, 110)]
    shining = rng.integers(3)
    for i, lamp in enumerate(lamps):
        color = lamp if i == shining else scaled(lamp, 0.25)
        stage.disc(x, top + tall * (0.3 - 0.3 * i), z, half * 0.6, color)


def traffic_sign(stage: Stage, x: float, z: float) -> None:
    """A disc, triangle, square, diamond or octagon with a rim, on a pole."""
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    top = pole(stage, x, z, height=rng.uniform(2.2, 3.4))
    r, sides = rng.uniform(0.5, 0.85), int(rng.choice([3, 4, 5, 8, 24]))
    turn = rng.choice([0, np.pi]) if sides == 3 else rng.choice([0, np.pi / sides])
    angles = np.pi / 2 + turn + 2 * np.pi * np.arange(sides) / sides
    rim, face, mark = stage.paint("sign"), stage.paint("sign"), stage.paint()
    canvas.begin(ID["traffic sign"], z=z)
    for size, color in ((1.0, rim), (0.72, face)):
        canvas.polygon(
            camera.upright(x, z, [(size * r * np.cos(a), top + size * r * np.sin(a)) for a in angles]), color
        )
    stage.rod([(x - r * 0.35, top), (x + r * 0.35, top)], z, 0.14, mark)
    if rng.random() < 0.3:
        canvas.polygon(camera.quad((x - r, x + r), (top - 1.9 * r, top - 1.15 * r), z), face)


def person(stage: Stage, x: float, z: float) -> None:
    """A person walking or standing, in any clothes."""
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    tall, broad = rng.uniform(1.35, 1.95), rng.uniform(0.2, 0.3)
    coat, trousers, skin = stage.paint("clothes"), stage.paint("clothes"), stage.lit(SKINS[rng.integers(4)])
    hip, stride, lean = tall * 0.5, rng.uniform(0.02, 0.35), rng.normal(0, 0.05)
    stage.shadow(x, z, 0.4, 0.6)
    canvas.begin(ID["person"], z=z)
    for side in (-1, 1):
        stage.rod([(x, hip), (x + side * stride, 0)], z, 0.18, trousers)
    if rng.random() < 0.25:  # a skirt or a long coat
        skirt = [(-broad, hip + 0.1), (broad, hip + 0.1), (broad * 1.3, tall * 0.25), (-broad * 1.3, tall * 0.25)]
        canvas.polygon(camera.upright(x, z, skirt), coat)
    torso = [(-broad * 0.7, hip), (broad * 0.7, hip), (broad + lean, tall * 0.82), (lean - broad, tall * 0.82)]
    canvas.polygon(camera.upright(x, z, torso), coat, grain=stage.grain(2, 24))
    swing = rng.uniform(-0.2, 0.3)
    for side in (-1, 1):
        shoulder = (x + side * broad + lean, tall * 0.8)
        stage.rod([shoulder, (x + side * (broad + swing), hip)], z, 0.12, scaled(coat, 0.85))
    stage.disc(x + lean, tall * 0.92, z, 0.13, skin)
    if rng.random() < 0.7:
        hair = stage.lit((60, 42, 30), 30)
        canvas.polygon(
            camera.upright(x + lean, z, [(-0.13, tall * 0.92), (0, tall * 1.02), (0.13, tall * 0.94)]), hair
        )
    if rng.random() < 0.3:
        canvas.polygon(camera.upright(x + broad, z, [(0, hip), (0.25, hip), (0.25, hip - 0.3), (0, hip - 0.3)]),
                       stage.paint())  # fmt: skip


def two_wheeler(stage: Stage, x: float, z: float, kind: str, *, ridden: bool) -> None:
    """A bicycle or a motorcycle, seen from the side or from behind, with or without a rider."""
    rng, side = stage.rng, stage.rng.random() < 0.6
    facing = rng.choice([-1, 1])
    stage.shadow(x, z, 0.7, 0.5)
    stage.canvas.begin(ID[kind], z=z)
    frame = stage.paint(kind)
    if side and kind == "bicycle":
        _bicycle(stage, x, z, facing, frame)
    elif side:
        _motorcycle(stage, x, z, facing, frame)
    else:
        thick = 0.12 if kind == "bicycle" else 0.2
        stage.rod([(x, 0), (x, 0.7)], z, thick, stage.lit((28, 28, 30)))
        stage.rod([(x, 0.5), (x, 1.0)], z, thick * (1 if kind == "bicycle" else 2), frame)
        stage.rod([(x - 0.3, 1.05), (x + 0.3, 1.05)], z, thick, stage.lit((60, 60, 64)))
    if ridden:
        _rider(stage, x, z, facing if side else 0, seat=0.95 if kind == "bicycle" else 0.8)


def _bicycle(stage: Stage, x: float, z: float, facing: int, frame: Color) -> None:
    tyre, spokes = stage.lit((30, 30, 32)), stage.lit((190, 190, 194))
    for end in (-0.52, 0.52):
        stage.disc(x + end, 0.34, z, 0.34, None)  # the whole wheel is labeled, including gaps between the spokes
        for angle in (0.2, 1.25, 2.3):
            du, dv = 0.32 * np.cos(angle), 0.32 * np.sin(angle)
            stage.rod([(x + end - du, 0.34 - dv), (x + end + du, 0.34 + dv)], z, 0.05, spokes)
        stage.disc(x + end, 0.34, z, 0.34, tyre, ring=0.1)
    stage.canvas.polygon(
        [
            stage.camera.project(x + facing * dx, y, z)
            for dx, y in ((-0.52, 0.34), (-0.15, 0.85), (0.4, 0.8), (0, 0.3))
        ],
        None,
    )
    path = ((-0.52, 0.34), (-0.15, 0.85), (0.4, 0.8), (0.0, 0.3), (-0.52, 0.34))
    stage.rod([(x + facing * dx, y) for dx, y in path], z, 0.1, frame)
    stage.rod([(x + facing * dx, y) for dx, y in ((0.52, 0.34), (0.38, 1.0), (0.55, 1.02))], z, 0.09, frame)
    stage.rod([(x + facing * dx, 0.95) for dx in (-0.3, -0.05)], z, 0.1, tyre)


def _motorcycle(stage: Stage, x: float, z: float, facing: int, frame: Color) -> None:
    tyre = stage.lit((30, 30, 32))
    for end in (-0.65, 0.65):
        stage.disc(x + end, 0.33, z, 0.33, tyre)
        stage.disc(x + end, 0.33, z, 0.15, stage.lit((150, 150, 155)))
    body = ((-0.85, 0.8), (-0.7, 0.95), (0.0, 0.8), (0.2, 1.0), (0.5, 0.95), (0.55, 0.55), (0.2, 0.3), (-0.4, 0.3))
    points = [stage.camera.project(x + facing * dx, y, z) for dx, y in body]
    stage.canvas.polygon(points, frame, grain=stage.grain(2, 14))
    stage.rod([(x - facing * 0.7, 0.9), (x, 0.82)], z, 0.12, tyre)
    stage.rod([(x + facing * 0.65, 0.35), (x + facing * 0.4, 1.15)], z, 0.1, stage.lit((160, 160, 165)))


def _rider(stage: Stage, x: float, z: float, facing: int, *, seat: float) -> None:
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    coat, trousers = stage.paint("rider"), stage.paint("clothes")
    canvas.begin(ID["rider"], z=z)
    lean, top = facing * rng.uniform(0.1, 0.4), seat + rng.uniform(0.5, 0.65)
    seat_x = x - facing * 0.2
    if facing:
        stage.rod([(seat_x, seat), (x + facing * 0.2, seat - 0.35), (x, 0.25)], z, 0.17, trousers)
    else:
        for side in (-1, 1):
            stage.rod([(x, seat), (x + side * 0.2, seat - 0.3), (x + side * 0.15, 0.3)], z, 0.15, trousers)
    torso = [(-0.18, seat - 0.05), (0.18, seat - 0.05), (0.22 + lean, top), (lean - 0.22, top)]
    canvas.polygon(camera.upright(seat_x, z, torso), coat, grain=stage.grain(2, 20))
    hand = x + facing * 0.4 if facing else x + 0.3
    stage.rod([(seat_x + lean, top - 0.05), (hand, 1.05)], z, 0.12, scaled(coat, 0.85))
    stage.disc(seat_x + lean * 1.2, top + 0.17, z, 0.15, stage.lit(SKINS[rng.integers(4)]))
    if rng.random() < 0.7:  # a helmet
        stage.disc(seat_x + lean * 1.2, top + 0.23, z, 0.15, stage.paint())


def tree(stage: Stage, x: float, z: float) -> None:
    """A trunk and a crown of several clumps, green or autumnal, sometimes bare or conical."""
    rng, canvas, camera = stage.rng, stage.canvas, stage.camera
    tall = rng.uniform(3.5, 9)
    canvas.begin(ID["vegetation"], z=z)
    stage.rod([(x, 0), (x, tall * 0.6)], z, rng.uniform(0.2, 0.45), stage.lit((92, 74, 58), 16))
    leaf = foliage(stage)
    if rng.random() < 0.2:
        outline = [(-tall * 0.22, tall * 0.15), (tall * 0.22, tall * 0.15), (0, tall)]
        canvas.polygon(camera.upright(x, z, outline), leaf, grain=("leaves", rng.uniform(18, 40)))
        return
    spread = tall * rng.uniform(0.18, 0.32)
    for _ in range(rng.integers(4, 8)):
        dx, dy = rng.normal(0, spread * 0.6), rng.normal(0, spread * 0.5)
        clump = jitter(rng, leaf, 12)
        stage.disc(
            x + dx, tall * 0.72 + dy, z, spread * rng.uniform(0.5, 0.9), clump, grain=("leaves", rng.uniform(16, 40))
        )


def foliage(stage: Stage) -> Color:
    """The color of leaves in a random season."""
    seasons = ((62, 98, 44), (38, 66, 34), (112, 130, 58), (150, 120, 56), (60, 104, 52), (74, 104, 40))
    return stage.lit(seasons[stage.rng.integers(len(seasons))], 14)


def clutter(stage: Stage, x: float, z: float) -> None:
    """Objects that are not evaluated: bins, boxes, benches (static), bags and carts (dynamic)."""
    rng = stage.rng
    stage.canvas.begin(ID["dynamic" if rng.random() < 0.4 else "static"], z=z)
    half, tall = rng.uniform(0.2, 0.7), rng.uniform(0.4, 1.3)
    quad = stage.camera.quad((x - half, x + half), (0, tall), z)
    stage.canvas.polygon(quad, stage.paint(), grain=stage.grain())
    stage.rod([(x - half, tall), (x + half, tall)], z, 0.12, stage.paint())


def glass(stage: Stage) -> Color:
    """A window pane: dark, sky-lit, or lamp-lit at night."""
    if stage.night and stage.rng.random() < 0.5:
        return jitter(stage.rng, (236, 200, 120), 20)
    return stage.lit(mixed((40, 48, 58), (150, 172, 190), stage.rng.random() ** 2), 10)
