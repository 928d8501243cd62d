"""Pictures: class maps in colour, panels with a legend, learning curves, confusion matrices.

Pictures are uint8, (H, W, 3) as arrays or (3, H, W) as tensors; class maps are integers (H, W), as arrays or tensors
on any device, with 255 where no class is known. What is drawn comes back as an array; what is given a `path` is
written there as PNG, beside it first and then renamed, so that a reader never finds half a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..functional.losses import IGNORE_INDEX
from . import lettering
from .colors import BLACK, OKABE_ITO, WHITE, Color, overlay_name, palette

__all__ = [
    "AGREEMENT",
    "ERRORS",
    "agreement_legend",
    "agreement_map",
    "colorize",
    "confusion_matrix_figure",
    "curves_figure",
    "denormalize",
    "error_map",
    "overlay",
    "overlay_name",
    "overlay_page",
    "palette",
    "panel",
]

Palette = Sequence[Color]

GRAY = (150, 150, 150)
# What `agreement_map` paints, in words; without labels only the first and the last occur. None is a class's colour,
# and all stay apart for colour-blind eyes.
AGREEMENT = {
    "agree": (225, 225, 225),
    "agree, both wrong": (140, 140, 140),
    "only the first is right": (51, 102, 204),
    "only the second is right": (238, 170, 34),
    "disagree": (150, 20, 40),
}
# What `error_map` paints; what is ignored is white.
ERRORS = {"right": AGREEMENT["agree"], "wrong": AGREEMENT["disagree"]}


def denormalize(pixel_values: Tensor | np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (3, H, W) -> uint8 (H, W, 3). `mean` and `std` are for values in [0, 1], as image processors have."""
    values = np.moveaxis(_array(pixel_values).astype(np.float64), 0, -1) * np.asarray(std) + np.asarray(mean)
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def colorize(labels: Any, palette: Palette, ignore_color: Color = WHITE) -> np.ndarray:
    """A class map (H, W) in the palette's colours, `ignore_color` where it is 255: uint8 (H, W, 3).

    Raises:
        ValueError: a class without a colour.
    """
    labels = _class_map(labels)
    strange = [value for value in _present(labels) if not 0 <= value < len(palette)]
    if strange:
        raise ValueError(f"The map holds {strange[:5]}, but the palette has {len(palette)} colours (255 is ignored).")
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = ignore_color
    return table[labels]


def overlay(image: Any, labels: Any, palette: Palette, alpha: float = 0.5) -> np.ndarray:
    """The picture, uint8 (H, W, 3), with the class map laid over it where that is not 255 and its colour not black.

    Args:
        alpha: how much of the class's colour is seen, from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be from 0 to 1, got {alpha}.")
    image, labels = _picture(image), _class_map(labels)
    _check_sizes(image, labels)
    colors = colorize(labels, palette, ignore_color=BLACK)  # black, a background's, would only darken the picture
    mixed = np.rint((1 - alpha) * image + alpha * colors).astype(np.uint8)
    return np.where((colors == BLACK).all(-1, keepdims=True), image, mixed)


def agreement_map(pred_a: Any, pred_b: Any, labels: Any = None) -> np.ndarray:
    """Where two branches predict one class, and with labels, who is right: uint8 (H, W, 3) in `AGREEMENT` colours.

    Args:
        pred_a, pred_b: class maps (H, W).
        labels: the truth; where it is 255, only agreement counts.
    """
    pred_a, pred_b = _class_map(pred_a), _class_map(pred_b)
    _check_sizes(pred_a, pred_b)
    agree = pred_a == pred_b
    case = np.where(agree, 0, 4)
    if labels is not None:
        labels = _class_map(labels)
        _check_sizes(pred_a, labels)
        known = labels != IGNORE_INDEX
        case[known & agree & (pred_a != labels)] = 1
        case[known & ~agree & (pred_a == labels)] = 2
        case[known & ~agree & (pred_b == labels)] = 3
    return np.array(list(AGREEMENT.values()), np.uint8)[case]


def agreement_legend(first: str, second: str) -> dict[str, Color]:
    """`AGREEMENT` for a map that knows the labels, with the two networks' names in its words."""
    words = {"the first": first, "the second": second}
    legend = {}
    for text, color in AGREEMENT.items():
        for there, name in words.items():
            text = text.replace(there, name)
        legend["disagree, both wrong" if text == "disagree" else text] = color
    return legend


