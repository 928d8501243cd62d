"""What a user can mend is one line on standard error and status 2, with no traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Say what is wrong and end with status 2, as argparse does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def mendable(output: str | os.PathLike, kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Within it, errors that a user can mend end the command by `fail`.

    Args:
        output: what the command writes, see `one_line`.
        kinds: of errors.
    """
    try:
        yield
    except kinds as error:
        fail(one_line(error, output))


def one_line(error: Exception, output: str | os.PathLike) -> str:
    """What a command says, without a traceback, of what its user can mend: bad input, or a disk that fails.

    Args:
        output: what the command writes: the system names no path where a write fails, as on a full disk.
    """
    if not isinstance(error, OSError) or isinstance(error, ConnectionError) or error.strerror is None:
        return str(error)
    path = error.filename or output
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{path}: a folder is expected there, but a file is in the way. Choose another name."
    return f"{path}: {error.strerror}."


def nearest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """ " Did you mean `...`?", what begins like it first; or `otherwise` where nothing is like it."""
    begun = [word for word in known if len(name) > 2 and word.startswith(name)]
    close = begun or difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else otherwise
