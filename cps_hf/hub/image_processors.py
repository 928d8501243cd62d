"""Compares what an image processor does to an image with what training does.

This is measured with known images instead of reading the processor's fields: which fields a processor uses, and in
which order it rescales, shifts and normalises, differs between classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

SQUARE_MODELS = ("dpt", "data2vec-vision")
"""These only accept one input size, so their images must be resized; images that are not square are errors."""
WINDOW_MODELS = ("eomt", "eomt_dinov3")
"""These also only accept one input size; their own processor resizes the shorter side to it and cuts windows."""

HEIGHT, WIDTH = 60, 132  # of the test images: sides that nobody resizes images to
LARGEST = 20.0  # a larger number is not a normalised pixel


@dataclass(frozen=True)
class Reading:
    """How a processor reads images.

    Args:
        mean, std: of the three colours, for images in [0, 1]: whatever its rescaling, its output is
            (image - mean) / std.
        swaps_colors: whether its output is blue, green, red.
        whole: whether the edges of the image are the edges of its output; false if it crops, pads or mirrors.
        size: height and width of its output for an image of 60 x 132.
    """

    mean: list[float]
    std: list[float]
    swaps_colors: bool
    whole: bool
    size: tuple[int, int]

    @property
    def range(self) -> tuple[float, float]:
        """The values of black and of white, over the colours."""
        pairs = [*zip(self.mean, self.std, strict=True)]
        return min((0 - m) / s for m, s in pairs), max((1 - m) / s for m, s in pairs)


def read_processor(processor: Any) -> Reading:
    """Find out how an image processor reads images.

    Args:
        processor: an image processor of transformers, or a processor that contains one.

    Raises:
        ValueError: it cannot be called with images, or its output is not three colours that grow linearly with those
            of the image.
    """
    processor = getattr(processor, "image_processor", processor)
    name = type(processor).__name__
    colors = np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0]], np.uint8)
    images = [np.broadcast_to(color, (HEIGHT, WIDTH, 3)).copy() for color in colors]
    try:
        whole = {"do_split_image": False} if getattr(processor, "do_split_image", False) else {}  # EoMT's windows
        made = processor(images=[*images, _ramp()], return_tensors="pt", **whole)["pixel_values"].float()
    except Exception as error:  # a processor may be anyone's
        raise ValueError(f"The {name} cannot process images: {type(error).__name__}: {error}") from error
    if made.ndim != 4 or made.shape[1] != 3:
        raise ValueError(f"The {name} turns five images into {tuple(made.shape)}, not into five of three colours.")
    height, width = made.shape[-2:]
    black, white, grey, red = made[:4, :, height // 2, width // 2].double()
    steps = white - black
    mixed = torch.stack([white[0], black[1], black[2]]), torch.stack([black[0], black[1], white[2]])
    kept, swapped = (torch.allclose(red, expected, atol=1e-3) for expected in mixed)
    even = torch.allclose(grey, black + steps * 128 / 255, rtol=0, atol=1e-2 * float(steps.abs().max()))
    if steps.abs().min() < 1e-6 or not even or not (kept or swapped):
        raise ValueError(
            f"The {name} mixes colours or is not linear: black, white, grey and red become {black.tolist()}, "
            f"{white.tolist()}, {grey.tolist()} and {red.tolist()}."
        )
    std = 1 / steps
    mean = -black * std
    ramp = (made[4].double() * std[:, None, None] + mean[:, None, None]).flip(0 if swapped and not kept else [])
    return Reading(
        mean=_as_written(mean, getattr(processor, "image_mean", None)),
        std=_as_written(std, getattr(processor, "image_std", None)),
        swaps_colors=not kept,
        whole=_has_its_edges(ramp),
        size=(height, width),
    )


def _ramp() -> np.ndarray:
    """Red grows from left to right, green from top to bottom."""
    image = np.zeros((HEIGHT, WIDTH, 3))
    image[..., 0], image[..., 1] = np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT)[:, None]
    return image.round().astype(np.uint8)


def _has_its_edges(ramp: torch.Tensor) -> bool:
    height, width = ramp.shape[-2:]
    red, green = ramp[0, height // 2, [0, -1]], ramp[1, [0, -1], width // 2]
    return torch.allclose(torch.cat([red, green]), torch.tensor([0.0, 1, 0, 1]).double(), atol=0.05)


def _as_written(measured: torch.Tensor, written: Sequence[float] | None) -> list[float]:
    """The measured numbers, or the processor's own field if it equals them up to rounding."""
    found = [float(f"{value:.6g}") if abs(value) > 1e-6 else 0.0 for value in measured.tolist()]
    fits = written is not None and len(written) == 3 and np.allclose(found, np.asarray(written, float), atol=1e-5)
    return [float(value) for value in written] if fits else found


