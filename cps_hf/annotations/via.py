"""VIA, the VGG Image Annotator: a project or "annotations (as JSON)" (https://www.robots.ox.ac.uk/~vgg/software/via/).

Polygons, rectangles, circles, ellipses, lines and points are read; later ones are on top. The label is a region
attribute: the only one in use, or `--attribute NAME`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .project import Project, ProjectBuilder, ReadOptions, Shape, clean, exports_in, field_of, numbers_of, points_of
from .shapes import ellipse, line, polygon, rectangle

PROJECT = "_via_img_metadata"


def is_via(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    rows = content.get(PROJECT, content)
    return (
        isinstance(rows, dict)
        and bool(rows)
        and all(isinstance(row, dict) and {"filename", "regions"} <= row.keys() for row in rows.values())
    )


def read_via(source: Path, options: ReadOptions) -> Project:
    """The JSON file, or a folder that contains it.

    Raises:
        ValueError: the file is truncated or not from VIA, the label attribute is ambiguous, or a region has no
            label.
    """
    builder = ProjectBuilder("via", source, options)
    found = exports_in(source, is_via)
    if not found:
        raise ValueError(f'{source} contains no VIA file. Save the project, or export "annotations (as JSON)".')
    used = {
        key
        for _, content in found
        for _, row in _images(content)
        for region in _regions(row, str(source))
        for key in _mapping(region, "region_attributes")
    }
    attribute = options.attribute or (next(iter(used)) if len(used) == 1 else None)
    if used and attribute not in used:
        raise ValueError(
            f"{source}: which region attribute is the label? There are {', '.join(sorted(used))}. Choose with "
            "`--attribute NAME`."
        )
    for path, content in found:
        listed = _mapping(_mapping(_mapping(content, "_via_attributes"), "region"), attribute)
        builder.declare(_mapping(listed, "options"))
        for key, row in _images(content):
            called = field_of(row, "filename", str, f"{path}, {key}")
            regions = _regions(row, f"{path}, {key}")
            where = f"{path}, {called}"
            shapes = [_shape(r, attribute, f"{where}, region {i}", options) for i, r in enumerate(regions, 1)]
            raw = [regions, attribute, options.line_width]
            builder.add(builder.find(called, path.parent), shapes, called=called, where=where, raw=raw)
    return builder.project()


def _images(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from content.get(PROJECT, content).items()


def _regions(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A list; a mapping in VIA 1."""
    regions = field_of(row, "regions", (list, dict), where)
    regions = [*regions.values()] if isinstance(regions, dict) else regions
    if not all(isinstance(region, dict) for region in regions):
        raise ValueError(f"{where}: each of its `regions` must be a mapping. Save it again in VIA.")
    return regions


def _mapping(row: dict[str, Any], key: str | None) -> dict[str, Any]:
    """An optional mapping."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _shape(region: dict[str, Any], attribute: str, where: str, options: ReadOptions) -> Shape:
    label = _mapping(region, "region_attributes").get(attribute)
    if isinstance(label, dict):  # a checkbox: {"road": true}
        label = next((name for name, chosen in label.items() if chosen), None)
    if not label:
        raise ValueError(f"{where} has no {attribute!r}, the attribute of its label. Add it in VIA.")
    row = field_of(region, "shape_attributes", dict, where)
    kind = field_of(row, "name", str, where)

    def numbers(*names: str) -> list[float]:
        return numbers_of([row.get(name) for name in names], where)

    if kind in ("polygon", "polyline"):
        xs, ys = (field_of(row, f"all_points_{axis}", list, where) for axis in "xy")
        if len(xs) != len(ys):
            raise ValueError(f"{where}: {len(xs)} x and {len(ys)} y. Save it again in VIA.")
        points = points_of([*zip(xs, ys, strict=True)], where)
        draw = partial(polygon, [points]) if kind == "polygon" else partial(line, points, options.line_width)
    elif kind == "rect":
        x, y, width, height = numbers("x", "y", "width", "height")
        draw = partial(rectangle, (x, y), (x + width, y + height))
    elif kind == "circle":
        x, y, radius = numbers("cx", "cy", "r")
        draw = partial(ellipse, (x, y), (radius, radius))
    elif kind == "ellipse":
        x, y, rx, ry, theta = numbers_of([*map(row.get, ("cx", "cy", "rx", "ry")), row.get("theta") or 0], where)
        draw = partial(ellipse, (x, y), (rx, ry), degrees=float(np.degrees(theta)))
    elif kind == "point":
        draw = partial(line, np.array([numbers("cx", "cy")]), options.line_width)
    else:
        raise ValueError(
            f"{where}: the shape {kind!r} is not supported, only polygon, rect, circle, ellipse, polyline and point."
        )
    return Shape(clean(label), draw)
