"""Supervisely: meta.json, and in each data set img/ and ann/, with one JSON file per image, `a.jpg.json`.

https://developer.supervisely.com/getting-started/supervisely-annotation-format. Later objects are on top. Polygons
(with holes), bitmaps, rectangles, lines and points are read.
"""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .project import (
    Project,
    ProjectBuilder,
    ReadOptions,
    Shape,
    clean,
    field_of,
    numbers_of,
    points_of,
    read_json,
    size_of,
)
from .shapes import bitmap, discs, line, polygon, rectangle

META, ANNOTATIONS = "meta.json", "ann"


def is_supervisely(source: Path) -> bool:
    return (source / META).is_file() and any(path.is_dir() for path in source.glob(f"**/{ANNOTATIONS}"))


def read_supervisely(source: Path, options: ReadOptions) -> Project:
    """The project's folder.

    Raises:
        ValueError: a file is truncated, or an object cannot be read.
    """
    builder = ProjectBuilder("supervisely", source, options)
    meta = read_json(source / META)
    builder.declare(
        field_of(row, "title", str, str(source / META)) for row in field_of(meta, "classes", list, str(source / META))
    )
    for path in sorted(source.glob(f"**/{ANNOTATIONS}/*.json")):
        content = read_json(path)
        size = field_of(content, "size", dict, str(path))
        rows = field_of(content, "objects", list, str(path))
        shapes = [_shape(row, f"{path}, object {i}", options) for i, row in enumerate(rows, 1)]
        called = path.name.removesuffix(".json")
        image = builder.find(called, path.parent.parent / "img")
        size = size_of(size.get("height"), size.get("width"))
        builder.add(image, shapes, called=called, where=str(path), raw=[size, rows, options.line_width], size=size)
    return builder.project()


def _shape(row: Any, where: str, options: ReadOptions) -> Shape:
    label, kind = (field_of(row, name, str, where) for name in ("classTitle", "geometryType"))
    if kind == "bitmap":
        inner = field_of(row, "bitmap", dict, where)
        left, top = map(int, numbers_of(field_of(inner, "origin", list, where), where, count=2))
        draw = partial(bitmap, _decoded(inner.get("data"), where), top, left)
        return Shape(clean(label), draw)
    points = field_of(row, "points", dict, where)
    outer = points_of(points.get("exterior"), where, least=2 if kind == "rectangle" else 1)
    if kind == "polygon":
        holes = field_of(points, "interior", list, where) if points.get("interior") else []
        draw = partial(polygon, [outer, *(points_of(ring, where) for ring in holes)])
    elif kind == "rectangle":
        draw = partial(rectangle, outer.min(axis=0), outer.max(axis=0) + 1)  # corners are pixels, both inclusive
    elif kind == "line":
        draw = partial(line, outer, options.line_width)
    elif kind == "point":
        draw = partial(discs, outer, options.line_width)
    else:
        raise ValueError(
            f"{where}: the geometry {kind!r} is not supported, only bitmap, polygon, rectangle, line and point."
        )
    return Shape(clean(label), draw)


def _decoded(text: Any, where: str) -> np.ndarray:
    """A PNG, compressed by zlib, in base64, as bool (H, W)."""
    try:
        data = zlib.decompress(base64.b64decode(text, validate=True))
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except (TypeError, ValueError, OSError, SyntaxError, zlib.error, binascii.Error) as error:
        raise ValueError(f"{where}: its bitmap cannot be read ({error}). Export it again.") from error
    return (pixels[..., :3].max(axis=-1) > 0) & (pixels[..., 3] > 0)
