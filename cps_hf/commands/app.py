"""`cps-hf app`: a page to try branches on: drop an image; see the overlay, the classes' shares, where two differ.

    cps-hf app outputs/train_cps                  # a run's folder: best, branch_0, branch_1, teacher
    cps-hf app outputs/a/best user/name           # two branches, folders or names on the Hub

It serves http://127.0.0.1:7860. Any model of AutoModelForSemanticSegmentation will do. Needs
`pip install "cps_hf[app]"`. A Space of the Hub runs the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..app.serve import serve
from .arguments import ArgumentParser
from .errors import mendable
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    first = ("examples", "title", "host", "port")
    parser = ArgumentParser("app", COMMANDS["app"], first=first, usage="BRANCH [BRANCH ...] [--option value ...]")
    parser.add_argument(
        "branches", metavar="BRANCH", nargs="+", help="a run's folder, or folders of branches, or names on the Hub"
    )
    parser.add_argument("--examples", metavar="FOLDER", help="images to pick from; default: drawn scenes")
    parser.add_argument("--title", default="Try a branch", help="what stands above")
    parser.add_argument("--host", help="default: this machine only; 0.0.0.0: everybody who can reach it")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with a branch")
    return parser


def main(argv: Sequence[str]) -> None:
    """Serve until it is stopped."""
    options = make_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with mendable("the page", (ValueError, OSError, ImportError)):
        serve(**vars(options))
