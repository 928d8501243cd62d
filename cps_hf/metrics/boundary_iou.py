"""Boundary IoU (Cheng, Girshick, Dollár, Berg, Kirillov; CVPR 2021): the IoU of pixels near contours."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.losses import IGNORE_INDEX


class BoundaryIoU:
    """Boundary IoU of every class over a data set, from three counts per class.

    A class's boundary region contains its pixels that are at most d steps, to any of the eight neighbours, from a
    pixel of another class or from outside the image. d is 2 % of the image's diagonal, at least 1 (section 4 of the
    paper and its released code). The score of a class is the intersection of the true and the predicted region over
    their union, each summed over images as for mean IoU. The mean is over classes that occur.

    Ignored pixels are removed from truth and prediction before regions are computed.

    Args:
        num_labels: C, the number of classes.
        ratio: d as a share of the diagonal.
    """

    def __init__(self, num_labels: int, *, ratio: float = 0.02):
        if num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {num_labels}.")
        if not 0 < ratio < 1:
            raise ValueError(f"`ratio` must be a share of the diagonal between 0 and 1, got {ratio}.")
        self.num_labels, self.ratio = num_labels, ratio
        self.counts = torch.zeros(3, num_labels, dtype=torch.int64)  # pixels in both regions, the true, the predicted

    def add_batch(self, *, predictions: Tensor, references: Tensor) -> None:
        """Add class maps (B, H, W) and their truths, integers; 255 in the truth is ignored.

        Raises:
            ValueError: the shapes differ, or a pixel that counts has no class.
        """
        if predictions.shape != references.shape or predictions.ndim != 3:
            raise ValueError(
                f"`predictions` and `references` must both be (B, H, W), got {tuple(predictions.shape)} and "
                f"{tuple(references.shape)}."
            )
        for guess, truth in zip(predictions.long(), references.to(predictions.device).long(), strict=True):
            guess = torch.where(truth == IGNORE_INDEX, truth, guess)
            for what, labels in (("references", truth), ("predictions", guess)):
                strange = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= self.num_labels))]
                if len(strange):
                    raise ValueError(
                        f"{what} contain {strange.unique().tolist()[:5]}: expected class ids in [0, "
                        f"{self.num_labels}), or 255 in references. Map the labels to class ids before scoring."
                    )
            distance = max(1, round(self.ratio * math.hypot(*truth.shape)))
            near_truth, near_guess = (
                near_contour(labels, distance) & (truth != IGNORE_INDEX) for labels in (truth, guess)
            )
            regions = (truth[near_truth & near_guess & (truth == guess)], truth[near_truth], guess[near_guess])
            counts = torch.stack([region.bincount(minlength=self.num_labels) for region in regions])
            self.counts += counts.to(self.counts.device)

    def compute(self) -> dict[str, Any]:
        """`mean_boundary_iou`, and `per_category_boundary_iou` as a list with NaN for classes that do not occur."""
        both, truth, guess = self.counts.double()
        iou = both / (truth + guess - both)
        return {"mean_boundary_iou": iou.nanmean().item(), "per_category_boundary_iou": iou.tolist()}


def near_contour(labels: Tensor, distance: int) -> Tensor:
    """Bool (H, W): whether the surrounding square of side `2 distance + 1` has another value, or leaves the image.

    All classes at once: a square has a single value if no two neighbours in it differ, and the number of those that do
    comes from running sums. (torch's max_pool2d over the square gives the same, 20 times slower for 1024 x 2048
    pixels.)
    """
    height, width = labels.shape
    near = torch.ones_like(labels, dtype=torch.bool)
    side = 2 * distance + 1
    if height < side or width < side:
        return near
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    differing = _sums(across, side, side - 1) + _sums(down, side - 1, side)
    near[distance : height - distance, distance : width - distance] = differing > 0
    return near


def _sums(values: Tensor, height: int, width: int) -> Tensor:
    """Sums over every window of `height` x `width`, (H - height + 1, W - width + 1)."""
    total = F.pad(values.int().cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))
    return total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
