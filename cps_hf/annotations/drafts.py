"""Masks in the import formats of annotation tools: a first draft to correct instead of an empty image.

Each region becomes one polygon. The tools' polygons have no holes, so a cut leads to each hole. The background class
is not drawn. `convert` reads the written files again; with a tolerance of 0, it gives the same masks.
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.folder import CLASSES
from ..data.masks import output_path
from ..files import write_atomically
from ..visualization.colors import palette
from .outlines import Outline, trace, without_specks

FORMATS = ("coco", "labelme", "cvat", "png")


@dataclass(frozen=True)
class Draft:
    """An image and its predicted mask.

    Attributes:
        name: the mask's name without a suffix; may include folders.
        image: the file. called: its name in the tool; may include folders.
        mask: a PNG of class ids.
    """

    name: str
    image: Path
    called: str
    mask: Path


def write_drafts(
    folder: Path,
    drafts: Sequence[Draft],
    names: Sequence[str],
    *,
    format: str,
    tolerance: float = 1,
    min_area: int = 0,
    background: str | None = "background",
) -> list[Path]:
    """Write files that an annotation tool imports.

    Args:
        folder: receives coco.json, cvat.xml, or labelme/ with a JSON file per image; for "png" classes.json, which
            names the classes in the masks.
        names: class names; the index is the class id.
        format: one of `FORMATS`.
        tolerance: how far outlines may move when they are simplified, in pixels; 0 keeps them exact.
        min_area: regions of fewer pixels are filled from their surroundings.
        background: the class that is not drawn. If it is not in `names`, all classes are drawn.

    Returns:
        The files; for LabelMe, their folder.

    Raises:
        ValueError: a negative tolerance or area.
    """
    if tolerance < 0 or min_area < 0:
        raise ValueError(f"A tolerance ({tolerance:g}) and an area ({min_area}) must not be negative.")
    if format == "png":
        write_atomically(folder / CLASSES, json.dumps([*names], ensure_ascii=False))
        return [folder / CLASSES]
    drawn = [name for name in names if name != background]

    def outlines(draft: Draft) -> tuple[tuple[int, int], list[tuple[str, Outline]]]:
        with Image.open(draft.mask) as image:
            ids = np.asarray(image)
        ids = without_specks(ids, min_area) if min_area > 1 else ids
        found = [(names[o.class_id], o) for o in trace(ids, tolerance=tolerance) if o.class_id < len(names)]
        return ids.shape, [(name, outline) for name, outline in found if name != background]

    if format == "labelme":
        for draft in drafts:
            _write_labelme(output_path(folder / "labelme", draft.name, ".json"), draft, *outlines(draft))
        return [folder / "labelme"]
    if format == "coco":
        path = folder / "coco.json"
        write_atomically(path, _coco([(draft, *outlines(draft)) for draft in drafts], drawn))
        return [path]
    path = folder / "cvat.xml"
    write_atomically(path, _cvat([(draft, *outlines(draft)) for draft in drafts], drawn))
    return [path]


_Drawn = tuple[Draft, tuple[int, int], list[tuple[str, Outline]]]


def _coco(images: Sequence[_Drawn], names: Sequence[str]) -> str:
    """https://cocodataset.org/#format-data"""
    content: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names, 1)],
    }
    ids = {name: i for i, name in enumerate(names, 1)}
    for number, (draft, (height, width), outlines) in enumerate(images, 1):
        content["images"].append({"id": number, "file_name": draft.called, "height": height, "width": width})
        for name, outline in outlines:
            (left, top), (right, bottom) = outline.outer.min(axis=0).tolist(), outline.outer.max(axis=0).tolist()
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids[name],
                    "segmentation": [outline.ring.ravel().tolist()],
                    "area": outline.area,
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": 0,
                }
            )
    return json.dumps(content, ensure_ascii=False)


def _write_labelme(path: Path, draft: Draft, size: tuple[int, int], outlines: list[tuple[str, Outline]]) -> None:
    """One file of LabelMe, which refers to the image."""
    shapes = [
        {
            "label": name,
            "points": outline.ring.tolist(),
            "group_id": None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
        }
        for name, outline in outlines
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": "5.4.1", "flags": {}, "shapes": shapes}
    content |= {"imagePath": _from(path.parent, draft.image), "imageData": None}
    content |= {"imageHeight": size[0], "imageWidth": size[1]}
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))


def _cvat(images: Sequence[_Drawn], names: Sequence[str]) -> str:
    """ "CVAT for images 1.1": https://docs.cvat.ai/docs/manual/advanced/xml_format/"""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for name, color in zip(names, palette(max(len(names), 1) + 1)[1:], strict=False):
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "color").text = f"#{bytes(color).hex()}"
    for number, (draft, (height, width), outlines) in enumerate(images):
        size = {"width": str(width), "height": str(height)}
        image = ElementTree.SubElement(root, "image", id=str(number), name=draft.called, **size)
        for name, outline in outlines:
            points = ";".join(f"{x:g},{y:g}" for x, y in outline.ring.tolist())
            fixed = {"source": "auto", "occluded": "0", "z_order": "0"}
            ElementTree.SubElement(image, "polygon", label=name, points=points, **fixed)
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _from(folder: Path, path: Path) -> str:
    """The relative path to a file; the absolute path if it is on another drive."""
    try:
        return Path(os.path.relpath(path, folder.resolve())).as_posix()
    except ValueError:
        return str(path)
