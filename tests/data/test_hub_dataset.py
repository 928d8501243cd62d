"""Local parquet folders through the loader for the Hub: columns, class names, encodings, errors."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Sequence, Value
from PIL import Image as PILImage
from support.image_files import png

from cps_hf.data.hub_dataset import load_hub, splits_of
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import read_sample
from cps_hf.data.streams import undecoded

ENCODING = LabelEncoding(("sky", "road"), values={7: 0, 9: 1})


def write_parquet(folder, label_feature=None, *, columns=("image", "label", "id"), classes=None):
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 255, (5, 8, 3), np.uint8)) for _ in range(4)]
    labels = [PILImage.fromarray(rng.choice([7, 9], (5, 8)).astype(np.uint8)) for _ in range(4)]
    data = {columns[0]: images, columns[1]: labels, columns[2]: [f"row-{i}" for i in range(4)]}
    features = {columns[0]: Image(), columns[1]: label_feature or Image(), columns[2]: Value("string")}
    if classes is not None:
        data["scene"], features["scene"] = [0] * 4, ClassLabel(names=["indoor", "outdoor"])
    if classes:
        data["objects"], features["objects"] = [[0]] * 4, Sequence(ClassLabel(names=classes))
    folder.mkdir(parents=True)
    Dataset.from_dict(data, features=Features(features)).to_parquet(folder / "train-00000-of-00001.parquet")
    return labels


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stored_encoding_is_found_again(tmp_path, streaming):
    labels = write_parquet(tmp_path / "set", ENCODING.to_feature())
    dataset = load_hub(tmp_path / "set", streaming=streaming)
    assert isinstance(dataset, IterableDataset) == streaming
    assert LabelEncoding.from_feature(dataset.features["label"]) == ENCODING
    for row, label in zip(undecoded(dataset, with_label=True, what="d"), labels, strict=True):
        decoded = read_sample(row, ENCODING, with_label=True)[1].numpy()
        assert np.array_equal(decoded, (np.asarray(label) == 9).astype(np.uint8))


def test_columns_are_renamed_and_others_dropped(tmp_path):
    write_parquet(tmp_path / "set", columns=("photo", "annotation", "name"))
    options = {"image_column": "photo", "label_column": "annotation"}
    dataset = load_hub(tmp_path / "set", id_column="name", class_names=["sky", "road"], values={7: 0, 9: 1}, **options)
    assert dataset.column_names == ["image", "label", "id"] and dataset["id"][2] == "row-2"
    assert LabelEncoding.from_feature(dataset.features["label"]).values == {7: 0, 9: 1}
    assert load_hub(tmp_path / "set", **options)["id"][:2] == ["train-0", "train-1"]
    alone = load_hub(tmp_path / "set", image_column="photo", with_labels=False, streaming=True)
    assert [*next(iter(alone))] == ["image"]


def test_names_come_from_a_list_of_class_labels(tmp_path):
    write_parquet(tmp_path / "set", classes=["a", "b", "c"])
    assert LabelEncoding.from_feature(load_hub(tmp_path / "set").features["label"]).names == ("a", "b", "c")
    write_parquet(tmp_path / "scenes", classes=[])  # a label of the whole image is not a class of its pixels
    assert LabelEncoding.from_feature(load_hub(tmp_path / "scenes").features["label"]) is None


def test_mismatches_are_named(tmp_path):
    write_parquet(tmp_path / "set", ENCODING.to_feature())
    with pytest.raises(ValueError, match="no column 'labels'.*There are: image, label, id. Did you mean 'label'"):
        load_hub(tmp_path / "set", label_column="labels")
    with pytest.raises(ValueError, match="Column 'id' .* of type Value, expected Image"):
        load_hub(tmp_path / "set", image_column="id")
    with pytest.raises(ValueError, match="Column 'image' .*expected text or integers for `id_column`"):
        load_hub(tmp_path / "set", id_column="image")
    with pytest.raises(ValueError, match="no column 'key' for `id_column`"):
        load_hub(tmp_path / "set", id_column="key")
    with pytest.raises(ValueError, match=r"already contain their coding \(2 classes\). Remove `values`"):
        load_hub(tmp_path / "set", values={0: 0})
    with pytest.raises(ValueError, match="No split 'val' in .*; there are: train"):
        load_hub(tmp_path / "set", "val")
    with pytest.raises(ValueError, match=r"(Cannot load|No data set).*nobody/nothing"):
        load_hub("nobody/nothing")


@pytest.mark.parametrize("streaming", [False, True])
def test_one_parquet_file_is_a_data_set_and_numbers_become_ids(tmp_path, streaming):
    image = {"bytes": None, "path": str(tmp_path / "a.png")}
    PILImage.new("RGB", (4, 3)).save(tmp_path / "a.png")
    features = Features({"image": Image(), "id": Value("int64")})
    Dataset.from_dict({"image": [image] * 3, "id": [7, 8, 900]}, features=features).to_parquet(tmp_path / "x.parquet")
    dataset = load_hub(tmp_path / "x.parquet", "unlabeled", with_labels=False, streaming=streaming)
    assert dataset.features["id"] == Value("string") and [row["id"] for row in dataset] == ["7", "8", "900"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_imagefolder_with_metadata_is_a_data_set(tmp_path, streaming):
    (tmp_path / "train").mkdir()
    for i in range(2):
        PILImage.new("RGB", (4, 3), (i, 0, 0)).save(tmp_path / "train" / f"{i}.png")
        PILImage.new("L", (4, 3), i).save(tmp_path / "train" / f"{i}_mask.png")
    lines = [f'{{"file_name": "{i}.png", "mask_file_name": "{i}_mask.png"}}\n' for i in range(2)]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(lines))
    dataset = load_hub(tmp_path, label_column="mask", class_names=["sky", "road"], streaming=streaming)
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    rows = undecoded(dataset, with_label=True, what="d")
    assert [int(read_sample(row, encoding, with_label=True)[1].max()) for row in rows] == [0, 1]


def plain_parquet(folder, labels, kind):
    """As other parquet writers store it: without Hugging Face's metadata."""
    files = {"image": [png(np.zeros((*label.shape, 3), np.uint8)) for label in labels]}
    files["label"] = [png(label) for label in labels]
    made = {
        "bytes": lambda data: data,
        "large bytes": lambda data: data,
        "bytes and path": lambda data: {"bytes": data, "path": "x.png"},
        "path and bytes": lambda data: {"path": None, "bytes": data},
        "bytes in a struct": lambda data: {"bytes": data},
    }[kind]
    type_ = pa.large_binary() if kind == "large bytes" else None
    columns = {name: pa.array([made(data) for data in values], type_) for name, values in files.items()}
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")


