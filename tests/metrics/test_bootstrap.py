"""The paired bootstrap against written-out loops, against closed forms, and on worlds whose truth is known."""

import math

import numpy as np
import pytest
import torch

from cps_hf.metrics.bootstrap import (
    MINIMUM_IMAGES,
    ImageCounts,
    Interval,
    _student,
    images_needed,
    paired_bootstrap,
)
from cps_hf.metrics.mean_iou import IoUCounter


def world(seed: int, images: int, classes: int = 4, gain: float = 0.25):
    """Confusion matrices (n, C, C) of two networks on images of 1000 pixels, with a rare last class that is often
    absent. The second network is right more often by `gain` in log odds."""
    rng = np.random.default_rng(seed)
    prior = np.array([4, 2, 1, 0.5])[:classes]
    truth = np.round(1000 * rng.dirichlet(prior, images)).astype(int)
    hard = rng.normal(0, 0.6, (images, 1))

    def network(shift: float) -> np.ndarray:
        accuracy = 1 / (1 + np.exp(-(1 + shift + hard + rng.normal(0, 0.5, truth.shape))))
        correct = np.round(truth * accuracy).astype(int)
        matrices = np.zeros((images, classes, classes), int)
        for c in range(classes):
            matrices[:, c, c] = correct[:, c]
            matrices[:, c, (c + 1) % classes] += truth[:, c] - correct[:, c]
        return matrices

    return network(0.0), network(gain)


def test_counts_give_the_mean_iou_of_each_image_and_of_all_together():
    rows = [[2, 0], [0, 0], [1, 1]], [[4, 0], [0, 0], [1, 1]], [[2, 2], [0, 0], [1, 1]]
    counts = ImageCounts(*(np.array(one) for one in rows))
    expected = [0.25, math.nan, 1.0]  # (2 / 4 + 0 / 2) / 2
    assert counts.mean_iou_by_image() == pytest.approx(expected, nan_ok=True)
    assert counts.mean_iou() == pytest.approx((3 / 5 + 1 / 3) / 2)


def typed_out(first, second, samples: int, seed: int, tail: float):
    """Image by image and sample by sample, each scored by the metric itself."""
    rng, n = np.random.default_rng(seed), len(first)
    means, classes = [], []
    for drawn in rng.integers(n, size=(samples, n)):
        scores = []
        for matrices in (first, second):
            counter, total = IoUCounter(num_labels=first.shape[1]), np.zeros(first.shape[1:], int)
            for image in drawn:
                total += matrices[image]
            counter.confusion_matrix = torch.from_numpy(total)
            scores.append(counter.compute())
        means.append(scores[1]["mean_iou"] - scores[0]["mean_iou"])
        classes.append(scores[1]["per_category_iou"] - scores[0]["per_category_iou"])

    def ends(values):
        values = sorted(v for v in values if not math.isnan(v))
        return [np.interp(share * (len(values) - 1), range(len(values)), values) for share in (tail, 1 - tail)]

    return ends(means), [ends(values) for values in zip(*classes, strict=True)]


def test_the_interval_equals_a_written_out_bootstrap():
    first, second = world(0, 12)
    for matrices in (first, second):  # the last class in three images only, so that some samples lack it
        matrices[:, 3] = 0
        matrices[:, :, 0] += matrices[:, :, 3]
        matrices[:, :, 3] = 0
    first[9:, 3, 3], second[9:, 3, 3] = 5, 40
    first[9:, 3, 0], second[9:, 3, 0] = 60, 25
    found = paired_bootstrap(first, second, samples=400, seed=3)
    tail = 0.5 * math.erfc(math.sqrt(12 / 11) * 2.20099 / math.sqrt(2))  # Student's quantile of 11 degrees, tables
    (low, high), by_class = typed_out(first, second, 400, 3, tail)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    for one, expected in zip(found.by_class, by_class, strict=True):
        assert (one.low, one.high) == pytest.approx(expected, abs=1e-4)
    assert [one.images for one in found.by_class] == [12, 12, 12, 3] and found.images == 12


def test_the_difference_is_that_of_the_metric():
    first, second = world(1, 7)
    scores = []
    for matrices in (first, second):
        counter = IoUCounter(num_labels=4)
        counter.confusion_matrix = torch.from_numpy(matrices.sum(0))
        scores.append(counter.compute())
    for metric in ("mean_iou", "mean_accuracy", "overall_accuracy"):
        found = paired_bootstrap(first, second, metric=metric, samples=10)
        assert found.difference == pytest.approx(scores[1][metric] - scores[0][metric])
        classes = "per_category_iou" if metric == "mean_iou" else "per_category_accuracy"
        expected = scores[1][classes] - scores[0][classes]
        assert [one.difference for one in found.by_class] == pytest.approx(expected)


def test_a_mean_over_images_of_one_size_has_students_interval():
    """Overall accuracy is then the mean of the images' own, for which mean +- t s / sqrt(n) holds."""
    rng = np.random.default_rng(5)
    n, area = 40, 10_000
    right = rng.binomial(area, [[0.7], [0.74]], size=(2, n)) + rng.integers(-800, 800, (2, n))
    matrices = np.zeros((2, n, 2, 2), int)
    matrices[..., 0, 0], matrices[..., 0, 1] = right, area - right
    found = paired_bootstrap(*matrices, metric="overall_accuracy", samples=40_000)
    differences = (right[1] - right[0]) / area
    half = 2.02269 * differences.std(ddof=1) / math.sqrt(n)  # of 39 degrees, tables
    assert found.difference == pytest.approx(differences.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.03)
    assert found.low == pytest.approx(differences.mean() - half, abs=0.05 * half)