def error_map(prediction: Any, labels: Any) -> np.ndarray:
    """Where a prediction is right and where it is wrong, uint8 (H, W, 3) in `ERRORS` colours; white where ignored."""
    prediction, labels = _class_map(prediction), _class_map(labels)
    _check_sizes(prediction, labels)
    case = np.where(labels == IGNORE_INDEX, 2, prediction != labels)
    return np.array([*ERRORS.values(), WHITE], np.uint8)[case]


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
    """Write a grid of pictures and class maps, with a title a column and a legend of the classes that occur.

    Small pictures are enlarged by whole factors, large ones reduced; class maps are never blended.

    Args:
        rows: each as long as `titles`; a cell with two dimensions is a class map, one with three a picture.
        names: the classes' names; `palette`: their colours.
        legend: further entries {text: colour}, e.g. `AGREEMENT`.
        captions: a line above each row.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"Each row needs {len(titles)} cells, one a title; got {[len(row) for row in rows]}.")
    if len(palette) < len(names):
        raise ValueError(f"The palette has {len(palette)} colours for {len(names)} class names.")
    cells = [[_array(cell) for cell in row] for row in rows]
    box = min(512, max(256, 1600 // len(titles)))
    pictures = [[_fit(cell, palette, box) for cell in row] for row in cells]
    entries = _legend_entries([cell for row in cells for cell in row if cell.ndim == 2], names, palette)
    entries += [(color, text) for text, color in (legend or {}).items()]
    entries = [(color, _line(text)) for color, text in entries]
    _draw_page(pictures, [_line(t) for t in titles], entries, Path(path), [_line(c) for c in captions or []])


def overlay_page(
    image: Any,
    labels: Any,
    names: Sequence[str],
    palette: Palette,
    path: str | os.PathLike,
    *,
    alpha: float = 0.5,
) -> None:
    """Write the picture with the class map laid over it, and below it a legend of the classes that occur.

    The picture keeps its pixels; a small one is enlarged by a whole factor, for the legend's sake.
    """
    labels = _class_map(labels)
    mixed = overlay(image, labels, palette, alpha)
    factor = max(1, 512 // max(labels.shape))
    mixed = mixed.repeat(factor, axis=0).repeat(factor, axis=1)
    entries = [(color, _line(overlay_name(name, color))) for color, name in _legend_entries([labels], names, palette)]
    _draw_page([[mixed]], None, entries, Path(path))


def _fit(cell: np.ndarray, palette: Palette, box: int) -> np.ndarray:
    picture = colorize(cell, palette) if cell.ndim == 2 else _picture(cell)
    height, width = picture.shape[:2]
    scale = box / max(height, width)
    if scale >= 1:
        return picture.repeat(int(scale), axis=0).repeat(int(scale), axis=1)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.NEAREST if cell.ndim == 2 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize(size, how))


def _legend_entries(maps: Sequence[np.ndarray], names: Sequence[str], palette: Palette) -> list[tuple[Color, str]]:
    """(colour, name) of the classes that occur in any map, and of ignored pixels when there are some."""
    present = sorted({value for labels in maps for value in _present(labels)})
    entries = [(tuple(palette[i]), str(names[i]) if i < len(names) else f"class {i}") for i in present]
    ignored = any((labels == IGNORE_INDEX).any() for labels in maps)
    return [*entries, (WHITE, "ignored")] if ignored else entries


def _draw_page(
    pictures: list[list[np.ndarray]],
    titles: list[str] | None,
    entries: list[tuple[Color, str]],
    path: Path,
    captions: Sequence[str] = (),
) -> None:
    """Titles if there are some, the rows with their captions, then the legend in columns, on a page large enough."""
    gap = 10
    columns = range(len(pictures[0]))
    widths = [max(row[i].shape[1] for row in pictures) for i in columns]
    font = lettering.font(max(15, sum(widths) // 75))
    line = round(font.size * 1.6)
    if titles is not None:
        widths = [max(width, math.ceil(font.getlength(title))) for width, title in zip(widths, titles, strict=True)]
    heights = [max(cell.shape[0] for cell in row) for row in pictures]
    entry = max((line + math.ceil(font.getlength(name)) + 2 * gap for _, name in entries), default=0)
    longest = max((math.ceil(font.getlength(caption)) for caption in captions), default=0)
    page_width = max(sum(widths) + gap * (len(widths) + 1), entry + gap, longest + 2 * gap)
    per_line = max(1, (page_width - gap) // entry) if entries else 1
    title_height = gap if titles is None else line
    legend_top = title_height + sum(heights) + gap * (len(heights) + 1) + line * len(captions)
    page = Image.new("RGB", (page_width, legend_top + line * math.ceil(len(entries) / per_line)), WHITE)
    draw = ImageDraw.Draw(page)
    top = title_height
    for number, (row, height) in enumerate(zip(pictures, heights, strict=True)):
        if captions:
            draw.text((gap, top + line // 2), captions[number], fill=BLACK, font=font, anchor="lm")
            top += line
        for i, cell in enumerate(row):
            left = gap * (i + 1) + sum(widths[:i]) + (widths[i] - cell.shape[1]) // 2
            y = top + (height - cell.shape[0]) // 2
            page.paste(Image.fromarray(cell), (left, y))
            draw.rectangle((left - 1, y - 1, left + cell.shape[1], y + cell.shape[0]), outline=GRAY)
        top += height + gap
    for i, title in enumerate(titles or []):
        middle = gap * (i + 1) + sum(widths[:i]) + widths[i] // 2
        draw.text((middle, line // 2), title, fill=BLACK, font=font, anchor="mm")
    for i, (color, name) in enumerate(entries):
        left, y = gap + entry * (i % per_line), legend_top + line * (i // per_line)
        draw.rectangle((left, y, left + line - 8, y + line - 8), fill=color, outline=GRAY)
        draw.text((left + line, y + (line - 8) // 2), name, fill=BLACK, font=font, anchor="lm")
    _write(path, lambda temporary: page.save(temporary, format="PNG"))


def confusion_matrix_figure(
    matrix: Any, names: Sequence[str], path: str | os.PathLike, *, title: str | None = None
) -> None:
    """Write a confusion matrix (C, C; rows are the truth) as the share of each true class that was predicted as what.

    Rows of classes that do not occur stay empty. Beyond 40 classes the cells are small and have no numbers.
    """
    from matplotlib.figure import Figure

    matrix = _array(matrix).astype(np.float64)
    count = len(names)
    if matrix.shape != (count, count):
        raise ValueError(f"The matrix must be ({count}, {count}) for {count} names, got {matrix.shape}.")
    with np.errstate(invalid="ignore"):
        shares = 100 * matrix / matrix.sum(1, keepdims=True)
    numbers = count <= 40
    side = 2.5 + (0.42 if numbers else 0.13) * count
    figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=100)
    axes.set_facecolor("0.93")
    if numbers:
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="0.85", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    names, size = [_plain(name) for name in names], 10 if numbers else 7
    axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if title:
        axes.set_title(_plain(title), fontsize=size + 1)
    for row, column in np.argwhere(shares >= 0.5) if numbers else ():
        share = shares[row, column]
        color = "white" if share > 60 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(picture, ax=axes, label="% of the true class's pixels", shrink=0.8)
    _write(Path(path), lambda temporary: figure.savefig(temporary, format="png"))


def curves_figure(
    records: Sequence[Mapping[str, Any]],
    keys: Sequence[str] | Mapping[str, Sequence[str]],
    path: str | os.PathLike,
) -> None:
    """Write learning curves: one line a key over "step".

    Args:
        records: rows of metrics.jsonl; a row counts for the keys it has beside "step". None leaves a gap, as NaN does.
        keys: those of one plot, or of several, one above the other, by what their axis is called.

    Raises:
        ValueError: a key that no row has.
    """
    from matplotlib.figure import Figure

    plots = keys if isinstance(keys, Mapping) else {"": keys}
    lines = max(2 * len(plots), sum(max(5, 1 + len(some)) for some in plots.values()))  # of text that the legends need
    figure = Figure(figsize=(9, max(1.5 + 2.2 * len(plots), 0.25 * lines)), dpi=110, layout="constrained")
    grid = figure.subplots(len(plots), 1, sharex=True, squeeze=False)
    for axes, (title, some) in zip(grid[:, 0], plots.items(), strict=True):
        drawn = [_curve(axes, records, key, i) for i, key in enumerate(some)]
        axes.set_ylabel(_plain(title))
        low, high = axes.get_ylim()
        low = min(0.0, low)  # from zero, or a difference of noise would look like a gain
        axes.set_ylim(low, high + 0.05 * (high - low))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        # Not by the lines' own labels, of which matplotlib hides those that start with "_".
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0}
        axes.legend(drawn, [_plain(key) for key in some], frameon=False, fontsize=9, **place)
    grid[-1, 0].set_xlabel("step")
    figure.align_ylabels()
    _write(Path(path), lambda temporary: figure.savefig(temporary, format="png"))


def _curve(axes: Any, records: Sequence[Mapping[str, Any]], key: str, number: int) -> Any:
    """The line of one key, in its own colour and, after seven colours, its own dashes."""
    points = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if "step" in r and key in r]
    if not points:
        raise ValueError(f"No record has {key!r} beside 'step'; there are {sorted({k for r in records for k in r})}.")
    steps, values = zip(*sorted(points), strict=True)
    # Yellow is left out, it cannot be seen on white.
    colors = [tuple(channel / 255 for channel in color) for color in OKABE_ITO if color != (240, 228, 66)]
    color, dashes = colors[number % len(colors)], ("-", "--", ":")[number // len(colors) % 3]
    marker = "o" if len(points) <= 30 else None
    (line,) = axes.plot(steps, values, dashes, color=color, marker=marker, markersize=3.5, linewidth=1.5)
    return line


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _picture(image: Any) -> np.ndarray:
    """uint8 (H, W, 3). (3, H, W) is turned; when both would do, a tensor's channels are first and an array's last."""
    picture = _array(image)
    if picture.dtype == np.uint8 and picture.ndim == 3:
        if picture.shape[0] == 3 and (picture.shape[-1] != 3 or isinstance(image, Tensor)):
            return np.ascontiguousarray(np.moveaxis(picture, 0, -1))
        if picture.shape[-1] == 3:
            return picture
    raise ValueError(
        f"A picture must be uint8, (H, W, 3) or (3, H, W), got {picture.dtype} {picture.shape}; see `denormalize`."
    )


def _class_map(labels: Any) -> np.ndarray:
    labels = _array(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"A class map must be integers (H, W), got {labels.dtype} {labels.shape}.")
    return labels.astype(np.int64)


def _present(labels: np.ndarray) -> list[int]:
    return [value for value in np.unique(labels).tolist() if value != IGNORE_INDEX]


def _check_sizes(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(f"The two must be of one size, got {a.shape[:2]} and {b.shape[:2]} (height, width).")


def _line(text: Any) -> str:
    """On one line: Pillow places no others by their middle."""
    return " ".join(str(text).split())


def _plain(text: Any) -> str:
    """As matplotlib shows it letter by letter: between two dollar signs it would read a formula."""
    return _line(text).replace("$", r"\$")


def _write(path: Path, save: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