def labels_of(dataset):
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    rows = undecoded(dataset, with_label=True, what="d")
    return [read_sample(row, encoding, with_label=True)[1].tolist() for row in rows]


@pytest.mark.parametrize("kind", ["bytes", "large bytes", "bytes and path", "path and bytes", "bytes in a struct"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_in_parquet_are_images_even_without_metadata(tmp_path, kind, streaming, caplog):
    labels = [np.full((4, 6), value, np.uint8) for value in (0, 1, 2)]
    plain_parquet(tmp_path / "set", labels, kind)
    caplog.set_level(logging.INFO, logger="cps_hf")
    dataset = load_hub(tmp_path / "set", class_names=["a", "b", "c"], streaming=streaming)
    assert labels_of(dataset) == [label.tolist() for label in labels]
    assert "Column 'label' contains encoded files without the type Image" in caplog.text


def test_a_column_of_paths_or_pixels_suggests_a_cast(tmp_path):
    for name, values in (("paths", ["a.png"]), ("pixels", [[[0, 1]]])):
        table = pa.table({"image": values, "label": values})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(
            ValueError, match=r"expected Image.*without Hugging Face's metadata.*cast_column\(\"image\""
        ):
            load_hub(tmp_path / f"{name}.parquet")


def test_black_and_white_masks_in_parquet_and_resizing(tmp_path):
    white = np.array([[0, 255]], np.uint8).repeat(2, 0)
    plain_parquet(tmp_path / "set", [white, white * 0], "bytes")
    two = {"class_names": ["a", "b"]}
    assert labels_of(load_hub(tmp_path / "set", **two)) == [[[0, 1]] * 2, [[0, 0]] * 2]
    feature = load_hub(tmp_path / "set", **two, resize_masks=True).features["label"]
    assert LabelEncoding.from_feature(feature) == LabelEncoding(("a", "b"), values={0: 0, 255: 1}, resize_masks=True)
    stream = load_hub(tmp_path / "set", **two, streaming=True).features["label"]
    assert LabelEncoding.from_feature(stream).values is None, "the rest of a stream is unknown"
    write_parquet(tmp_path / "carried", ENCODING.to_feature())
    carried = load_hub(tmp_path / "carried", resize_masks=True).features["label"]
    assert LabelEncoding.from_feature(carried) == LabelEncoding(ENCODING.names, ENCODING.values, resize_masks=True)


def test_splits_of_shards_files_and_imagefolders_are_found(tmp_path):
    write_parquet(tmp_path / "set")
    data = (tmp_path / "set" / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "set" / "train_extra-00000-of-00001.parquet").write_bytes(data)
    assert splits_of(tmp_path / "set") == ["train", "train_extra"]
    assert splits_of(tmp_path / "set" / "train-00000-of-00001.parquet") == ["train"]
    for split in ("train", "validation"):
        (tmp_path / "folder" / split).mkdir(parents=True)
        PILImage.new("RGB", (4, 3)).save(tmp_path / "folder" / split / "0.png")
    assert sorted(splits_of(tmp_path / "folder")) == ["train", "validation"]
    with pytest.raises(ValueError, match="Cannot find the splits of '.*nowhere'"):
        splits_of(tmp_path / "nowhere")
