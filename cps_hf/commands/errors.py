"""Errors the user can fix: one line on standard error and status 2, without a traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Print the message to standard error and exit with status 2, as argparse does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


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
