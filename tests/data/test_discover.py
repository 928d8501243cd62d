"""A user's folder: labeled, unlabeled and validation images, the classes, and the table."""

import os
import re
import shutil

import numpy as np
import pytest
from support.own_folders import BANDS, SIZE, write_files, write_image, write_mask

from cps_hf.data.discover import discover
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import read_sample
from cps_hf.data.streams import undecoded


def write_set(root, labeled=10, unlabeled=5, folder="", start=0):
    names = [f"p{i:02d}" for i in range(start, start + labeled + unlabeled)]
    write_files(root / folder, *(f"images/{name}.jpg" for name in names))
    write_files(root / folder, *(f"masks/{name}.png" for name in names[:labeled]))
    return root


def ids_of(found):
    return [None if d is None else list(d["id"]) for d in (found.labeled, found.unlabeled, found.evaluation)]


def labels_of(dataset):
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    rows = undecoded(dataset, with_label=True, what="d")
    return {row["id"]: read_sample(row, encoding, with_label=True)[1].numpy() for row in rows}


def test_masks_define_labeled_images_and_a_share_is_held_out(tmp_path):
    found = discover(write_set(tmp_path), class_names=["sky", "road"])
    labeled, unlabeled, evaluation = ids_of(found)
    assert (len(labeled), len(unlabeled), len(evaluation)) == (8, 5, 2)
    assert sorted(labeled + evaluation) == [f"p{i:02d}" for i in range(10)] and found.held_out == evaluation
    assert found.unlabeled.column_names == ["image", "id"] and found.class_names == ("sky", "road")
    assert all(np.array_equal(label, BANDS) for label in labels_of(found.evaluation).values())
    assert found.labeled.features == found.evaluation.features
    assert found.sizes["labeled"] == [SIZE] * 8 and found.pixels["validation"][:2].tolist() == [80, 80]


def test_the_split_depends_on_the_seed_not_the_file_system(tmp_path):
    first, again, other = (discover(write_set(tmp_path), seed=seed) for seed in (0, 0, 1))
    assert first.held_out == again.held_out != other.held_out


def test_the_table_says_what_was_found(tmp_path):
    write_set(tmp_path / "my photos")
    (tmp_path / "my photos" / "classes.txt").write_text("Himmel\nStraße\n", encoding="utf-8")
    write_image(tmp_path / "my photos" / "images" / "p20.jpg", (30, 40))
    (tmp_path / "my photos" / ".DS_Store").write_bytes(b"x")
    table = discover(tmp_path / "my photos").table()
    for said in (
        "my photos: images in images/, masks in masks/; no split.",
        "labeled           8   10 x 8",
        "unlabeled         6   10 x 8 and 40 x 30",
        "validation        2   10 x 8   20 % of the labeled images, held out",
        "  0 Himmel        50.00           50.00",
        "held out: p",
        "skipped: 1 hidden or system files",
    ):
        assert said in table, table
    assert max(map(len, table.splitlines()[1:])) < 120  # the first line is the folder's own path


def test_few_labeled_images_work_with_a_warning(tmp_path):
    found = discover(write_set(tmp_path, labeled=3))
    assert len(found.labeled) == 3 and found.evaluation is None and found.held_out == []
    assert "With 3 labeled images, none is held out" in found.table() and "No scores can be" in found.table()
    found = discover(tmp_path, validation="none")
    assert found.evaluation is None and "No scores can be" in found.table()
    assert len(discover(tmp_path, validation=0.4).evaluation) == 1


def test_a_test_split_is_not_used_unless_named(tmp_path):
    for start, (split, labeled) in enumerate((("train", 6), ("valid", 3), ("test", 4))):
        write_set(tmp_path, labeled, 2, split, start=10 * start)  # no copies between the sets
    found = discover(tmp_path)
    assert [len(ids) for ids in ids_of(found)] == [6, 2, 3] and found.held_out == []
    table = found.table()
    assert "the validation split" in table and "2 images of the val split have no mask and are not used" in table
    assert "The test split (6 images, 4 with a mask) is not used" in table and "`--validation test`" in table
    found = discover(tmp_path, validation="test", unlabeled_root=tmp_path / "valid")
    assert [len(ids) for ids in ids_of(found)] == [
        6,
        7,
        4,
    ] and "the test split, as set by `validation`" in found.table()
    found = discover(tmp_path, validation=0.5)
    assert [len(ids) for ids in ids_of(found)] == [3, 2, 3] and "The val split (5 images" in found.table()


