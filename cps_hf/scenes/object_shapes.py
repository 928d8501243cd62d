"""The 20 object classes of VOC as simple shapes in a unit square: u to the right and v up, both -1 to 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import PAINTS, SKINS, Canvas, Color, jitter, mixed, paint, scaled

FURS: tuple[Color, ...] = (
    (60, 48, 40),
    (150, 104, 66),
    (214, 176, 128),
    (232, 226, 214),
    (40, 40, 44),
    (120, 116, 112),
)
DARK: Color = (30, 30, 34)


@dataclass
class Pen:
    """Paints one object: places the unit square in the picture, rotated, mirrored and with random paints."""

    canvas: Canvas
    rng: np.random.Generator
    center: tuple[float, float]
    half: float
    turn: float
    flip: int

    def __post_init__(self):
        self.main, self.second, self.third = (paint(self.rng) for _ in range(3))
        self.fur = jitter(self.rng, FURS[self.rng.integers(len(FURS))])
        self.dark = jitter(self.rng, DARK, 8)
        self.glass = mixed((40, 48, 60), (170, 196, 214), self.rng.random())
        kinds = ("grain", "plaster", "weave", "ribs", "blotch", "planks")
        self.surface = (kinds[self.rng.integers(len(kinds))], self.rng.uniform(3, 16))
        self.hair = ("fur", self.rng.uniform(6, 22))

    def _at(self, u: float, v: float) -> tuple[float, float]:
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        u = u * self.flip
        x, y = u * cos - v * sin, u * sin + v * cos
        return float(self.center[0] + self.half * x), float(self.center[1] - self.half * y)

    def shape(self, points, color: Color | None, grain=None) -> None:
        self.canvas.polygon([self._at(u, v) for u, v in points], color, grain=grain)

    def box(self, left: float, bottom: float, right: float, top: float, color: Color, grain=None) -> None:
        self.shape([(left, bottom), (right, bottom), (right, top), (left, top)], color, grain)

    def oval(self, u: float, v: float, ru: float, rv: float, color: Color | None, grain=None) -> None:
        around = 2 * np.pi * np.arange(20) / 20
        self.shape([(u + ru * np.cos(a), v + rv * np.sin(a)) for a in around], color, grain)

    def ring(self, u: float, v: float, radius: float, color: Color, width: float) -> None:
        around = 2 * np.pi * np.arange(21) / 20
        self.rod([(u + radius * np.cos(a), v + radius * np.sin(a)) for a in around], color, width)

    def rod(self, points, color: Color, width: float) -> None:
        self.canvas.line([self._at(u, v) for u, v in points], color, width * self.half)


def aeroplane(p: Pen) -> None:
    p.shape([(-0.95, 0.6), (-0.7, 0.6), (-0.45, 0.12), (-0.8, 0.1)], p.second)
    p.oval(0.0, 0.05, 0.95, 0.18, p.main, p.surface)
    p.shape([(-0.1, 0.05), (0.2, 0.05), (-0.25, -0.65), (-0.5, -0.65)], scaled(p.main, 0.8))
    p.shape([(0.0, 0.15), (0.2, 0.15), (0.0, 0.5), (-0.15, 0.5)], scaled(p.main, 0.7))
    for u in np.linspace(-0.5, 0.6, 8):
        p.oval(u, 0.1, 0.035, 0.05, p.glass)
    p.oval(0.0, -0.28, 0.14, 0.07, p.third)


def bicycle(p: Pen) -> None:
    # The gaps between spokes and tubes are labeled too: the lines alone would be nothing but border.
    p.shape([(-0.6, -0.4), (-0.2, 0.3), (0.42, 0.25), (0.0, -0.4)], None)
    for u in (-0.6, 0.6):
        p.oval(u, -0.4, 0.4, 0.4, None)
        p.ring(u, -0.4, 0.38, p.dark, 0.09)
        for angle in (0.3, 1.35, 2.4):
            du, dv = 0.36 * np.cos(angle), 0.36 * np.sin(angle)
            p.rod([(u - du, -0.4 - dv), (u + du, -0.4 + dv)], (150, 150, 154), 0.03)
    p.rod([(-0.6, -0.4), (-0.2, 0.3), (0.42, 0.25), (0.0, -0.4), (-0.6, -0.4)], p.main, 0.1)
    p.rod([(0.0, -0.4), (-0.25, 0.45)], p.main, 0.09)
    p.rod([(0.6, -0.4), (0.4, 0.5), (0.65, 0.58)], p.main, 0.09)
    p.rod([(-0.42, 0.47), (-0.1, 0.47)], p.dark, 0.14)


def bird(p: Pen) -> None:
    flying = p.rng.random() < 0.4
    p.shape([(-0.95, 0.1), (-0.9, -0.2), (-0.4, 0.0)], scaled(p.main, 0.7))
    p.oval(-0.05, 0.0, 0.5, 0.3, p.main, p.hair)
    p.oval(0.5, 0.35, 0.22, 0.22, p.main, p.hair)
    p.shape([(0.68, 0.4), (1.0, 0.3), (0.68, 0.25)], (226, 160, 50))
    p.oval(0.56, 0.4, 0.05, 0.05, p.dark)
    if flying:
        p.shape([(-0.3, 0.1), (0.25, 0.1), (-0.35, 0.95)], p.second, p.hair)
        p.shape([(-0.2, -0.1), (0.2, -0.1), (-0.4, -0.8)], scaled(p.second, 0.8), p.hair)
    else:
        p.shape([(-0.45, 0.1), (0.2, 0.1), (-0.5, -0.2)], p.second, p.hair)
        for u in (-0.1, 0.1):
            p.rod([(u, -0.25), (u + 0.03, -0.75), (u + 0.15, -0.75)], (200, 140, 60), 0.06)


def boat(p: Pen) -> None:
    p.shape([(-0.9, -0.3), (0.95, -0.25), (0.6, -0.75), (-0.65, -0.75)], p.main, p.surface)
    p.shape([(-0.9, -0.3), (0.95, -0.25), (0.88, -0.36), (-0.86, -0.4)], p.second)
    if p.rng.random() < 0.6:
        p.rod([(0.0, -0.3), (0.0, 0.95)], (120, 90, 60), 0.06)
        p.shape([(0.06, -0.2), (0.06, 0.9), (0.75, -0.15)], mixed(p.third, (245, 245, 240), 0.5))
        p.shape([(-0.06, -0.2), (-0.06, 0.7), (-0.6, -0.2)], mixed(p.second, (245, 245, 240), 0.6))
    else:
        p.box(-0.5, -0.3, 0.3, 0.15, p.third, p.surface)
        for u in (-0.4, -0.12, 0.12):
            p.box(u, -0.15, u + 0.15, 0.05, p.glass)
        p.box(-0.3, 0.15, -0.1, 0.5, p.second)


def bottle(p: Pen) -> None:
    wide = p.rng.uniform(0.2, 0.34)
    glass = p.main if p.rng.random() < 0.5 else (40, 92, 60)
    outline = [(-wide, -0.95), (wide, -0.95), (wide, 0.15), (0.1, 0.5), (0.1, 0.85), (-0.1, 0.85), (-0.1, 0.5)]
    p.shape([*outline, (-wide, 0.15)], glass)
    p.box(-0.12, 0.8, 0.12, 0.95, p.third)
    p.box(-wide, -0.55, wide, -0.05, mixed(p.second, (245, 240, 225), 0.5), ("weave", 10))
    p.rod([(-wide * 0.6, -0.8), (-wide * 0.6, 0.1)], mixed(glass, (255, 255, 255), 0.6), 0.05)


def bus(p: Pen) -> None:
    p.box(-1.0, -0.5, 1.0, 0.6, p.main, p.surface)
    p.box(-1.0, -0.25, 1.0, -0.12, p.second)
    for u in np.linspace(-0.92, 0.62, 6):
        p.box(u, 0.05, u + 0.24, 0.45, p.glass)
    p.box(0.72, -0.45, 0.94, 0.45, scaled(p.glass, 0.7))
    for u in (-0.6, 0.45):
        p.oval(u, -0.52, 0.17, 0.17, p.dark)
        p.oval(u, -0.52, 0.08, 0.08, (160, 160, 164))


def car(p: Pen) -> None:
    p.shape([(-0.6, 0.0), (-0.38, 0.42), (0.25, 0.42), (0.55, 0.0)], scaled(p.main, 0.95))
    p.shape([(-1, -0.35), (-0.98, 0.02), (-0.6, 0.08), (0.6, 0.06), (0.95, -0.08), (1, -0.35)], p.main, p.surface)
    p.shape([(-0.48, 0.04), (-0.32, 0.35), (-0.08, 0.35), (-0.08, 0.04)], p.glass)
    p.shape([(0.0, 0.04), (0.0, 0.35), (0.2, 0.35), (0.42, 0.04)], p.glass)
    p.oval(0.92, -0.1, 0.06, 0.06, (250, 236, 180))
    for u in (-0.58, 0.58):
        p.oval(u, -0.36, 0.2, 0.2, p.dark)
        p.oval(u, -0.36, 0.1, 0.1, (160, 160, 164))


def _legs(p: Pen, spots, top: float, bottom: float, width: float, color: Color) -> None:
    for u in spots:
        p.box(u - width, bottom, u + width, top, color)


def cat(p: Pen) -> None:
    p.rod([(-0.45, -0.6), (-0.8, -0.4), (-0.75, 0.2), (-0.6, 0.35)], p.fur, 0.14)
    p.oval(-0.05, -0.35, 0.48, 0.55, p.fur, p.hair)
    _legs(p, (0.05, 0.25), -0.4, -0.9, 0.09, scaled(p.fur, 0.9))
    for side in (-1, 1):
        p.shape([(0.2 + side * 0.36, 0.4), (0.2 + side * 0.34, 0.95), (0.2 + side * 0.04, 0.6)], p.fur)
    p.oval(0.2, 0.38, 0.38, 0.33, p.fur, p.hair)
    for side in (-1, 1):
        p.oval(0.2 + side * 0.15, 0.44, 0.07, 0.07, (180, 200, 70))
        p.oval(0.2 + side * 0.15, 0.44, 0.025, 0.06, DARK)
        p.rod([(0.2 + side * 0.1, 0.25), (0.2 + side * 0.5, 0.28)], (240, 240, 240), 0.02)
    p.shape([(0.15, 0.3), (0.25, 0.3), (0.2, 0.24)], (214, 130, 130))


def chair(p: Pen) -> None:
    wood = p.main
    p.box(-0.5, 0.0, -0.36, 0.95, wood)
    p.box(0.1, 0.1, 0.22, 0.95, scaled(wood, 0.85))
    for v in (0.75, 0.5, 0.25):
        p.box(-0.45, v, 0.2, v + 0.12, wood)
    p.shape([(-0.5, -0.1), (0.4, -0.15), (0.55, 0.08), (-0.38, 0.1)], p.second, p.surface)
    for u, top, bottom in ((-0.46, -0.1, -0.95), (0.36, -0.12, -0.98), (0.48, 0.0, -0.8), (-0.3, -0.1, -0.78)):
        p.box(u - 0.05, bottom, u + 0.05, top, scaled(wood, 0.8))


def cow(p: Pen) -> None:
    coat, spots = p.fur, mixed(p.fur, (250, 246, 240) if sum(p.fur) < 380 else (40, 34, 30), 0.85)
    _legs(p, (-0.62, -0.45, 0.25, 0.42), -0.1, -0.85, 0.07, scaled(coat, 0.85))
    p.rod([(-0.75, 0.25), (-0.9, -0.3)], coat, 0.06)
    p.shape([(-0.8, 0.35), (0.5, 0.4), (0.5, -0.2), (0.1, -0.35), (-0.75, -0.25)], coat, p.hair)
    for _ in range(4):
        u, v = p.rng.uniform(-0.6, 0.35), p.rng.uniform(-0.1, 0.25)
        p.oval(u, v, p.rng.uniform(0.08, 0.18), p.rng.uniform(0.06, 0.13), spots)
    p.shape([(0.4, 0.45), (0.75, 0.55), (0.95, 0.1), (0.75, 0.0), (0.5, 0.15)], coat, p.hair)
    p.oval(0.88, 0.08, 0.1, 0.09, (214, 160, 150))
    for du in (0.5, 0.72):
        p.rod([(du, 0.5), (du + 0.04, 0.75)], (230, 224, 200), 0.07)
    p.oval(-0.45, -0.32, 0.14, 0.1, (226, 170, 160))


def diningtable(p: Pen) -> None:
    p.shape([(-0.95, 0.1), (0.95, 0.1), (0.7, 0.45), (-0.7, 0.45)], p.main, ("planks", p.rng.uniform(6, 18)))
    p.box(-0.95, 0.0, 0.95, 0.1, scaled(p.main, 0.75))
    for u, bottom in ((-0.85, -0.9), (0.85, -0.9), (-0.6, -0.6), (0.6, -0.6)):
        p.box(u - 0.07, bottom, u + 0.07, 0.0, scaled(p.main, 0.65))
    for u in p.rng.uniform(-0.55, 0.55, 3):
        p.oval(u, 0.28, 0.16, 0.06, (236, 236, 232))


def dog(p: Pen) -> None:
    p.rod([(-0.6, 0.15), (-0.9, 0.55)], p.fur, 0.12)
    _legs(p, (-0.55, -0.38, 0.2, 0.36), -0.1, -0.85, 0.08, scaled(p.fur, 0.88))
    p.oval(-0.1, 0.05, 0.6, 0.28, p.fur, p.hair)
    p.oval(0.5, 0.42, 0.26, 0.24, p.fur, p.hair)
    p.shape([(0.55, 0.5), (0.98, 0.38), (0.95, 0.22), (0.55, 0.2)], scaled(p.fur, 1.1))
    p.oval(0.96, 0.36, 0.07, 0.06, DARK)
    p.oval(0.35, 0.38, 0.1, 0.28, scaled(p.fur, 0.6))
    p.oval(0.6, 0.5, 0.045, 0.045, DARK)
    p.rod([(0.28, 0.18), (0.5, 0.12)], p.main, 0.1)


def horse(p: Pen) -> None:
    _legs(p, (-0.55, -0.4, 0.2, 0.34), 0.0, -0.95, 0.055, scaled(p.fur, 0.85))
    p.shape([(-0.65, 0.25), (-0.8, 0.2), (-0.92, -0.5), (-0.75, -0.4)], scaled(p.fur, 0.5), p.hair)
    p.oval(-0.12, 0.1, 0.55, 0.25, p.fur, p.hair)
    p.shape([(0.15, 0.2), (0.4, -0.05), (0.72, 0.75), (0.5, 0.9)], p.fur, p.hair)
    p.shape([(0.48, 0.92), (0.66, 0.85), (1.0, 0.45), (0.9, 0.36), (0.6, 0.6)], p.fur)
    p.shape([(0.1, 0.32), (0.46, 0.98), (0.54, 0.9), (0.3, 0.3)], scaled(p.fur, 0.45), p.hair)
    p.shape([(0.5, 0.88), (0.54, 1.0), (0.62, 0.86)], p.fur)
    p.oval(0.68, 0.7, 0.035, 0.035, DARK)


def motorbike(p: Pen) -> None:
    for u in (-0.62, 0.62):
        p.oval(u, -0.42, 0.34, 0.34, p.dark)
        p.oval(u, -0.42, 0.18, 0.18, (168, 168, 172))
    p.shape([(-0.5, -0.3), (0.3, -0.45), (0.45, 0.05), (-0.3, 0.0)], (96, 98, 104), ("ribs", 22))
    p.shape([(-0.1, 0.0), (0.4, 0.05), (0.35, 0.35), (0.0, 0.32)], p.main)
    p.shape([(-0.95, 0.2), (-0.1, 0.02), (-0.05, 0.2), (-0.8, 0.35)], p.dark)
    p.rod([(0.62, -0.4), (0.38, 0.5), (0.2, 0.58)], (176, 176, 180), 0.09)
    p.oval(0.5, 0.32, 0.11, 0.11, (250, 240, 190))
    p.rod([(-0.9, -0.5), (0.1, -0.5)], (190, 190, 194), 0.1)


def person(p: Pen) -> None:
    skin = SKINS[p.rng.integers(len(SKINS))]
    stride, swing = p.rng.uniform(0.05, 0.3), p.rng.uniform(-0.1, 0.5)
    for side in (-1, 1):
        p.rod([(side * 0.1, -0.1), (side * stride, -0.92)], p.second, 0.2)
        p.rod([(side * 0.22, 0.45), (side * 0.42, swing - 0.15)], scaled(p.main, 0.85), 0.14)
        p.oval(side * 0.43, swing - 0.18, 0.07, 0.07, skin)
    p.shape([(-0.22, -0.15), (0.22, -0.15), (0.29, 0.5), (-0.29, 0.5)], p.main, p.surface)
    p.oval(0, 0.74, 0.17, 0.21, skin)
    p.shape([(-0.18, 0.72), (-0.15, 0.95), (0.15, 0.97), (0.18, 0.76), (0, 0.87)], FURS[p.rng.integers(len(FURS))])


def pottedplant(p: Pen) -> None:
    p.shape([(-0.3, -0.95), (0.3, -0.95), (0.42, -0.3), (-0.42, -0.3)], p.main, p.surface)
    p.box(-0.46, -0.4, 0.46, -0.28, scaled(p.main, 0.85))
    leaf = jitter(p.rng, ((58, 110, 48), (36, 80, 44), (120, 140, 60))[p.rng.integers(3)], 14)
    for angle in p.rng.uniform(0.25, np.pi - 0.25, 9):
        length = p.rng.uniform(0.6, 1.15)
        du, dv = length * np.cos(angle), length * np.sin(angle)
        side = np.array([-np.sin(angle), np.cos(angle)]) * p.rng.uniform(0.08, 0.16)
        middle = (0.6 * du, -0.3 + 0.6 * dv)
        points = [(0, -0.3), (middle[0] + side[0], middle[1] + side[1]), (du, dv - 0.3)]
        p.shape([*points, (middle[0] - side[0], middle[1] - side[1])], jitter(p.rng, leaf, 14), ("leaves", 14))


def sheep(p: Pen) -> None:
    wool = jitter(p.rng, ((236, 230, 216), (190, 180, 164), (90, 80, 74))[p.rng.integers(3)])
    face = DARK if p.rng.random() < 0.6 else (206, 180, 156)
    _legs(p, (-0.45, -0.28, 0.2, 0.36), -0.2, -0.85, 0.06, face)
    for angle in np.linspace(0, 2 * np.pi, 11):
        p.oval(-0.08 + 0.42 * np.cos(angle), 0.02 + 0.24 * np.sin(angle), 0.24, 0.2, wool, ("leaves", 14))
    p.oval(-0.08, 0.02, 0.45, 0.28, wool, ("leaves", 14))
    p.oval(0.62, 0.22, 0.16, 0.22, face)
    p.oval(0.56, 0.42, 0.18, 0.12, wool, ("leaves", 14))
    p.oval(0.42, 0.25, 0.12, 0.06, face)


def sofa(p: Pen) -> None:
    p.box(-0.85, -0.2, 0.85, 0.5, p.main, p.surface)
    p.box(-0.8, -0.35, 0.8, -0.02, scaled(p.main, 1.15), p.surface)
    p.box(-0.02, -0.35, 0.02, 0.45, scaled(p.main, 0.6))
    p.box(-0.85, -0.65, 0.85, -0.33, scaled(p.main, 0.8), p.surface)
    for u in (-1.0, 0.72):
        p.box(u, -0.65, u + 0.28, 0.15, scaled(p.main, 0.9), p.surface)
        p.oval(u + 0.14, 0.14, 0.15, 0.12, scaled(p.main, 1.1))
        p.box(u + 0.06, -0.8, u + 0.16, -0.65, p.dark)
    p.shape([(-0.6, -0.02), (-0.25, -0.02), (-0.3, 0.3), (-0.55, 0.3)], p.second, ("weave", 12))


def train(p: Pen) -> None:
    p.box(-1.0, -0.55, 0.6, 0.5, p.main, p.surface)
    p.shape([(0.6, -0.55), (0.95, -0.5), (0.98, -0.1), (0.75, 0.45), (0.6, 0.5)], p.second)
    p.shape([(0.68, 0.05), (0.9, 0.05), (0.75, 0.38), (0.68, 0.38)], p.glass)
    p.box(-1.0, -0.3, 0.6, -0.2, p.third)
    for u in np.linspace(-0.95, 0.35, 6):
        p.box(u, 0.0, u + 0.16, 0.32, p.glass)
    for u in np.linspace(-0.85, 0.7, 7):
        p.oval(u, -0.62, 0.1, 0.1, p.dark)
    p.rod([(-1.0, -0.74), (1.0, -0.74)], (110, 100, 92), 0.07)
    p.rod([(-0.3, 0.5), (-0.1, 0.75), (-0.3, 0.95)], p.dark, 0.05)


def tvmonitor(p: Pen) -> None:
    case = mixed(p.main, DARK, 0.5)
    p.box(-0.9, -0.5, 0.9, 0.75, case)
    p.box(-0.78, -0.36, 0.78, 0.63, PAINTS[p.rng.integers(len(PAINTS))], ("stripes", p.rng.uniform(4, 30)))
    p.shape([(-0.7, 0.6), (-0.2, 0.6), (-0.55, -0.3), (-0.75, -0.3)], p.glass)
    p.box(-0.1, -0.75, 0.1, -0.5, scaled(case, 0.8))
    p.box(-0.45, -0.85, 0.45, -0.73, case)


# In the order of the class ids, 1 to 20.
SHAPES = (aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
          person, pottedplant, sheep, sofa, train, tvmonitor)  # fmt: skip
