"""What was found in a folder, and its table for a terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from .labels import IGNORE_INDEX
from .table import first_few

MOST_CLASSES = 40  # rows


@dataclass
class Discovered:
    """The content of a folder.

    Attributes:
        labeled, unlabeled, evaluation: with "image", "id" and, except for the unlabeled, "label", as from
            `load_folder`; `None` if there is none.
        class_names: by class id.
        layout: a description of the folder's layout.
        held_out: the ids of the images of `evaluation`, if part of the labeled images is held out.
        passed_over: number of skipped files by reason.
        sizes: by "labeled", "unlabeled" and "validation", (height, width) of each sampled image.
        pixels: by "labeled" and "validation", int64 (256,), pixels by class id; 255 counts ignored pixels.
        judged_on: a description of where the validation images come from.
        notes: sentences for the user.
    """

    root: Path
    labeled: Dataset
    unlabeled: Dataset | None
    evaluation: Dataset | None
    class_names: tuple[str, ...]
    layout: str
    held_out: list[str]
    passed_over: dict[str, int]
    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    judged_on: str = ""
    notes: list[str] = field(default_factory=list)

    def table(self, width: int | None = None) -> str:
        """Counts, sizes, classes with their shares of pixels, and notes.

        Args:
            width: the columns that notes are wrapped to. If `None`, each is one line.
        """
        below = _below(self)
        if width is not None:
            options = {"break_long_words": False, "break_on_hyphens": False}
            below = [line for note in below for line in textwrap.wrap(note, width, **options)]
        sections = [[f"{self.root}: {self.layout}."], _counts(self), _classes(self), below]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _counts(found: Discovered) -> list[str]:
    sets = {"labeled": found.labeled, "unlabeled": found.unlabeled, "validation": found.evaluation}
    rows = [("", "images", "width x height", "")]
    for name, dataset in sets.items():
        count = 0 if dataset is None else len(dataset)
        rows.append((name, str(count), sizes_in_words(found.sizes.get(name, [])), ""))
    lines = _aligned(rows, left=(0, 2))
    if found.judged_on:
        lines[-1] += f"   {found.judged_on}"
    return lines


def sizes_in_words(sizes: Sequence[tuple[int, int]]) -> str:
    """ "240 x 180", or the smallest and the largest, each width x height."""
    if not sizes:
        return ""
    if len(set(sizes)) == 1:
        return f"{sizes[0][1]} x {sizes[0][0]}"
    if len(set(sizes)) == 2:
        return " and ".join(f"{w} x {h}" for (h, w), _ in Counter(sizes).most_common())
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    (h, w), (height, width) = by_area[0], by_area[-1]
    return f"{w} x {h} to {width} x {height}, {len(set(sizes))} sizes"


def _classes(found: Discovered) -> list[str]:
    sets = [name for name in ("labeled", "validation") if name in found.pixels]
    shares = {name: found.pixels[name] / max(int(found.pixels[name][:IGNORE_INDEX].sum()), 1) for name in sets}
    rows = [("class", *(f"{name}, %" for name in sets))]
    names = list(found.class_names)
    for class_id, name in enumerate(names[:MOST_CLASSES]):
        rows.append((f"{class_id:>3} {name}", *(_percent(shares[which][class_id]) for which in sets)))
    lines = _aligned(rows, left=(0,))
    if len(names) > MOST_CLASSES:
        lines.append(f"... and {len(names) - MOST_CLASSES} more")
    ignored = [found.pixels[name][IGNORE_INDEX] / max(int(found.pixels[name].sum()), 1) for name in sets]
    if np.any(ignored):
        said = " and ".join(f"{_percent(share)} % of {name}" for name, share in zip(sets, ignored, strict=True))
        lines.append(f"ignored: {said} pixels")
    return lines


def _percent(share: float) -> str:
    return "-" if share == 0 else f"{100 * share:.2f}"


def _below(found: Discovered) -> list[str]:
    lines = []
    if found.held_out:
        lines.append(f"held out: {first_few(found.held_out, 6)}")
    if found.passed_over:
        told = "; ".join(f"{count} {reason}" for reason, count in found.passed_over.items())
        lines.append(f"skipped: {told}")
    return lines + list(found.notes)


def _aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return ["   ".join(row).rstrip() for row in cells]
