"""`cps-hf app`: a page for trying branches. Drop an image, see the overlay, class shares and where branches differ.

    cps-hf app outputs/train_cps                  # a run's output folder: best, branch_0, branch_1, teacher
    cps-hf app outputs/a/best user/name           # two branches: folders or Hub ids

Serves http://127.0.0.1:7860. Works with any AutoModelForSemanticSegmentation model. Requires
`pip install "cps_hf[app]"`. A Hugging Face Space runs the same page.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..app.serve import serve
from .arguments import ArgumentParser
from .errors import user_errors
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    first = ("examples", "title", "host", "port")
    parser = ArgumentParser("app", COMMANDS["app"], first=first, usage="BRANCH [BRANCH ...] [--option value ...]")
    parser.add_argument(
        "branches", metavar="BRANCH", nargs="+", help="a run's output folder, branch folders or Hub ids"
    )
    parser.add_argument("--examples", metavar="FOLDER", help="example images; default: drawn scenes")
    parser.add_argument("--title", default="Try a branch", help="title of the page")
    parser.add_argument("--host", help="default: this machine only; 0.0.0.0: all network interfaces")
    parser.add_argument("--port", type=int, help="default: the first free port from 7860")
    parser.add_argument("--device", help="default: a GPU if available")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with a branch")
    return parser


def main(argv: Sequence[str]) -> None:
    """Serve the page until interrupted."""
    options = make_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with user_errors("the page", (ValueError, OSError, ImportError)):
        serve(**vars(options))
