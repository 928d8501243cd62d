"""Tensor math that only needs torch: losses, CutMix, and logits that are resized piecewise."""

from .cutmix import draw_cutmix_masks, mix, swap_neighbours
from .losses import (
    IGNORE_INDEX,
    balanced_class_weights,
    class_counts,
    dice_loss,
    focal_loss,
    frequency_weights,
    ohem_cross_entropy,
    pixel_cross_entropy,
    probabilities,
    pseudo_label,
    soft_cross_entropy,
    soft_target,
    squared_difference,
)
from .resize import resize_rows, source_rows
from .strided import (
    Logits,
    StridedLogits,
    add_over_pixels,
    full_size,
    map_over_pixels,
    mirrored,
    split_images,
    sum_over_pixels,
)

__all__ = [
    "IGNORE_INDEX",
    "Logits",
    "StridedLogits",
    "add_over_pixels",
    "balanced_class_weights",
    "class_counts",
    "dice_loss",
    "draw_cutmix_masks",
    "focal_loss",
    "frequency_weights",
    "full_size",
    "map_over_pixels",
    "mirrored",
    "mix",
    "ohem_cross_entropy",
    "pixel_cross_entropy",
    "probabilities",
    "pseudo_label",
    "resize_rows",
    "soft_cross_entropy",
    "soft_target",
    "source_rows",
    "split_images",
    "squared_difference",
    "sum_over_pixels",
    "swap_neighbours",
]
