"""Turn a YAML file and a command line into groups of settings, including an objective. The command line wins.

Every field of the groups and of the chosen objective is an option of the same name, in YAML and as `--name value`.
An unknown name or a value of a wrong type raises an error that names it and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..config import RETIRED
from ..objectives import OBJECTIVES
from .errors import fail, nearest, use_options
from .help import make_help
from .values import convert

Settings = TypeVar("Settings")


def parse(
    settings: type[Settings],
    argv: Sequence[str],
    *,
    command: str = "train",
    description: str = "",
    first: Collection[str] = (),
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
    default_objective: str = "cps",
) -> Settings:
    """Read a command line, and the YAML file that its `--config` names.

    Args:
        settings: a dataclass of dataclasses. No two of them have a field of the same name. Its field `objective` is
            one of `OBJECTIVES`, chosen by name.
        command: its name after `cps-hf`, for the help.
        first: the fields that `--help` shows; `--help-all` shows all.
        defaults: maps the given options (see `read_words`) to the defaults that differ from the classes' own: by
            field, and {objective: {field: value}} for fields of a single objective.

    Prints errors to standard error and exits with status 2.
    """
    try:
        use_options(["objective", "config"])
        given = read_words(argv)
        common = dict(defaults(given))
        help_wanted = {word: given.pop(word, False) for word in ("help", "help_all")}
        from_file = _read_yaml(given.pop("config")) if "config" in given else {}
        name = given.pop("objective", from_file.get("objective", default_objective))
        if not isinstance(name, str) or name not in OBJECTIVES:
            hint = nearest(str(name), OBJECTIVES)
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {name!r}.{hint}")
        own = common.get(name, {})
        base = {key: value for key, value in common.items() if key not in OBJECTIVES} | own
        groups = groups_of(settings, name)
        declared = {field.name for cls in groups.values() for field in dataclasses.fields(cls)} | {"objective"}
        use_options(declared - (from_file.keys() - given.keys()))  # a field of the file has no dashes there
        if any(help_wanted.values()):
            text = make_help(command, description, groups.values(), name, base | from_file, first=first)
            print(text.format_help(everything=help_wanted["help_all"]), end="")
            raise SystemExit(0)
        from_file = _without_foreign_fields(from_file, name)
        return settings(**_build(groups, name, base | from_file | given, typed=given))
    except ValueError as error:
        fail(str(error))


def groups_of(settings: type, objective: str) -> dict[str, type]:
    """The classes of the groups by name, including the objective's class."""
    return typing.get_type_hints(settings) | {"objective": OBJECTIVES[objective]}


def read_words(argv: Sequence[str]) -> dict[str, Any]:
    """Parse `--name value`, `--name=value`, `--name v1 v2` and `--flag` into {name: str, list of str or True}.

    Raises:
        ValueError: a value belongs to no option, or an option is given twice.
    """
    values: dict[str, Any] = {}
    name = None
    for word in argv:
        if word in ("-h", "--help", "--help-all", "--help_all"):
            values["help_all" if word.endswith("all") else "help"] = True
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


def given_names(argv: Sequence[str]) -> set[str]:
    """The options given by a command line and its `--config` file. The words must be valid for `parse`."""
    given = read_words(argv)
    from_file = _read_yaml(given["config"]) if "config" in given else {}
    return {*given, *from_file} - {"config"}


def _build(
    groups: Mapping[str, type], objective: str, values: Mapping[str, Any], typed: Collection[str]
) -> dict[str, Any]:
    """The groups by name, filled with the values. `typed` are the names from the command line, for messages."""
    types = {
        name: {f.name: hints[f.name] for f in dataclasses.fields(cls)}
        for name, cls in groups.items()
        for hints in [typing.get_type_hints(cls)]
    }
    known = {field: group for group, fields in types.items() for field in fields}
    assert len(known) == sum(map(len, types.values())), "two groups have a field of the same name"
    converted: dict[str, dict[str, Any]] = {name: {} for name in groups}
    for key, value in values.items():
        if key not in known:
            raise ValueError(_unknown(key, objective, [*known, "config", "objective"], on_command_line=key in typed))
        try:
            converted[known[key]][key] = convert(key, value, types[known[key]][key])
        except ValueError as error:
            raise ValueError(str(error).replace("got True", "got no value" if key in typed else "got true")) from error
    return {name: cls(**converted[name]) for name, cls in groups.items()}


def _unknown(key: str, objective: str, known: Sequence[str], *, on_command_line: bool) -> str:
    """The message for a name that no group has: an option of the command line, or a field of a YAML file."""
    said = f"unknown option `--{key}`" if on_command_line else f"unknown field `{key}` in the `--config` file"
    owners = [name for name, cls in OBJECTIVES.items() if key in cls.__dataclass_fields__]
    if owners:
        several = "s" if len(owners) > 1 else ""
        return f"{said} with `objective={objective}`. It belongs to the objective{several} {', '.join(owners)}."
    hint = nearest(key, known, prefix="--" if on_command_line else "", otherwise=" `--help-all` lists them.")
    return f"{said}.{hint}".replace("Did you mean `", "Did you mean the field `", 0 if on_command_line else 1)


def _without_foreign_fields(values: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """A file's values without its objective, without that objective's hyper-parameters if another one is chosen, and
    without options of earlier versions."""
    values = dict(values)
    theirs = values.pop("objective", objective)
    own = OBJECTIVES.get(theirs) if isinstance(theirs, str) else None
    foreign = own.__dataclass_fields__.keys() - OBJECTIVES[objective].__dataclass_fields__.keys() if own else set()
    left_out = sorted(foreign & values.keys())
    if left_out:
        listed = ", ".join(f"`{key}`" for key in left_out)
        print(f"note: {listed} of the file's objective {theirs}: not used by {objective}.", file=sys.stderr)
    retired = sorted({*RETIRED} & values.keys())
    if retired:
        listed = ", ".join(f"`{key}`" for key in retired)
        print(f"note: {listed} of the file: no longer an option, ignored.", file=sys.stderr)
    return {key: value for key, value in values.items() if key not in foreign and key not in RETIRED}


# ------------------------------------------------------------------------------------------------ the file


def _read_yaml(path: Any) -> dict[str, Any]:
    if not isinstance(path, str):
        raise ValueError("`--config` needs the path of one YAML file.")
    try:
        with Path(path).open(encoding="utf-8") as file:
            values = _PlainLoader(file).get_single_data()
    except OSError as error:
        raise ValueError(f"cannot read `--config {path}`: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date like 2026-99-99
        raise ValueError(f"`--config {path}` is not valid YAML: {error}") from error
    if _size(values, {}) > 100_000:
        raise ValueError(f"`--config {path}` has too many or circular aliases for a settings file.")
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"`--config {path}` must contain `field: value` lines, found a {type(values).__name__}.")
    return values


class _PlainLoader(yaml.SafeLoader):
    """Plain values only, and no duplicate keys: YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _size(value: Any, known: dict[int, float]) -> float:
    """The number of values with every alias expanded; infinite if one contains itself."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")
        items = value if isinstance(value, list) else [*value.keys(), *value.values()]
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]
