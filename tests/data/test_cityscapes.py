"""Small handmade Cityscapes trees, read through the loader."""

import numpy as np
import pytest
from datasets import Dataset, Image, IterableDataset
from PIL import Image as PILImage

from cps_hf.data import cityscapes
from cps_hf.data.cityscapes import load_cityscapes
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import read_sample
from cps_hf.data.streams import undecoded

FRAMES = {
    "train": ["bonn_000001_000019", "aachen_000002_000019"],
    "val": ["ulm_000000_000019"],
    "train_extra": ["augsburg_000000_000000"],
}


def write_tree(root, *, suffixes=("labelIds",), kinds=("gtFine",), label=None):
    if label is None:
        label = np.arange(34, dtype=np.uint8).reshape(2, 17)
    for split, frames in FRAMES.items():
        for i, frame in enumerate(frames):
            folder = root / "leftImg8bit" / split / frame.split("_")[0]
            folder.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(np.full((2, 17, 3), 10 * i, np.uint8)).save(folder / f"{frame}_leftImg8bit.png")
            for kind in kinds:
                if (kind == "gtFine") == (split == "train_extra"):
                    continue
                folder = root / kind / split / frame.split("_")[0]
                folder.mkdir(parents=True, exist_ok=True)
                for suffix in suffixes:
                    PILImage.fromarray(label).save(folder / f"{frame}_{kind}_{suffix}.png")
    return root


def first_sample(dataset):
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    return read_sample(undecoded(dataset, with_label=True, what="d")[0], encoding, with_label=True)


def test_the_table_is_the_official_one():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    official = {label.id: label for label in labels if label.id >= 0}
    assert len(official) == len(cityscapes.LABELS) == 34
    for ours in cityscapes.LABELS:
        theirs = official[ours.id]
        expected = theirs.trainId if theirs.trainId != -1 else 255
        assert (ours.name, ours.train_id, ours.color) == (theirs.name, expected, theirs.color)
    assert cityscapes.ID2LABEL == {label.trainId: label.name for label in labels if 0 <= label.trainId < 255}


def test_label_ids_become_train_ids(tmp_path):
    dataset = load_cityscapes(write_tree(tmp_path), "train")
    assert isinstance(dataset, Dataset) and dataset.column_names == ["image", "label", "id"]
    assert dataset["id"] == ["aachen_000002_000019", "bonn_000001_000019"]
    assert isinstance(dataset.features["label"], Image)
    assert dataset[0]["image"].size == (17, 2)
    _, label = first_sample(dataset)
    evaluated = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    evaluated |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert label.flatten().tolist() == [evaluated.get(i, 255) for i in range(34)]


def test_license_plates_are_ignored(tmp_path):
    label = np.full((2, 17), 255, np.uint8)  # -1 in an 8-bit image
    _, decoded = first_sample(load_cityscapes(write_tree(tmp_path, label=label), "train"))
    assert (decoded == 255).all()


def test_train_ids_are_read_if_there_are_no_label_ids(tmp_path):
    label = (np.arange(34, dtype=np.uint8).reshape(2, 17)) % 19
    _, decoded = first_sample(load_cityscapes(write_tree(tmp_path, suffixes=("labelTrainIds",), label=label), "val"))
    assert np.array_equal(decoded.numpy(), label)


def test_train_extra_has_images_without_labels_or_with_coarse_ones(tmp_path):
    write_tree(tmp_path, kinds=("gtFine", "gtCoarse"))
    assert load_cityscapes(tmp_path, "train_extra").column_names == ["image", "id"]
    coarse = load_cityscapes(tmp_path, "train_extra", annotations="coarse")
    assert coarse[0]["label"].size == (17, 2)


def test_images_alone_never_open_a_label(tmp_path):
    write_tree(tmp_path)
    for path in (tmp_path / "gtFine").rglob("*.png"):
        path.write_bytes(b"unreadable")
    dataset = load_cityscapes(tmp_path, "train", with_labels=False)
    assert dataset.column_names == ["image", "id"]
    image, label = read_sample(undecoded(dataset, with_label=False, what="d")[1], with_label=False)
    assert image.shape == (3, 2, 17) and label is None


def test_skipped_images_need_no_label(tmp_path):
    write_tree(tmp_path)
    next((tmp_path / "gtFine" / "train" / "bonn").iterdir()).unlink()
    with pytest.raises(ValueError, match="1 of 2 label files are missing"):
        load_cityscapes(tmp_path, "train")
    assert load_cityscapes(tmp_path, "train", only_ids={"aachen_000002_000019"})["id"] == ["aachen_000002_000019"]


def test_streaming_gives_the_same_rows(tmp_path):
    write_tree(tmp_path)
    stream = load_cityscapes(tmp_path, "train", streaming=True)
    assert isinstance(stream, IterableDataset)
    assert [row["id"] for row in stream] == load_cityscapes(tmp_path, "train")["id"]
    assert LabelEncoding.from_feature(stream.features["label"]).names == cityscapes.NAMES


def test_what_is_missing_is_named(tmp_path):
    write_tree(tmp_path)
    with pytest.raises(ValueError, match=r"No folder .*leftImg8bit/test.*found in .*gtFine, leftImg8bit"):
        load_cityscapes(tmp_path, "test")
    with pytest.raises(ValueError, match="no such folder"):
        load_cityscapes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="train, val, test, train_extra, got 'training'"):
        load_cityscapes(tmp_path, "training")
    with pytest.raises(ValueError, match="`annotations`.*'rough'"):
        load_cityscapes(tmp_path, annotations="rough")
    next((tmp_path / "gtFine" / "train").rglob("bonn*.png")).unlink()
    with pytest.raises(ValueError, match=r"1 of 2 label files are missing: .*bonn_000001_000019_gtFine_labelIds.png"):
        load_cityscapes(tmp_path, "train")


def test_mac_files_are_skipped_and_existing_splits_are_found(tmp_path):
    dataset = load_cityscapes(write_tree(tmp_path), "train")
    city = tmp_path / "leftImg8bit" / "train" / "aachen"
    (city / "._aachen_000002_000019_leftImg8bit.png").write_bytes(b"Mac OS X")
    assert load_cityscapes(tmp_path, "train")["id"] == dataset["id"]
    assert cityscapes.splits_of(tmp_path) == [split for split in cityscapes.SPLITS if split in FRAMES]
