"""Serving the page: what `cps-hf app` and a Space of the Hub run."""

from __future__ import annotations

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
