"""Class maps as pictures, checked pixel by pixel."""

import numpy as np
import pytest
import torch
from support.pictures import blocks

from cps_hf.visualization import (
    AGREEMENT,
    ERRORS,
    agreement_legend,
    agreement_map,
    colorize,
    denormalize,
    error_map,
    overlay,
    palette,
)


def test_classes_have_their_colour_and_ignored_pixels_none():
    labels = np.array([[0, 1, 255], [2, 2, 1]], np.uint8)
    colors = [(1, 2, 3), (40, 50, 60), (7, 8, 9)]
    expected = [[(1, 2, 3), (40, 50, 60), (255, 0, 255)], [(7, 8, 9), (7, 8, 9), (40, 50, 60)]]
    for given in (labels, labels.astype(np.int64), torch.from_numpy(labels), torch.from_numpy(labels).long()):
        np.testing.assert_array_equal(colorize(given, colors, ignore_color=(255, 0, 255)), expected)
    assert colorize(np.full((1, 1), 255), [(i, i, i) for i in range(256)]).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("value", [3, 254, -1, 1000])
def test_a_class_without_a_colour_is_an_error(value):
    with pytest.raises(ValueError, match=rf"contains \[{value}\], but the palette has 3 colours"):
        colorize(np.array([[0, value, 255]]), palette(3))


def test_an_overlay_blends_all_but_ignored_and_black():
    labels, image = blocks(7, 9, [0, 1, 2, 255])
    colors = np.array([(250, 10, 20), (0, 100, 200), (0, 0, 0)])
    mixed = overlay(image, labels, colors, alpha=0.25)
    for row in range(7):
        for column in range(9):
            expected = image[row, column].astype(float)
            if labels[row, column] not in (2, 255):
                expected = 0.75 * expected + 0.25 * colors[labels[row, column]]
            assert np.abs(mixed[row, column] - expected).max() <= 0.5
    tensors = overlay(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels), colors, alpha=0.25)
    np.testing.assert_array_equal(tensors, mixed)
    assert mixed.dtype == np.uint8
    with pytest.raises(ValueError, match="`alpha` must be from 0 to 1, got 1.5"):
        overlay(image, labels, colors, alpha=1.5)
    with pytest.raises(ValueError, match=r"the same size, got \(7, 9\) and \(7, 8\)"):
        overlay(image, labels[:, :8], colors)
    with pytest.raises(ValueError, match="must be uint8.*float64.*see `denormalize`"):
        overlay(image / 255, labels, colors)


def test_three_rows_of_a_tensor_are_channels_and_of_an_array_rows():
    picture = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    empty = np.full((3, 5), 255, np.uint8)
    np.testing.assert_array_equal(overlay(picture, empty, palette(2)), picture)
    tensor = torch.from_numpy(picture)  # (3, 5, 3): three channels of 5 x 3 pixels
    np.testing.assert_array_equal(
        overlay(tensor, np.full((5, 3), 255, np.uint8), palette(2)), picture.transpose(1, 2, 0)
    )


def test_denormalizing_gives_back_every_value():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    picture[..., 1] = 255 - picture[..., 1]
    normal = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(
        std
    )[:, None, None]
    np.testing.assert_array_equal(denormalize(normal, mean, std), picture)
    assert denormalize(torch.full((3, 1, 1), 1e6), mean, std).tolist() == [[[255, 255, 255]]]


def test_agreement_says_who_is_right():
    rng = np.random.default_rng(3)
    a, b, labels = rng.integers(0, 3, (3, 11, 8))
    labels[0] = 255
    painted = agreement_map(torch.from_numpy(a), b, labels)
    seen = set()
    for index in np.ndindex(labels.shape):
        known = labels[index] != 255
        if a[index] == b[index]:
            case = "agree, both wrong" if known and a[index] != labels[index] else "agree"
        else:
            case = "disagree"
            if known and a[index] == labels[index]:
                case = "only the first is right"
            if known and b[index] == labels[index]:
                case = "only the second is right"
        seen.add(case)
        assert tuple(painted[index]) == AGREEMENT[case]
    assert seen == set(AGREEMENT)
    alone = agreement_map(a, b)
    np.testing.assert_array_equal((alone == AGREEMENT["agree"]).all(-1), a == b)


def test_the_legend_of_agreement_names_the_networks():
    legend = agreement_legend("branch 0", "the teacher")
    assert [*legend.values()] == [*AGREEMENT.values()]
    assert [*legend][1:4] == ["agree, both wrong", "only branch 0 is right", "only the teacher is right"]
    assert [*legend][4] == "disagree, both wrong"


def test_errors_are_marked_and_void_is_neither_right_nor_wrong():
    labels, guess = np.array([[0, 1, 255], [2, 2, 1]]), torch.tensor([[0, 2, 1], [2, 1, 1]])
    right, wrong, void = ERRORS["right"], ERRORS["wrong"], (255, 255, 255)
    assert [[tuple(c) for c in row] for row in error_map(guess, labels).tolist()] == [
        [right, wrong, void],
        [right, wrong, right],
    ]
    with pytest.raises(ValueError, match="the same size"):
        error_map(guess, labels[:, :2])
