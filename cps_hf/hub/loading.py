"""How an exported branch is loaded: lines of Python that run as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path


def loading_lines(branch: str | os.PathLike) -> list[str]:
    """The lines that load a branch where cps_hf is not installed, to be printed and copied.

    Args:
        branch: the folder of an exported branch.

    Returns:
        An import, `processor = ...` and `model = ...`.
    """
    folder = Path(branch)
    name, code = repr(str(folder)), ""
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("auto_map"):
        code = ", trust_remote_code=True"  # the architecture's code lies beside the weights
    return [
        "from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation",
        f"processor = AutoImageProcessor.from_pretrained({name})",
        f"model = AutoModelForSemanticSegmentation.from_pretrained({name}{code})",
    ]
