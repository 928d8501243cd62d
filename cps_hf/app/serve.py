"""Serve the page: used by `cps-hf app` and by a Hugging Face Space."""

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
        branches: output folders of runs, branch folders or Hub ids; the first is shown first.
        examples: a folder of example images. If None, scenes are drawn.
        host: if None, this machine only. "0.0.0.0": all network interfaces.
        port: if None, the first free port from 7860.
        device: if None, a GPU if available.
        trust_remote_code: run model code that comes with a branch.

    Raises:
        ValueError: the port is invalid, a branch cannot be read, the branches have different classes, or there is no
            example.
        ImportError: Gradio is not installed: `pip install "cps_hf[app]"`.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"`--port` must be from 1 to 65535, got {port}")
    try:
        from .interface import launch  # late: Gradio is optional, and takes seconds to import
    except ImportError as error:
        raise ImportError(f'the page needs Gradio: pip install "cps_hf[app]" ({error})') from error
    sources = find_branches(branches)
    page = Page(sources, device=device, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="cps-hf-app-") as scratch:
        shown = write_examples(Path(scratch), page.classes) if examples is None else find_examples(examples)
        launch(page, other_branch(sources), shown, title, host, port)
