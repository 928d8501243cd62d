"""Class names, and their colours or values in masks, from the files that annotation tools write."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .folder import read_class_names

IGNORED_NAMES = {"void", "ignore", "ignored"}
"""Entries of a colour table that are not classes: their pixels are ignored."""


class ClassTable(NamedTuple):
    """The classes as a file describes them.

    Attributes:
        names: in the order of the file.
        colors: the colour of each name in masks, or none.
        values: the stored value of each name in masks; if none, its position in the list.
    """

    path: Path
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] | None = None
    values: tuple[int, ...] | None = None


def find_class_tables(folders: Sequence[Path]) -> list[ClassTable]:
    """The files of `READERS` in these folders, the most specific file name first.

    Raises:
        ValueError: a file cannot be read, or two files with the same name disagree.
    """
    found: list[ClassTable] = []
    for name, read in READERS.items():
        tables = [read(folder / name) for folder in folders if (folder / name).is_file()]
        for other in tables[1:]:
            if other[1:] != tables[0][1:]:
                raise ValueError(
                    f"{tables[0].path} and {other.path} describe different classes. Make them equal, or set "
                    "`class_names`."
                )
        found += tables[:1]
    return found


def _read_json(path: Path) -> ClassTable:
    return ClassTable(path, read_class_names(path))


def _read_text(path: Path) -> ClassTable:
    """One name per line."""
    return ClassTable(path, tuple(_lines(path)))


def _read_labelmap(path: Path) -> ClassTable:
    """CVAT's and Datumaro's, `name:red,green,blue:parts:actions`; the colour is optional."""
    names, colors = [], []
    for line in _lines(path):
        name, _, rest = line.partition(":")
        color = rest.partition(":")[0].strip()
        names.append(name.strip())
        if color:
            colors.append(_color(color.split(","), path, line))
    if colors and len(colors) < len(names):
        raise ValueError(f"{path}: {len(colors)} of {len(names)} lines have a colour. Add one to all lines or none.")
    return ClassTable(path, tuple(names), tuple(colors) or None)


def _read_label_colors(path: Path) -> ClassTable:
    """CamVid's, `red green blue name`."""
    rows = [line.split(None, 3) for line in _lines(path)]
    for row in rows:
        if len(row) < 4:
            raise ValueError(f"{path}: expected lines of `red green blue name`, found {' '.join(row)!r}.")
    colors = tuple(_color(row[:3], path, " ".join(row)) for row in rows)
    return ClassTable(path, tuple(row[3].strip() for row in rows), colors)


def _read_csv(path: Path) -> ClassTable:
    """`Pixel Value, Class` (Roboflow's), or `name, r, g, b`, below a header line."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(_lines(path))]
    head, body = [cell.casefold() for cell in (rows or [[]])[0]], rows[1:]
    name = next((i for i, cell in enumerate(head) if cell in ("class", "name", "label", "class_name")), None)
    value = next((i for i, cell in enumerate(head) if "value" in cell or cell in ("id", "index", "pixel")), None)
    if name is not None and all(len(row) == len(head) for row in body):
        if {"r", "g", "b"} <= {*head}:
            cells = [head.index(channel) for channel in "rgb"]
            colors = tuple(_color([row[i] for i in cells], path, ",".join(row)) for row in body)
            return ClassTable(path, tuple(row[name] for row in body), colors)
        if value is not None and all(row[value].isdecimal() for row in body):
            found = sorted((int(row[value]), row[name]) for row in body)
            values = tuple(number for number, _ in found)
            plain = values == tuple(range(len(values)))
            return ClassTable(path, tuple(text for _, text in found), values=None if plain else values)
    raise ValueError(
        f"{path}: expected lines of `Pixel Value, Class` or `name, r, g, b` below such a header, found "
        f"{', '.join(head) or 'nothing'}."
    )


def _color(cells: Sequence[str], path: Path, line: str) -> tuple[int, int, int]:
    numbers = [int(cell) for cell in cells if re.fullmatch(r"\s*\d{1,3}\s*", cell)]
    if len(numbers) != 3 or len(cells) != 3 or max(numbers) > 255:
        raise ValueError(f"{path}: expected a colour, three numbers from 0 to 255, found {line!r}.")
    return numbers[0], numbers[1], numbers[2]


def _lines(path: Path) -> list[str]:
    """The lines without empty lines and comments."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


READERS: dict[str, Callable[[Path], ClassTable]] = {
    "classes.json": _read_json,
    "labelmap.txt": _read_labelmap,
    "label_colors.txt": _read_label_colors,
    "class_dict.csv": _read_csv,
    "_classes.csv": _read_csv,
    "classes.txt": _read_text,
}


def given_classes(given: str | Path | Sequence[str] | Mapping[int | str, str]) -> ClassTable:
    """`class_names` as a table: names, or a file of them (one of `READERS`, JSON, a table, or one name per line).

    Raises:
        ValueError: the file cannot be read, or contains no names.
    """
    if not isinstance(given, str | Path):
        return ClassTable(Path("class_names"), read_class_names(given))
    path = Path(given)
    by_kind = {".txt": _read_text, ".csv": _read_csv}.get(path.suffix.lower(), _read_json)
    return READERS.get(path.name, by_kind)(path)


def without_ignored(table: ClassTable) -> tuple[tuple[str, ...], dict[tuple[int, int, int], int]]:
    """(the classes, colour -> class id) of a colour table. Names in `IGNORED_NAMES` are not classes; their id: 255."""
    names = tuple(name for name in table.names if name.casefold() not in IGNORED_NAMES)
    ids = {name: i for i, name in enumerate(names)}
    return names, {color: ids.get(name, 255) for name, color in zip(table.names, table.colors or (), strict=True)}
