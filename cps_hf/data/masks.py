"""Write predictions: palette masks (as in Pascal VOC), Cityscapes' labelIds, probabilities.

Files are written under a temporary name and renamed, so that every file is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..files import written_whole
from ..functional import IGNORE_INDEX
from .cityscapes import LABELS

_LABEL_IDS = np.zeros(256, np.uint8)  # by class id; 255 and other values become 0, "unlabeled"
for _label in LABELS:
    if _label.train_id != IGNORE_INDEX:
        _LABEL_IDS[_label.train_id] = _label.id


def write_mask(path: Path, class_ids: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> None:
    """A palette PNG of class ids (H, W), displayed in the palette's colours; 255, if it occurs, is white."""
    image = Image.fromarray(np.ascontiguousarray(class_ids, np.uint8)).convert("L")
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = 255
    image.putpalette(table.tobytes())  # turns "L" into "P" without changing the pixels
    _write(path, lambda file: image.save(file, format="PNG"))


def write_label_ids(path: Path, class_ids: np.ndarray) -> None:
    """Cityscapes' 19 class ids (H, W) as the official label ids (road 7, ..., bicycle 33) in a grey PNG."""
    _write(path, lambda file: Image.fromarray(_LABEL_IDS[class_ids]).save(file, format="PNG"))


def write_probabilities(path: Path, probabilities: np.ndarray) -> None:
    """Probabilities (C, H, W) as float16 in a .npy file, which `numpy.load(path, mmap_mode="r")` reads in parts."""
    _write(path, lambda file: np.save(file, probabilities.astype(np.float16, copy=False)))


def output_path(folder: Path, name: str, suffix: str) -> Path:
    """`<folder>/<name><suffix>`; the name may include folders.

    Raises:
        ValueError: the path is outside the folder, or the name is not a valid file name.
    """
    if not name.rpartition("/")[2].strip(". "):
        raise ValueError(f"The image id {name!r} is not a valid file name. Rename the id.")
    path = folder / f"{name}{suffix}"
    if not os.path.normpath(path).startswith(os.path.normpath(folder) + os.sep):
        raise ValueError(f"The image id {name!r} leads outside {folder}, so no file is written for it. Rename the id.")
    return path


def _write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        save(file)
