"""`cps-hf report`: a finished run as one HTML page, made of what the run left in its folder.

    cps-hf report outputs/train_cps

A run writes its report at its end; this writes it anew, say after `cps-hf compare` or in a newer version. The page is
one file that needs no network: open OUT/report.html in a browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.page import write_report
from .arguments import ArgumentParser
from .errors import mendable
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser("report", COMMANDS["report"], first=(), usage="RUN")
    parser.add_argument("run", metavar="RUN", help="the output folder of a run that has ended")
    return parser


def main(argv: Sequence[str]) -> Path:
    """Write the page; its path."""
    options = make_parser().parse_args(argv)
    with mendable(options.run, (OSError, ValueError)):
        path = write_report(options.run)
    print(f"Written: {path}")
    return path
