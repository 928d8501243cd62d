"""Serving the page: what `cps-hf app`, examples/app.py and a Space of the Hub run."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .page import Page, find_branches, find_examples, other_branch, write_examples


def serve(
    branches: Sequence[str],
    *,
    examples: str | None = None,
    title: str = "Try a branch",
    host: str | None = None,
    port: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve the page until the process is stopped.

    Args:
        branches: runs' folders, branches' folders, names on the Hub; the first is shown first.
        examples: a folder of images to pick from; None: scenes are drawn.
        host: None: this machine only. "0.0.0.0": everybody who can reach it.
        port: None: the first free one from 7860.
        device: None: a GPU where there is one.
        trust_remote_code: run model code that comes with a branch.

    Raises:
        ValueError: the port is none, a branch cannot be read, the branches differ in their classes, or there is no
            example.
        ImportError: Gradio is not installed: `pip install "cps_hf[app]"`.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"`--port` must be from 1 to 65535, got {port}")
    try:
        from .interface import launch  # late: Gradio is an extra, and takes seconds
    except ImportError as error:
        raise ImportError(f'the page needs Gradio: pip install "cps_hf[app]" ({error})') from error
    sources = find_branches(branches)
    page = Page(sources, device=device, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="cps-hf-app-") as scratch:
        shown = write_examples(Path(scratch), page.classes) if examples is None else find_examples(examples)
        launch(page, other_branch(sources), shown, title, host, port)


def main(argv: Sequence[str] | None = None) -> None:
    """`serve` with its arguments from the command line; a mistake there is one line."""
    parser = argparse.ArgumentParser(description="A page to try branches on.")
    parser.add_argument("branches", nargs="+", help="a run's folder, or folders of branches, or names on the Hub")
    parser.add_argument("--examples", metavar="FOLDER", help="images to pick from; default: drawn scenes")
    parser.add_argument("--title", default="Try a branch")
    parser.add_argument("--host", help="default: this machine only; 0.0.0.0: everybody who can reach it")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with a branch")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        serve(**vars(options))
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
