"""Shared by both kinds of drawn scenes: paints, textures, a canvas with a label plane, and camera effects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 2
_TILE = 512

Color = tuple[int, int, int]

# One set of paints for walls, clothes and vehicles alike: color alone must not reveal the class.
PAINTS: tuple[Color, ...] = (
    (240, 238, 232),
    (205, 200, 190),
    (160, 160, 162),
    (118, 120, 124),
    (74, 76, 80),
    (34, 35, 40),
    (196, 178, 142),
    (222, 206, 170),
    (150, 112, 80),
    (104, 72, 52),
    (158, 78, 62),
    (178, 44, 40),
    (120, 26, 34),
    (214, 120, 50),
    (226, 188, 70),
    (176, 170, 90),
    (98, 128, 70),
    (48, 92, 62),
    (120, 158, 150),
    (96, 150, 190),
    (52, 92, 150),
    (34, 48, 96),
    (118, 92, 140),
    (210, 150, 158),
)

SKINS: tuple[Color, ...] = ((236, 198, 170), (206, 156, 120), (148, 100, 72), (92, 62, 48))


def jitter(rng: np.random.Generator, color: Sequence[int], amount: float = 14) -> Color:
    """`color` with slightly changed brightness and hue."""
    moved = np.asarray(color) + rng.normal(0, amount) + rng.normal(0, amount / 2, 3)
    r, g, b = np.clip(moved, 0, 255).astype(int).tolist()
    return r, g, b


# Favorite paints of a kind of object are drawn more often; every kind still uses any paint at times.
FAVOURITES: dict[str, tuple[int, ...]] = {
    "building": (6, 7, 10),
    "wall": (15, 3, 2),
    "fence": (8, 9),
    "metal": (3, 4, 2),
    "sign": (11, 14, 20),
    "traffic light": (14, 5, 4),
    "car": (0, 5, 1, 11, 21, 2),
    "truck": (0, 8, 20),
    "bus": (14, 18, 19),
    "train": (11, 12, 0),
    "motorcycle": (5, 11, 4),
    "bicycle": (5, 18, 14),
    "clothes": (22, 12, 21, 13),
    "rider": (14, 13, 19),
}


def paint(rng: np.random.Generator, kind: str | None = None, amount: float = 9) -> Color:
    """Any paint of the shared set or, nine times out of ten, a favorite of this kind of object."""
    among = FAVOURITES[kind] if kind in FAVOURITES and rng.random() < 0.9 else range(len(PAINTS))
    return jitter(rng, PAINTS[among[rng.integers(len(among))]], amount)


def scaled(color: Sequence[int], factor: float) -> Color:
    """`color`, brighter (`factor` > 1) or darker."""
    r, g, b = (max(0, min(255, int(c * factor))) for c in color)
    return r, g, b


def mixed(a: Sequence[int], b: Sequence[int], share: float) -> Color:
    """A mix with `share` of b and the rest of a."""
    r, g, b = (int(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, b


@lru_cache(maxsize=1)
def _tiles() -> dict[str, np.ndarray]:
    """Gray textures of 512 x 512 pixels, about -1 to 1. Each use cuts out a piece at a random position."""
    rng = np.random.default_rng(20210601)
    y, x = np.mgrid[:_TILE, :_TILE]

    def cloud(radius: float) -> np.ndarray:
        noise = Image.fromarray(rng.integers(0, 256, (_TILE, _TILE), dtype=np.uint8))
        field = np.asarray(noise.filter(ImageFilter.GaussianBlur(radius)), np.float32)
        return np.clip((field - field.mean()) / (2 * field.std()), -1, 1)

    grain, fine, coarse = cloud(0.6), cloud(2), cloud(8)
    row = y // 6
    mortar = (y % 6 == 0) | ((x + 7 * (row % 2)) % 14 == 0)
    return {
        "grain": 0.7 * grain + 0.5 * coarse,
        "blotch": coarse + 0.3 * grain,
        "leaves": np.clip(1.6 * fine + 0.6 * coarse, -1, 1),
        "grass": np.clip(np.roll(grain, 1, 0) + grain + 0.4 * coarse, -1, 1),
        "brick": np.where(mortar, -0.9, 0.2) + 0.4 * grain,
        "planks": np.where(x % 9 < 2, -0.9, 0.2) + 0.3 * fine,
        "ribs": np.sin(2 * np.pi * x / 6) * 0.8 + 0.2 * grain,
        "plaster": 0.5 * coarse + 0.25 * grain,
        "fur": 0.8 * fine + 0.4 * grain,
        "weave": 0.5 * (np.sign(np.sin(x / 2.3)) * np.sign(np.sin(y / 2.3))) + 0.3 * grain,
        "stripes": np.sign(np.sin(2 * np.pi * (x + y) / 26)) * 0.8,
        "waves": np.sin(2 * np.pi * (y + 6 * coarse) / 12) * 0.6 + 0.3 * fine,
    }


def texture(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """A piece of the texture `kind`, float32 (height, width), cut out at a position drawn by `rng`."""
    tile = _tiles()[kind]
    tops = (rng.integers(_TILE) + np.arange(height)) % _TILE
    lefts = (rng.integers(_TILE) + np.arange(width)) % _TILE
    return tile[np.ix_(tops, lefts)].astype(np.float32)


class Canvas:
    """An image, its labels, its instances and its depth, painted together; near objects cover far ones.

    Coordinates are pixels of the finished image, (x, y), with fractions. Everything is painted at twice that size.

    Args:
        size: (height, width) of the finished image.
        background: the initial value of the label plane.
    """

    def __init__(self, size: tuple[int, int], background: int, rng: np.random.Generator):
        self.height, self.width = size
        self.rng = rng
        wide = (self.width * SUPERSAMPLING, self.height * SUPERSAMPLING)
        self.rgb = Image.new("RGB", wide)
        self.labels = Image.new("L", wide, background)
        self.instances = Image.new("L", wide, 0)
        self.depth = Image.new("L", wide, 255)
        self._pens = {name: ImageDraw.Draw(getattr(self, name)) for name in ("rgb", "labels", "instances", "depth")}
        self.label: int | None = None
        self.instance: int | None = None
        self.z: int | None = None

    def begin(self, label: int | None, *, z: float | None = None, instance: int | None = None) -> None:
        """Paint what follows as this label, `z` meters away. If `label` is None, only the color changes."""
        self.label = label
        self.instance = instance
        self.z = None if z is None else int(255 * (1 - np.exp(-z / 60)))

    def polygon(self, points, color: Color | None, *, grain: tuple[str, float] | None = None) -> None:
        """A filled polygon. If `color` is None, labels only. `grain`: a texture and its strength in gray levels."""
        self._paint("polygon", [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], color, grain, {})

    def ellipse(self, box, color: Color | None, *, grain: tuple[str, float] | None = None, ring: float = 0) -> None:
        """An ellipse in `box` (left, top, right, bottom), filled, or an outline of width `ring`."""
        left, top, right, bottom = (v * SUPERSAMPLING for v in box)
        corners = [(min(left, right), min(top, bottom)), (max(left, right), max(top, bottom))]
        options = {"width": max(1, round(ring * SUPERSAMPLING))} if ring else {}
        self._paint("ellipse", corners, color, grain, options)

    def line(self, points, color: Color | None, width: float) -> None:
        """A line through `points`, at least one painted pixel wide."""
        scaled_points = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        self._paint("line", scaled_points, color, None, {"width": max(1, round(width * SUPERSAMPLING))})

    def rectangle(self, box, color: Color | None, *, grain: tuple[str, float] | None = None) -> None:
        """A filled rectangle (left, top, right, bottom)."""
        left, top, right, bottom = box
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color, grain=grain)

    def _paint(self, shape: str, points, color: Color | None, grain, options: dict) -> None:
        values = {"rgb": color, "labels": self.label, "instances": self.instance, "depth": self.z}
        for name, value in values.items():
            if value is not None:
                self._stroke(self._pens[name], shape, points, value, options)
        if grain is not None and color is not None:
            self._add_texture(shape, points, grain, options)

    @staticmethod
    def _stroke(pen: ImageDraw.ImageDraw, shape: str, points, value, options: dict) -> None:
        if shape == "line":
            pen.line(points, fill=value, **options)
        elif shape == "ellipse" and options:
            pen.ellipse(points, outline=value, **options)
        elif shape == "ellipse":
            pen.ellipse(points, fill=value)
        else:
            pen.polygon(points, fill=value)

    def _add_texture(self, shape: str, points, grain: tuple[str, float], options: dict) -> None:
        xs, ys = zip(*points, strict=True)
        left, top = max(0, int(min(xs))), max(0, int(min(ys)))
        right, bottom = min(self.rgb.width, int(max(xs)) + 2), min(self.rgb.height, int(max(ys)) + 2)
        if right - left < 2 or bottom - top < 2:
            return
        mask = Image.new("L", (right - left, bottom - top), 0)
        moved = [(x - left, y - top) for x, y in points]
        self._stroke(ImageDraw.Draw(mask), shape, moved, 255, options)
        kind, strength = grain
        patch = np.asarray(self.rgb.crop((left, top, right, bottom)), np.float32)
        patch = patch + strength * texture(self.rng, kind, bottom - top, right - left)[..., None]
        self.rgb.paste(Image.fromarray(np.clip(patch, 0, 255).astype(np.uint8)), (left, top), mask)

    def darken(self, points, strength: float) -> None:
        """A soft shadow over a polygon: only colors change."""
        points = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        mask = Image.new("L", self.rgb.size, 0)
        ImageDraw.Draw(mask).polygon(points, fill=int(255 * strength))
        self.rgb.paste((12, 14, 22), (0, 0), mask.filter(ImageFilter.BoxBlur(2)))

    def picture(self) -> np.ndarray:
        """The colors at their final size, float32 (H, W, 3), 0 to 255."""
        return np.asarray(self.rgb.reduce(SUPERSAMPLING), np.float32)

    def plane(self, name: str) -> np.ndarray:
        """The plane `labels`, `instances` or `depth` at its final size, uint8 (H, W): every second painted pixel."""
        return np.asarray(getattr(self, name))[1::SUPERSAMPLING, 1::SUPERSAMPLING].copy()


def photograph(picture: np.ndarray, rng: np.random.Generator, *, noise: float) -> np.ndarray:
    """Camera effects: exposure, contrast, white balance, vignetting, blur and noise.

    Args:
        picture: float32 (H, W, 3), 0 to 255.
        noise: the strongest noise, in gray levels.
    """
    height, width = picture.shape[:2]
    white_balance = rng.normal(1, 0.03, 3).astype(np.float32)
    contrast, brightness = rng.uniform(0.9, 1.15), rng.normal(0, 6)
    picture = (picture * white_balance - 118) * contrast + 118 + brightness
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    slope_x, slope_y = rng.normal(0, 0.08, 2)
    picture = picture * (1 + slope_x * x + slope_y * y - rng.uniform(0, 0.15) * (x * x + y * y))[..., None]
    picture = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if rng.random() < 0.35:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    noisy = np.asarray(picture, np.float32)
    strength = rng.uniform(0.1, 1) * noise
    noisy = noisy + rng.standard_normal((height, width, 1), np.float32) * strength
    noisy = noisy + rng.standard_normal((height, width, 3), np.float32) * (strength / 2)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def check_scene(index: int, seed: int) -> None:
    """Raise a `ValueError` for an invalid scene index or seed."""
    for name, value in (("index", index), ("seed", seed)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            raise ValueError(f"`{name}` of a scene must be an integer of 0 or more, got {value!r}.")
