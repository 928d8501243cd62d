"""How to load an exported branch: lines of Python that run as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

_OF_QUERIES = ("ForUniversalSegmentation", "ForInstanceSegmentation")


def auto_class_name(architecture: str) -> str:
    """The transformers Auto class that loads a model of this class."""
    return f"AutoModelFor{'Universal' if architecture.endswith(_OF_QUERIES) else 'Semantic'}Segmentation"


def loading_lines(branch: str | os.PathLike) -> list[str]:
    """The lines that load a branch where cps_hf is not installed, for printing and copying.

    Args:
        branch: the folder of an exported branch.

    Returns:
        An import, `processor = ...` and `model = ...`.
    """
    folder = Path(branch)
    name, code, architectures = repr(str(folder)), "", None
    config = folder / "config.json"
    if config.is_file():
        fields = json.loads(config.read_text(encoding="utf-8"))
        architectures = fields.get("architectures")
        if fields.get("auto_map"):
            code = ", trust_remote_code=True"  # the architecture's code is next to the weights
    auto_class = auto_class_name((architectures or [""])[0])
    return [
        f"from transformers import AutoImageProcessor, {auto_class}",
        f"processor = AutoImageProcessor.from_pretrained({name})",
        f"model = {auto_class}.from_pretrained({name}{code})",
    ]


def prediction_lines(image: str = "photo.jpg") -> list[str]:
    """The lines that follow `loading_lines` and end in `mask`, a long tensor (H, W) of class ids."""
    return [
        "from PIL import Image",
        f"image = Image.open({image!r}).convert('RGB')",
        "outputs = model(**processor(image, return_tensors='pt'))",
        "[mask] = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])",
    ]
