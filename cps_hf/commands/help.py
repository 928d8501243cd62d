"""The text of `cps-hf train --help`: each field's docstring line and its default for the given command line."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..objectives import OBJECTIVES
from .arguments import ArgumentParser


def make_help(
    command: str,
    description: str,
    groups: Iterable[type],
    objective: str,
    defaults: Mapping[str, Any],
    *,
    first: Collection[str],
) -> ArgumentParser:
    """A parser that knows all options. It only formats the help and never parses.

    Args:
        groups: dataclasses whose docstrings contain `name: text` lines below a section title.
        objective: the objective whose options the help shows.
        defaults: by field, where they differ from the classes' defaults.
        first: the fields that the short help shows.
    """
    usage = "[DIR] [--config FILE.yaml] [--objective NAME] [--field value ...]"
    parser = ArgumentParser(command, description, first={*first, "config", "objective"}, usage=usage)
    main = parser.add_argument_group("what to run")
    main.add_argument("DIR", nargs="?", help="your folder of images and masks, or what `--dataset` names")
    main.add_argument("--config", metavar="FILE.yaml", help="fields by name; the command line overrides them")
    main.add_argument(
        "--objective",
        metavar="NAME",
        choices=OBJECTIVES,
        help=f"one of {', '.join(OBJECTIVES)} (shown here: {objective}; for others: `--objective NAME --help-all`)",
    )
    for cls in groups:
        helps, hints, section = documented(cls), typing.get_type_hints(cls), None
        title = f"objective {objective}: {cls.__name__}" if cls is OBJECTIVES[objective] else cls.__name__
        for f in dataclasses.fields(cls):
            where, text = helps.get(f.name, (None, ""))
            if section is None or (where and where != section.title):
                section = parser.add_argument_group(where or title)
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            default = defaults.get(f.name, default)
            text = f"{text} (default: {_shown(default)})"
            choices = ("true", "false") if hints[f.name] is bool else None
            section.add_argument(f"--{f.name}", metavar=_metavar(hints[f.name]), choices=choices, help=text)
    return parser


def documented(cls: type) -> dict[str, tuple[str | None, str]]:
    """Field name -> (section, help), from the class's docstrings: `name: text` lines below a section title."""
    found: dict[str, tuple[str | None, str]] = {}
    for base in reversed(cls.__mro__):
        section, name = None, None
        for line in (base.__doc__ or "").splitlines():
            entry = re.match(r"\s{8}(\w+): (.+)", line)
            if entry:
                name = entry[1]
                found[name] = (section, entry[2].strip())
            elif name and re.match(r"\s{12}\S", line):
                found[name] = (section, f"{found[name][1]} {line.strip()}")
            else:
                name = None
                title = re.match(r"    (\S.*)$", line)
                section = title[1] if title and not line.rstrip().endswith(".") and title[1] != "Args:" else section
    return found


def _shown(value: Any) -> str:
    """The value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if value in (None, "", [], {}):
        return "none"
    if isinstance(value, dict):
        return json.dumps(value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _metavar(expected: Any) -> str:
    """What to type: "INT", "true|false", "FLOAT ..." for several, "JSON" for a mapping."""
    kinds = [kind for kind in typing.get_args(expected) if kind is not types.NoneType]
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        return "|".join(map(_metavar, kinds))
    if typing.get_origin(expected) is list:
        return f"{_metavar(kinds[0])} ..."
    names = {bool: "true|false", str: "TEXT", int: "INT", float: "NUMBER", dict: "JSON"}
    return names[typing.get_origin(expected) or expected]
