"""Folders of one's own: masks matched by name, class names, ways of coding, and what is said when one is missing."""

import json

import numpy as np
import pytest
from datasets import IterableDataset
from PIL import Image

from cps_hf.data.folder import load_folder, read_class_names
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import read_sample
from cps_hf.data.streams import undecoded

NAMES = ["sky", "road"]


def picture(path, value=90, size=(6, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def mask(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8), mode).save(path)


def write_tree(root, label=None, mask_suffix=""):
    label = np.indices((6, 9)).sum(0) % 2 if label is None else label
    for name in ("b", "trip/a", "c.v2"):
        picture(root / "images" / f"{name}.jpg")
        mask(root / "masks" / f"{name}{mask_suffix}.png", label)
    return root


def labels_of(dataset):
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    rows = undecoded(dataset, with_label=True, what="d")
    return {row["id"]: read_sample(row, encoding, with_label=True)[1].numpy() for row in rows}


@pytest.mark.parametrize("suffix", ["", "_mask"])
def test_masks_are_matched_by_name_in_subfolders_too(tmp_path, suffix):
    dataset = load_folder(write_tree(tmp_path, mask_suffix=suffix), class_names=NAMES, mask_suffix=suffix)
    assert dataset["id"] == ["b", "c.v2", "trip/a"] and dataset.column_names == ["image", "label", "id"]
    assert LabelEncoding.from_feature(dataset.features["label"]).names == ("sky", "road")
    assert all(np.array_equal(label, np.indices((6, 9)).sum(0) % 2) for label in labels_of(dataset).values())


def test_a_split_is_a_folder_and_streaming_gives_the_same_rows(tmp_path):
    write_tree(tmp_path / "train")
    dataset = load_folder(tmp_path, "train", class_names=NAMES)
    stream = load_folder(tmp_path, "train", class_names=NAMES, streaming=True)
    assert isinstance(stream, IterableDataset) and [row["id"] for row in stream] == dataset["id"]
    with pytest.raises(ValueError, match=r"No split 'val' in .*folders there: train"):
        load_folder(tmp_path, "val")


def test_images_alone_need_no_mask(tmp_path):
    write_tree(tmp_path)
    for path in (tmp_path / "masks").rglob("*.png"):
        path.write_bytes(b"unreadable")
    assert load_folder(tmp_path, with_labels=False).column_names == ["image", "id"]


def test_images_that_are_left_out_need_no_mask(tmp_path, caplog):
    write_tree(tmp_path)
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(ValueError, match="1 of 3 images .* have no mask"):
        load_folder(tmp_path, class_names=NAMES)
    assert list(labels_of(load_folder(tmp_path, class_names=NAMES, only_ids={"trip/a"}))) == ["trip/a"]
    assert "belong to no image" not in caplog.text  # the mask of c.v2 has one
    lines = [{"file_name": "images/b.jpg"}, {"file_name": "images/c.v2.jpg", "mask_file_name": "masks/c.v2.png"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_folder(tmp_path, class_names=NAMES, only_ids={"images/c.v2"})["id"] == ["images/c.v2"]


def test_images_alone_may_lie_in_the_folder_itself_unless_masks_may_lie_there_too(tmp_path):
    for name in ("b", "a"):
        picture(tmp_path / f"{name}.jpg")
    assert load_folder(tmp_path, with_labels=False)["id"] == ["a", "b"]
    with pytest.raises(ValueError, match="No folder .*images"):
        load_folder(tmp_path, class_names=NAMES)
    mask(tmp_path / "annotations" / "a.png", np.zeros((6, 9)))
    with pytest.raises(ValueError, match="No folder .*images; .* holds: a.jpg, annotations, b.jpg"):
        load_folder(tmp_path, with_labels=False)


def test_codes_may_come_from_json_which_has_text_for_keys(tmp_path):
    write_tree(tmp_path / "rgb", label=np.full((6, 9, 3), (128, 64, 128)))
    told = json.loads('{"colors": {"128, 64, 128": 1, "0,0,0": 255}}')
    assert (labels_of(load_folder(tmp_path / "rgb", class_names=NAMES, **told))["b"] == 1).all()
    write_tree(tmp_path / "grey", label=np.full((6, 9), 7))
    told = json.loads('{"values": {"7": 1}}')
    assert (labels_of(load_folder(tmp_path / "grey", class_names=NAMES, **told))["b"] == 1).all()


def test_masks_of_two_classes_that_hold_0_and_255_alone_mean_0_and_1(tmp_path, caplog):
    wanted = np.indices((6, 9)).sum(0) % 2
    write_tree(tmp_path, label=wanted * 255)
    for streaming in (False, True):
        assert np.array_equal(labels_of(load_folder(tmp_path, class_names=NAMES, streaming=streaming))["b"], wanted)
    assert "the masks hold 0 and 255 alone, so that 255 is 'road'" in caplog.text
    said = {0: 0, 1: 1, 255: 255}
    assert set(np.unique(labels_of(load_folder(tmp_path, class_names=NAMES, values=said))["b"])) == {0, 255}
    told = labels_of(load_folder(tmp_path, class_names=NAMES, values={0: 0, 255: 1}))["b"]
    assert np.array_equal(told, wanted)


@pytest.mark.parametrize("third", [0, 1, 77])
def test_one_mask_decides_what_255_means(tmp_path, caplog, third):
    """0 and 255 in two masks; the third holds 0 alone, or a 1, or what cannot be read: only the 1 tells otherwise."""
    write_tree(tmp_path, label=(np.indices((6, 9)).sum(0) % 2) * 255)
    mask(tmp_path / "masks" / "trip" / "a.png", np.full((6, 9), third))
    feature = load_folder(tmp_path, class_names=NAMES).features["label"]
    assert LabelEncoding.from_feature(feature).values == (None if third == 1 else {0: 0, 255: 1})
    assert ("255 alone" in caplog.text) == (third != 1)
    assert (
        LabelEncoding.from_feature(load_folder(tmp_path, class_names=[*NAMES, "car"]).features["label"]).values is None
    )


def test_a_1_among_masks_of_0_and_255_that_nobody_looked_at_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("cps_hf.data.black_and_white.MASKS", 2)
    write_tree(tmp_path, label=(np.indices((6, 9)).sum(0) % 2) * 255)  # b, c.v2, trip/a
    mask(tmp_path / "masks" / "c.v2.png", np.ones((6, 9)))
    with pytest.raises(ValueError, match=r"'c.v2' .* holds 1 \(54 pixels\).*`values={0: 0, 1: 1, 255: 1}`"):
        labels_of(load_folder(tmp_path, class_names=NAMES))
    told = labels_of(load_folder(tmp_path, class_names=NAMES, values={0: 0, 1: 1, 255: 1}))  # as the error says
    assert (told["c.v2"] == 1).all()


def test_colour_coded_masks_and_reduced_labels(tmp_path):
    red, black = (200, 0, 0), (0, 0, 0)
    rgb = np.where((np.indices((6, 9)).sum(0) % 2)[..., None] == 1, red, black)
    write_tree(tmp_path / "rgb", label=rgb)
    decoded = labels_of(load_folder(tmp_path / "rgb", class_names=NAMES, colors={black: 255, red: 1}))["b"]
    assert np.array_equal(decoded, np.where(np.indices((6, 9)).sum(0) % 2 == 1, 1, 255))
    with pytest.raises(ValueError, match=r"mode 'RGB'.*colors="):
        labels_of(load_folder(tmp_path / "rgb", class_names=NAMES))
    write_tree(tmp_path / "ade", label=np.arange(54).reshape(6, 9) % 3)
    reduced = labels_of(load_folder(tmp_path / "ade", class_names=NAMES, reduce_labels=True))["b"]
    assert np.array_equal(reduced, np.array([255, 0, 1])[np.arange(54).reshape(6, 9) % 3])


@pytest.mark.parametrize("content", [["sky", "road"], {"0": "sky", "1": "road"}, {"1": "road", "0": "sky"}])
def test_class_names_come_from_a_file_beside_the_images_or_elsewhere(tmp_path, content):
    write_tree(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(content))
    beside = load_folder(tmp_path)
    (tmp_path / "classes.json").rename(tmp_path / "elsewhere.json")
    told = load_folder(tmp_path, class_names=tmp_path / "elsewhere.json")
    for dataset in (beside, told):
        assert LabelEncoding.from_feature(dataset.features["label"]).names == ("sky", "road")
    assert LabelEncoding.from_feature(load_folder(tmp_path).features["label"]) is None


def test_metadata_lines_are_followed_and_may_not_lead_out(tmp_path):
    picture(tmp_path / "set" / "x" / "1.png")
    mask(tmp_path / "set" / "y" / "other.png", np.zeros((6, 9)))
    lines = tmp_path / "set" / "metadata.jsonl"
    lines.write_text('{"file_name": "x/1.png", "mask_file_name": "y/other.png"}\n\n')
    assert load_folder(tmp_path / "set", class_names=NAMES)["id"] == ["x/1"]
    picture(tmp_path / "secret.png")
    for text, said in (
        ('{"file_name": "../secret.png", "mask_file_name": "y/other.png"}', "line 1: '../secret.png' leads out"),
        ('{"file_name": "x/2.png", "mask_file_name": "y/other.png"}', "line 1: no file .*x/2.png"),
        ('{"file_name": "x/1.png", "mask_file_name": null}', "line 1: expected .*file name is no text"),
        ('{"file_name": 7, "mask_file_name": "y/other.png"}', "line 1: expected .*file name is no text"),
        ('{"file_name": "x/1.png"}', 'line 1: expected .*"mask_file_name"'),
        ("x/1.png", "line 1: expected"),
        ('{"file_name": "x/1.png", "mask_file_name": "y/other.png"}\n' * 2, "more than once: x/1"),
        ("\n", "lists no image"),
    ):
        lines.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_folder(tmp_path / "set", class_names=NAMES)


def test_what_is_missing_or_double_is_named(tmp_path, caplog):
    write_tree(tmp_path)
    mask(tmp_path / "masks" / "alone.png", np.zeros((6, 9)))
    load_folder(tmp_path, class_names=NAMES)
    assert "1 masks belong to no image: alone" in caplog.text
    (tmp_path / "masks" / "b.png").unlink()
    both = r"1 of 3 images .* have no mask .*b.png\): b\. 1 masks belong to no image: alone\..*with_labels=False"
    with pytest.raises(ValueError, match=both):
        load_folder(tmp_path, class_names=NAMES)
    picture(tmp_path / "images" / "b.png")
    with pytest.raises(ValueError, match="Two files have one name: .*b.jpg and .*b.png"):
        load_folder(tmp_path, with_labels=False)
    with pytest.raises(ValueError, match=r"No folder .*pictures; .* holds: images, masks"):
        load_folder(tmp_path, images="pictures")
    picture(tmp_path / "sets" / "train" / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"No folder .*images; .*sets holds: train. Give `split`, one of train;"):
        load_folder(tmp_path / "sets")
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="No image in .*looked for .jpg, .jpeg, .png"):
        load_folder(tmp_path / "empty", with_labels=False)
    with pytest.raises(ValueError, match="No folder .*nowhere"):
        load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": {0: 0}, "reduce_labels": True}, "not values and reduce_labels"),
        ({"class_names": None, "values": {0: 0}}, "`values` needs `class_names`"),
        ({"values": {0: 7}}, "class ids 0 to 1"),
        ({"values": {"road": 0}}, r"`values` must be like `values=\{7: 0\}` .*, found \{'road': 0\}"),
        ({"colors": {"red": 0}}, r"`colors` must be like .*found \{'red': 0\}"),
        ({"colors": {"1, 2": 0}}, r"a colour is \(red, green, blue\).*got \(1, 2\)"),
        ({"colors": {}, "reduce_labels": True}, "not colors and reduce_labels"),
        ({"palette": [(0, 0, 0)]}, "1 colours for 2 classes"),
        ({"class_names": {"0": "a", "2": "b"}}, r"without a gap, found the ids \[0, 2\]"),
        ({"class_names": {"sky": 0}}, "keys must be class ids"),
        ({"class_names": "missing.json"}, "Cannot read class names from missing.json"),
        ({"class_names": ["a", "a"]}, "more than once: a"),
    ],
)
def test_class_names_and_codes_that_do_not_fit_are_refused(tmp_path, options, said):
    write_tree(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_folder(tmp_path, **({"class_names": NAMES} | options))


def test_class_names_in_the_order_of_their_ids():
    assert read_class_names({2: "c", 0: "a", 1: "b"}) == ("a", "b", "c") and read_class_names(None) is None


def test_a_split_may_lie_below_images_and_masks(tmp_path):
    for split, name in (("train", "a"), ("val", "b")):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("RGB" if kind == "images" else "L", (4, 3)).save(tmp_path / kind / split / f"{name}.png")
    assert load_folder(tmp_path, "val", class_names=NAMES)["id"] == ["b"]
    assert load_folder(tmp_path, "train", class_names=NAMES)["id"] == ["a"]
    with pytest.raises(ValueError, match=r"No split 'test' in .*: expected a folder .*test, or .*images/test"):
        load_folder(tmp_path, "test", class_names=NAMES)


def test_images_and_masks_may_lie_in_one_folder_where_a_suffix_tells_them_apart(tmp_path, caplog):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg")
    Image.new("RGB", (4, 3)).save(tmp_path / "b.png")
    for name in ("a", "b"):
        Image.new("L", (4, 3)).save(tmp_path / f"{name}_mask.png")
    dataset = load_folder(tmp_path, images=".", masks=".", mask_suffix="_mask", class_names=NAMES)
    assert dataset["id"] == ["a", "b"] and "passed over" not in caplog.text and "belong to no image" not in caplog.text


def test_names_may_differ_in_what_follows_what_they_share(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images" / "21_training.tif")
    Image.new("L", (4, 3)).save(tmp_path / "masks" / "21_manual1.gif")
    options = {"image_suffix": "_training", "mask_suffix": "_manual1"}
    assert load_folder(tmp_path, **options, class_names=NAMES)["id"] == ["21_training"]
    with pytest.raises(
        ValueError, match=r"expected e.g. 21_training.png\).*`image_suffix='_image', mask_suffix='_mask'`"
    ):
        load_folder(tmp_path, class_names=NAMES)


def test_colours_in_json_are_text(tmp_path):
    table = {"#804080": 0, "0, 0, 255": 1}
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (4, 3), (0, 0, 255)).save(tmp_path / "masks" / "a.png")
    dataset = load_folder(tmp_path, class_names=NAMES, colors=table)
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    assert encoding.colors == {(128, 64, 128): 0, (0, 0, 255): 1}
    with pytest.raises(
        ValueError, match=r"must be like `colors=.*--load_options '{\"colors\": {\"128, 64, 128\": 0}}'"
    ):
        load_folder(tmp_path, class_names=NAMES, colors={"red": 0})
