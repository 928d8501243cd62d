"""How many classes a mean is over: a class without pixels has no score and is not part of the mean, which is
stated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def scored_classes(scores: Mapping[str, Any], metric: str = "mean_iou") -> int:
    """The number of classes in a mean: an IoU needs a pixel in the labels or the predictions, an accuracy in the
    labels.

    Args:
        scores: as returned by `MeanIoU.compute`, or as in results.json.
        metric: "mean_iou", "mean_accuracy" or "mean_boundary_iou".
    """
    return sum(not is_missing(value) for value in _by_class(scores, metric))


def over_classes(scores: Mapping[str, Any], metric: str = "mean_iou") -> str:
    """ " over 17 of 19 classes"; empty if the mean is over all classes, or there are no scores by class."""
    scored, named = scored_classes(scores, metric), len(_by_class(scores, metric))
    return "" if scored == named else f" over {scored} of {named} classes"


def is_missing(value: float | None) -> bool:
    """Whether this is the score of a class without pixels: NaN, or None in results.json."""
    return value is None or math.isnan(value)


def _by_class(scores: Mapping[str, Any], metric: str) -> Sequence[float | None]:
    return scores.get(f"per_category_{metric.removeprefix('mean_')}", [])
