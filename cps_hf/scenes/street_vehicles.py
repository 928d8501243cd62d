"""Cars, trucks, buses, trams and similar vehicles, seen from behind, ahead or the side."""

from __future__ import annotations

from .canvas import jitter, mixed, scaled
from .street_objects import ID, Stage, glass

# width, height, length in meters: (smallest, largest)
SIZES = {
    "car": ((1.6, 1.9), (1.35, 1.75), (3.6, 4.8)),
    "truck": ((2.1, 2.6), (2.5, 3.6), (5.5, 9)),
    "bus": ((2.3, 2.6), (2.7, 3.4), (9, 13)),
    "train": ((2.3, 2.6), (3.1, 3.7), (16, 34)),
    "caravan": ((2.0, 2.3), (2.3, 2.7), (4, 6)),
    "trailer": ((1.5, 2.0), (0.9, 1.5), (2, 4)),
}


def vehicle(stage: Stage, kind: str, x: float, z: float, *, across: bool = False) -> None:
    """A vehicle whose near end is at (x, z). `across`: it stands across the street and shows its side."""
    rng, canvas = stage.rng, stage.canvas
    width, height, length = (rng.uniform(*bounds) for bounds in SIZES[kind])
    body = stage.paint(kind)
    stage.shadow(x, z, (length if across else width) * 0.55, width if across else length * 0.6)
    canvas.begin(ID[kind], z=z)
    if across:
        _flank_view(stage, kind, x, z, length, height, body)
    else:
        _end_view(stage, kind, x, z, (width, height, length), body)


def _flank_view(stage: Stage, kind: str, x: float, z: float, length: float, height: float, body) -> None:
    rng, camera, canvas = stage.rng, stage.camera, stage.canvas
    facing, half, base = rng.choice([-1, 1]), length / 2, 0.28

    def shape(outline, color, grain=None):
        canvas.polygon([camera.project(x + facing * dx * half, y, z) for dx, y in outline], color, grain=grain)

    if kind == "car":
        belt, roof = height * 0.58, height
        front, rear = rng.uniform(0.05, 0.3), rng.uniform(-0.95, -0.55)
        hood = [(-1, base), (-1, belt * 0.95), (rear - 0.1, belt), (front + 0.25, belt), (1, belt * 0.85), (1, base)]
        shape(hood, body, stage.grain(2, 14))
        shape([(rear - 0.1, belt), (rear + 0.12, roof), (front, roof), (front + 0.28, belt)], scaled(body, 0.95))
        pane = glass(stage)
        shape([(rear + 0.02, belt), (rear + 0.16, roof - 0.1), (front - 0.03, roof - 0.1), (front + 0.18, belt)], pane)
        middle = (rear + front) / 2
        shape([(middle - 0.02, belt), (middle - 0.02, roof), (middle + 0.03, roof), (middle + 0.03, belt)], body)
    elif kind == "truck":
        cab = 1 - 2 * rng.uniform(0.2, 0.3)
        shape([(-1, base + 0.4), (-1, height), (cab - 0.03, height), (cab - 0.03, base + 0.4)], body, _cargo(stage))
        shape([(-1, base), (-1, base + 0.4), (1, base + 0.4), (1, base)], stage.lit((44, 44, 48)))
        tall = height * rng.uniform(0.7, 0.9)
        shape([(cab, base), (cab, tall), (0.9, tall), (1, tall * 0.55), (1, base)], stage.paint(), stage.grain(2, 10))
        shape([(cab + 0.1, tall * 0.58), (cab + 0.1, tall * 0.9), (0.9, tall * 0.9), (0.96, tall * 0.58)],
              glass(stage))  # fmt: skip
    else:
        shape([(-1, base), (-1, height), (1, height), (1, base)], body, stage.grain(2, 14))
        _window_row(stage, shape, height, 6 if kind == "caravan" else 8 if kind == "bus" else 14)
    wheels = {"car": (-0.62, 0.64), "truck": (-0.7, -0.45, 0.7), "bus": (-0.6, 0.65), "train": ()}.get(kind, (0.0,))
    for spot in wheels:
        radius = 0.32 if kind in ("car", "trailer", "caravan") else 0.48
        stage.disc(x + facing * spot * half, radius, z, radius, stage.lit((26, 26, 28)))
        stage.disc(x + facing * spot * half, radius, z, radius * 0.5, stage.lit((140, 140, 145), 20))


def _cargo(stage: Stage) -> tuple[str, float]:
    return ("ribs", "planks", "plaster", "weave")[stage.rng.integers(4)], stage.rng.uniform(8, 26)


def _window_row(stage: Stage, shape, height: float, count: int) -> None:
    low, high = height * 0.5, height * 0.85
    stripe = stage.paint()
    shape([(-1, height * 0.22), (-1, height * 0.32), (1, height * 0.32), (1, height * 0.22)], stripe)
    for i in range(count):
        left = -0.95 + 1.9 * i / count
        shape([(left, low), (left, high), (left + 1.6 / count, high), (left + 1.6 / count, low)], glass(stage))


