"""Boundary IoU against its definition, pixel by pixel, and against the erosion of its released code."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from cps_hf.metrics.boundary_iou import BoundaryIoU, near_contour


def blobs(height, width, seed, classes=4):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (height // 9 + 1, width // 9 + 1), dtype=np.uint8)
    labels = coarse.repeat(9, 0).repeat(9, 1)[:height, :width].copy()
    labels[tuple(rng.integers(0, [[height], [width]], (2, 5)))] = rng.integers(0, classes, 5)
    return labels


def region(labels, value, distance):
    """The pixels of `value` within `distance` of another value or of the outside."""
    height, width = labels.shape
    found = set()
    for y in range(height):
        for x in range(width):
            if labels[y, x] != value:
                continue
            square = [(y + a, x + b) for a in range(-distance, distance + 1) for b in range(-distance, distance + 1)]
            if any(not (0 <= i < height and 0 <= j < width) or labels[i, j] != value for i, j in square):
                found.add((y, x))
    return found


def test_scores_follow_the_definition_over_image_sizes():
    metric, both, either = BoundaryIoU(5), np.zeros(5), np.zeros(5)
    for seed, (height, width) in enumerate([(37, 61), (64, 30), (5, 3), (90, 91)]):
        truth, guess = blobs(height, width, seed), blobs(height, width, seed)
        guess[height // 3 :, width // 2 :] = np.roll(guess, 4, 1)[height // 3 :, width // 2 :]
        truth[:: max(2, height // 4)] = 255
        metric.add_batch(predictions=torch.from_numpy(guess)[None], references=torch.from_numpy(truth)[None])
        guess[truth == 255] = 255
        distance = max(1, round(0.02 * math.sqrt(height**2 + width**2)))
        for value in range(5):
            a, b = region(truth, value, distance), region(guess, value, distance)
            both[value] += len(a & b)
            either[value] += len(a | b)
    assert either[4] == 0 and (either[:4] > 0).all() and 0.1 < both.sum() / either.sum() < 0.95
    scores = metric.compute()
    np.testing.assert_allclose(scores["per_category_boundary_iou"][:4], both[:4] / either[:4])
    assert math.isnan(scores["per_category_boundary_iou"][4])
    assert scores["mean_boundary_iou"] == pytest.approx((both[:4] / either[:4]).mean())


@pytest.mark.parametrize("distance", [1, 2, 7, 30])
def test_regions_equal_repeated_erosion(distance):
    labels = blobs(61, 83, 3)
    labels[10:50, 20:75] = 2  # wide enough to have an inside
    near = near_contour(torch.from_numpy(labels), distance).numpy()
    for value in range(4):
        mask = labels == value
        eroded = binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)
        np.testing.assert_array_equal(near & mask, mask & ~eroded)
    assert near.all() == (distance == 30)


def test_a_perfect_prediction_scores_one_with_ignored_pixels():
    truth = torch.from_numpy(blobs(40, 50, 1))[None]
    guess = truth.clone()
    truth[:, 12:20, 5:30] = 255
    guess[:, 14:18, 8:20] = 3
    metric = BoundaryIoU(4)
    metric.add_batch(predictions=guess, references=truth)
    assert metric.compute()["per_category_boundary_iou"] == [1, 1, 1, 1]


def test_errors_at_contours_cost_more_than_inside():
    truth = torch.zeros(1, 100, 100, dtype=torch.uint8)
    truth[:, 20:80, 20:80] = 1
    shifted = truth.roll(2, 2)
    metric = BoundaryIoU(2)
    metric.add_batch(predictions=shifted, references=truth)
    iou = (60 * 58) / (60 * 62)
    assert metric.compute()["per_category_boundary_iou"][1] < iou - 0.2


def test_invalid_inputs_are_rejected():
    maps = torch.zeros(1, 4, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"must both be \(B, H, W\), got \(1, 4, 5\) and \(1, 4, 4\)"):
        BoundaryIoU(2).add_batch(predictions=maps, references=maps[..., :4])
    with pytest.raises(ValueError, match=r"references contain \[7\].*\[0, 2\)"):
        BoundaryIoU(2).add_batch(predictions=maps, references=maps + 7)
    with pytest.raises(ValueError, match=r"predictions contain \[2\]"):
        BoundaryIoU(2).add_batch(predictions=maps + 2, references=maps)
    with pytest.raises(ValueError, match="`num_labels` must be at least 1, got 0"):
        BoundaryIoU(0)
    with pytest.raises(ValueError, match="`ratio` must be a share of the diagonal.*got 0"):
        BoundaryIoU(2, ratio=0)
