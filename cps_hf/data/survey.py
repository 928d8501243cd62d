"""Survey a whole data set before it is used: its content, and problems that no single sample shows.

The same walk serves `check`, which reports everything, and a run, which stops before its first step if it cannot train
on the data.
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
from .streams import check_label_range, id_of, label_name, undecoded
from .table import as_typed
from .windowed import is_beyond_decoding, open_windowed
from .workers import allowed_workers, outlive_signals

FIRST_ROWS = 64  # of a stream, which may be long
LINES = 64  # rows and columns of a mask that are searched for seams
SEAM = 12  # largest width of a seam in pixels; at most a twentieth of the mask
SHARE_OF_SEAMS = 0.8  # of a class's pixels in a mask; with a larger share in seams, it is not a real class
AT_LEAST = 30  # pixels needed before that is reported

UNUSUAL = {
    ("image", "turned"): "images rotated according to their EXIF orientation",
    ("label", "turned with image"): "masks of their images' stored size, rotated with them",
    ("label", "cannot tell"): (
        "masks of rotated images whose sizes do not show whether they are rotated too: taken as displayed in a viewer"
    ),
    ("label", "turned itself"): "masks with their own EXIF orientation",
    ("label", "resized"): "masks resized to their images",
    ("label", "seams"): (
        "masks that seem to have been resized with interpolation, which adds thin lines of wrong classes between "
        "objects: resize masks with nearest-neighbor interpolation"
    ),
    ("label", "white"): "masks that contain only 0 and 255, where others contain 1: 255 is ignored in them",
    ("label", "all ignored"): "masks without a labeled pixel",
    ("image", "pages"): "images with further pages or frames, which are not read",
    ("label", "pages"): "masks with further pages or frames, which are not read",
    ("image", "depth"): "images of more than 8 bits per channel, reduced to 8",
    ("image", "few bits"): "images that use few of their 16 bits and become nearly black: scale them, 12 bits by 16",
    ("image", "alpha"): "images with transparency, which is dropped",
    ("image", "bands"): "images with further bands, which are dropped",
    ("image", "colour space"): "images in another colour space (CMYK, LAB, ...), converted to RGB",
    ("image", "white is zero"): "images that store white as 0, read as displayed in a viewer",
    ("label", "white is zero"): "masks of 1 bit that store white as 0; white is read as 1, as displayed in a viewer",
}
"""What is read correctly but is unusual, as text that follows a count."""


class Note(NamedTuple):
    """What is unusual or may be a mistake but is read correctly: its key in `UNUSUAL`, text that follows the count,
    the count, the first ids."""

    kind: tuple[str, str]
    what: str
    count: int
    first: list[str]


@dataclass
class Survey:
    """The result of a walk over a data set.

    Attributes:
        what: the set's name in error messages. names: of its classes.
        encoding: the coding of its labels, or none.
        rows: its number of rows, none for a stream. looked_at: how many of them were read.
        sizes: (height, width) of each image that can be read.
        pixels, images: by class id (256; 255 is ignored), the number of pixels and of images with the class.
        problems: {"id", "problem"} of each sample that cannot be read.
        unusual: by the keys of `UNUSUAL`, the ids of the samples.
        palettes: value -> colour in the masks' palettes -> the first id with it.
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
        """The set's name in a sentence."""
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
        """The named classes without a pixel in the samples that were read."""
        if not self.with_label or not self.readable:
            return []
        return [name for name, count in zip(self.names, self.pixels, strict=False) if count == 0]

    @property
    def white_is_a_class(self) -> bool:
        """Whether 255 in the masks means the second of two classes."""
        return self.encoding is not None and self.encoding.values == BLACK_AND_WHITE

    def faults(self) -> list[str]:
        """Problems of the whole set that no single sample shows, as sentences."""
        if not self.with_label or not self.readable:
            return []
        found = [self._all_ignored(), self._black_and_white(), self._palettes()]
        return [sentence for sentence in found if sentence]

    def notes(self) -> list[Note]:
        """What is worth knowing about the set although it can be read."""
        unusual = dict(self.unusual)
        if not self.pixels[1]:  # without a 1, black and white masks are a problem of the set, or already handled
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
            f"No pixel of {self.called} is labeled: the masks of {self.scope} contain only ignored pixels "
            f"({IGNORE_INDEX}). Provide masks with class ids, or, if these values mean classes, define them, e.g. "
            f"{as_typed(values=table)}."
        )

    def _black_and_white(self) -> str | None:
        """Masks of two classes are often drawn in black and white, but white, 255, means ignored."""
        coded = _has_table(self.encoding)
        if coded or len(self.names) != 2 or set(np.flatnonzero(self.pixels).tolist()) != {0, IGNORE_INDEX}:
            return None
        ignored = {0: 0, 1: 1, IGNORE_INDEX: IGNORE_INDEX}
        return (
            f"The masks of {self.scope} of {self.called} contain only 0 and 255, and 255 is ignored: no pixel would "
            f"be {self.names[1]!r}. If 255 means that class: {as_typed(values=BLACK_AND_WHITE)}. If it means ignored: "
            f"{as_typed(values=ignored)}."
        )

    def _palettes(self) -> str | None:
        """Indices with other colours in other files were numbered by the program that saved them, not by class."""
        told = None if _has_table(self.encoding) else self._first_difference()
        if told is None:
            return None
        table = {color: "class id" for colors in self.palettes.values() for color in colors}
        ids = {i: i for i in range(min(len(self.names), 256))}
        return (
            f"The palettes of the masks of {self.called} differ: {told}, so a value is not the same class in all "
            "files; programs that reduce colours renumber them in each file. If the colours define the class, set "
            f"{as_typed(colors=table)}. If the stored values do: {as_typed(values=ids)}."
        )

    def _first_difference(self) -> str | None:
        """A difference between two masks' palettes, or between one and that of the classes."""
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
    """Read every sample: the label's values, both sizes, what is unusual.

    Args:
        dataset: with "image" and optionally "label"; only the first `FIRST_ROWS` of a stream are read.
        what: its name in error messages.
        names: the class names. If None, those of its label coding.
        whole: also decode images; otherwise only their headers and labels are read.
        seconds: stop after this time; the samples read are then a fixed random choice. If None, no limit.
        num_workers: processes that read images.
        in_windows: read images that are too large to decode whole by rows, since training reads crops of them.
            Otherwise they are problems, as for an evaluation.

    Raises:
        ValueError: it is not a data set of images.
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
    for look in tqdm(results, **bar, disable=not progress or None):  # None: only on a terminal
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
    """Runs in the workers."""

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
        except Exception as error:  # returned, without the worker's traceback
            return error

    def _suspicious(self, pixels: np.ndarray, ids: np.ndarray | None) -> Iterator[str]:
        """What may be a mistake in this mask."""
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
            num_workers=allowed_workers(min(num_workers, len(order) // 8)),  # starting one takes time
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
                check_label_range(torch.from_numpy(found.ids), self.num_labels, label_name(row))
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
                check_label_range(torch.from_numpy(ids), self.num_labels, label_name(row))
                look["pixels"] += np.bincount(ids.reshape(-1), minlength=256)
            look["unusual"] += [("label", kind) for kind in self._suspicious(look["pixels"], None)]
        return look


def _has_table(encoding: LabelEncoding | None) -> bool:
    return encoding is not None and encoding.has_table


def _as_it_is(look: Any) -> Any:
    return look  # the default loader would turn arrays into tensors


def holds_seams(ids: np.ndarray) -> bool:
    """Whether a class of a label map uint8 (H, W) is only a seam between others, as from interpolating a mask.

    Interpolation leaves a seam at most borders between two classes. A thin object, such as a pole, also lies between
    two classes, but most of their borders have no pole.
    """
    pixels, in_seams, count, without = np.moveaxis(seams(ids)[..., :IGNORE_INDEX], 1, 0)
    share = (in_seams / np.maximum(pixels, 1)).sum(0)  # seams across rows or across columns
    found = (pixels.sum(0) >= AT_LEAST) & (share >= SHARE_OF_SEAMS) & (count.sum(0) >= without.sum(0))
    return bool(found.any())


def seams(ids: np.ndarray) -> np.ndarray:
    """Counts by class id on some of the rows, then on some of the columns, of a label map uint8 (H, W): (2, 4, 256).

    A seam is a short run of pixels between a lower and a higher value, neither of which is ignored. For each class:
    its pixels; those in seams; its seams; and the borders between a lower and a higher class without any seam.
    """
    found = np.zeros((2, 4, 256), np.int64)
    for i, lines in enumerate((ids[:: max(1, ids.shape[0] // LINES)], ids[:, :: max(1, ids.shape[1] // LINES)].T)):
        starts = np.ones(lines.shape, bool)
        starts[:, 1:] = lines[:, 1:] != lines[:, :-1]
        at = np.flatnonzero(starts)
        values, line, length = lines.reshape(-1)[at], at // lines.shape[1], np.diff(at, append=lines.size)
        before, after = np.roll(values, 1), np.roll(values, -1)
        inside = (np.roll(line, 1) == line) & (np.roll(line, -1) == line) & (before != IGNORE_INDEX)
        inside &= (after != IGNORE_INDEX) & (length <= max(2, min(SEAM, lines.shape[1] // 20)))
        inside &= ((before < values) & (values < after)) | ((before > values) & (values > after))
        found[i, 0] = np.bincount(values, weights=length, minlength=256)
        found[i, 1] = np.bincount(values[inside], weights=length[inside], minlength=256)
        found[i, 2] = np.bincount(values[inside], minlength=256)
        sharp = (line[1:] == line[:-1]) & ~inside[1:] & ~inside[:-1]
        low, high = np.minimum(values[1:], values[:-1])[sharp], np.maximum(values[1:], values[:-1])[sharp]
        low, high = low[high != IGNORE_INDEX], high[high != IGNORE_INDEX]
        # A border lies around each class from low + 1 to high - 1: the sum of a step up and a step down.
        steps = np.bincount(low + 1, minlength=256) - np.bincount(high, minlength=256)
        found[i, 3] = np.cumsum(steps)
    return found


def _count(found: Survey, look: dict[str, Any]) -> dict[str, Any]:
    """Add up the counts; the rest of the result is small."""
    found.looked_at += 1
    if "pixels" in look:
        pixels = look.pop("pixels")
        found.pixels += pixels
        found.images += pixels > 0
    return look


def _note(found: Survey, look: dict[str, Any]) -> None:
    """Record what has names, in the order of the rows."""
    if "problem" in look:
        found.problems.append({"id": look["id"], "problem": look["problem"]})
        return
    found.sizes.append(look["size"])
    for kind in look["unusual"]:
        found.unusual.setdefault(kind, []).append(look["id"])
    for index, color in (look["palette"] or {}).items():
        found.palettes.setdefault(index, {}).setdefault(color, look["id"])
