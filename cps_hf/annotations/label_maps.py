"""Masks with a label in every pixel: by colour, by number, or in black and white. Also Roboflow's masks.

`cps_hf.data.reading` reads the mask files: lossy files are rejected, and a mask of the stored size is rotated with its
image.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..data.labels import BLACK_AND_WHITE, IGNORE_INDEX, LabelEncoding, LabelError, LabelSizeError
from ..data.raster import Raster, open_raster
from ..data.reading import examine
from ..data.table import first_few
from ..data.walk import IMAGE_SUFFIXES, MASK_SUFFIXES, walk
from ..files import stamp_of
from .project import IMAGE_FOLDERS, Project, ProjectBuilder, ReadOptions, Shape, clean
from .shapes import Region

OTHER_MASKS = ("SegmentationObject", "SegmentationClass", "masks_machine", "masks_human")
"""Folders whose files are not images."""

Color = tuple[int, int, int]


def read_colors(source: Path, options: ReadOptions) -> Project:
    """RGB masks and a colour table, `options.colors`.

    Raises:
        ValueError: the table is missing or cannot be read, or a mask contains another colour.
    """
    builder = ProjectBuilder("colors", source, options)
    if options.colors is None:
        raise ValueError(
            'RGB masks need a colour table, `--colors FILE`: JSON like {"road": [128, 64, 128]} or {"#804080": '
            '"road"}, CSV with the columns name, r, g, b, or a labelmap.txt of CVAT.'
        )
    advice = f"Fix the mask, or add its colours to {options.colors} (`--colors`; null: ignored)."
    add_label_maps(builder, options.masks, colors=read_color_table(options.colors), advice=advice)
    return builder.project(background=None)


def read_ids(source: Path, options: ReadOptions) -> Project:
    """Masks of class ids. `options.first_id` is the first class; lower values have no label.

    Raises:
        ValueError: there are no class names, or a mask contains another id.
    """
    builder = ProjectBuilder("ids", source, options)
    if not options.classes:
        raise ValueError("Masks of ids need the names of their classes, from the first id on: `--classes NAME ...`.")
    first = options.first_id
    values = {first + i: name for i, name in enumerate(options.classes)}
    values |= dict.fromkeys(range(first), "") | {IGNORE_INDEX: None}
    last = first + len(options.classes) - 1
    advice = (
        f"`--classes` names the values {first} to {last}, and {IGNORE_INDEX} is ignored. Name further classes, set "
        "the first class's value with `--first_id`, or fix the mask."
    )
    add_label_maps(builder, options.masks, values=values, advice=advice)
    return builder.project(background="background" if first else None)


def read_binary(source: Path, options: ReadOptions) -> Project:
    """Masks of 0 and 255 (or 1): `options.classes` names the two.

    Raises:
        ValueError: the number of names is not two, or a mask contains another value.
    """
    builder = ProjectBuilder("binary", source, options)
    names = options.classes or ("background", "foreground")
    if len(names) != 2:
        raise ValueError(f"`--format binary` has two classes, for 0 and for 255; `--classes` names {len(names)}.")
    values = {value: names[index] for value, index in {**BLACK_AND_WHITE, 1: 1}.items()}
    advice = (
        "Black and white masks contain 0 and 255, or 0 and 1. For a value per class use `--format ids`, for colours "
        "`--format colors`."
    )
    add_label_maps(builder, options.masks, values=values, advice=advice)
    return builder.project(background=None)


ROBOFLOW_CLASSES = "_classes.csv"


def read_roboflow_masks(source: Path, options: ReadOptions) -> Project:
    """Roboflow's "Semantic Segmentation Masks": each split has images, `<image>_mask.png`, and _classes.csv.

    Its other exports are COCO and YOLO, and are read as such.

    Raises:
        ValueError: a table is missing or cannot be read, tables differ, or a mask contains another value.
    """
    builder = ProjectBuilder("roboflow_masks", source, options)
    tables: dict[Path, dict[int, str]] = {}
    for path in sorted(source.rglob(ROBOFLOW_CLASSES)):
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
        try:
            tables[path] = {int(row[0]): clean(row[1]) for row in rows[1:]}
        except (ValueError, IndexError) as error:
            raise ValueError(f'{path}: expected the columns "Pixel Value, Class", found {rows[:3]}.') from error
    if not tables:
        raise ValueError(f"{source} contains no {ROBOFLOW_CLASSES}, Roboflow's table of mask values.")
    (path, table), *others = tables.items()
    for other, differing in others:
        if differing != table:
            raise ValueError(f"{path} and {other} name different classes: the splits are from two exports.")
    advice = f"{path} lists no such value. Export again, or fix the mask."
    add_label_maps(builder, None, values=dict(table), mask_suffix="_mask", advice=advice)
    return builder.project(background=None)


def add_label_maps(
    builder: ProjectBuilder,
    folder: str | None,
    *,
    colors: Mapping[Color, str | None] | None = None,
    values: Mapping[int, str | None] | None = None,
    mask_suffix: str = "",
    advice: str,
) -> None:
    """Add all masks of a source, each with its image.

    Args:
        folder: name of the masks' folder, in the source or in each of its splits. If `None` or ".", masks are next to
            the images.
        colors, values: the meaning of a colour or a number: a label, `None` (ignored), "" (no label).
        mask_suffix: of the masks' names, unless the options set one.
        advice: the end of the message if a mask contains other colours or values.

    Raises:
        ValueError: there are no masks, two of them belong to one image, or one fits two images.
    """
    table = colors if colors is not None else values
    names = [name for name in dict.fromkeys(table.values()) if name]
    builder.declare(names)
    builder.uses.update(names)
    index = {name: i for i, name in enumerate(names)} | {"": len(names), None: IGNORE_INDEX}
    coded = {code: index[name] for code, name in table.items()}
    encoding = LabelEncoding((*names, "(no label)"), **{"colors" if colors is not None else "values": coded})
    as_rgb = grey_as_rgb(encoding) if values is not None else None
    for name, image, mask in _pairs(builder, folder, builder.options.mask_suffix or mask_suffix):
        raw = [str(mask), *stamp_of(mask), sorted(map(str, table.items()))]
        shapes = _reader(name, image, mask, encoding, as_rgb, names, advice) if image else ()
        builder.add(image, shapes, called=name, where=str(mask), raw=raw)


def _reader(
    name: str,
    image: Path,
    mask: Path,
    encoding: LabelEncoding,
    as_rgb: LabelEncoding | None,
    names: Sequence[str],
    advice: str,
) -> Callable[[], list[Shape]]:
    def shapes() -> list[Shape]:
        coding = encoding
        if as_rgb is not None and stored_as_rgb(open_raster({"path": str(mask)}, name, "label")):
            coding = as_rgb
        row = {"image": {"path": str(image)}, "label": {"path": str(mask)}, "id": name}
        with advising(advice):
            ids = examine(row, coding, with_label=True, whole=False).ids
        found = [i for i in np.unique(ids).tolist() if i != len(names)]
        return [Shape(None if i == IGNORE_INDEX else names[i], _drawn(ids == i)) for i in found]

    return shapes


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """A context in which errors of reading a mask advise this, instead of options that `cps-hf convert` lacks."""
    try:
        yield
    except LabelSizeError as error:
        raise ValueError(f"{error.problem} Each pixel needs a label: replace one of the files.") from error
    except LabelError as error:
        raise ValueError(f"{error.problem} {advice}") from error


def stored_as_rgb(raster: Raster) -> bool:
    """Whether a mask of grey values has three channels, as drawing programs save black and white.

    Raises:
        ValueError: it has several channels and is colored or transparent.
    """
    image = raster.stored()
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    pixels = np.asarray(image.convert("RGBA"))
    if (pixels[..., 3] < 255).any():
        raise ValueError(f"The mask of {raster.where} has transparent pixels. Save it as grey values, without alpha.")
    if (pixels[..., :1] != pixels[..., 1:3]).any():
        raise ValueError(
            f"The mask of {raster.where} is colored; this format has grey values. Read colors with `--format colors "
            "--colors FILE`."
        )
    return True


def grey_as_rgb(encoding: LabelEncoding) -> LabelEncoding:
    """The same encoding for masks whose values are repeated in three channels."""
    colors = {(value,) * 3: id_ for value, id_ in encoding.values.items() if 0 <= value <= 255}
    return LabelEncoding(encoding.names, colors=colors)


def _drawn(pixels: np.ndarray) -> Callable[[int, int], Region]:
    return lambda height, width: Region(0, 0, pixels)


def _pairs(builder: ProjectBuilder, folder: str | None, mask_suffix: str) -> list[tuple[str, Path | None, Path]]:
    """(name, image if any, mask)."""
    image_suffix = builder.options.image_suffix
    inner = Path(folder or ".").name or None
    masks: dict[str, Path] = {}
    for below, path in walk(builder.source, MASK_SUFFIXES).files.items():
        parts = Path(below).parts
        name = str(Path(*(part for part in parts[:-1] if part not in (inner, *IMAGE_FOLDERS)), path.stem))
        if (inner is None or inner in parts[:-1]) and name.endswith(mask_suffix):
            name = clean(name.removesuffix(mask_suffix))
            if name in masks:
                raise ValueError(f"Two masks belong to the image {name!r}: {masks[name]} and {path}. Remove one.")
            masks[name] = path
    if not masks:
        there = f"a folder {inner!r}" if inner is not None else f"files *{mask_suffix}.png"
        raise ValueError(
            f"{builder.source} contains no masks: looked for {there} with files of {', '.join(MASK_SUFFIXES)}. Set "
            "their folder with `--masks NAME`. JPEG is not supported, as it changes values."
        )
    no_images = {inner, *OTHER_MASKS}
    images: dict[str, Path] = {}
    for below, path in walk(builder.root, IMAGE_SUFFIXES).files.items():
        parts = Path(below).parts
        if path in masks.values() or not no_images.isdisjoint(parts[:-1]):
            continue
        name = str(Path(*(part for part in parts[:-1] if part not in IMAGE_FOLDERS), path.stem))
        name = clean(name.removesuffix(image_suffix))
        if name in images and name in masks:
            raise ValueError(
                f"The mask {masks[name]} fits two images: {images[name]} and {path}. Remove or rename one."
            )
        images[name] = path
    alone = [name for name in images if name not in masks]
    if alone:
        builder.notes.append(f"{len(alone)} images have no mask and are skipped: {first_few(alone, 3)}")
    return [(name, images.get(name), mask) for name, mask in masks.items()]


def read_color_table(path: Path) -> dict[Color, str | None]:
    """The meaning of colours, from JSON, CSV or CVAT's labelmap.txt.

    Raises:
        ValueError: the table cannot be read, or one colour has two labels.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = _json_table(text) if path.suffix.lower() == ".json" else _text_table(text)
        if not pairs:
            raise ValueError("it is empty")
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(
            f'{path} is not a colour table ({error}): expected JSON like {{"road": [128, 64, 128]}} or {{"#804080": '
            '"road"}, CSV with the columns name, r, g, b, or lines like `road:128,64,128::`.'
        ) from error
    table: dict[Color, str | None] = {}
    for color, name in pairs:
        if color in table and table[color] != name:
            raise ValueError(f"{path}: the colour {color} means {table[color]!r} and {name!r}. Give each its own.")
        table[color] = name
    return table


def _json_table(text: str) -> list[tuple[Color, str | None]]:
    rows = json.loads(text)
    return [
        (_color(key), None if value is None else clean(value))
        if isinstance(value, str | None)
        else (_color(value), clean(key))
        for key, value in rows.items()
    ]


def _text_table(text: str) -> list[tuple[Color, str | None]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if all(re.match(r".+:\d+,\d+,\d+(:|$)", line) for line in lines):
        parts = [line.split(":") for line in lines]
        return [(_color(part[1]), clean(part[0])) for part in parts]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    if not rows[0][-1].isdigit():
        rows = rows[1:]  # the header
    return [(_color(row[-3:]), clean(row[0])) for row in rows]


def _color(value: object) -> Color:
    if isinstance(value, str) and re.fullmatch("#?[0-9a-fA-F]{6}", value):
        return tuple(bytes.fromhex(value[-6:]))
    parts = value.split(",") if isinstance(value, str) else value
    color = tuple(int(part) for part in parts)
    if len(color) != 3 or not all(0 <= part <= 255 for part in color):
        raise ValueError(f"{value!r} is not a colour (red, green, blue), each from 0 to 255")
    return color
