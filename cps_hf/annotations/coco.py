"""COCO: a JSON file with "images", "annotations" and "categories" (https://cocodataset.org/#format-data).

Polygons, uncompressed and compressed RLE are read. The parts of an object are joined. A crowd is ignored and lies
below all objects, unless `crowds` is set. The files have no drawing order, so the smaller object is on top.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from . import rle
from .project import (
    Project,
    ProjectBuilder,
    ReadOptions,
    Shape,
    clean,
    exports_in,
    field_of,
    numbers_of,
    points_of,
    size_of,
)
from .shapes import Region, bitmap, polygon, rectangle, union


def is_coco(content: Any) -> bool:
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read_coco(source: Path, options: ReadOptions) -> Project:
    """One file, or all in a folder (`train/_annotations.coco.json`, `annotations/instances_val.json`).

    Raises:
        ValueError: a file is truncated or not in COCO's format, or an object is invalid.
    """
    builder = ProjectBuilder("coco", source, options)
    found = exports_in(source, is_coco)
    if not found:
        raise ValueError(
            f'{source} contains no COCO file: expected a JSON file with "images", "annotations" and "categories".'
        )
    counts: Counter[str] = Counter()
    for path, content in found:
        counts += _read_file(path, content, builder)
    if counts["boxes"]:
        builder.notes.append(f"{counts['boxes']} objects have a box but no outline; their boxes are drawn")
    if counts["crowds"] and not options.crowds:
        builder.notes.append(
            f"{counts['crowds']} objects are crowds (`iscrowd`) and are ignored. CVAT marks every brush mask as a "
            "crowd: if these are, use `--crowds`"
        )
    return builder.project(overlap="area")


def _read_file(path: Path, content: dict[str, Any], builder: ProjectBuilder) -> Counter[str]:
    """Read one file. Returns the number of "boxes" drawn and of "crowds"."""
    images = _by_id(content, "images", "file_name", path)
    categories = _by_id(content, "categories", "name", path)
    annotations = _by_image(content, images, categories, path)
    used = {row["category_id"] for found in annotations.values() for _, row in found}
    # Roboflow lists its project as a parent category, which no object has.
    above = {str(row.get("supercategory")) for row in categories.values()}
    builder.declare(row["name"] for key, row in categories.items() if key in used or row["name"] not in above)
    counts: Counter[str] = Counter()
    for key, row in images.items():
        called, size = row["file_name"], size_of(row.get("height"), row.get("width"))
        shapes, raw = [], [size]
        for where, annotation in annotations[key]:
            has_box_alone = not annotation.get("segmentation")
            counts["boxes"] += has_box_alone
            draw = _box(annotation, where, builder.options) if has_box_alone else _outline(annotation, size, where)
            label, crowd = clean(categories[annotation["category_id"]]["name"]), bool(annotation.get("iscrowd"))
            counts["crowds"] += crowd
            crowd = crowd and not builder.options.crowds
            shapes.append(Shape(None if crowd else label, draw, under=crowd))
            raw.append([label, crowd, annotation.get("segmentation") or annotation.get("bbox")])
        image, where = builder.find(called, path.parent), f"{path}, image {called}"
        builder.add(image, shapes, called=called, where=where, raw=raw, size=size)
    return counts


def _by_id(content: dict[str, Any], key: str, name: str, path: Path) -> dict[int | str, dict[str, Any]]:
    """The rows of a list by their ids; each must have a text `name`."""
    found: dict[int | str, dict[str, Any]] = {}
    for row in field_of(content, key, list, str(path)):
        id_ = field_of(row, "id", (int, str), f"{path}, `{key}`")
        named = field_of(row, name, str, f"{path}, `{key}`, id {id_}")
        if id_ in found and found[id_][name] != named:
            raise ValueError(
                f"{path}: {found[id_][name]!r} and {named!r} in `{key}` have the same id, {id_!r}. Two exports were "
                "merged without renumbering."
            )
        found[id_] = row
    return found


def _by_image(
    content: dict[str, Any], images: Collection[Any], categories: Collection[Any], path: Path
) -> dict[int | str, list[tuple[str, dict[str, Any]]]]:
    """The annotations of each image, and their names in error messages."""
    found = defaultdict(list)
    for number, row in enumerate(field_of(content, "annotations", list, str(path))):
        where = f"{path}, annotation {row.get('id', number) if isinstance(row, dict) else number}"
        image, category = (field_of(row, key, (int, str), where) for key in ("image_id", "category_id"))
        if image not in images:
            raise ValueError(f"{where}: no image has the id {image!r}. Images and annotations are from two exports.")
        if category not in categories:
            raise ValueError(
                f"{where}: no category has the id {category!r}; there are {sorted(categories, key=str)[:8]}. "
                "Categories and annotations are from two exports."
            )
        found[image].append((where, row))
    return found


def _outline(annotation: dict[str, Any], size: tuple[int, int] | None, where: str):
    segmentation = field_of(annotation, "segmentation", (list, dict), where)
    if isinstance(segmentation, list):
        # COCO's own files contain outlines of two points; they cover no pixel.
        parts = [points_of(part, where, least=2) for part in segmentation]
        return partial(_parts, parts)
    height, width = numbers_of(field_of(segmentation, "size", list, where), where, count=2)
    counts = field_of(segmentation, "counts", (list, str), where)
    if size is not None and size != (height, width):
        raise ValueError(
            f"{where}: its runs are for {height:.0f} x {width:.0f} pixels (height x width), but the image has "
            f"{size[0]} x {size[1]}. Export it again."
        )
    return partial(_runs, counts, int(height), int(width), where)


def _parts(parts, height: int, width: int) -> Region:
    return union([polygon([part], height, width) for part in parts])


def _runs(counts, own_height: int, own_width: int, where: str, height: int, width: int) -> Region:
    try:
        runs = rle.decompress(counts) if isinstance(counts, str) else counts
        mask = rle.from_runs(runs, own_height, own_width, by_columns=True)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    return bitmap(mask, 0, 0, height, width)


def _box(annotation: dict[str, Any], where: str, options: ReadOptions):
    if not options.boxes:
        raise ValueError(
            f"{where} has no outline (`segmentation` is empty), only a box. Draw outlines in the tool, or use boxes "
            "as masks: `--boxes`."
        )
    x, y, width, height = numbers_of(field_of(annotation, "bbox", list, where), where, count=4)
    return partial(rectangle, (x, y), (x + width, y + height))