def check_processor(
    processor: Any, model_type: str, image_mean: Sequence[float], image_std: Sequence[float], *, reduces: bool = False
) -> None:
    """Check that a processor to be exported reads images as training does. Resizing is only a warning.

    Args:
        model_type: the architecture's type, which may need one size.
        image_mean, image_std: training's, for images in [0, 1].
        reduces: whether training reads masks with 0 as ignored and k as class k - 1.

    Raises:
        ValueError: it normalises differently, omits a part of the image, or would read masks differently.
    """
    reading = read_processor(processor)
    processor = getattr(processor, "image_processor", processor)
    if reading.swaps_colors:
        raise ValueError(
            "`processing_class` swaps red and blue, but training reads images without swapping. Set "
            "`processing_class.do_flip_channel_order = False`."
        )
    if not _same_numbers(reading, image_mean, image_std):
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        found = ", ".join(f"{name} {getattr(processor, name)}" for name in names if hasattr(processor, name))
        raise ValueError(
            f"`processing_class` normalises images differently from training: it uses mean {reading.mean} and "
            f"std {reading.std} for images in [0, 1] ({found}), training {[*image_mean]} and {[*image_std]}. Fix the "
            f"processor, or train with its numbers: `image_mean={reading.mean}, image_std={reading.std}`."
        )
    if not reading.whole:
        raise ValueError(
            "`processing_class` crops, pads or mirrors images, so a predicted mask would not match its "
            "image. Disable that, e.g. with `processing_class.do_center_crop = False` or `.do_pad = False`."
        )
    if bool(getattr(processor, "do_reduce_labels", reduces)) != reduces:
        zero = "ignored" if reduces else "class 0"
        raise ValueError(
            f"`processing_class` would read masks differently from training, where 0 is {zero}. Set "
            f"`processing_class.do_reduce_labels = {reduces}`."
        )
    if reading.size != (HEIGHT, WIDTH) and model_type not in (*SQUARE_MODELS, *WINDOW_MODELS):
        height, width = reading.size
        squashes = abs(height / HEIGHT - width / WIDTH) > 0.05 * height / HEIGHT
        what = f"squashes every image to {height} x {width}, whatever its aspect ratio"
        logger.warning(
            "`processing_class` %s; training did not. Set `processing_class.do_resize = False`.",
            what if squashes else f"resizes images ({HEIGHT} x {WIDTH} pixels become {height} x {width})",
        )


def check_range(reading: Reading) -> None:
    """Check a processor's numbers before they are used for training.

    Raises:
        ValueError: they are not plausible as network input, e.g. if values up to 255 are normalised as if in [0, 1].
    """
    low, high = reading.range
    if low < -LARGEST or high > LARGEST:
        raise ValueError(
            f"`processing_class` turns black and white into {low:.4g} and {high:.4g}, as if `do_rescale` is off "
            "while the mean is for images in [0, 1]. Set `processing_class.do_rescale = True`. If a network was "
            f"really trained like that, set `image_mean={reading.mean}, image_std={reading.std}`."
        )


def _same_numbers(reading: Reading, image_mean: Sequence[float], image_std: Sequence[float]) -> bool:
    """Whether black and white become the same values."""
    theirs, ours = (
        np.subtract.outer([0, 1], np.asarray(mean)) / np.asarray(std)
        for mean, std in ((reading.mean, reading.std), (image_mean, image_std))
    )
    return np.allclose(theirs, ours, rtol=1e-3, atol=2e-3)
