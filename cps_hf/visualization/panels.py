"""Pages of pictures: rows of images and class maps with titles and a legend; one overlay above its legend.

With a `path`, the page is written there as PNG, completely or not at all, so that a reader never finds half a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..files import written_whole
from ..functional.losses import IGNORE_INDEX
from .class_maps import Palette, as_array, as_class_map, as_picture, classes_in, colorize, enlarged, overlay
from .colors import BLACK, WHITE, Color, overlay_name
from .lettering import font, one_line

GRAY = (150, 150, 150)


def panel(
    rows: Sequence[Sequence[Any]],
    titles: Sequence[str],
    names: Sequence[str],
    palette: Palette,
    path: str | os.PathLike,
    *,
    legend: Mapping[str, Color] | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Write a grid of pictures and class maps, with a title per column and a legend of the classes that occur.

    Small pictures are enlarged by whole factors, large ones reduced; class maps are never blended.

    Args:
        rows: each as long as `titles`; a two-dimensional cell is a class map, a three-dimensional one a picture.
        names: the classes' names; `palette`: their colours.
        legend: more entries {text: colour}, e.g. `AGREEMENT`.
        captions: a line above each row.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"Each row needs {len(titles)} cells, one per title; got {[len(row) for row in rows]}.")
    if len(palette) < len(names):
        raise ValueError(f"The palette has {len(palette)} colours for {len(names)} class names.")
    cells = [[as_array(cell) for cell in row] for row in rows]
    box = min(512, max(256, 1600 // len(titles)))
    pictures = [[_fit(cell, palette, box) for cell in row] for row in cells]
    entries = _legend_entries([cell for row in cells for cell in row if cell.ndim == 2], names, palette)
    entries += [(color, text) for text, color in (legend or {}).items()]
    _draw_page(pictures, titles, entries, Path(path), captions or [])


def overlay_page(
    image: Any,
    labels: Any,
    names: Sequence[str],
    palette: Palette,
    path: str | os.PathLike,
    *,
    alpha: float = 0.5,
) -> None:
    """Write the picture with the class map over it, and a legend of the classes that occur below it.

    The picture keeps its resolution; a small one is enlarged by a whole factor, so that the legend fits.
    """
    labels = as_class_map(labels)
    mixed = enlarged(overlay(image, labels, palette, alpha), side=512)
    entries = [(color, overlay_name(name, color)) for color, name in _legend_entries([labels], names, palette)]
    _draw_page([[mixed]], None, entries, Path(path))


def _fit(cell: np.ndarray, palette: Palette, box: int) -> np.ndarray:
    picture = colorize(cell, palette) if cell.ndim == 2 else as_picture(cell)
    height, width = picture.shape[:2]
    scale = box / max(height, width)
    if scale >= 1:
        return enlarged(picture, side=box)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.NEAREST if cell.ndim == 2 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize(size, how))


def _legend_entries(maps: Sequence[np.ndarray], names: Sequence[str], palette: Palette) -> list[tuple[Color, str]]:
    """(colour, name) of the classes that occur in any map, and of ignored pixels if there are any."""
    present = sorted({value for labels in maps for value in classes_in(labels)})
    entries = [(tuple(palette[i]), str(names[i]) if i < len(names) else f"class {i}") for i in present]
    ignored = any((labels == IGNORE_INDEX).any() for labels in maps)
    return [*entries, (WHITE, "ignored")] if ignored else entries


def _draw_page(
    pictures: list[list[np.ndarray]],
    titles: Sequence[str] | None,
    entries: list[tuple[Color, str]],
    path: Path,
    captions: Sequence[str] = (),
) -> None:
    """Draw titles if there are any, the rows with their captions, then the legend in columns, on a large enough
    page."""
    entries = [(color, one_line(text)) for color, text in entries]
    titles, captions = titles and [one_line(title) for title in titles], [one_line(text) for text in captions]
    gap = 10
    columns = range(len(pictures[0]))
    widths = [max(row[i].shape[1] for row in pictures) for i in columns]
    letters = font(max(15, sum(widths) // 75))
    line = round(letters.size * 1.6)
    if titles is not None:
        widths = [max(width, math.ceil(letters.getlength(title))) for width, title in zip(widths, titles, strict=True)]
    heights = [max(cell.shape[0] for cell in row) for row in pictures]
    entry = max((line + math.ceil(letters.getlength(name)) + 2 * gap for _, name in entries), default=0)
    longest = max((math.ceil(letters.getlength(caption)) for caption in captions), default=0)
    page_width = max(sum(widths) + gap * (len(widths) + 1), entry + gap, longest + 2 * gap)
    per_line = max(1, (page_width - gap) // entry) if entries else 1
    title_height = gap if titles is None else line
    legend_top = title_height + sum(heights) + gap * (len(heights) + 1) + line * len(captions)
    page = Image.new("RGB", (page_width, legend_top + line * math.ceil(len(entries) / per_line)), WHITE)
    draw = ImageDraw.Draw(page)
    top = title_height
    for number, (row, height) in enumerate(zip(pictures, heights, strict=True)):
        if captions:
            draw.text((gap, top + line // 2), captions[number], fill=BLACK, font=letters, anchor="lm")
            top += line
        for i, cell in enumerate(row):
            left = gap * (i + 1) + sum(widths[:i]) + (widths[i] - cell.shape[1]) // 2
            y = top + (height - cell.shape[0]) // 2
            page.paste(Image.fromarray(cell), (left, y))
            draw.rectangle((left - 1, y - 1, left + cell.shape[1], y + cell.shape[0]), outline=GRAY)
        top += height + gap
    for i, title in enumerate(titles or []):
        middle = gap * (i + 1) + sum(widths[:i]) + widths[i] // 2
        draw.text((middle, line // 2), title, fill=BLACK, font=letters, anchor="mm")
    for i, (color, name) in enumerate(entries):
        left, y = gap + entry * (i % per_line), legend_top + line * (i // per_line)
        draw.rectangle((left, y, left + line - 8, y + line - 8), fill=color, outline=GRAY)
        draw.text((left + line, y + (line - 8) // 2), name, fill=BLACK, font=letters, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        page.save(temporary, format="PNG")