def test_images_are_drawn_for_both_networks_at_once():
    """Two networks that differ equally in each image: the spread between images does not affect their difference."""
    rng = np.random.default_rng(0)
    right = rng.integers(200, 800, 30)
    matrices = np.zeros((2, 30, 2, 2), int)
    for network, shift in enumerate((0, 50)):
        matrices[network, :, 0, 0], matrices[network, :, 0, 1] = right + shift, 1000 - right - shift
    found = paired_bootstrap(*matrices, metric="overall_accuracy")
    assert found.low == pytest.approx(0.05) and found.high == pytest.approx(0.05) and found.beyond_chance == 1
    back = paired_bootstrap(*matrices[::-1], metric="overall_accuracy")
    assert back.beyond_chance == -1 and back.difference == pytest.approx(-0.05)


@pytest.mark.parametrize("images", [10, 40])
def test_95_percent_of_intervals_contain_the_true_difference(images):
    true = paired_bootstrap(*world(99, 100_000), samples=1)
    runs, held, of_classes = 400, 0, np.zeros(4)
    for seed in range(runs):
        found = paired_bootstrap(*world(seed, images), samples=600, seed=seed)
        held += found.low <= true.difference <= found.high
        of_classes += [a.low <= b.difference <= a.high for a, b in zip(found.by_class, true.by_class, strict=True)]
    assert 0.92 <= held / runs <= 0.98
    assert (of_classes / runs >= 0.90).all() and (of_classes / runs <= 0.99).all()


def test_equal_networks_differ_beyond_chance_once_in_twenty():
    apart = 0
    for seed in range(400):
        first, second = world(seed, 20, gain=0.0)
        apart += paired_bootstrap(first, second, samples=600, seed=seed).beyond_chance != 0
    assert 0.02 <= apart / 400 <= 0.09


def test_the_same_seed_gives_the_same_interval_and_blocks_do_not_matter(monkeypatch):
    first, second = world(2, 15)
    found = paired_bootstrap(first, second, samples=200, seed=4)
    assert found == paired_bootstrap(ImageCounts.of(first), ImageCounts.of(second), samples=200, seed=4)
    assert found != paired_bootstrap(first, second, samples=200, seed=5)
    monkeypatch.setattr("cps_hf.metrics.bootstrap._DRAWN_AT_A_TIME", 45)
    assert paired_bootstrap(first, second, samples=200, seed=4) == found


def test_absent_classes_have_no_difference():
    first, second = world(3, 12)
    empty = [np.pad(one, ((0, 0), (0, 1), (0, 1))) for one in (first, second)]
    plain, found = paired_bootstrap(first, second), paired_bootstrap(*empty)
    assert (found.difference, found.low, found.high) == (plain.difference, plain.low, plain.high)
    assert math.isnan(found.by_class[4].difference) and found.by_class[4].images == 0
    assert found.by_class[:4] == plain.by_class


def test_few_images_are_not_conclusive():
    matrices = np.zeros((2, 9, 2, 2), int)
    matrices[0, :, 0, 1] = matrices[1, :, 0, 0] = 100  # one is always wrong, the other always right
    assert paired_bootstrap(*matrices).beyond_chance == 0
    one = paired_bootstrap(*matrices[:, :1])
    assert math.isnan(one.low) and one.difference == pytest.approx(1) and images_needed(one) == MINIMUM_IMAGES
    more = np.concatenate([matrices, matrices[:, :1]], 1)
    assert paired_bootstrap(*more).beyond_chance == 1


def test_images_needed_grows_with_the_square_of_the_width():
    assert images_needed(Interval(0.02, -0.02, 0.06, images=50)) == 200
    assert images_needed(Interval(-0.02, -0.06, 0.02, images=50)) == 200
    assert images_needed(Interval(0.0, -0.02, 0.02, images=50)) == 200  # at least one point is to be detected
    assert images_needed(Interval(0.3, 0.2, 0.4, images=5)) == MINIMUM_IMAGES
    assert images_needed(Interval(0.1, -0.2, 0.4, images=5)) == 45


def test_students_quantiles_are_those_of_tables():
    for degrees, expected in ((9, 2.262), (14, 2.145), (29, 2.045), (99, 1.984)):
        assert _student(degrees, 0.975) == pytest.approx(expected, abs=1e-3)


def test_invalid_comparisons_are_errors():
    first, second = world(0, 4)
    other = second.copy()
    other[2, 0, 1] += 1
    for arguments, options, said in (
        ((first, other), {}, "Image 2 has different labels"),
        ((first, second[:3]), {}, r"same images and classes, got .* \(4, 4\) and \(3, 4\)"),
        ((first[:0], second[:0]), {}, "no image to compare"),
        ((first[0], second[0]), {}, r"must be \(n, C, C\), got \(4, 4\)"),
        ((first, second), {"metric": "iou"}, "`metric` must be one of mean_iou"),
        ((first, second), {"samples": 0}, "`samples` must be at least 1"),
        ((first, second), {"confidence": 95}, "`confidence` between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            paired_bootstrap(*arguments, **options)
