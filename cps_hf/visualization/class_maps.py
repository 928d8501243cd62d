"""Class maps as pictures: in colours, over an image, compared with each other or with the truth.

Pictures are uint8, (H, W, 3) as arrays or (3, H, W) as tensors. Class maps are integers (H, W), as arrays or tensors
on any device, with 255 where no class is known. The results are arrays (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..functional.losses import IGNORE_INDEX
from .colors import BLACK, WHITE, Color

Palette = Sequence[Color]

# The colours of `agreement_map`, with their meaning; without labels only the first and the last occur. None is a class
# colour, and all are distinguishable by colour-blind people.
AGREEMENT = {
    "agree": (225, 225, 225),
    "agree, both wrong": (140, 140, 140),
    "only the first is right": (51, 102, 204),
    "only the second is right": (238, 170, 34),
    "disagree": (150, 20, 40),
}
# The colours of `error_map`; ignored pixels are white.
ERRORS = {"right": AGREEMENT["agree"], "wrong": AGREEMENT["disagree"]}


def denormalize(pixel_values: Tensor | np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (3, H, W) -> uint8 (H, W, 3). `mean` and `std` are for values in [0, 1], as in image processors."""
    values = np.moveaxis(as_array(pixel_values).astype(np.float64), 0, -1) * np.asarray(std) + np.asarray(mean)
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def colorize(labels: Any, palette: Palette, ignore_color: Color = WHITE) -> np.ndarray:
    """A class map (H, W) in the palette's colours, `ignore_color` where it is 255: uint8 (H, W, 3).

    Raises:
        ValueError: a class has no colour.
    """
    labels = as_class_map(labels)
    strange = [value for value in classes_in(labels) if not 0 <= value < len(palette)]
    if strange:
        raise ValueError(f"The map contains {strange[:5]}, but the palette has {len(palette)} colours (255: ignored).")
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = ignore_color
    return table[labels]


def overlay(image: Any, labels: Any, palette: Palette, alpha: float = 0.5) -> np.ndarray:
    """The picture, uint8 (H, W, 3), with the class map over it, except where it is 255 or its colour is black.

    Args:
        alpha: the opacity of the class's colour, from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be from 0 to 1, got {alpha}.")
    image, labels = as_picture(image), as_class_map(labels)
    _check_sizes(image, labels)
    # torchvision's draw_segmentation_masks needs a boolean map per class, and rounds down: half of the tinted pixels
    # are darker by one.
    colors = colorize(labels, palette, ignore_color=BLACK)  # black, a background's, would only darken the picture
    mixed = np.rint((1 - alpha) * image + alpha * colors).astype(np.uint8)
    return np.where((colors == BLACK).all(-1, keepdims=True), image, mixed)


def agreement_map(pred_a: Any, pred_b: Any, labels: Any = None) -> np.ndarray:
    """Where two branches predict the same class and, with labels, which is right: uint8 (H, W, 3) in `AGREEMENT`
    colours.

    Args:
        pred_a, pred_b: class maps (H, W).
        labels: the truth; where it is 255, only agreement is shown.
    """
    pred_a, pred_b = as_class_map(pred_a), as_class_map(pred_b)
    _check_sizes(pred_a, pred_b)
    agree = pred_a == pred_b
    case = np.where(agree, 0, 4)
    if labels is not None:
        labels = as_class_map(labels)
        _check_sizes(pred_a, labels)
        known = labels != IGNORE_INDEX
        case[known & agree & (pred_a != labels)] = 1
        case[known & ~agree & (pred_a == labels)] = 2
        case[known & ~agree & (pred_b == labels)] = 3
    return np.array(list(AGREEMENT.values()), np.uint8)[case]


def agreement_legend(first: str, second: str) -> dict[str, Color]:
    """`AGREEMENT` for a map with labels, with the two networks' names in its texts."""
    words = {"the first": first, "the second": second}
    legend = {}
    for text, color in AGREEMENT.items():
        for there, name in words.items():
            text = text.replace(there, name)
        legend["disagree, both wrong" if text == "disagree" else text] = color
    return legend


def error_map(prediction: Any, labels: Any) -> np.ndarray:
    """Where a prediction is right and where it is wrong, uint8 (H, W, 3) in `ERRORS` colours; white where ignored."""
    prediction, labels = as_class_map(prediction), as_class_map(labels)
    _check_sizes(prediction, labels)
    case = np.where(labels == IGNORE_INDEX, 2, prediction != labels)
    return np.array([*ERRORS.values(), WHITE], np.uint8)[case]


def enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """A small picture enlarged by the largest whole factor that fits into `side` x `side`; a large one unchanged."""
    factor = max(1, side // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def as_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_picture(image: Any) -> np.ndarray:
    """uint8 (H, W, 3). (3, H, W) is transposed; if both are possible, a tensor has channels first, an array last."""
    picture = as_array(image)
    if picture.dtype == np.uint8 and picture.ndim == 3:
        if picture.shape[0] == 3 and (picture.shape[-1] != 3 or isinstance(image, Tensor)):
            return np.ascontiguousarray(np.moveaxis(picture, 0, -1))
        if picture.shape[-1] == 3:
            return picture
    raise ValueError(
        f"A picture must be uint8, (H, W, 3) or (3, H, W), got {picture.dtype} {picture.shape}; see `denormalize`."
    )


def as_class_map(labels: Any) -> np.ndarray:
    labels = as_array(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"A class map must be integers (H, W), got {labels.dtype} {labels.shape}.")
    return labels.astype(np.int64)


def classes_in(labels: np.ndarray) -> list[int]:
    return [value for value in np.unique(labels).tolist() if value != IGNORE_INDEX]


def _check_sizes(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(f"Both must have the same size, got {a.shape[:2]} and {b.shape[:2]} (height, width).")
