"""CVAT's exports "CVAT for images 1.1" (annotations.xml) and "Segmentation mask 1.1" (labelmap.txt and PNGs).

https://docs.cvat.ai/docs/manual/advanced/formats/. In the XML, shapes are stacked by `z_order`, then in file order.
All kinds but skeletons and cuboids are read.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

from . import rle
from .label_maps import add_label_maps, read_color_table
from .project import IMAGE_FOLDERS, Project, ProjectBuilder, ReadOptions, Shape, clean, numbers_of, points_of, size_of
from .shapes import bitmap, discs, ellipse, line, polygon, rectangle

LABELMAP = "labelmap.txt"
MASKS = "SegmentationClass"


def read_cvat(source: Path, options: ReadOptions) -> Project:
    """annotations.xml, or a folder that contains one.

    Raises:
        ValueError: the file is truncated, for a video, or not from CVAT.
    """
    builder = ProjectBuilder("cvat", source, options)
    files = [source] if source.is_file() else sorted(source.rglob("*.xml"))
    if not files:
        raise ValueError(f"{source} contains no XML file. CVAT names it annotations.xml.")
    for path in files:
        _read_file(path, builder)
    return builder.project()


def _read_file(path: Path, builder: ProjectBuilder) -> None:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(
            f"{path} is not a complete XML file: {error}. Export it again; the download may have been interrupted."
        ) from error
    if root.tag != "annotations":
        raise ValueError(f"{path} is not from CVAT: expected <annotations>, found <{root.tag}>.")
    if root.find("track") is not None:
        raise ValueError(f'{path} is "CVAT for video". Export the task as "CVAT for images 1.1".')
    builder.declare(name.text or "" for name in root.iterfind("meta//labels/label/name"))
    for image in root.iter("image"):
        called = image.get("name", "")
        where = f"{path}, image {called}"
        shapes, raw = [], [image.get("width"), image.get("height"), builder.options.line_width]
        for element in image:
            if element.tag in ("tag", "attribute"):
                continue
            shapes.append(_shape(element, f"{where}, {element.tag} {element.get('label')!r}", builder.options))
            raw.append([element.tag, sorted(element.attrib.items())])
        size = size_of(image.get("height"), image.get("width"))
        subset = [path.parent / name / image.get("subset", "") for name in IMAGE_FOLDERS]
        found = builder.find(called, *subset, path.parent)
        builder.add(found, shapes, called=called, where=where, raw=raw, size=size)


def _shape(element: ElementTree.Element, where: str, options: ReadOptions) -> Shape:
    def numbers(*names: str) -> list[float]:
        return numbers_of([element.get(name) for name in names], where)

    kind, (degrees, z) = element.tag, numbers_of([element.get("rotation", 0), element.get("z_order", 0)], where)
    if kind in ("polygon", "polyline", "points"):
        text = element.get("points", "")
        pairs = [pair.split(",") for pair in text.split(";") if pair.strip()]
        points = points_of(pairs, where, least=3 if kind == "polygon" else 1)
    if kind == "polygon":
        draw = partial(polygon, [points])
    elif kind == "polyline":
        draw = partial(line, points, options.line_width)
    elif kind == "points":
        draw = partial(discs, points, options.line_width)
    elif kind == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        draw = partial(rectangle, (left, top), (right, bottom), degrees=degrees)
    elif kind == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        draw = partial(ellipse, (x, y), (rx, ry), degrees=degrees)
    elif kind == "mask":
        left, top, width, height = map(int, numbers("left", "top", "width", "height"))
        runs = [int(n) for n in numbers_of(filter(str.strip, element.get("rle", "").split(",")), where)]
        try:
            pixels = rle.from_runs(runs, height, width, by_columns=False)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
        draw = partial(bitmap, pixels, top, left)
    else:
        raise ValueError(
            f"{where}: this kind of shape is not supported, only polygon, mask, box, ellipse, polyline and points. "
            "Remove it in CVAT."
        )
    return Shape(clean(element.get("label", "")), draw, z=z)


def read_cvat_masks(source: Path, options: ReadOptions) -> Project:
    """The folder with labelmap.txt; images are in JPEGImages or elsewhere (`images`).

    Raises:
        ValueError: the table cannot be read, a mask has no image, or it contains a colour that is not in the table.
    """
    builder = ProjectBuilder("cvat_masks", source, options)
    table = read_color_table(source / LABELMAP)
    if not (source / MASKS).is_dir():
        raise ValueError(f'No folder {source / MASKS}: CVAT\'s "Segmentation mask 1.1" has its masks there.')
    advice = f"{source / LABELMAP} lists no such colour. Export again, or add it there."
    add_label_maps(builder, MASKS, colors=table, advice=advice)
    return builder.project(background=None)
