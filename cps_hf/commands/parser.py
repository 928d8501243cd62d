"""A YAML file and a command line become settings and an objective; the command line wins.

Every field of the settings and of the chosen objective is an option of the same name, in YAML and as `--name value`.
An unknown name or a value of a wrong type is an error that names it and the nearest valid name.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..objectives import OBJECTIVES, Objective

Settings = TypeVar("Settings")


def parse(
    settings_class: type[Settings],
    argv: list[str] | None = None,
    *,
    description: str = "",
    defaults: dict[str, Any] | None = None,
    default_objective: str = "cps",
) -> tuple[Settings, Objective]:
    """Read the command line (and the YAML file that its `--config` names) into settings and an objective.

    Args:
        settings_class: `CPSConfig`, or a dataclass that extends it with fields of a script's own.
        argv: the arguments; none: those of this process.
        defaults: what differs from the classes' own defaults, by field name; and {objective: {field: value}} for what
            is one objective's own.

    Exits with a message on standard error and status 2 when something is wrong, as argparse does.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        given = _read_command_line(argv)
        wants_help = given.pop("help", False)
        from_file = _read_yaml(given.pop("config")) if "config" in given else {}
        name = given.get("objective", from_file.get("objective", default_objective))
        if not isinstance(name, str) or name not in OBJECTIVES:
            raise ValueError(
                f"`objective` must be one of {', '.join(OBJECTIVES)}, got {name!r}.{_nearest(name, OBJECTIVES)}"
            )
        common = {key: value for key, value in (defaults or {}).items() if key not in OBJECTIVES}
        defaults = {**common, **(defaults or {}).get(name, {})}
        if wants_help:
            print(_help(settings_class, name, description, {**defaults, **from_file}))
            sys.exit(0)
        if from_file.get("objective", name) != name and isinstance(from_file["objective"], str):
            from_file = _without_foreign_fields(from_file, name)
        values = {**defaults, **from_file, **given}
        values.pop("objective", None)
        return _build(settings_class, name, values)
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def to_yaml(settings: Any, objective: Objective) -> str:
    """The settings and the objective as a YAML file that `--config` reads back to the same."""
    name = next((n for n, c in OBJECTIVES.items() if type(objective) is c), type(objective).__name__)
    values = {"objective": name, **dataclasses.asdict(objective), **settings.to_dict()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _build(settings_class: type[Settings], name: str, values: dict[str, Any]) -> tuple[Settings, Objective]:
    settings_types, objective_types = _field_types(settings_class), _field_types(OBJECTIVES[name])
    clash = settings_types.keys() & objective_types.keys()
    assert not clash, f"fields of both {settings_class.__name__} and the objective {name}: {clash}"
    known = {**settings_types, **objective_types}
    for key in values:
        if key not in known:
            owners = [other for other, cls in OBJECTIVES.items() if key in _field_types(cls)]
            elsewhere = f" It is a field of the objective {' and '.join(owners)}." if owners else ""
            hint = elsewhere or _nearest(key, [*known, "config", "objective"])
            raise ValueError(f"unknown field `{key}` with `objective={name}`.{hint}")
    converted = {key: _convert(key, value, known[key]) for key, value in values.items()}
    settings = settings_class(**{k: v for k, v in converted.items() if k in settings_types})
    return settings, OBJECTIVES[name](**{k: v for k, v in converted.items() if k in objective_types})


def _without_foreign_fields(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A file's values without the hyper-parameters of its own objective, when the command line chose another one."""
    own = OBJECTIVES.get(values["objective"])
    foreign = _field_types(own).keys() - _field_types(OBJECTIVES[name]).keys() if own else set()
    left_out = sorted(foreign & values.keys())
    if left_out:
        listed = ", ".join(f"`{key}`" for key in left_out)
        print(f"note: {listed} of the file's objective {values['objective']}: not used by {name}.", file=sys.stderr)
    return {key: value for key, value in values.items() if key not in foreign}


def _field_types(cls) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _read_command_line(argv: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name v1 v2` and `--flag` become {name: str, list of str or True}."""
    values: dict[str, Any] = {}
    name = None
    for word in argv:
        if word in ("-h", "--help"):
            values["help"] = True
        elif word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in values:
                raise ValueError(f"`--{name}` is given twice.")
            values[name] = value if "=" in word else True
        elif name is None:
            raise ValueError(f"expected `--field value`, found {word!r}.")
        elif values[name] is True:
            values[name] = word
        else:
            values[name] = [*values[name], word] if isinstance(values[name], list) else [values[name], word]
    return values


def _read_yaml(path: Any) -> dict[str, Any]:
    if not isinstance(path, str):
        raise ValueError("`--config` needs the path of one YAML file.")
    try:
        with Path(path).open(encoding="utf-8") as file:
            values = _PlainLoader(file).get_single_data()
    except OSError as error:
        raise ValueError(f"cannot read `--config {path}`: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date like 2026-99-99
        raise ValueError(f"`--config {path}` is no valid YAML: {error}") from error
    if _size(values, {}) > 100_000:
        raise ValueError(f"`--config {path}` refers to itself again and again, as no settings do.")
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"`--config {path}` must hold `field: value` lines, found a {type(values).__name__}.")
    return values


class _PlainLoader(yaml.SafeLoader):
    """Plain values only, and no key twice: YAML would keep the last without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _size(value: Any, known: dict[int, float]) -> float:
    """How many values there are when every alias is written out; infinite where one holds itself."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")
        items = value if isinstance(value, list) else [*value.keys(), *value.values()]
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]


def _convert(name: str, value: Any, expected: Any) -> Any:
    """The value as the type that the field declares: text from the command line, or what YAML made of it."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):  # X | None, or bool | str | None
        if value is None or value in ("none", "None", "null"):
            return None
        *first, last = [a for a in arguments if a is not types.NoneType]
        for candidate in first:
            with contextlib.suppress(ValueError):
                return _convert(name, value, candidate)
        return _convert(name, value, last)
    if origin is list:
        items = value if isinstance(value, list | tuple) else [] if value in ("", "none") else [value]
        return [_convert(name, item, arguments[0]) for item in items]
    convert = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, dict: _to_dict}[origin or expected]
    converted = convert(value)
    if converted is None:
        kind = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
        got = "" if name.endswith("_token") else f", got {value!r}"
        raise ValueError(f"`{name}` must be {kind[origin or expected]}{got}.")
    return converted


def _to_bool(value):
    return {"true": True, "false": False}.get(str(value).lower()) if not isinstance(value, list) else None


def _to_int(value):
    text = str(value).replace("_", "")
    return int(text) if not isinstance(value, bool) and re.fullmatch(r"[+-]?\d+", text) else None


def _to_float(value):
    try:  # YAML reads 1e-3 as text
        return None if isinstance(value, bool | list) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _to_str(value):
    # `--run_name` without a value arrives as True; a YAML 92 or 1.0 where text is expected is that text
    return None if isinstance(value, bool | list | dict) or value is None else str(value)


def _to_dict(value):
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else " `--help` lists them."


def _help(settings_class: type, name: str, description: str, defaults: dict[str, Any]) -> str:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
        usage="%(prog)s [--config FILE.yaml] [--objective NAME] [--field value ...]",
    )
    main = parser.add_argument_group("what to run")
    main.add_argument("--config", metavar="FILE.yaml", help="fields by name; the command line wins")
    main.add_argument(
        "--objective",
        metavar="NAME",
        help=f"one of {', '.join(OBJECTIVES)} (this help: {name}; `--objective NAME --help` shows another's fields)",
    )
    objective_class = OBJECTIVES[name]
    for title, cls in (
        (f"objective {name}: {objective_class.__name__}", objective_class),
        ("settings", settings_class),
    ):
        helps, group = _documented(cls), None
        for f in dataclasses.fields(cls):
            section, text = helps.get(f.name, (None, ""))
            if group is None or (section and section != group.title):
                group = parser.add_argument_group(section or title)
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            default = defaults.get(f.name, default)
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text = f"{text} (default: {shown if shown not in ('', None, {}) else 'none'})".replace("%", "%%")
            group.add_argument(f"--{f.name}", metavar=_metavar(_field_types(cls)[f.name]), help=text)
    return parser.format_help()


def _metavar(expected) -> str:
    text = expected.__name__ if isinstance(expected, type) and not typing.get_args(expected) else str(expected)
    return text.replace(" | None", "").replace("typing.", "").upper()


def _documented(cls) -> dict[str, tuple[str | None, str]]:
    """Field name -> (section, help), from the class's docstrings: `name: text` lines under a section's line."""
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
