"""Display colours for classes that have none: apart for all eyes, also for those that see red and green alike."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Color = tuple[int, int, int]

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# Okabe and Ito's eight colours, which stay apart for colour-blind eyes; black comes first, as class 0 is often the
# background.
OKABE_ITO = (
    BLACK,
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
# What eyes without the red, the green or the blue cones see, in linear RGB (Machado, Oliveira, Fernandes; IEEE TVCG
# 2009, severity 1).
_SEEN = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def palette(num_labels: int) -> tuple[Color, ...]:
    """`num_labels` display colours: Okabe and Ito's eight, then each as far as can be from all before it.

    Far for every kind of eye: what counts is the smallest of the distances in CIELAB for usual and for colour-blind
    eyes. A palette is the beginning of every longer one.
    """
    if not 1 <= num_labels <= 255:
        raise ValueError(f"`num_labels` must be from 1 to 255, got {num_labels}.")
    return OKABE_ITO[:num_labels] if num_labels <= len(OKABE_ITO) else _far_colors(num_labels)


def overlay_name(name: str, color: Color) -> str:
    """What the legend of an overlay calls a class: one that is black there is not seen in its colour."""
    return f"{name} (not tinted)" if tuple(color) == BLACK else name


@lru_cache
def _far_colors(num_labels: int) -> tuple[Color, ...]:
    steps = np.linspace(0, 255, 12).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    looks = _looks(candidates)
    chosen = [*OKABE_ITO]
    # White is what ignored pixels are shown in.
    distance = _distances(looks, _looks(np.array([WHITE, *chosen], np.uint8))).min(1)
    while len(chosen) < num_labels:
        best = int(distance.argmax())
        chosen.append(tuple(candidates[best].tolist()))
        distance = np.minimum(distance, _distances(looks, looks[best : best + 1])[:, 0])
    return tuple(chosen)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m): how far colours are apart for the eyes that tell them apart least."""
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(-1)


def _looks(colors: np.ndarray) -> np.ndarray:
    """uint8 (n, 3) -> CIELAB as usual eyes and each kind of colour-blind ones see them, (n, 4, 3)."""
    srgb = colors / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.stack([linear, *(linear @ np.array(matrix).T for matrix in _SEEN.values())], 1).clip(0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = seen @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
