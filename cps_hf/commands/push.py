"""`cps-hf push`: push a branch to the Hub: weights, config, image processor, model card and, for own models, code.

    cps-hf push outputs/train_cps/best --repo_id USER/NAME --private
    cps-hf push outputs/train_cps/best --repo_id USER/NAME --revision v2 --tag v2.0
    cps-hf push outputs/train_cps/best --repo_id USER/NAME --space FOLDER   # also write a Space

Makes one commit. Needs a token with write access: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..hub.push import MESSAGE, push_branch
from .arguments import ArgumentParser
from .errors import user_errors
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    first = ("repo_id", "private", "revision", "tag", "license", "push_pictures", "space")
    usage = "BRANCH_DIR --repo_id USER/NAME [--option value ...]"
    parser = ArgumentParser("push", COMMANDS["push"], first=first, usage=usage)
    parser.add_argument("directory", metavar="BRANCH_DIR", help="an exported branch, like OUT/best")
    parser.add_argument("--repo_id", required=True, metavar="USER/NAME", help="created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="a private repository")
    parser.add_argument("--revision", help="a branch of the repository, created if missing (default: main)")
    parser.add_argument("--tag", help="a tag for the commit, like v1")
    parser.add_argument("--commit_message", default=MESSAGE, help="the commit's title")
    parser.add_argument("--license", help="for the card (default: the card's own, otherwise the base model's)")
    parser.add_argument(
        "--push_pictures",
        action="store_true",
        help="add pictures/predictions.png of the run to the card; it shows images of the run's data set",
    )
    parser.add_argument("--space", metavar="FOLDER", help="also write a local folder that is ready to be a Space")
    return parser


def main(argv: Sequence[str]) -> None:
    """Push the branch that the command line names, and print its address."""
    options = vars(make_parser().parse_args(argv))
    directory, repo_id, space = (options.pop(name) for name in ("directory", "repo_id", "space"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with user_errors(space or directory, (ValueError, RuntimeError, OSError)):
        if space is not None and Path(space).exists():
            raise ValueError(f"`--space {space}` already exists and would be overwritten. Choose a new folder.")
        address = push_branch(directory, repo_id, **options)
        print(address)
        if space is not None:
            from ..app.space import write_space_of  # late: it imports all prediction code

            print(write_space_of(directory, address, space, license=options["license"], private=options["private"]))
