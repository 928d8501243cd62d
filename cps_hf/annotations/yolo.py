"""YOLO segmentation: a text file per image, a line per object: class x y x y ..., as shares of width and height.

https://docs.ultralytics.com/datasets/segment/. Class names are in data.yaml, or in classes.txt, one per line. The
files have no drawing order, so the smaller object is on top. An image without a text file, or with an empty one, has
no object.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.walk import IMAGE_SUFFIXES, walk
from .project import Project, ProjectBuilder, ReadOptions, Shape, clean, numbers_of
from .shapes import Region, polygon

LABELS = "labels"


def yolo_table(source: Path) -> Path | None:
    """The file that names the classes."""
    found = [*sorted(source.glob("*.yaml")), *sorted(source.glob("*.yml"))]
    named = [path for path in found if path.name in ("data.yaml", "dataset.yaml")]
    listed = [path for path in [source / "classes.txt"] if path.is_file()]
    return (named or found or listed or [None])[0]


def read_yolo(source: Path, options: ReadOptions) -> Project:
    """`images/train/a.jpg` with `labels/train/a.txt`, or `train/images/a.jpg` with `train/labels/a.txt`.

    Raises:
        ValueError: there are no class names, or a line has no class or no outline.
    """
    builder = ProjectBuilder("yolo", source, options)
    names = options.classes or _names(source)
    builder.declare(names.values() if isinstance(names, dict) else names)
    by_id = names if isinstance(names, dict) else dict(enumerate(names))
    if not any(path.is_dir() for path in source.rglob(LABELS)):
        raise ValueError(f"{source} contains no folder {LABELS!r}, where YOLO's text files are expected.")
    texts = {}
    for below, path in walk(source, (".txt",)).files.items():
        parts = Path(below).parts
        if LABELS in parts[:-1]:
            texts[_key(parts, LABELS)] = path
    used = set()
    for below, image in walk(builder.root, IMAGE_SUFFIXES).files.items():
        key = _key(Path(below).parts, "images")
        text = texts.get(key)
        lines = text.read_text(encoding="utf-8").splitlines() if text else []
        used.add(key)
        where = str(text or image)
        rows = [(i, line.split()) for i, line in enumerate(lines, 1) if line.strip()]
        shapes = [_shape(row, by_id, f"{where}, line {i}", options) for i, row in rows]
        builder.add(image, shapes, called=below, where=where, raw=[lines, sorted(by_id.items())])
    for key, path in texts.items():
        if key not in used:
            builder.add(None, (), called=str(path), where=str(path), raw=None)
    return builder.project(overlap="area")


def _key(parts: tuple[str, ...], folder: str) -> tuple[str, ...]:
    return *(part for part in parts[:-1] if part != folder), Path(parts[-1]).stem


def _names(source: Path) -> dict[int, str]:
    import yaml

    path = yolo_table(source)
    if path is None:
        raise ValueError(f"{source} contains no data.yaml with YOLO's class names. Set them: `--classes NAME ...`.")
    if path.suffix == ".txt":
        return dict(enumerate(filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))))
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = content["names"]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(key): str(name) for key, name in pairs}
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} names no classes: expected `names: [road, car]` ({str(error)[:80]}).") from error


def _shape(row: list[str], names: dict[int, str], where: str, options: ReadOptions) -> Shape:
    if not row[0].isdigit() or int(row[0]) not in names:
        raise ValueError(f"{where}: the class {row[0]!r} is none of {sorted(names)[:8]}, which data.yaml names.")
    numbers = np.array(numbers_of(row[1:], where))
    if len(numbers) == 4:
        if not options.boxes:
            raise ValueError(
                f"{where} contains a box and no outline. Export for segmentation, or use boxes as masks: `--boxes`."
            )
        x, y, width, height = numbers
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    elif len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"{where}: expected a class and at least three points, found {len(numbers)} numbers.")
    else:
        points = numbers.reshape(-1, 2)
    return Shape(clean(names[int(row[0])]), partial(_scaled, points))


def _scaled(points: np.ndarray, height: int, width: int) -> Region:
    return polygon([points * (width, height)], height, width)
