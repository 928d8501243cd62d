"""Looking at a whole data set before it is used: what is in it, and what no single sample shows.

One walk and one judge: `check` tells all of it, and a run refuses before its first step what it cannot train on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from .labels import BLACK_AND_WHITE, IGNORE_INDEX, LabelEncoding
from .reading import examine
from .streams import check_label_range, id_of, undecoded
from .table import as_typed
from .windowed import is_beyond_decoding, open_windowed
from .workers import allowed_workers, outlive_signals

FIRST_ROWS = 64  # of a stream, whose end may be far
LINES = 64  # rows and columns of a mask on which seams are looked for
SEAM = 12  # pixels: how wide one may be, and a twentieth of the mask
SHARE_OF_SEAMS = 0.8  # of a class's pixels; one that has more of them there is no class
AT_LEAST = 30  # pixels, before that is said

UNUSUAL = {
    ("image", "turned"): "images turned as their EXIF says",
    ("label", "turned with image"): "masks of their images' stored size, turned with them",
    ("label", "cannot tell"): (
        "masks of turned images whose sizes cannot tell whether they were drawn turned: taken as drawn in a viewer"
    ),
    ("label", "turned itself"): "masks with an EXIF orientation of their own",
    ("label", "resized"): "masks resized to their images",
    ("label", "seams"): (
        "masks with a class that lies in seams between a lower and a higher one alone, as resizing with interpolation "
        "leaves it: resize masks by the nearest pixel"
    ),
    ("label", "white"): "masks that hold 0 and 255 alone, where others hold 1: 255 is ignored in them",
    ("label", "all ignored"): "masks without a labeled pixel",
    ("image", "pages"): "images with further pages or frames, which are not read",
    ("label", "pages"): "masks with further pages or frames, which are not read",
    ("image", "depth"): "images of more than 8 bits a channel, reduced to 8",
    ("image", "few bits"): "images that use few of their 16 bits and become nearly black: scale them, 12 bits by 16",
    ("image", "alpha"): "images with transparency, which is dropped",
    ("image", "bands"): "images with further bands, which are dropped",
    ("image", "colour space"): "images in another colour space (CMYK, LAB ...), converted to RGB",
    ("image", "white is zero"): "images that store white as 0, shown as a viewer does",
    ("label", "white is zero"): "masks of 1 bit that store white as 0; white is taken as 1, as a viewer shows it",
}
"""What is read rightly and is unusual all the same, in words that follow a count."""


class Note(NamedTuple):
    """What is read rightly and is unusual, or may be a mistake: its key in `UNUSUAL`, words that follow the count, how
    many, the first ids."""

    kind: tuple[str, str]
    what: str
    count: int
    first: list[str]


@dataclass
class Survey:
    """What a walk over a data set found.

    Attributes:
        what: how errors call the set. names: of its classes.
        encoding: how its labels are coded, or none.
        rows: how many it has; none: a stream. looked_at: of them.
        sizes: (height, width) of each image that can be read.
        pixels, images: by class id (256, 255 is ignored), how many pixels have it and how many images hold it.
        problems: {"id", "problem"} of each sample that cannot be read.
        unusual: by the keys of `UNUSUAL`, the ids of the samples.
        palettes: value -> colour in the masks' palettes -> the id that shows it first.
    """

    what: str
    names: Sequence[str]
    encoding: LabelEncoding | None
    with_label: bool
    rows: int | None
    looked_at: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    problems: list[dict[str, str]] = field(default_factory=list)
    unusual: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    palettes: dict[int, dict[tuple[int, int, int], str]] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """How a sentence calls the set."""
        return self.what if " " in self.what else f"`{self.what}`"

    @property
    def is_whole(self) -> bool:
        return self.looked_at == self.rows

    @property
    def scope(self) -> str:
        """ "all 12 samples", "200 of 3000 samples", "the first 64 samples"."""
        if self.rows is None:
            return f"the first {self.looked_at} samples"
        return f"all {self.rows} samples" if self.is_whole else f"{self.looked_at} of {self.rows} samples"

    @property
    def readable(self) -> int:
        return len(self.sizes)

    @property
    def absent(self) -> list[str]:
        """The named classes without a pixel in what was looked at."""
        if not self.with_label or not self.readable:
            return []
        return [name for name, count in zip(self.names, self.pixels, strict=False) if count == 0]

    @property
    def white_is_a_class(self) -> bool:
        """Whether 255 in the masks means the second of two classes."""
        return self.encoding is not None and self.encoding.values == BLACK_AND_WHITE

    def faults(self) -> list[str]:
        """What is wrong with the set as a whole: sentences. Nothing of it shows in one sample."""
        if not self.with_label or not self.readable:
            return []
        found = [self._all_ignored(), self._black_and_white(), self._palettes()]
        return [sentence for sentence in found if sentence]

    def notes(self) -> list[Note]:
        """What to know of the set although it is read."""
        unusual = dict(self.unusual)
        if not self.pixels[1]:  # with a 1 somewhere 255 is ignored; without, that is a fault of the set, or settled
            unusual.pop(("label", "white"), None)
        return [
            Note(kind, text, len(unusual[kind]), unusual[kind][:5])
            for kind, text in UNUSUAL.items()
            if kind in unusual
        ]

    def _all_ignored(self) -> str | None:
        if self.pixels[:IGNORE_INDEX].sum() or not self.pixels[IGNORE_INDEX]:
            return None
        table = {IGNORE_INDEX: len(self.names) - 1}
        return (
            f"No pixel of {self.called} is labeled: the masks of {self.scope} hold ignored pixels ({IGNORE_INDEX}) "
            "alone. Give masks with class ids, or, if these values mean classes, say which, for instance "
            f"{as_typed(values=table)}."
        )

    def _black_and_white(self) -> str | None:
        """Masks of two classes are often drawn in black and white, and white, 255, is what is ignored."""
        coded = _has_table(self.encoding)
        if coded or len(self.names) != 2 or set(np.flatnonzero(self.pixels).tolist()) != {0, IGNORE_INDEX}:
            return None
        ignored = {0: 0, 1: 1, IGNORE_INDEX: IGNORE_INDEX}
        return (
            f"The masks of {self.scope} of {self.called} hold 0 and 255 alone, and 255 is ignored: no pixel would be "
            f"{self.names[1]!r}. If 255 means that class: {as_typed(values=BLACK_AND_WHITE)}. If it is to be ignored: "
            f"{as_typed(values=ignored)}."
        )

    def _palettes(self) -> str | None:
        """Indices that mean other colours in other files were numbered by whoever saved the file, not by a class."""
        told = None if _has_table(self.encoding) else self._first_difference()
        if told is None:
            return None
        table = {color: "class id" for colors in self.palettes.values() for color in colors}
        ids = {i: i for i in range(min(len(self.names), 256))}
        return (
            f"The palettes of the masks of {self.called} differ: {told}, so that a value is not the same class in all "
            "files; programs that reduce colours number them anew in each. If the colours tell the class, say which: "
            f"{as_typed(colors=table)}. If the stored values do: {as_typed(values=ids)}."
        )

    def _first_difference(self) -> str | None:
        """Between two masks' palettes, or else between one and that of the classes."""
        by_value = sorted(self.palettes.items())
        for index, colors in by_value:
            if index != IGNORE_INDEX and len(colors) > 1:
                (a, first), (b, second) = list(colors.items())[:2]
                return f"value {index} is shown as {a} in {first!r} and as {b} in {second!r}"
        named = (self.encoding.palette if self.encoding is not None else None) or ()
        for index, colors in by_value:
            for color, name in colors.items():
                if color in named and index < len(named) and named[index] != color:
                    other = self.encoding.names[named.index(color)]
                    return f"value {index} is shown as {color} in {name!r}, the colour of {other!r} in `palette`"
        return None


