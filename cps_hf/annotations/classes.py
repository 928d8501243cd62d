"""The mapping from a tool's labels to classes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..data.table import first_few
from ..functional import IGNORE_INDEX
from .project import Project, clean, read_json

IGNORED = "ignored"
"""How `--map` and `--background` denote pixels without a class."""
REST = "*"
"""In a map: all labels that are not listed."""


@dataclass(frozen=True)
class ClassTable:
    """
    Attributes:
        names: class names; the index is the class id.
        ids: label -> class id, or 255 (ignored).
        background: the class id of the pixels without a label, or 255.
    """

    names: tuple[str, ...]
    ids: Mapping[str, int]
    background: int


def read_map(path: Path) -> dict[str, str]:
    """{label: class} from a JSON file; null and "ignored" become "ignored".

    Raises:
        ValueError: the file is not such a mapping.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(value, str | None) for value in content.values()):
        raise ValueError(f'{path}: expected a JSON mapping like {{"car": "vehicle", "glare": null}} (null: ignored).')
    return {clean(key): IGNORED if value is None else clean(value) for key, value in content.items()}


def class_table(
    project: Project,
    *,
    classes: tuple[str, ...] | None = None,
    background: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> ClassTable:
    """The classes of a project. By default the background first, then the tool's labels in its order.

    Args:
        classes: exactly these, in this order.
        background: the class of unlabeled pixels, or "ignored". If `None`, the reader's default.
        mapping: label -> class or "ignored"; "*" stands for all other labels.

    Raises:
        ValueError: a label has no class, the map names an unknown label, or the background is not in `classes`.
    """
    mapping = dict(mapping or {})
    strange = [label for label in mapping if label not in project.labels and label != REST]
    if strange:
        raise ValueError(
            f"`--map` names {strange[0]!r}, which is not a label of {project.source}. Its labels are "
            f"{first_few(project.labels, 12)}."
        )
    target = {label: mapping.get(label, mapping.get(REST, label)) for label in project.labels}
    rest = background if background is not None else project.background
    wanted = [rest] if rest not in (None, IGNORED) else []
    names = classes or tuple(dict.fromkeys([*wanted, *(name for name in target.values() if name != IGNORED)]))
    if wanted and rest not in names:
        raise ValueError(
            f"Pixels without a label are {rest!r}, which is not in `--classes` ({', '.join(names)}). Add it, or set "
            f"`--background NAME` to one of these, or `--background {IGNORED}`."
        )
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise ValueError(f"{project.source} has {len(names)} classes; 1 to {IGNORE_INDEX} are supported.")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"`--classes` names {repeated[0]!r} twice.")
    unknown = {label: name for label, name in target.items() if name not in (*names, IGNORED)}
    used = [label for label in unknown if project.uses[label]]
    if used:
        counted = first_few([f"{label!r} ({project.uses[label]})" for label in used], 8)
        close = difflib.get_close_matches(used[0], names, n=1)
        hint = f" Is {used[0]!r} meant to be {close[0]!r}?" if close else ""
        raise ValueError(
            f"{project.source} has labels that are not in `--classes` ({', '.join(names)}): {counted}.{hint} Add "
            'them, or map them to classes: `--map FILE` with {"label": "class"}, null for ignored, "*" for the rest.'
        )
    ids = {label: names.index(name) if name in names else IGNORE_INDEX for label, name in target.items()}
    return ClassTable(names, ids, names.index(rest) if wanted else IGNORE_INDEX)
