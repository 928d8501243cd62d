"""The letters on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import ImageFont


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: names are not always ASCII. `size`: in pixels."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def one_line(text: Any) -> str:
    """On one line: Pillow places no others by their middle."""
    return " ".join(str(text).split())
