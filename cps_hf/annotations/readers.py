"""Choose the reader of an export: by name or by its content."""

from __future__ import annotations

from pathlib import Path

from .coco import is_coco, read_coco
from .cvat import LABELMAP, read_cvat, read_cvat_masks
from .label_maps import ROBOFLOW_CLASSES, read_binary, read_colors, read_ids, read_roboflow_masks
from .label_studio import is_label_studio, read_label_studio
from .labelme import is_labelme, read_labelme
from .object_masks import read_object_masks
from .project import Project, ReadOptions, read_json
from .supervisely import is_supervisely, read_supervisely
from .via import is_via, read_via
from .yolo import LABELS, read_yolo, yolo_table

READERS = {
    "coco": read_coco,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "cvat_masks": read_cvat_masks,
    "colors": read_colors,
    "binary": read_binary,
    "objects": read_object_masks,
    "ids": read_ids,
    "label_studio": read_label_studio,
    "roboflow_masks": read_roboflow_masks,
    "yolo": read_yolo,
    "supervisely": read_supervisely,
    "via": read_via,
}

CLASSES_ARE_THE_MASKS = ("binary", "ids")
"""Formats for which `ReadOptions.classes` names the stored values."""

_OF_FOLDERS = ("cvat_masks", "colors", "binary", "objects", "ids", "roboflow_masks", "yolo", "supervisely")
_BY_CONTENT = {"coco": is_coco, "labelme": is_labelme, "label_studio": is_label_studio, "via": is_via}


def read_project(source: Path, options: ReadOptions, *, format: str | None = None) -> Project:
    """Read a tool's export.

    Args:
        source: its folder, or a single file.
        format: one of `READERS`. If `None`, it is detected.

    Raises:
        ValueError: the source does not exist, its format is not recognized, or it cannot be read.
    """
    if not source.exists():
        raise ValueError(f"No such file or folder: {source}.")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"`--images`: no folder {options.images}.")
    if source.suffix.lower() in (".zip", ".tar", ".gz", ".tgz"):
        raise ValueError(
            f"{source} is an archive. Unpack it and give the folder: `unzip {source.name} -d {source.stem}`."
        )
    format = format or format_of(source)
    if source.is_file() and format in _OF_FOLDERS:
        raise ValueError(f"`--format {format}` reads a folder, but {source} is a file.")
    return READERS[format](source, options)


def format_of(source: Path) -> str:
    """Detect the format of an export.

    Raises:
        ValueError: no format or several formats match.
    """
    if source.is_file():
        if source.suffix.lower() == ".xml":
            return "cvat"
        found = _format_of_json(source)
        if found is None:
            raise ValueError(f"The format of {source} is not recognized. Set it: `--format {'|'.join(READERS)}`.")
        return found
    if (source / LABELMAP).is_file():
        return "cvat_masks"
    if is_supervisely(source):
        return "supervisely"
    if any(source.rglob(ROBOFLOW_CLASSES)):
        return "roboflow_masks"
    if yolo_table(source) and any(path.is_dir() for path in source.rglob(LABELS)):
        return "yolo"
    if any(source.rglob("*.xml")):
        return "cvat"
    found = {name for path in sorted(source.rglob("*.json"))[:20] if (name := _format_of_json(path))}
    if len(found) != 1:
        what = f"may be {' or '.join(sorted(found))}" if found else "contains no export whose format is recognized"
        raise ValueError(
            f"{source} {what}. Set it: `--format {'|'.join(READERS)}`. For masks as PNGs: colors (RGB and a "
            "table), binary (0 and 255), objects (a file per class or object) or ids (numbers)."
        )
    return found.pop()


def _format_of_json(path: Path) -> str | None:
    content = read_json(path)
    return next((name for name, fits in _BY_CONTENT.items() if fits(content)), None)
