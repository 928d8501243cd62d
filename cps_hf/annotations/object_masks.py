"""One mask per class or object: files in which one object is not 0.

    masks/road/a.png          a folder per class, files named after their images
    masks/a/road.png          a folder per image, files named after classes; road_1.png, road_2.png: two objects
    masks/a_road_2.png        a single folder, files named after image, class and object

If `--classes` names only one class in addition to the background, every file is an object of that class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from ..data.labels import LabelEncoding, stored_values
from ..data.raster import open_raster
from ..data.reading import examine
from ..data.table import first_few
from ..data.walk import IMAGE_SUFFIXES, MASK_SUFFIXES, walk
from ..files import stamp_of
from .label_maps import advising, grey_as_rgb, stored_as_rgb
from .project import IMAGE_FOLDERS, Project, ProjectBuilder, ReadOptions, Shape, clean
from .shapes import Region

_SIDES = ("outside", "inside")
_AS_RGB = grey_as_rgb(LabelEncoding(_SIDES, values={value: int(value != 0) for value in range(256)}))
_ADVICE = "Save the mask of one object as grey values: 0, and one other value."
_NUMBER = re.compile(r"[-_. ]*\d+$")


def read_object_masks(source: Path, options: ReadOptions) -> Project:
    """All masks of `<source>/<masks>`; smaller ones are on top.

    Raises:
        ValueError: there are no masks, two images have one name, or a mask has no image, no class, or more than two
            values.
    """
    builder = ProjectBuilder("objects", source, options)
    folder = source / options.masks
    files = walk(folder, MASK_SUFFIXES).files if folder.is_dir() else {}
    if not files:
        raise ValueError(f"{folder} contains no masks ({', '.join(MASK_SUFFIXES)}). Set their folder: `--masks NAME`.")
    images = {}
    for below, path in walk(builder.root, IMAGE_SUFFIXES).files.items():
        if not path.is_relative_to(folder):
            parts = [part for part in PurePosixPath(below).parts[:-1] if part not in IMAGE_FOLDERS]
            name = clean(str(PurePosixPath(*parts, path.stem)))
            if name in images:
                raise ValueError(f"Two images are called {name!r}: {images[name]} and {path}. Remove or rename one.")
            images[name] = path
    if not images:
        raise ValueError(f"{builder.root} contains no images besides the masks. Set their folder: `--images DIR`.")
    single = [name for name in options.classes or () if name != "background"]
    single = single[0] if len(single) == 1 else None
    masks: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    lost = []
    for below, path in files.items():
        name, label = _place(clean(str(PurePosixPath(below).with_suffix(""))), images, single)
        if name is None or not label:
            lost.append(below)
        else:
            masks[name].append((label, path))
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(files)} masks in {folder} belong to no image or name no class: "
            f"{first_few(lost, 3)}. Expected masks/CLASS/IMAGE.png, masks/IMAGE/CLASS.png or "
            "masks/IMAGE_CLASS.png, optionally with a number after the class; or name a single class for all: "
            "`--classes background NAME`."
        )
    builder.declare(sorted({label for found in masks.values() for label, _ in found}))
    builder.uses.update(label for found in masks.values() for label, _ in found)
    for name, found in masks.items():
        stamps = [[label, str(path), *stamp_of(path)] for label, path in found]
        shapes = partial(_shapes, name, images[name], found)
        builder.add(images[name], shapes, called=name, where=str(folder), raw=stamps)
    alone = [name for name in images if name not in masks]
    if alone:
        builder.notes.append(f"{len(alone)} images have no mask and are skipped: {first_few(alone, 3)}")
    return builder.project(overlap="area")


def _place(name: str, images: dict[str, Path], single: str | None) -> tuple[str | None, str | None]:
    """(image, label) of a mask, from its path."""
    first, _, rest = name.partition("/")
    above, _, last = name.rpartition("/")
    if above in images:  # masks/IMAGE/CLASS.png
        return above, single or _without_number(last)
    if rest in images:  # masks/CLASS/IMAGE.png
        return rest, single or first
    begun = [image for image in images if name.startswith(image) and name[len(image) : len(image) + 1] in "_-. "]
    image = max(begun, key=len, default=None)
    if image is None:
        return None, None
    return image, single or _without_number(name[len(image) :].lstrip("_-. "))


def _without_number(text: str) -> str:
    return _NUMBER.sub("", text).strip()


def _shapes(name: str, image: Path, masks: list[tuple[str, Path]]) -> list[Shape]:
    shapes = []
    for label, path in masks:
        raster = open_raster({"path": str(path)}, name, "label")
        is_rgb, pixels = stored_as_rgb(raster), raster.stored()
        with advising(_ADVICE):
            stored = stored_values(pixels.convert("L") if is_rgb else pixels, name=f"{name} ({path})")
        found = np.unique(stored).tolist()
        if len(found) > 2 or (len(found) == 2 and 0 not in found):
            raise ValueError(
                f"{path} contains the values {first_few(found)}; the mask of one object has 0 and one other value. "
                "For masks with one value per class, use `--format ids`."
            )
        encoding = LabelEncoding(_SIDES, values={value: int(value != 0) for value in found})
        row = {"image": {"path": str(image)}, "label": {"path": str(path)}, "id": name}
        with advising(_ADVICE):
            ids = examine(row, _AS_RGB if is_rgb else encoding, with_label=True, whole=False).ids
        shapes.append(Shape(label, _drawn(ids == 1)))
    return shapes


def _drawn(pixels: np.ndarray) -> Callable[[int, int], Region]:
    return lambda height, width: Region(0, 0, pixels)
