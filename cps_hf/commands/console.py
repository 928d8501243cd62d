"""Console output: encodings that lack some characters, and quiet third-party logging."""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap

WIDEST = 118
"""Longer lines are hard to read. Also the width of text that goes into a file."""


def print_any_text() -> None:
    """Print characters that the console's or log file's encoding lacks as escapes, as Python does on standard error.
    Otherwise one class name could lose a whole table of scores.

    Call this once, before a command does anything.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # missing without a console, or if the output is captured
            stream.reconfigure(errors="backslashreplace")


def terminal_width() -> int:
    """The columns to wrap text to: the terminal's, at most `WIDEST`; `WIDEST` without a terminal."""
    known = shutil.get_terminal_size((WIDEST if not sys.stdout.isatty() else 80, 24)).columns
    return max(40, min(known, WIDEST))


def wrapped(text: str) -> str:
    """A paragraph, wrapped to the terminal."""
    return textwrap.fill(text, terminal_width(), break_long_words=False, break_on_hyphens=False)


def log_warnings_alone() -> None:
    """For commands that load branches: print this package's warnings as plain text, and silence the messages and
    progress bars of Transformers."""
    from transformers.utils import logging as transformers_logging  # slow, and this module is imported for `--help`

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
