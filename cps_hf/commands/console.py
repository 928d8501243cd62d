"""What a command prints to, which may know fewer letters than class names and paths have."""

from __future__ import annotations

import logging
import sys


def print_any_text() -> None:
    """From now on a letter that the console's or the log file's encoding lacks is printed as an escape, as Python does
    on standard error anyway: no table of scores is lost for the name of a class.

    To be called once, before a command does anything.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where there is no console, or a program catches what is printed
            stream.reconfigure(errors="backslashreplace")


def log_warnings_alone() -> None:
    """Of a command that loads branches: what this package warns of is printed as it is, without what Transformers
    says and draws while it loads each."""
    from transformers.utils import logging as transformers_logging  # slow, and this module is imported for `--help`

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
