"""Convert a value from a command line or a YAML file to its field's declared type."""

from __future__ import annotations

import contextlib
import json
import re
import types
import typing
from typing import Any


def convert(name: str, value: Any, expected: Any) -> Any:
    """The value as its field's type.

    Args:
        name: the field's name, for errors.
        value: text, a list of texts or True from the command line, or a value parsed from YAML.
        expected: bool, int, float, str, a list or dict of them, or a union of these and None.

    Raises:
        ValueError: the value is not of that type.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):  # X | None, or bool | str | None
        if value is None or value in ("none", "None", "null"):
            return None
        *first, last = [a for a in arguments if a is not types.NoneType]
        for candidate in first:
            with contextlib.suppress(ValueError):
                return convert(name, value, candidate)
        return convert(name, value, last)
    if origin is list:
        joined = re.fullmatch(r"(\d+) *[x×*,] *(\d+)", value) if isinstance(value, str) else None
        if arguments == (int,) and joined:
            height, width = joined.groups()
            raise ValueError(
                f"`{name}` must be height and width as two integers, got {value!r}. Write "
                f"`--{name} {height} {width}`, or `{name}: [{height}, {width}]` in a YAML file."
            )
        items = value if isinstance(value, list | tuple) else [] if value in ("", "none") else [value]
        return [convert(name, item, arguments[0]) for item in items]
    kind = origin or expected
    converted = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, dict: _to_dict}[kind](value)
    if converted is None:
        wanted = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}[kind]
        got = "" if name.endswith("_token") else f", got {value!r}"
        several = kind is str and isinstance(value, list)
        hint = " Quote values with spaces; DIR comes before all options." if several else ""
        raise ValueError(f"`{name}` must be {wanted}{got}.{hint}")
    return converted


def _to_bool(value: Any) -> bool | None:
    return {"true": True, "false": False}.get(str(value).lower()) if not isinstance(value, list) else None


def _to_int(value: Any) -> int | None:
    text = str(value).replace("_", "")
    return int(text) if not isinstance(value, bool) and re.fullmatch(r"[+-]?\d+", text) else None


def _to_float(value: Any) -> float | None:
    try:  # YAML reads 1e-3 as text
        return None if isinstance(value, bool | list) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _to_str(value: Any) -> str | None:
    # `--run_name` without a value arrives as True; a YAML 92 or 1.0 is valid where text is expected
    return None if isinstance(value, bool | list | dict) or value is None else str(value)


def _to_dict(value: Any) -> dict | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None
