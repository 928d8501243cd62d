"""Errors the user can fix: one line on standard error and status 2, without a traceback."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

_options: frozenset[str] = frozenset()
_flags: frozenset[str] = frozenset()


def use_options(names: Collection[str], *, flags: Collection[str] = ()) -> None:
    """Set the names, without dashes, of the running command's options. Messages show them as they are typed.

    Args:
        flags: those without a value.
    """
    global _options, _flags
    _options, _flags = frozenset(names), frozenset(flags)


def fail(message: str) -> NoReturn:
    """Print the message to standard error and exit with status 2, as argparse does."""
    message = " ".join(line.strip() for line in message.splitlines())  # those of libraries may have several
    print(f"error: {for_command_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def for_command_line(message: str) -> str:
    """A message of the library with the command's options as they are typed: `max_steps` as `--max_steps`,
    `optim="sgd"` as `--optim sgd`. Of an argument that it shows for Python and for a command line
    (`cps_hf.data.table.as_typed`), only the latter remains."""

    def typed(found: re.Match) -> str:
        name, value = found["name"], found["value"]
        if name not in _options:
            return found[0]
        if value is None or (name in _flags and value == "True"):
            return f"`--{name}`"
        value = value.strip("\"'")
        return f"`--{name} {value.lower() if value in ('True', 'False', 'None') else value}`"

    if "load_options" in _options:
        message = re.sub(r"`[^`]+` \(on a command line (`[^`]+`)\)", r"\1", message)
    return re.sub(r"(?<!field )`(?P<name>[a-z][a-z0-9_]*)(=(?P<value>[^`]+))?`", typed, message)


@contextmanager
def user_errors(
    output: str | os.PathLike, kinds: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """A context in which errors that the user can fix end the command through `fail`.

    Args:
        output: what the command writes, see `one_line`.
        kinds: the error types to catch.
    """
    try:
        yield
    except kinds as error:
        fail(one_line(error, output))


def one_line(error: Exception, output: str | os.PathLike) -> str:
    """A one-line message for an error that the user can fix: bad input or a failing disk.

    Args:
        output: what the command writes. The system names no path if a write fails, as on a full disk.
    """
    if not isinstance(error, OSError) or isinstance(error, ConnectionError) or error.strerror is None:
        return str(error)
    path = error.filename2 or error.filename or output  # filename2: the target of a rename
    if isinstance(error, IsADirectoryError):
        return f"{path}: expected a file, found a folder. Choose another name."
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{path}: expected a folder, found a file. Choose another name."
    return f"{path}: {error.strerror}."


def nearest(name: str, known: Iterable[str], *, prefix: str = "", otherwise: str = "") -> str:
    """ " Did you mean `...`?" with `prefix` and the closest name, preferring a common beginning; `otherwise` if
    none is close."""
    begun = [word for word in known if len(name) > 2 and word.startswith(name)]
    close = begun or difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{prefix}{close[0]}`?" if close else otherwise