def survey(
    dataset,
    *,
    what: str = "dataset",
    names: Sequence[str] | None = None,
    whole: bool = False,
    seconds: float | None = None,
    num_workers: int = 0,
    progress: bool = True,
    in_windows: bool = True,
) -> Survey:
    """Look at every sample: the label's values, the sizes of both, what is unusual.

    Args:
        dataset: with "image" and perhaps "label"; of a stream the first `FIRST_ROWS` are looked at.
        what: how errors call it.
        names: the classes that there are; none: those that its labels' coding names.
        whole: decode images too; else their headers are read, and their labels.
        seconds: stop after so long; samples are then those of a fixed random choice. None: no limit.
        num_workers: processes that read.
        in_windows: read images that are too large to be decoded whole some rows at a time, since training reads crops
            of them. Otherwise they are problems, as they are for an evaluation.

    Raises:
        ValueError: it is no data set of images.
    """
    with_label = "label" in (dataset.features or {})
    rows = undecoded(dataset, with_label=with_label, what=what)
    encoding = LabelEncoding.from_feature(dataset.features["label"]) if with_label else None
    if names is None:
        names = encoding.names if encoding is not None else [f"class {c}" for c in range(IGNORE_INDEX)]
    length = len(rows) if isinstance(rows, Dataset) else None
    found = Survey(what, names, encoding, with_label, length)
    looks = _Looks(rows, encoding, with_label, len(names) if with_label else None, whole, in_windows)
    order = list(range(length or 0))
    if length is not None and seconds is not None:
        order = np.random.default_rng(0).permutation(length).tolist()
    results = looks.of_rows(order, num_workers) if length is not None else looks.of_stream()
    bar = {"total": length, "desc": f"looking at {what}", "unit": "sample", "leave": False}
    end, seen = None if seconds is None else time.monotonic() + seconds, []
    for look in tqdm(results, **bar, disable=not progress or None):  # None: where the output is a terminal
        if isinstance(look, Exception):
            raise look
        seen.append(_count(found, look))
        if end is not None and time.monotonic() > end:
            break
    positions = order if length is not None else range(len(seen))
    for _, look in sorted(zip(positions, seen, strict=False), key=lambda pair: pair[0]):
        _note(found, look)
    return found


