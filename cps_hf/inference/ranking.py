"""Ranks images for labeling: those where branches disagree most come first, without near-duplicates at the top."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

THUMBNAIL = 8  # pixels per side of the thumbnail with which images are compared
NEAR = 0.25  # of the median distance between two images: closer ones show much the same scene


def uncertainty(probabilities: Sequence[Tensor]) -> dict[str, Tensor]:
    """How uncertain networks are about each pixel.

    With several networks, a label would resolve the mutual information of prediction and network: the entropy of the
    mean minus the mean entropy, that is the networks' Jensen-Shannon divergence (Houlsby et al. 2011, arXiv
    1112.5745). It is 0 where they predict the same distribution, however flat. A single network only has its entropy.

    Args:
        probabilities: one tensor (C, H, W) per network.

    Returns:
        Maps (H, W): "entropy" of the mean and, with several networks, "disagreement"; both as fractions: the entropy
        of log(C), the disagreement of log(min(C, networks)).
    """
    classes, count = probabilities[0].shape[0], len(probabilities)
    entropy = _entropy(sum(probabilities) / count)
    found = {"entropy": entropy / np.log(max(2, classes))}
    if count > 1:
        mean_entropy = sum(_entropy(one) for one in probabilities) / count
        # rounding may give slightly negative values
        found["disagreement"] = (entropy - mean_entropy).clamp(min=0) / np.log(max(2, min(classes, count)))
    return found


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities.float()).sum(0)


def descriptor(image: Tensor) -> np.ndarray:
    """A thumbnail as a vector: similar for neighbouring frames of a video and for copies.

    Args:
        image: uint8 (3, H, W).
    """
    small = torch.nn.functional.adaptive_avg_pool2d(image.float()[None] / 255, THUMBNAIL)
    return small.flatten().numpy()


def spread(scores: Sequence[float], descriptors: np.ndarray, count: int | None = None) -> list[int]:
    """The order in which to label: each next image has the highest product of score and distance to those before it.

    The distance factor is 1 - exp(-d^2 / 2 s^2), where d is the distance to the nearest image that is already ranked
    and s is a quarter of the median distance between two images: 0 for a copy, close to 1 for another scene.

    Args:
        scores: one per image, at least 0.
        descriptors: (images, features).
        count: how many images to rank like this; the rest are ordered by their remaining scores. If `None`, all.

    Returns:
        All indices, best first; ties keep their order.
    """
    left = np.asarray(scores, dtype=np.float64).copy()
    if len(left) < 2:
        return [*range(len(left))]
    scale = NEAR * _median_distance(descriptors)
    order, rest = [], np.ones(len(left), dtype=bool)
    for _ in range(min(len(left), count if count is not None else len(left))):
        best = int(np.flatnonzero(rest)[np.argmax(left[rest])])
        order.append(best)
        rest[best] = False
        if scale > 0:
            squared = ((descriptors - descriptors[best]) ** 2).sum(1)
            factor = 1 - np.exp(-squared / (2 * scale**2))
            left = np.minimum(left, np.asarray(scores) * factor)
    behind = np.flatnonzero(rest)
    return [*order, *(int(i) for i in behind[np.argsort(-left[behind], kind="stable")])]


def _median_distance(descriptors: np.ndarray, at_most: int = 500) -> float:
    """The median distance of pairs of images, from at most so many evenly spaced ones."""
    some = descriptors[np.linspace(0, len(descriptors) - 1, min(len(descriptors), at_most)).astype(int)]
    squared = (some**2).sum(1)
    distances = np.sqrt(np.maximum(squared[:, None] + squared[None] - 2 * some @ some.T, 0))
    return float(np.median(distances[np.triu_indices(len(some), 1)]))