def _end_view(stage: Stage, kind: str, x: float, z: float, size: tuple[float, float, float], body) -> None:
    rng, camera, canvas = stage.rng, stage.camera, stage.canvas
    width, height, length = size
    base, far = 0.3, z + length
    xs = (x - width / 2, x + width / 2)
    body_top = height * 0.6 if kind == "car" else height
    near_left, near_right = camera.project(xs[0], 0, z)[0], camera.project(xs[1], 0, z)[0]
    far_left, far_right = camera.project(xs[0], 0, far)[0], camera.project(xs[1], 0, far)[0]
    for edge, seen in ((xs[0], far_left < near_left), (xs[1], far_right > near_right)):
        if seen:  # the side facing the center of the picture
            _flank_in_perspective(stage, kind, edge, (z, far), height, body_top, body)
    if kind == "car":
        roof = rng.uniform(0.62, 0.85) * width / 2
        cabin = [(-width / 2 * 0.94, body_top), (-roof, height), (roof, height), (width / 2 * 0.94, body_top)]
        canvas.polygon(camera.upright(x, z + 0.3, cabin), body)
        pane = [(dx * 0.86, body_top if y == body_top else height - 0.08) for dx, y in cabin]
        canvas.polygon(camera.upright(x, z + 0.3, pane), glass(stage))
    face = scaled(body, rng.uniform(0.85, 1.05))
    front = face if kind != "truck" else stage.paint()
    canvas.polygon(camera.quad(xs, (base, body_top), z), front, grain=stage.grain(2, 14))
    _face(stage, kind, x, z, width, height)
    for side in (-1, 1):
        left = x + side * width * 0.38
        tyre = camera.quad((left - width * 0.08, left + width * 0.08), (0, base + 0.1), z)
        canvas.polygon(tyre, stage.lit((24, 24, 26)))


def _flank_in_perspective(stage: Stage, kind: str, edge: float, zs, height: float, body_top: float, body) -> None:
    camera, canvas = stage.camera, stage.canvas
    shade = scaled(body, stage.rng.uniform(0.6, 0.9))
    grain = _cargo(stage) if kind == "truck" else stage.grain(2, 12)
    canvas.polygon(camera.wall(edge, (0.3, body_top), zs), shade, grain=grain)
    z, far = zs
    inner = (z + (far - z) * 0.15, z + (far - z) * 0.75)
    if kind == "car":
        tilt = 0.85 * edge if abs(edge) > 1 else edge
        top = [camera.project(edge, body_top, z + 0.2), camera.project(tilt, height, inner[0] + 0.2)]
        top += [camera.project(tilt, height, inner[1]), camera.project(edge, body_top, far - 0.8)]
        canvas.polygon(top, mixed(glass(stage), shade, 0.2))
    elif kind in ("bus", "train"):
        step = (far - z) / (7 if kind == "bus" else 14)
        for i in range(7 if kind == "bus" else 14):
            pane = (z + step * (i + 0.12), z + step * (i + 0.88))
            canvas.polygon(camera.wall(edge, (height * 0.5, height * 0.85), pane), glass(stage))
    for spot in (0.18, 0.8):
        if kind != "train":
            wheel_z = z + (far - z) * spot
            canvas.polygon(camera.wall(edge, (0, 0.6), (wheel_z - 0.32, wheel_z + 0.32)), stage.lit((26, 26, 28)))


def _face(stage: Stage, kind: str, x: float, z: float, width: float, height: float) -> None:
    """Windows, lamps and plates of the visible end."""
    rng, camera, canvas = stage.rng, stage.camera, stage.canvas
    half = width / 2
    if kind in ("bus", "train"):
        low, high = (0.45, 0.8) if kind == "bus" else (0.42, 0.78)
        part = 0.88 if kind == "bus" else 0.8
        canvas.polygon(camera.quad((x - half * part, x + half * part), (height * low, height * high), z), glass(stage))
        sign = jitter(rng, (240, 200, 90), 20) if rng.random() < 0.6 else stage.paint()
        canvas.polygon(camera.quad((x - half * 0.6, x + half * 0.6), (height * 0.86, height * 0.95), z), sign)
        if kind == "train":
            stage.rod([(x - half, height * 0.3), (x + half, height * 0.3)], z, 0.3, stage.paint())
            stage.rod([(x, height), (x + 0.5, height + 0.6), (x, height + 1.1)], z, 0.08, stage.lit((60, 60, 64)))
    elif kind == "truck":
        if rng.random() < 0.5:  # the doors of the load
            stage.rod([(x, 0.7), (x, height)], z, 0.08, stage.lit((60, 60, 64)))
            stage.rod([(x - half, 0.6), (x + half, 0.6)], z, 0.25, stage.lit((44, 44, 48)))
        else:
            canvas.polygon(
                camera.quad((x - half * 0.85, x + half * 0.85), (height * 0.42, height * 0.66), z), glass(stage)
            )
            stage.rod([(x - half * 0.8, 0.9), (x + half * 0.8, 0.9)], z, 0.3, stage.lit((50, 52, 56)))
    elif kind == "caravan":
        canvas.polygon(camera.quad((x - half * 0.6, x + half * 0.6), (height * 0.5, height * 0.75), z), glass(stage))
    lamp = (214, 44, 40) if rng.random() < 0.6 else (250, 240, 200)
    lamp = lamp if stage.night else scaled(lamp, 0.8)
    level = 0.45 * height if kind == "car" else 0.25 * height
    for side in (-1, 1):
        stage.rod([(x + side * half * 0.68, level), (x + side * half * 0.92, level)], z, 0.16, lamp)
    stage.rod([(x - 0.26, level - 0.2), (x + 0.26, level - 0.2)], z, 0.12, stage.lit((222, 222, 210), 12))
