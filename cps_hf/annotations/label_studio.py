"""Label Studio: the "JSON" export, a list of tasks (https://labelstud.io/guide/export).

Polygons, rectangles, ellipses, key points and brush strokes are read; later ones are on top. If several people labeled
a task, the newest annotation counts. The export names images as they were uploaded (`3f2a81c0-a.jpg`); a file `a.jpg`
is found too, also if the upload changed its spaces and brackets (`a (1).jpg` becomes `a_1.jpg`).
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from ..data.walk import IMAGE_SUFFIXES
from . import rle
from .project import Project, ProjectBuilder, ReadOptions, Shape, clean, exports_in, field_of, numbers_of, points_of
from .shapes import bitmap, ellipse, line, polygon

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")


def is_label_studio(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) and isinstance(task.get("data"), dict) for task in content)
    )


def read_label_studio(source: Path, options: ReadOptions) -> Project:
    """The JSON file, or a folder that contains it.

    Raises:
        ValueError: the file is truncated or from another export, or a shape cannot be read.
    """
    builder = ProjectBuilder("label_studio", source, options)
    found = exports_in(source, is_label_studio)
    if not found:
        raise ValueError(f'{source} contains no export of Label Studio. Choose "JSON", not JSON-MIN or CSV.')
    several, unlabeled = 0, 0
    for path, tasks in found:
        for task in tasks:
            called = _image_name(task, str(path))
            where = f"{path}, task {task.get('id', '?')}"
            labeled = field_of(task, "annotations", list, where) if task.get("annotations") else []
            done = [a for a in labeled if isinstance(a, dict) and not a.get("was_cancelled")]
            several += len(done) > 1
            if not done:
                unlabeled += 1
                continue
            newest = sorted(done, key=lambda a: str(a.get("updated_at") or ""))[-1]
            results = field_of(newest, "result", list, where)
            shapes, size = [], None
            for row in results:
                shape = _shape(row, f"{where}, result {row.get('id') if isinstance(row, dict) else '?'}", options)
                if shape is not None:
                    shapes.append(shape)
                    size = int(row["original_height"]), int(row["original_width"])
            own = _UPLOAD.sub("", called)
            image = builder.find(called, path.parent) or builder.find(own, path.parent) or builder.find_saved_as(own)
            raw = [results, options.line_width]
            builder.add(image, shapes, called=called, where=where, raw=raw, size=size)
    if several:
        builder.notes.append(f"{several} images were labeled more than once; the newest labels count")
    if unlabeled:
        builder.notes.append(f"{unlabeled} images are not labeled yet and are skipped")
    return builder.project()


def _image_name(task: dict[str, Any], where: str) -> str:
    for value in [*task["data"].values(), task.get("file_upload")]:
        if not isinstance(value, str):
            continue
        parts = urlsplit(value)
        local = parse_qs(parts.query).get("d")  # /data/local-files/?d=folder/a.jpg
        path = local[0] if local else unquote(parts.path)
        if path.lower().endswith(IMAGE_SUFFIXES):
            return clean(path.lstrip("/") if local else path.rpartition("/")[2])
    raise ValueError(f"{where}, task {task.get('id', '?')}: its data names no image file.")


def _shape(row: Any, where: str, options: ReadOptions) -> Shape | None:
    """`None` if it has no label or is not a shape (a choice, a text)."""
    value = field_of(row, "value", dict, where)
    labels = next((v for k, v in value.items() if k.endswith("labels") and isinstance(v, list)), None)
    if not labels or row.get("type") in ("choices", "textarea", "rating"):
        return None
    height, width = map(int, numbers_of([row.get("original_height"), row.get("original_width")], where))
    if row.get("image_rotation"):
        raise ValueError(f"{where}: images rotated in Label Studio are not supported. Rotate the file instead.")
    scale = np.array([width, height]) / 100  # from percent

    def numbers(*names: str) -> list[float]:
        return numbers_of([value.get(name) for name in names], where)

    if "points" in value:
        draw = partial(polygon, [points_of(value["points"], where, least=2) * scale])
    elif "rle" in value:
        try:
            draw = partial(bitmap, rle.from_brush(field_of(value, "rle", list, where), height, width), 0, 0)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
    elif "radiusX" in value:
        x, y, rx, ry = numbers("x", "y", "radiusX", "radiusY")
        [degrees] = numbers_of([value.get("rotation") or 0], where)
        draw = partial(ellipse, (x, y) * scale, (rx, ry) * scale, degrees=degrees)
    elif "height" in value:
        x, y, w, h = numbers("x", "y", "width", "height")
        degrees = np.radians(numbers_of([value.get("rotation") or 0], where)[0])
        corner, (w, h) = (x, y) * scale, (w, h) * scale
        along, down = np.array([np.cos(degrees), np.sin(degrees)]), np.array([-np.sin(degrees), np.cos(degrees)])
        corners = [corner, corner + w * along, corner + w * along + h * down, corner + h * down]
        draw = partial(polygon, [np.array(corners)])  # rotated about the upper left corner
    elif "x" in value:
        draw = partial(line, np.array([numbers("x", "y")]) * scale, options.line_width)
    else:
        raise ValueError(f"{where}: a shape with {', '.join(value)} is not supported.")
    return Shape(clean(labels[0]), draw)
