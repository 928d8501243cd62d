"""The content of an export, independent of the tool: images, and the labeled shapes on each.

A reader (`coco.py`, `labelme.py`, ...) fills a `ProjectBuilder`; `convert.py` turns the `Project` into masks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np

from ..data.table import first_few
from ..data.walk import IMAGE_SUFFIXES, walk
from .shapes import Region

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
"""Names of image folders in exports; they are not part of an image's name."""


@dataclass(frozen=True)
class Shape:
    """A labeled shape.

    Attributes:
        label: the tool's label. If `None`, its pixels are ignored.
        draw: its pixels in an image of a given height and width.
        z: shapes with a higher z are on top.
        under: below all other shapes, regardless of size (a crowd).
    """

    label: str | None
    draw: Callable[[int, int], Region]
    z: float = 0
    under: bool = False


@dataclass(frozen=True)
class LabeledImage:
    """An image and its shapes.

    Attributes:
        name: the mask's name without a suffix; may include folders.
        image: the file.
        shapes: returns the shapes in drawing order. For masks, this reads the file.
        size: height and width on which the shapes were drawn, if the tool exports it.
        stamp: changes when the labels change.
        where: the source of the labels, for error messages.
    """

    name: str
    image: Path
    shapes: Callable[[], Sequence[Shape]]
    size: tuple[int, int] | None
    stamp: str
    where: str


