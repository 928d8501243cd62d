"""Matplotlib figures: confusion matrices, learning curves, bars by class; written as PNG, completely or not at all.

Matplotlib is imported when something is drawn: importing takes a second, and most runs of the package draw nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import written_whole
from .class_maps import as_array
from .colors import OKABE_ITO
from .lettering import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_confusion_matrix(matrix: Any, names: Sequence[str], *, title: str | None = None) -> Figure:
    """A confusion matrix (C, C; rows are the truth) as shares of each true class's pixels.

    Rows of classes that do not occur are empty. Above 40 classes, the cells are small and have no numbers.
    (scikit-learn's ConfusionMatrixDisplay writes a number into every cell, and would be another dependency.)

    Raises:
        ValueError: the matrix is not (C, C) for C names.
    """
    from matplotlib.figure import Figure

    matrix = as_array(matrix).astype(np.float64)
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
    return figure


def write_confusion_matrix(
    matrix: Any, names: Sequence[str], path: str | os.PathLike, *, title: str | None = None
) -> None:
    """Write the figure of `draw_confusion_matrix`."""
    _save(draw_confusion_matrix(matrix, names, title=title), Path(path))


def draw_curves(records: Sequence[Mapping[str, Any]], keys: Sequence[str] | Mapping[str, Sequence[str]]) -> Figure:
    """Learning curves: one line per key over "step".

    Args:
        records: rows of metrics.jsonl; a row is used for each of its keys besides "step". None and NaN are gaps.
        keys: the keys of one plot, or of several plots from top to bottom, by axis label.

    Raises:
        ValueError: no row has a key.
    """
    from matplotlib.figure import Figure

    plots = keys if isinstance(keys, Mapping) else {"": keys}
    lines = max(2 * len(plots), sum(max(5, 1 + len(some)) for some in plots.values()))  # of text, for the legends
    figure = Figure(figsize=(9, max(1.5 + 2.2 * len(plots), 0.25 * lines)), dpi=110, layout="constrained")
    grid = figure.subplots(len(plots), 1, sharex=True, squeeze=False)
    for axes, (title, some) in zip(grid[:, 0], plots.items(), strict=True):
        drawn = [_curve(axes, records, key, i) for i, key in enumerate(some)]
        axes.set_ylabel(_plain(title))
        low, high = axes.get_ylim()
        low = min(0.0, low)  # from zero, or differences of noise would look like gains
        axes.set_ylim(low, high + 0.05 * (high - low))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        # Not with the lines' own labels: matplotlib hides labels that start with "_".
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0}
        axes.legend(drawn, [_plain(_label(key)) for key in some], frameon=False, fontsize=9, **place)
    grid[-1, 0].set_xlabel("step")
    figure.align_ylabels()
    return figure


def write_curves(
    records: Sequence[Mapping[str, Any]], keys: Sequence[str] | Mapping[str, Sequence[str]], path: str | os.PathLike
) -> None:
    """Write the figure of `draw_curves`."""
    _save(draw_curves(records, keys), Path(path))


def curve_groups(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys in a run's records that get a curve, by plot; empty if there are none."""
    keys = sorted({key for record in records for key in record})
    groups = {
        "loss": [key for key in keys if key == "loss" or key.endswith("_loss")],
        # Without "eval_mean_iou", which repeats the best branch's.
        "mean IoU": [key for key in keys if key.endswith("_mean_iou") and key != "eval_mean_iou"],
        "agreement": [key for key in keys if key.endswith(("agreement", "commonest_class"))],
    }
    return {title: some for title, some in groups.items() if some}


def draw_classes(iou: Sequence[float | None], names: Sequence[str], shares: Sequence[float] | None = None) -> Figure:
    """The IoU of each class as a bar, next to the class's share of the labeled pixels if it is known.

    Args:
        iou: fractions, by class; None or NaN: the class does not occur.
        shares: fractions, by class.
    """
    from matplotlib.figure import Figure

    values = [math.nan if value is None else 100 * value for value in iou]
    columns = 1 if shares is None else 2
    figure = Figure(figsize=(3 + 3 * columns, 1.2 + 0.28 * len(names)), dpi=110, layout="constrained")
    grid = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    blue, orange = ("#0072b2", "#e69f00")
    _bars(grid[0], values, "IoU, %", blue, limit=100)
    grid[0].set_yticks(range(len(names)), [_plain(name) for name in names])
    grid[0].invert_yaxis()  # the first class is on top
    if shares is not None:
        _bars(grid[1], [100 * share for share in shares], "share of the labeled pixels, %", orange)
    return figure


def _bars(axes: Any, values: Sequence[float], label: str, color: str, limit: float | None = None) -> None:
    shown = [0 if math.isnan(value) else value for value in values]
    bars = axes.barh(range(len(values)), shown, color=color)
    words = ["-" if math.isnan(value) else f"{value:.1f}" for value in values]
    axes.bar_label(bars, words, padding=3, fontsize=8)
    axes.set_xlim(0, 1.15 * (limit or max(shown) or 1))
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Any, records: Sequence[Mapping[str, Any]], key: str, number: int) -> Any:
    """The line of one key, in its own colour and, after seven colours, its own dashes."""
    points = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if "step" in r and key in r]
    if not points:
        raise ValueError(f"No record has {key!r} and 'step'; there are {sorted({k for r in records for k in r})}.")
    steps, values = zip(*sorted(points), strict=True)
    # Yellow is omitted, since it cannot be seen on white.
    colors = [tuple(channel / 255 for channel in color) for color in OKABE_ITO if color != (240, 228, 66)]
    color, dashes = colors[number % len(colors)], ("-", "--", ":")[number // len(colors) % 3]
    marker = "o" if len(points) <= 30 else None
    (line,) = axes.plot(steps, values, dashes, color=color, marker=marker, markersize=3.5, linewidth=1.5)
    return line


def _label(key: str) -> str:
    """A key of metrics.jsonl in words: "eval_branch_0_mean_iou" is "branch 0". Other keys are unchanged."""
    if key.endswith(("agreement", "commonest_class")):
        what = "agreement" if key.endswith("agreement") else "most common class"
        return f"{what}, {'fixed images' if key.startswith('eval_') else 'training batches'}"
    if key.startswith("eval_") and key.endswith("_mean_iou"):
        return key.removeprefix("eval_").removesuffix("_mean_iou").replace("_", " ")
    return key.replace("_", " ") if key.endswith("_loss") else key


def _plain(text: Any) -> str:
    """Escape text for matplotlib, which would read a formula between two dollar signs."""
    return one_line(text).replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
