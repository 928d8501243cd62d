"""The pixel counts per class of a labeled set."""

import logging

import numpy as np
import pytest
from PIL import Image
from support.toy import write_world

from cps_hf.data import class_counts
from cps_hf.data.class_counts import count_class_pixels

SIZES = [(40, 56), (56, 40), (20, 24)]


@pytest.fixture
def world(tmp_path):
    dataset = write_world(tmp_path / "labeled", SIZES)
    labels = [np.asarray(row["label"]) for row in dataset]
    return tmp_path / "labeled", dataset, [[int((label == c).sum()) for c in range(3)] for label in labels]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_shares_of_all_processes_make_up_the_whole_set(world, streamed):
    _, dataset, expected = world
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    assert count_class_pixels(dataset, 3).tolist() == np.sum(expected, 0).tolist()
    shares = [count_class_pixels(dataset, 3, rank=rank, num_processes=2).tolist() for rank in (0, 1)]
    assert shares == [np.add(expected[0], expected[2]).tolist(), expected[1]]


def test_only_the_first_rows_of_a_stream_are_counted(world, monkeypatch):
    _, dataset, expected = world
    monkeypatch.setattr(class_counts, "ROWS_OF_A_STREAM", 2)
    assert count_class_pixels(dataset.to_iterable_dataset(), 3).tolist() == np.add(*expected[:2]).tolist()


def test_no_image_is_opened_and_bad_labels_are_named_or_skipped(world, caplog):
    folder, dataset, expected = world
    (folder / "0.png").write_bytes(b"no image")
    assert count_class_pixels(dataset, 3).tolist() == np.sum(expected, 0).tolist()
    (folder / "1_label.png").write_bytes(b"no label")
    with pytest.raises(ValueError, match="labeled-1"):
        count_class_pixels(dataset, 3)
    with caplog.at_level(logging.WARNING):
        found = count_class_pixels(dataset, 3, skip_bad_samples=True)
    assert found.tolist() == np.add(expected[0], expected[2]).tolist() and "without an unreadable label" in caplog.text


def test_a_value_that_is_not_a_class_is_an_error(world):
    folder, dataset, _ = world
    Image.fromarray(np.full(SIZES[0], 2, np.uint8)).save(folder / "0_label.png")
    with pytest.raises(ValueError, match=r"labeled-0.*2 \(2240 pixels\)"):
        count_class_pixels(dataset, 2)