class _Looks(torch.utils.data.Dataset):
    """What runs in the workers."""

    def __init__(
        self,
        rows,
        encoding: LabelEncoding | None,
        with_label: bool,
        num_labels: int | None,
        whole: bool,
        in_windows: bool,
    ):
        self.rows, self.encoding, self.with_label = rows, encoding, with_label
        self.num_labels, self.whole, self.in_windows = num_labels, whole, in_windows

    def __getitem__(self, index: int) -> dict[str, Any] | Exception:
        try:
            return self.look(self.rows[index])
        except Exception as error:  # carried over as it is, without the worker's traceback
            return error

    def _suspicious(self, pixels: np.ndarray, ids: np.ndarray | None) -> Iterator[str]:
        """What may be a mistake of this mask."""
        if not pixels[:IGNORE_INDEX].any():
            yield "all ignored"
        coded = _has_table(self.encoding)
        if self.num_labels == 2 and not coded and np.flatnonzero(pixels).tolist() == [0, IGNORE_INDEX]:
            yield "white"
        if ids is not None and holds_seams(ids):
            yield "seams"

    def of_rows(self, order: Sequence[int], num_workers: int) -> Iterable[dict[str, Any] | Exception]:
        return torch.utils.data.DataLoader(
            self,
            sampler=order,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=allowed_workers(min(num_workers, len(order) // 8)),  # starting one takes a few looks' time
            generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )

    def of_stream(self) -> Iterator[dict[str, Any]]:
        return map(self.look, itertools.islice(iter(self.rows), FIRST_ROWS))

    def look(self, row: dict[str, Any]) -> dict[str, Any]:
        name = id_of(row)
        try:
            if self.in_windows and is_beyond_decoding(row["image"]):
                return self._look_in_windows(row, name)
            found = examine(row, self.encoding, with_label=self.with_label, whole=self.whole)
            if found.ids is not None:
                check_label_range(torch.from_numpy(found.ids), self.num_labels, name)
        except ValueError as error:
            return {"id": name, "problem": str(error)}
        look = {"id": name, "size": found.size, "unusual": found.unusual, "palette": found.palette}
        if found.ids is not None:
            look["pixels"] = np.bincount(found.ids.reshape(-1), minlength=256)
            look["unusual"] += [("label", kind) for kind in self._suspicious(look["pixels"], found.ids)]
        return look

    def _look_in_windows(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """Some rows at a time; seams, palettes and what is unusual about the image are not looked for."""
        image, label = open_windowed(row, self.encoding, with_label=self.with_label)
        look: dict[str, Any] = {"id": name, "size": image.shape[1:], "unusual": [], "palette": None}
        if self.whole:
            for _ in image.bands():  # damage shows where it is decoded
                pass
        if label is not None:
            look["pixels"] = np.zeros(256, np.int64)
            for ids in label.bands():
                check_label_range(torch.from_numpy(ids), self.num_labels, name)
                look["pixels"] += np.bincount(ids.reshape(-1), minlength=256)
            look["unusual"] += [("label", kind) for kind in self._suspicious(look["pixels"], None)]
        return look


def _has_table(encoding: LabelEncoding | None) -> bool:
    return encoding is not None and encoding.has_table


def _as_it_is(look: Any) -> Any:
    return look  # the loader would make tensors of arrays


def holds_seams(ids: np.ndarray) -> bool:
    """Whether a class of a label map uint8 (H, W) is the seam between others: what interpolation makes of a mask."""
    rows, in_rows, columns, in_columns = seams(ids)[:, :IGNORE_INDEX]
    share = in_rows / np.maximum(rows, 1) + in_columns / np.maximum(columns, 1)  # a row crosses it, or a column
    return bool(((rows + columns >= AT_LEAST) & (share >= SHARE_OF_SEAMS)).any())


def seams(ids: np.ndarray) -> np.ndarray:
    """Pixels of a label map uint8 (H, W) by class id, (4, 256): on some of its rows, and of those the ones in short
    runs between a lower and a higher value; the same on some of its columns. Ignored neighbours do not count."""
    found = np.zeros((4, 256), np.int64)
    for i, lines in enumerate((ids[:: max(1, ids.shape[0] // LINES)], ids[:, :: max(1, ids.shape[1] // LINES)].T)):
        starts = np.ones(lines.shape, bool)
        starts[:, 1:] = lines[:, 1:] != lines[:, :-1]
        at = np.flatnonzero(starts)
        values, line, length = lines.reshape(-1)[at], at // lines.shape[1], np.diff(at, append=lines.size)
        before, after = np.roll(values, 1), np.roll(values, -1)
        inside = (np.roll(line, 1) == line) & (np.roll(line, -1) == line) & (before != IGNORE_INDEX)
        inside &= (after != IGNORE_INDEX) & (length <= max(2, min(SEAM, lines.shape[1] // 20)))
        inside &= ((before < values) & (values < after)) | ((before > values) & (values > after))
        found[2 * i] = np.bincount(values, weights=length, minlength=256)
        found[2 * i + 1] = np.bincount(values[inside], weights=length[inside], minlength=256)
    return found


def _count(found: Survey, look: dict[str, Any]) -> dict[str, Any]:
    """Add up what can be added; what is left of the look is small."""
    found.looked_at += 1
    if "pixels" in look:
        pixels = look.pop("pixels")
        found.pixels += pixels
        found.images += pixels > 0
    return look


def _note(found: Survey, look: dict[str, Any]) -> None:
    """What has names, in the order of the rows."""
    if "problem" in look:
        found.problems.append({"id": look["id"], "problem": look["problem"]})
        return
    found.sizes.append(look["size"])
    for kind in look["unusual"]:
        found.unusual.setdefault(kind, []).append(look["id"])
    for index, color in (look["palette"] or {}).items():
        found.palettes.setdefault(index, {}).setdefault(color, look["id"])
