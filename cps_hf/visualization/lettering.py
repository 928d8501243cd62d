"""Text on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import ImageFont


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: names are not always ASCII. `size`: in pixels."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def one_line(text: Any) -> str:
    """The text on one line: Pillow cannot centre several lines."""
    return " ".join(str(text).split())