def test_a_list_names_the_validation_images(tmp_path):
    write_set(tmp_path / "set")
    listed = tmp_path / "list.txt"
    listed.write_text("p03\nimages/p01.jpg\n\n")
    found = discover(tmp_path / "set", validation=listed)
    assert found.held_out == list(found.evaluation["id"]) == ["p01", "p03"] and len(found.labeled) == 8
    assert "the images listed in list.txt" in found.table()
    for text, said in (
        ("p03\np12\nx\n", "2 of 3 listed images are not labeled images .*: p12, x;"),
        ("", "it is empty"),
    ):
        listed.write_text(text)
        with pytest.raises(ValueError, match=said):
            discover(tmp_path / "set", validation=str(listed))
    listed.write_text("\n".join(f"p{i:02d}" for i in range(10)))
    with pytest.raises(ValueError, match="All 10 labeled images .* none is left to train on"):
        discover(tmp_path / "set", validation=str(listed))


def test_a_missing_list_is_not_needed_with_a_validation_split(tmp_path):
    write_set(tmp_path, 3, 0, "train")
    write_set(tmp_path, 2, 0, "val", start=3)
    with pytest.raises(ValueError, match=r"no such file. By default, the validation split of .* is used"):
        discover(tmp_path, validation="run/validation.txt")


def test_groups_stay_whole_and_their_unlabeled_images_stay_out(tmp_path):
    for patient in "abcd":
        for i in range(5):
            write_image(tmp_path / "images" / f"{patient}_{i}.jpg")
            if i < 3:
                write_mask(tmp_path / "masks" / f"{patient}_{i}.png")
    found = discover(tmp_path, group_by=r"images/(\w)_")
    (held,) = {name[0] for name in found.evaluation["id"]}
    assert len(found.evaluation) == 3 and len(found.labeled) == 9 and len(found.unlabeled) == 6
    assert not {name for name in [*found.labeled["id"], *found.unlabeled["id"]] if name[0] == held}
    assert f"Held out as whole groups: {held} (of 4 groups)." in found.table()
    assert "2 unlabeled images of these groups are skipped." in found.table()
    without = discover(tmp_path).table()
    (pattern,) = re.findall("`--group_by '(.*)'`", without)
    assert "numbered frames of 4 sequences (a, b, c ..." in without
    assert len(discover(tmp_path, group_by=pattern).evaluation) == 3
    assert "`group_by` has no effect" in discover(tmp_path, group_by="x", validation="none").table()


def test_additional_unlabeled_images_are_added_once(tmp_path):
    write_set(tmp_path / "set")
    write_files(tmp_path / "more", "x/q.jpg", "masks/q.png")
    write_image(tmp_path / "more" / "p10.jpg", (9, 11))  # differs from the set's image with this name
    found = discover(tmp_path / "set", unlabeled_root=tmp_path / "more")
    assert found.unlabeled["id"][5:] == ["more/p10", "more/x/q"] and len(found.unlabeled) == 7
    found = discover(tmp_path / "set", unlabeled_root=tmp_path / "set" / "images")
    assert len(found.unlabeled) == 5 and "15 images of" in found.table() and "are not added" in found.table()


@pytest.mark.parametrize("bring", [os.link, shutil.copy])
def test_converted_photographs_are_not_added_as_unlabeled(tmp_path, bring):
    """`cps-hf convert` links or copies images; held-out ones must not become training images."""
    write_set(tmp_path / "set", unlabeled=0)
    (tmp_path / "photos").mkdir()
    for image in (tmp_path / "set" / "images").iterdir():
        bring(image, tmp_path / "photos" / image.name)
    write_files(tmp_path / "photos", "new_1.jpg", "new_2.jpg")
    found = discover(tmp_path / "set", unlabeled_root=tmp_path / "photos")
    assert sorted(found.unlabeled["id"]) == ["new_1", "new_2"] and len(found.evaluation) > 0
    assert f"{len(found.labeled) + len(found.evaluation)} images of" in found.table()


def test_equal_names_in_two_folders_stay_distinct(tmp_path):
    write_set(tmp_path, folder="train", labeled=6, unlabeled=1)
    write_set(tmp_path, labeled=6, unlabeled=1)
    found = discover(tmp_path)
    ids = {*found.labeled["id"], *found.evaluation["id"]}
    assert len(ids) == 12 and {"train/images/p00", "images/p00"} <= ids


