"""Joint geometry of image and label, the views an objective asks for, and normalising on the device.

Everything random is drawn from a generator that the caller seeds with (seed, position in the stream), so a sample does
not depend on the worker that made it. Images stay uint8 until they are on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from ..config import AugmentationConfig
from ..functional import IGNORE_INDEX
from ..functional.cutmix import draw_cutmix_masks
from .windowed import WindowedImage, WindowedLabel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIEWS = ("weak", "strong", "strong_2", "second_crop", "cutmix_mask", "cutmix_mask_2", "pseudo_labels")


def random_crop(
    image: Tensor | WindowedImage,
    label: Tensor | WindowedLabel | None,
    augmentation: AugmentationConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Flip, scale and crop an image and its label alike.

    The crop's box is found in the source image and only that box is resized: the result is what resizing the whole
    image and cropping it gives, up to a rounding of the box to whole source pixels.

    Args:
        image: uint8 (3, H, W). label: uint8 (H, W) or `None`. Of windowed ones the box alone is read.

    Returns:
        image uint8 (3, h, w) with 0 on padding, label uint8 (h, w) with 255 on padding, and valid bool (h, w), false
        on padding; (h, w) is the crop size. The padding is centred.
    """
    crop_height, crop_width = augmentation.crop_size
    height, width = image.shape[-2:]
    draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    scale = _pick_scale(augmentation, draw[1])
    box_height, filled_height = _along_one_side(height, crop_height, scale)
    box_width, filled_width = _along_one_side(width, crop_width, scale)
    top = int(draw[2] * (height - box_height + 1))
    left = int(draw[3] * (width - box_width + 1))
    box, filled = (top, left, box_height, box_width), (filled_height, filled_width)
    if isinstance(image, WindowedImage):
        image, label = (None if part is None else part.window(*box) for part in (image, label))
        box = (0, 0, box_height, box_width)

    image = TF.resized_crop(
        tv_tensors.Image(image),
        *box,
        size=list(filled),
        interpolation=v2.InterpolationMode.BILINEAR,
        antialias=augmentation.resize_antialias,
    )
    if label is not None:
        label = TF.resized_crop(
            tv_tensors.Mask(label), *box, size=list(filled), interpolation=v2.InterpolationMode.NEAREST
        )
    valid = tv_tensors.Mask(torch.ones(filled, dtype=torch.bool))
    if draw[0] < augmentation.horizontal_flip:
        image = TF.horizontal_flip(image)
        label = None if label is None else TF.horizontal_flip(label)
    missing = crop_height - filled[0], crop_width - filled[1]
    if any(missing):
        # left, top, right, bottom; the odd pixel goes to the right and the bottom
        padding = [missing[1] // 2, missing[0] // 2, missing[1] - missing[1] // 2, missing[0] - missing[0] // 2]
        image = TF.pad(image, padding, fill=0)
        label = None if label is None else TF.pad(label, padding, fill=IGNORE_INDEX)
        valid = TF.pad(valid, padding, fill=0)
    plain = [None if t is None else t.as_subclass(Tensor).contiguous() for t in (image, label, valid)]
    return plain[0], plain[1], plain[2]


def _along_one_side(size: int, crop: int, scale: float) -> tuple[int, int]:
    """How many source pixels the crop shows, and how many of its own pixels they fill (the rest is padding)."""
    box = max(1, round(crop / scale))
    if box <= size:
        return box, crop
    return size, min(crop, max(1, round(size * scale)))


def _pick_scale(augmentation: AugmentationConfig, u: float) -> float:
    scales = augmentation.random_scale
    if augmentation.random_scale_mode == "range":
        return scales[0] + (scales[1] - scales[0]) * u
    return scales[int(u * len(scales))]


def strong_view(image: Tensor, augmentation: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Colour jitter, grey and blur on a uint8 (3, h, w) image; the geometry is left alone."""
    chain = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, 0.25)], p=augmentation.color_jitter),
            v2.RandomGrayscale(p=augmentation.grayscale),
            v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=augmentation.gaussian_blur),
        ]
    )
    with _torchvision_draws_from(generator):
        return chain(tv_tensors.Image(image)).as_subclass(Tensor)


@contextmanager
def _torchvision_draws_from(generator: torch.Generator) -> Iterator[None]:
    """torchvision's transforms draw from torch's global generator: lend it a seed, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def labeled_sample(
    image: Tensor | WindowedImage,
    label: Tensor | WindowedLabel,
    augmentation: AugmentationConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """ "pixel_values" uint8 (3, h, w), "labels" uint8 (h, w), "valid" bool (h, w)."""
    image, label, valid = random_crop(image, label, augmentation, generator)
    if augmentation.labeled_color_jitter:  # else nothing is drawn
        if torch.rand((), generator=generator).item() < augmentation.labeled_color_jitter:
            image = strong_view(image, augmentation, generator)
    return {"pixel_values": image, "labels": label, "valid": valid}


def unlabeled_views(
    image: Tensor | WindowedImage,
    views: Sequence[str],
    augmentation: AugmentationConfig,
    generator: torch.Generator,
    cutmix_masks: Mapping[str, Any] | None = None,
    label: Tensor | WindowedLabel | None = None,
) -> dict[str, Tensor]:
    """The views that an objective declares, by name, and "valid". All but "second_crop" share one crop.

    "weak", "strong", "strong_2": uint8 (3, h, w); "cutmix_mask", "cutmix_mask_2": bool (h, w), drawn with the keyword
    arguments `cutmix_masks`; "second_crop": uint8 (3, h, w), another crop of the image, with its own "second_valid";
    "pseudo_labels": uint8 (h, w), the crop of `label`, 255 on padding.
    """
    crop, label, valid = random_crop(image, label, augmentation, generator)
    sample = {"valid": valid}
    for view in views:
        if view == "weak":
            sample[view] = crop
        elif view in ("strong", "strong_2"):
            sample[view] = strong_view(crop, augmentation, generator)
        elif view == "pseudo_labels":
            sample[view] = label
        elif view in ("cutmix_mask", "cutmix_mask_2"):
            masks = draw_cutmix_masks(1, *augmentation.crop_size, generator=generator, **(cutmix_masks or {}))
            sample[view] = masks[0]
        elif view == "second_crop":
            sample[view], _, sample["second_valid"] = random_crop(image, None, augmentation, generator)
        else:
            raise ValueError(f"Unknown view {view!r}. Known are {', '.join(VIEWS)}.")
    return sample


def normalize(images: Tensor, mean: Tensor, std: Tensor, valid: Tensor | None = None) -> Tensor:
    """uint8 (B, 3, H, W) to float32: divided by 255, minus `mean`, over `std` (both (3,), on the images' device).

    Padding (`valid` (B, H, W) false) is 0 afterwards.
    """
    images = (images.float() - 255 * mean.view(1, 3, 1, 1)) / (255 * std.view(1, 3, 1, 1))
    return images if valid is None else images * valid.unsqueeze(1)
