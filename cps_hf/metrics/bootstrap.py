"""Is one network better than another, or is it chance? A paired bootstrap over the images that both were scored on.

Images are drawn with replacement, the same ones for both networks, and the scores are computed again from the
confusion matrices of the drawn images. Only the choice of evaluation images varies: an interval says nothing about
another seed or another labeled set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

MINIMUM_IMAGES = 10
"""With fewer images an interval is not reliable: it estimates the spread between images from these few alone."""

WORTH_KNOWING = 0.01
"""The smallest difference of scores that `images_needed` is computed for: one point."""

METRICS = ("mean_iou", "mean_accuracy", "overall_accuracy")
_DRAWN_AT_A_TIME = 2**22  # images over all samples: the size of a block of samples in memory


@dataclass(frozen=True)
class ImageCounts:
    """What the scores need from each image's confusion matrix: 3 C numbers instead of C x C.

    Args:
        correct: int64 (n, C), the pixels of each class that are predicted correctly.
        truth: int64 (n, C), the pixels of each class in the labels.
        predicted: int64 (n, C), the pixels that are predicted as each class. Ignored pixels are not counted.
    """

    correct: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, matrices: Any) -> ImageCounts:
        """From confusion matrices, int (n, C, C): rows are the truth, columns the prediction."""
        matrices = np.asarray(matrices)
        if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2]:
            raise ValueError(f"Confusion matrices by image must be (n, C, C), got {matrices.shape}.")
        return cls(matrices.diagonal(axis1=1, axis2=2).copy(), matrices.sum(2), matrices.sum(1))

    def __len__(self) -> int:
        return len(self.truth)

    def mean_iou(self) -> float:
        """Over all images together, as in `MeanIoU`; NaN if no pixel counts."""
        summed = (one.sum(0, keepdims=True) for one in (self.correct, self.truth, self.predicted))
        return float(_scores(*summed, "mean_iou")[0][0])

    def mean_iou_by_image(self) -> list[float]:
        """Of each image, over the classes that occur in it or are predicted; NaN if all its pixels are ignored."""
        return _scores(self.correct, self.truth, self.predicted, "mean_iou")[0].tolist()


@dataclass(frozen=True)
class Interval:
    """A difference of two scores, the second network's minus the first's. Fractions.

    Args:
        difference: on the images themselves; NaN if the class occurs for neither or for only one network.
        low, high: the ends of the interval; NaN if there is only one image.
        images: the number of images; for a class, those in which it occurs or is predicted.
        by_class: the intervals of each class's IoU (or accuracy); empty in those themselves.
    """

    difference: float
    low: float
    high: float
    images: int = 0
    by_class: tuple[Interval, ...] = ()

    @property
    def beyond_chance(self) -> int:
        """1: the second network is better; -1: it is worse; 0: it may be chance, or is unknown."""
        if self.images < MINIMUM_IMAGES:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def paired_bootstrap(
    first: ImageCounts | Any,
    second: ImageCounts | Any,
    *,
    metric: str = "mean_iou",
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """How much better the second network is, with an interval that contains the true difference 19 times out of 20.

    In each sample, a score is that of `MeanIoU` on the drawn images: a class that is neither in their labels nor
    predicted is not counted, and one that is predicted but absent has an IoU of 0.

    The interval is the percentile interval with expanded tails (Hesterberg, What Teachers Should Know About the
    Bootstrap, The American Statistician 69, 2015). Plain percentiles are too narrow for few images, by the factor
    sqrt((n - 1) / n) and by a normal quantile instead of Student's.

    Args:
        first, second: `ImageCounts`, or confusion matrices int (n, C, C) by image, of the same images in the same
            order.
        metric: "mean_iou", "mean_accuracy" or "overall_accuracy".
        samples: how many times the images are drawn.
        seed: the seed of the draws; equal seeds give equal intervals.
        confidence: how often the interval should contain the difference.

    Raises:
        ValueError: the two are not of the same images and classes, there is no image, or an option is invalid.
    """
    first, second = (one if isinstance(one, ImageCounts) else ImageCounts.of(one) for one in (first, second))
    _check(first, second, metric, samples, confidence)
    n = len(first)
    observed = [_scores(*_summed(np.ones((1, n)), one), metric) for one in (first, second)]
    drawn = [[_scores(*_summed(counts, one), metric) for one in (first, second)] for counts in _draw(n, samples, seed)]
    (mean_1, classes_1), (mean_2, classes_2) = observed
    means = np.concatenate([b[0] - a[0] for a, b in drawn])
    classes = np.concatenate([b[1] - a[1] for a, b in drawn])
    tail = _tail(n, confidence)
    present = (first.truth + first.predicted + second.predicted > 0).sum(0)
    by_class = tuple(
        _interval(float(difference), classes[:, c], tail, int(present[c]))
        for c, difference in enumerate((classes_2 - classes_1)[0])
    )
    found = _interval(float((mean_2 - mean_1)[0]), means, tail, n)
    return Interval(found.difference, found.low, found.high, n, by_class)


def images_needed(interval: Interval) -> int:
    """How many images are needed to detect the observed difference, or one point if it is smaller.

    The width of an interval is proportional to 1 / sqrt(images), so the result is images x (half width /
    difference)^2, and at least `MINIMUM_IMAGES`, below which nothing is concluded. From few images it is an order of
    magnitude.
    """
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half) or not math.isfinite(interval.difference):
        return MINIMUM_IMAGES
    wanted = max(abs(interval.difference), WORTH_KNOWING)
    return max(MINIMUM_IMAGES, math.ceil(interval.images * (half / wanted) ** 2 - 1e-9))


def _check(first: ImageCounts, second: ImageCounts, metric: str, samples: int, confidence: float) -> None:
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, got {metric!r}.")
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"`samples` must be at least 1 and `confidence` between 0 and 1, got {samples} and {confidence}."
        )
    if first.truth.shape != second.truth.shape:
        raise ValueError(
            "The two networks must be scored on the same images and classes, got (images, classes) "
            f"{first.truth.shape} and {second.truth.shape}."
        )
    if len(first) == 0:
        raise ValueError("There is no image to compare two networks on.")
    differ = np.flatnonzero((first.truth != second.truth).any(1))
    if len(differ):
        raise ValueError(
            f"Image {differ[0]} has different labels for the first and the second network: both must be scored on the "
            "same images in the same order."
        )


def _draw(n: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of float (samples of the block, n): how often each image is drawn."""
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWN_AT_A_TIME // n)
    for start in range(0, samples, block):
        size = min(block, samples - start)
        images = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(images.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _summed(counts: np.ndarray, images: ImageCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The drawn images' correct, true and predicted pixels, float (samples, C); exact below 2^53 pixels."""
    return counts @ images.correct, counts @ images.truth, counts @ images.predicted


def _scores(
    correct: np.ndarray, truth: np.ndarray, predicted: np.ndarray, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """(the metric (samples,), IoU or accuracy by class (samples, C)), NaN as in `IoUCounter.compute`."""
    with np.errstate(invalid="ignore"):  # 0 / 0: a class that does not occur
        by_class = correct / (truth + predicted - correct if metric == "mean_iou" else truth)
        if metric == "overall_accuracy":
            return correct.sum(1) / truth.sum(1), by_class
        occurs = ~np.isnan(by_class)
        return np.where(occurs, by_class, 0).sum(1) / occurs.sum(1), by_class


def _interval(difference: float, drawn: np.ndarray, tail: float, images: int) -> Interval:
    drawn = drawn[~np.isnan(drawn)]
    if images < 2 or not len(drawn) or math.isnan(difference):
        return Interval(difference, math.nan, math.nan, images)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(difference, float(low), float(high), images)


def _tail(n: int, confidence: float) -> float:
    """The share of the samples on each side of the interval."""
    if n < 2:
        return (1 - confidence) / 2
    return NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student(n - 1, 0.5 + confidence / 2))


def _student(degrees: int, probability: float) -> float:
    """A quantile of Student's distribution, by its expansion around the normal one (Abramowitz and Stegun, 26.7.5):
    accurate to 0.1 % from 9 degrees of freedom on, where intervals become reliable."""
    z, d = NormalDist().inv_cdf(probability), degrees
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )
