"""LabelMe: one JSON file per image, next to it or in another folder (https://github.com/wkentaro/labelme).

All its shapes are read; later ones are on top. Lines and points are `line_width` thick, as in LabelMe's own export (10
pixels). Its labels `__ignore__` and `_background_` keep their meaning. Images without a JSON file count as not labeled
yet.
"""

from __future__ import annotations

import base64
import binascii
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.table import first_few
from ..data.walk import IMAGE_SUFFIXES, walk
from .project import Project, ProjectBuilder, ReadOptions, Shape, clean, field_of, points_of, read_json, size_of
from .shapes import bitmap, discs, ellipse, line, polygon, rectangle

IGNORE, BACKGROUND = "__ignore__", "_background_"
LABELS = "labels.txt"  # one label per line, in order; LabelMe's `--labels`


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys()


def read_labelme(source: Path, options: ReadOptions) -> Project:
    """A folder of JSON files, or a single file.

    Raises:
        ValueError: a file is truncated or not from LabelMe, or a shape is of an unknown kind.
    """
    builder = ProjectBuilder("labelme", source, options)
    files = [source] if source.is_file() else sorted(source.rglob("*.json"))
    if source.is_dir() and (source / LABELS).is_file():
        lines = (source / LABELS).read_text(encoding="utf-8").splitlines()
        builder.declare(name for name in map(clean, lines) if name and name != IGNORE)
    labeled = set()
    for path in files:
        content = read_json(path)
        if not is_labelme(content):
            if source.is_file():
                raise ValueError(f"{path} is not a LabelMe file: expected `shapes` and `imagePath`.")
            builder.notes.append(f"{path} is not a LabelMe file and is skipped")
            continue
        called = str(content["imagePath"])
        image = builder.find(called, path.parent) or _embedded_name(builder, path)
        rows = field_of(content, "shapes", list, str(path))
        shapes = [_shape(row, f"{path}, shape {i}", options) for i, row in enumerate(rows, 1)]
        size = size_of(content.get("imageHeight"), content.get("imageWidth"))
        builder.add(image, shapes, called=called, where=str(path), raw=[size, rows, options.line_width], size=size)
        labeled.add(image.resolve() if image else None)
    if source.is_dir():
        everything = walk(builder.root, IMAGE_SUFFIXES).files
        alone = [name for name, path in everything.items() if path.resolve() not in labeled]
        if alone:
            builder.notes.append(
                f"{len(alone)} images have no JSON file, so are not labeled yet and skipped: {first_few(alone, 3)}"
            )
    own = BACKGROUND if BACKGROUND in (*builder.labels, *builder.uses) else "background"
    return builder.project(background=own)


def _embedded_name(builder: ProjectBuilder, path: Path) -> Path | None:
    """The image with the JSON file's name, if `imagePath` does not exist (say, after the folder was renamed)."""
    for suffix in IMAGE_SUFFIXES:
        for name in (path.stem + suffix, path.stem + suffix.upper()):
            if found := builder.find(name, path.parent):
                return found
    return None


def _shape(row: Any, where: str, options: ReadOptions) -> Shape:
    label = clean(field_of(row, "label", str, where))
    kind = str(row.get("shape_type") or "polygon")
    points = points_of(row.get("points"), where)
    least = {"rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "mask": 2, "oriented_rectangle": 4}.get(kind, 1)
    if len(points) < least:
        raise ValueError(f"{where}: a {kind} has {least} points, found {len(points)}.")
    if kind in ("polygon", "oriented_rectangle"):
        draw = partial(polygon, [points])
    elif kind == "rectangle":
        draw = partial(rectangle, points[0], points[1])
    elif kind == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        draw = partial(ellipse, points[0], (radius, radius))
    elif kind in ("line", "linestrip", "point"):
        draw = partial(line, points, options.line_width)
    elif kind == "points":
        draw = partial(discs, points, options.line_width)
    elif kind == "mask":
        (left, top), (right, bottom) = np.rint(points[:2]).astype(int)
        pixels = _decoded(row.get("mask"), where)
        if pixels.shape != (bottom - top + 1, right - left + 1):
            raise ValueError(
                f"{where}: its mask is {pixels.shape[0]} x {pixels.shape[1]}, its corners span {bottom - top + 1} x "
                f"{right - left + 1} (height x width). Save it again in LabelMe."
            )
        draw = partial(bitmap, pixels, int(top), int(left))
    else:
        raise ValueError(
            f"{where}: the shape type {kind!r} is not supported, only polygon, rectangle, oriented_rectangle, "
            "circle, line, linestrip, point, points and mask."
        )
    return Shape(None if label == IGNORE else label, draw)


def _decoded(text: Any, where: str) -> np.ndarray:
    """The PNG inside a shape of type "mask", as bool (H, W)."""
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("L")) > 0
    except (TypeError, ValueError, OSError, SyntaxError, binascii.Error) as error:
        raise ValueError(f"{where}: its mask is not a PNG in base64 ({error}). Save it again in LabelMe.") from error
