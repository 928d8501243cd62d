"""`cps-hf report`: a finished run as one HTML page, from the files in its output folder.

    cps-hf report outputs/train_cps

A run writes its report at the end. This command rewrites it, for example after `cps-hf compare` or with a newer
version. The page is one file and works offline: open OUT/report.html in a browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.page import write_report
from .arguments import ArgumentParser
from .errors import user_errors
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser("report", COMMANDS["report"], first=(), usage="RUN")
    parser.add_argument("run", metavar="RUN", help="the output folder of a finished run")
    return parser


def main(argv: Sequence[str]) -> Path:
    """Write the page. Returns its path."""
    options = make_parser().parse_args(argv)
    with user_errors(options.run, (OSError, ValueError)):
        path = write_report(options.run)
    print(f"Written: {path}")
    return path