def test_a_roboflow_export(tmp_path):
    for split, count in (("train", 5), ("valid", 2)):
        for i in range(count):
            write_image(tmp_path / split / f"{i}_jpg.rf.{split}.jpg")
            write_mask(tmp_path / split / f"{i}_jpg.rf.{split}_mask.png", BANDS * 2)
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, car\n2, tree\n")
    found = discover(tmp_path)
    assert found.class_names == ("background", "car", "tree") and [len(found.labeled), len(found.evaluation)] == [5, 2]
    assert "No labeled training image has: car." in found.table()


def test_a_cvat_export(tmp_path):
    colors = [(0, 0, 0), (250, 50, 83)]
    for i in range(6):
        write_image(tmp_path / "JPEGImages" / f"{i}.jpg")
    for i in range(5):
        write_mask(tmp_path / "SegmentationClass" / f"{i}.png", BANDS, colors)
        write_mask(tmp_path / "SegmentationObject" / f"{i}.png", BANDS, colors)
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:250,50,83::\n")
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "default.txt").write_text("0\n1\n2\n3\n4\n")
    found = discover(tmp_path)
    assert [len(ids) for ids in ids_of(found)] == [4, 1, 1] and found.class_names == ("background", "road")
    assert all(np.array_equal(label, BANDS) for label in labels_of(found.labeled).values())


def test_options_of_the_folder_loader_are_supported(tmp_path):
    for i in range(5):
        write_image(tmp_path / "shots" / f"{i}.png", (16, 20))
        write_mask(tmp_path / "truth" / f"{i}_t.png", BANDS * 4)
    options = {"images": "shots", "masks": "truth", "mask_suffix": "_t", "class_names": ["a", "b"]}
    options |= {"values": {"0": 0, "4": 1}, "resize_masks": True, "palette": [[0, 0, 0], [9, 9, 9]]}
    found = discover(tmp_path, load_options=options)
    encoding = LabelEncoding.from_feature(found.labeled.features["label"])
    assert encoding == LabelEncoding(
        ("a", "b"), values={0: 0, 4: 1}, palette=((0, 0, 0), (9, 9, 9)), resize_masks=True
    )
    assert {label.shape for label in labels_of(found.labeled).values()} == {(16, 20)}
    with pytest.raises(ValueError, match="`load_options` of an own folder: no 'split', only images, masks"):
        discover(tmp_path, load_options={"split": "train"})


def test_an_unreadable_mask_is_reported_and_never_held_out(tmp_path):
    write_set(tmp_path, labeled=6)
    (tmp_path / "masks" / "p02.png").write_bytes(b"damaged")
    for seed in range(6):
        found = discover(tmp_path, seed=seed)
        assert "p02" in found.labeled["id"] and "WARNING: 1 masks cannot be read." in found.table()


def test_output_of_earlier_runs_is_skipped(tmp_path):
    write_files(tmp_path, *(f"{i}.jpg" for i in range(6)), *(f"masks/{i}.png" for i in range(5)))
    write_files(tmp_path, "outputs/run/pictures/x.png", "outputs/run/best/predictions.png", "other/y.png")
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "outputs" / "run" / name).write_text("")
    found = discover(tmp_path)
    assert found.unlabeled["id"] == ["5", "other/y"] and found.passed_over["of earlier runs"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"validation": "0"}, "`validation` must be a share between 0 and 1, a file .* got '0'"),
        ({"validation": "1.5"}, "got '1.5'"),
        ({"validation": "nowhere.txt"}, "got 'nowhere.txt', and there is no such file"),
        ({"validation": "test"}, "`validation` test: .* has no images with masks in such a split"),
        ({"group_by": "("}, "is not a regular expression"),
        ({"group_by": "images"}, "`group_by` finds a single group, 'images', in all 10 labeled images"),
        ({"unlabeled_root": "nowhere"}, "`unlabeled_root`: No folder nowhere"),
        ({"class_names": ["a"]}, "Masks contain 1, .* names classes 0 to 0: a"),
        ({"class_names": "nowhere.json"}, "Cannot read class names from nowhere.json"),
        ({"class_names": "nowhere.txt"}, "nowhere.txt is not UTF-8 text"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        discover(write_set(tmp_path), **options)


def test_masks_only_in_other_splits_are_an_error(tmp_path):
    write_set(tmp_path, 0, 3, "train")
    write_set(tmp_path, 3, 0, "val")
    with pytest.raises(ValueError, match="3 images to train on, and none of them has a mask .* 3 in val, 0 in test"):
        discover(tmp_path)