@dataclass
class Project:
    """A tool's export.

    Attributes:
        format: one of `readers.READERS`.
        source: where it was read from.
        labels: those the tool declares, in its order, then others that occur.
        uses: number of shapes by label. Masks are not read yet, so each of their labels counts as one.
        images: sorted by name.
        background: the default class of unlabeled pixels. `None` if every pixel is labeled.
        overlap: which shape is on top by default: the later one ("order") or the smaller one ("area").
        notes: what was skipped, as sentences.
    """

    format: str
    source: Path
    labels: list[str]
    uses: Counter[str]
    images: list[LabeledImage]
    background: str | None = "background"
    overlap: str = "order"
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading an export.

    Args:
        images: the folder of images, if it is outside the export.
        masks: for mask formats: their folder in the source.
        image_suffix, mask_suffix: what an image's and its mask's name have in addition to their common part.
        classes: the classes in the order of their ids; required by some formats.
        colors: a file with a colour table.
        first_id: for masks of ids: the lowest value that is a class.
        attribute: for VIA: the region attribute that contains the label.
        line_width: width of lines and points, in pixels.
        boxes: draw the box of an object that has no outline.
        crowds: for COCO: draw crowds as objects. If False, they are ignored.
        skip_bad_images: skip missing images.
        skip_empty: skip images without a shape.
    """

    images: Path | None = None
    masks: str = "masks"
    image_suffix: str = ""
    mask_suffix: str = ""
    classes: tuple[str, ...] | None = None
    colors: Path | None = None
    first_id: int = 0
    attribute: str | None = None
    line_width: float = 10
    boxes: bool = False
    crowds: bool = False
    skip_bad_images: bool = False
    skip_empty: bool = False


class ProjectBuilder:
    """Builds a `Project`: finds the images, names them, and records problems.

    Args:
        format: the reader's name.
        source: a folder, or a file in one.
    """

    def __init__(self, format: str, source: Path, options: ReadOptions):
        self.format, self.source, self.options = format, source, options
        self.root = options.images or (source if source.is_dir() else source.parent)
        self.labels: dict[str, None] = {}
        self.uses: Counter[str] = Counter()
        self.notes: list[str] = []
        self._images: dict[str, LabeledImage] = {}
        self._missing: list[str] = []
        self._empty: list[str] = []
        self._files: dict[str, list[Path]] | None = None

    def declare(self, labels: Iterable[str]) -> None:
        """Add the labels that the tool lists, in its order."""
        self.labels |= dict.fromkeys(map(clean, labels))

    def find(self, name: str, *near: Path) -> Path | None:
        """The image file that an export calls `name`: next to the labels, in the folders that tools use, or anywhere
        in the source if a single file matches best.

        Raises:
            ValueError: several files match equally well.
        """
        name = clean(name).replace("\\", "/")
        for folder in (*near, self.root, *(self.root / sub for sub in IMAGE_FOLDERS)):
            if name and (folder / name).is_file():
                return folder / name
        wanted = PurePosixPath(name).parts[::-1]
        found = self._by_name().get(wanted[0], []) if wanted else []
        ranked = sorted(found, key=lambda path: -_shared(wanted, path.parts[::-1]))
        if len(ranked) > 1 and _shared(wanted, ranked[0].parts[::-1]) == _shared(wanted, ranked[1].parts[::-1]):
            raise ValueError(
                f"The labels name the image {name!r}, which matches two files: {ranked[0]} and {ranked[1]}. Set the "
                "folder of images with `--images DIR`."
            )
        return ranked[0] if ranked else None

    def find_saved_as(self, name: str) -> Path | None:
        """The image file whose name an upload to a web server changed to `name`: spaces became underscores, and
        characters other than letters, digits, "-", "_" and "." were removed (Django's `get_valid_filename`).

        Raises:
            ValueError: several files match.
        """
        found = [path for own, paths in self._by_name().items() if _saved_as(own) == clean(name) for path in paths]
        if len(found) > 1:
            raise ValueError(
                f"The labels name the image {name!r}, which matches two files: {found[0]} and {found[1]}. Rename the "
                "images as they are called in the export."
            )
        return found[0] if found else None

    def _by_name(self) -> dict[str, list[Path]]:
        """The image files below the root, by name."""
        if self._files is None:
            self._files = {}
            for path in walk(self.root, IMAGE_SUFFIXES).files.values() if self.root.is_dir() else ():
                self._files.setdefault(clean(path.name), []).append(path)
        return self._files

    def add(
        self,
        image: Path | None,
        shapes: Sequence[Shape] | Callable[[], Sequence[Shape]],
        *,
        called: str,
        where: str,
        raw: Any,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Add an image and its shapes.

        Args:
            image: the file. `None` if it was not found.
            shapes: the shapes; for masks, a function that reads them.
            called: the image's name in the labels.
            where: the source of the labels, for error messages.
            raw: the raw labels, to detect changes.
        """
        if image is None:
            self._missing.append(called)
            return
        if not callable(shapes):
            if not shapes and self.options.skip_empty:
                self._empty.append(called)
                return
            used = Counter(shape.label for shape in shapes if shape.label is not None)
            if "" in used:
                raise ValueError(f"{where}: {used['']} shapes have no label. Add labels in the tool.")
            self.uses += used
        name = self._name_of(image)
        if name in self._images:
            raise ValueError(
                f"Two entries have the same mask, {name}.png: {self._images[name].image} in "
                f"{self._images[name].where}, and {image} in {where}. Remove or rename one."
            )
        text = json.dumps(raw, sort_keys=True, ensure_ascii=False, default=str)
        stamp = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        fixed = None if callable(shapes) else tuple(shapes)
        given = shapes if fixed is None else lambda: fixed
        self._images[name] = LabeledImage(name, image, given, size, stamp, where)

    def project(self, **fields: Any) -> Project:
        """The complete project.

        Raises:
            ValueError: images are missing, or there are none.
        """
        if self._missing:
            said = f"{len(self._missing)} of {len(self._missing) + len(self._images)} labeled images are missing"
            if not self.options.skip_bad_images:
                raise ValueError(
                    f"{self.source}: {said}: {first_few(self._missing, 3)}. Looked in {self.root} and below. Set "
                    "their folder with `--images DIR`, or skip them with `--skip_bad_images`."
                )
            self.notes.append(f"{said} and skipped: {first_few(self._missing, 3)}")
        if self._empty:
            self.notes.append(f"{len(self._empty)} images without a shape are skipped: {first_few(self._empty, 3)}")
        if not self._images:
            raise ValueError(f"{self.source}, read as `--format {self.format}`, contains no labeled image.")
        images = [self._images[name] for name in sorted(self._images)]
        labels = [*self.labels, *sorted(self.uses.keys() - self.labels.keys())]
        return Project(self.format, self.source, labels, self.uses, images, notes=self.notes, **fields)

    def _name_of(self, image: Path) -> str:
        """The image's path below the root, without its suffix and without folders named "images" or similar."""
        # Links are not followed: images that link to a store keep their names.
        path, root = Path(os.path.abspath(image)), Path(os.path.abspath(self.root))
        parts = path.relative_to(root).parts if path.is_relative_to(root) else (path.name,)
        kept = [part for part in parts[:-1] if part not in IMAGE_FOLDERS]
        return clean(str(PurePosixPath(*kept, PurePath(parts[-1]).stem)))


def clean(text: str) -> str:
    """One spelling of characters that Unicode has in two forms (macOS file names), without surrounding spaces."""
    return unicodedata.normalize("NFC", str(text)).strip()


def _saved_as(name: str) -> str:
    return re.sub(r"[^-\w.]", "", name.replace(" ", "_"))


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """The number of equal leading parts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != clean(y)), min(len(a), len(b)))


# ------------------------------------------------------------------------------------------------ parsing

_MOST = 1e12  # larger than any coordinate; products do not overflow


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: the file is truncated or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a complete JSON file: {error}. Export it again; the download may have been interrupted."
        ) from error


def exports_in(source: Path, is_export: Callable[[Any], bool]) -> list[tuple[Path, Any]]:
    """(path, content) of a tool's JSON files: `source` itself, or files at any depth in it.

    Raises:
        ValueError: a JSON file is truncated.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.json"))
    contents = [(path, read_json(path)) for path in files]
    return [(path, content) for path, content in contents if is_export(content)]


def field_of(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`row[name]`, checked for its type.

    Raises:
        ValueError: it is missing or of another type.
    """
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        words = {list: "a list", dict: "a mapping", str: "a text", int: "a number", float: "a number"}
        expected = " or ".join(dict.fromkeys(words.get(k, k.__name__) for k in kinds))
        raise ValueError(f"{where}: `{name}` must be {expected}, found {_shown(value)}.")
    return value


def points_of(value: Any, where: str, *, least: int = 1) -> np.ndarray:
    """Points (N, 2), from pairs or from a flat list.

    Raises:
        ValueError: the values are not numbers or not pairs, or there are fewer than `least` points.
    """
    try:
        points = np.array(value, dtype=np.float64)
        points = points.reshape(-1, 2) if points.ndim == 1 else points
    except (TypeError, ValueError, OverflowError):
        points = np.zeros((0, 0))
    if points.ndim != 2 or points.shape[1] != 2 or not (abs(points) < _MOST).all() or len(points) < least:
        raise ValueError(f"{where}: expected at least {least} points (x, y), found {_shown(value)}.")
    return points


def numbers_of(values: Iterable[Any], where: str, *, count: int | None = None) -> list[float]:
    """A list of `count` numbers.

    Raises:
        ValueError: a value is not a number, or their count differs.
    """
    values = list(values)
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = [math.nan]
    if not all(abs(number) < _MOST for number in numbers) or len(numbers) != (count or len(numbers)):
        raise ValueError(f"{where}: expected {count or ''}{' ' * bool(count)}numbers, found {_shown(values)}.")
    return numbers


def size_of(height: Any, width: Any) -> tuple[int, int] | None:
    """Height and width if both are given."""
    try:
        size = int(height), int(width)
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
