"""Folders of images and masks in layouts that users have."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (8, 10)  # height and width
BANDS = np.repeat(np.arange(2, dtype=np.uint8), SIZE[0] // 2)[:, None].repeat(SIZE[1], 1)  # 0 above, 1 below


def write_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    """An image of one colour, different for each name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], tuple(zlib.crc32(path.name.encode()).to_bytes(4, "big")[:3])).save(path)


def write_mask(path: Path, ids=BANDS, colors: list[tuple[int, int, int]] | None = None, *, palette=False) -> None:
    """A mask in grey or in the colours of its ids: as a picture or as a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids, np.uint8))
    if colors and palette:
        image.putpalette([value for color in colors for value in color])
    elif colors:
        image = Image.fromarray(np.array(colors, np.uint8)[np.asarray(ids)])
    image.save(path)


def write_files(root: Path, *names: str, ids=BANDS) -> Path:
    """Images and masks by name: masks are recognised by their folder or ending."""
    for name in names:
        lowered = name.lower()
        is_mask = any(word in lowered for word in ("mask", "label", "segmentation", "ann", "gt", "manual", "truth"))
        (write_mask if is_mask else write_image)(root / name, *([ids] if is_mask else []))
    return root
