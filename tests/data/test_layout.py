"""Images, masks and splits recognized by names, and the error messages for ambiguous folders."""

import unicodedata

import pytest
from support.own_folders import write_files, write_image, write_mask

from cps_hf.data.layout import find_layout, images_alone


def pairs_of(root, **options):
    """{image: (mask or none, split)}, paths below the root."""
    layout = find_layout(root, **options)
    return {pair.path: (pair.mask and pair.mask.relative_to(root).as_posix(), pair.split) for pair in layout.pairs}


LAYOUTS = {
    "two folders": {"images/a.jpg": ("masks/a.png", None), "images/b.jpg": (None, None)},
    "other names": {"img/a.jpg": ("ann/a.png", None), "img/b.jpg": (None, None)},
    "annotations": {"Images/a.jpg": ("Annotations/a.png", None)},
    "ground truth": {"image/a.png": ("GroundTruth/a.png", None)},
    "gt": {"imgs/a.bmp": ("gt/a.bmp", None)},
    "splits above": {
        "train/images/a.jpg": ("train/masks/a.png", "train"),
        "valid/images/a.jpg": ("valid/masks/a.png", "val"),
        "test/images/a.jpg": (None, "test"),
    },
    "splits below": {
        "images/train/a.jpg": ("labels/train/a.png", "train"),
        "images/train/b.jpg": (None, "train"),
        "images/val/c.jpg": ("labels/val/c.png", "val"),
    },
    "splits of images alone": {
        "images/train/a.jpg": ("masks/a.png", "train"),
        "images/val/b.jpg": ("masks/b.png", "val"),
    },
    "training and validation": {
        "training/images/a.jpg": ("training/labels/a.png", "train"),
        "validation/images/b.jpg": ("validation/labels/b.png", "val"),
    },
    "one word for both": {"train/a_01.jpg": ("train_masks/a_01_mask.gif", "train"), "test/b.jpg": (None, "test")},
    "annot": {"train/a.png": ("trainannot/a.png", "train"), "val/b.png": ("valannot/b.png", "val")},
    "kinds in names": {"Train/Urban/images_png/1.png": ("Train/Urban/masks_png/1.png", "train")},
    "nested": {
        "images/ride 1/day/a.jpg": ("masks/ride 1/day/a.png", None),
        "images/ride 2/day/a.jpg": (None, None),
    },
    "folders within": {"site 1/images/a.jpg": ("site 1/masks/a.png", None), "site 2/images/a.jpg": (None, None)},
    "masks within": {"images/a.jpg": ("images/masks/a.png", None), "images/b.jpg": (None, None)},
    "packed": {"my set/data/images/a.jpg": ("my set/data/masks/a.png", None)},
    "VOC": {"VOC2012/JPEGImages/a.jpg": ("VOC2012/SegmentationClass/a.png", None)},
    "images in the folder itself": {"a.jpg": ("masks/a.png", None), "b.jpg": (None, None)},
    "a folder whose names fit": {"photos of may/a.jpg": ("masks/a.png", None), "photos of may/b.jpg": (None, None)},
    "unlabeled": {"images/a.jpg": ("masks/a.png", None), "unlabeled/a.jpg": (None, None)},
    "unlabeled beside": {"a.jpg": ("a_mask.png", None), "unlabeled/a.jpg": (None, None)},
    "Roboflow": {
        "train/a_jpg.rf.1f2.jpg": ("train/a_jpg.rf.1f2_mask.png", "train"),
        "train/b_jpg.rf.3e4.jpg": (None, "train"),
        "valid/c_jpg.rf.5d6.jpg": ("valid/c_jpg.rf.5d6_mask.png", "val"),
    },
    "side by side, both have an ending": {"1_sat.jpg": ("1_mask.png", None), "2_sat.jpg": (None, None)},
    "told by kind": {"a.jpg": ("a.png", None), "b.jpg": (None, None)},
    "endings of masks": {
        "images/a.jpg": ("masks/a_masks.png", None),
        "images/b.jpg": ("masks/b-label.png", None),
        "images/c.jpg": ("masks/c_GT.PNG", None),
        "images/d.JPG": ("masks/d_labelIds.png", None),
        "images/e.jpeg": ("masks/e_L.png", None),
        "images/f.jpg": ("masks/f.jpg.png", None),
    },
    "endings of images": {
        "images/a_image.png": ("masks/a.png", None),
        "images/b_leftImg8bit.png": ("masks/b.png", None),
    },
    "beginnings": {"images/image_1.png": ("masks/mask_1.png", None), "images/image_2.png": (None, None)},
    "endings that nobody knows": {
        "images/21_training.tif": ("masks/21_manual1.gif", None),
        "images/22_training.tif": ("masks/22_manual1.gif", None),
    },
    "a mask's ending in an image's name": {"images/road_label.jpg": ("masks/road_label.png", None)},
    "dots and spaces": {"images/a.v2 (1).jpg": ("masks/a.v2 (1).png", None)},
    "masks in a folder named by their kind": {"images/a.jpg": ("annotations/trimaps/a.png", None)},
    "images and masks in folders of one depth": {"images/original/a.jpg": ("masks/binary/a.png", None)},
    "splits of masks alone": {
        "images/a.jpg": ("masks/train/a.png", "train"),
        "images/b.jpg": ("masks/val/b.png", "val"),
    },
    "masks of a folder called unlabeled": {"images/unlabeled/a.jpg": ("masks/unlabeled/a.png", None)},
    "a split's name deeper": {"images/field/test/a.jpg": ("masks/field/test/a.png", None)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_common_layouts(tmp_path, name):
    expected = LAYOUTS[name]
    write_files(tmp_path, *expected)
    for mask, _ in expected.values():
        if mask:
            write_mask(tmp_path / mask)
    assert pairs_of(tmp_path) == expected


def test_ids_are_short_and_the_layout_is_described(tmp_path):
    write_files(
        tmp_path, "train/images/x/a.jpg", "train/masks/x/a_mask.png", "val/images/b.jpg", "val/masks/b_mask.png"
    )
    layout = find_layout(tmp_path)
    assert [pair.id for pair in layout.pairs] == ["x/a", "b"]
    assert layout.sentence == (
        "images in images/, masks in masks/, named like their images with `_mask`; splits train, val"
    )


def test_names_match_in_either_unicode_form(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Köln straße") for form in ("NFC", "NFD"))
    write_files(tmp_path, f"images/{apart}/{apart} 道路.jpg", f"masks/{composed}/{composed} 道路_mask.png")
    (pair,) = find_layout(tmp_path).pairs
    assert pair.mask is not None and unicodedata.normalize("NFC", pair.id) == f"{composed}/{composed} 道路"


def test_voc_lists_define_the_splits(tmp_path):
    names = [f"JPEGImages/{n}.jpg" for n in "abcd"] + [f"SegmentationClass/{n}.png" for n in "abc"]
    write_files(tmp_path, *names, "SegmentationObject/a.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("a\nb\nc\nd\n")  # CVAT's
    assert {split for _, split in pairs_of(tmp_path).values()} == {None}
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\r\n\r\n")
    splits = {path: split for path, (_, split) in pairs_of(tmp_path).items()}
    assert splits == {
        "JPEGImages/a.jpg": "train",
        "JPEGImages/b.jpg": "val",
        "JPEGImages/c.jpg": None,
        "JPEGImages/d.jpg": None,
    }
    assert find_layout(tmp_path).passed_over["images elsewhere, in SegmentationObject"] == 1


def test_junk_is_skipped_and_counted(tmp_path):
    write_files(tmp_path, "images/a.jpg", "masks/a.png", "notes/sketch.jpg")
    for name in (".DS_Store", "Thumbs.db", "images/._a.jpg", "images/.hidden.jpg", "read me.md", "images/a.xmp"):
        (tmp_path / name).write_bytes(b"junk")
    write_image(tmp_path / "__MACOSX" / "images" / "a.jpg")
    layout = find_layout(tmp_path)
    assert [pair.path for pair in layout.pairs] == ["images/a.jpg"]
    assert layout.passed_over == {
        "hidden or system files": 5,
        "unsupported file types (.md, .xmp)": 2,
        "images elsewhere, in notes": 1,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"images": "photos", "masks": "drawn"}, {"photos/a.jpg": ("drawn/a_mask.png", None)}),
        ({"masks": "drawn"}, {"photos/a.jpg": ("drawn/a_mask.png", None)}),
        ({"images": "photos", "masks": "drawn", "mask_suffix": "_2"}, {"photos/a.jpg": ("drawn/a_2.png", None)}),
    ],
)
def test_folders_and_suffixes_may_be_given(tmp_path, options, expected):
    write_files(tmp_path, "photos/a.jpg", "depth/a.jpg")
    write_mask(tmp_path / "drawn" / ("a_2.png" if "mask_suffix" in options else "a_mask.png"))
    if options.get("images") is None:
        (tmp_path / "depth" / "a.jpg").unlink()
    assert pairs_of(tmp_path, **options) == expected


def test_a_given_folder_may_be_nested_or_the_root(tmp_path):
    write_files(tmp_path / "1", "train/raw/photos/a.jpg", "train/raw/drawn masks/a.png", "masks/a.png")
    options = {"images": "raw/photos", "masks": "raw/drawn masks"}
    assert pairs_of(tmp_path / "1", **options) == {"train/raw/photos/a.jpg": ("train/raw/drawn masks/a.png", "train")}
    write_files(tmp_path / "2", "a.jpg", "drawn masks/a.png")
    assert pairs_of(tmp_path / "2", images=".", masks="drawn masks") == {"a.jpg": ("drawn masks/a.png", None)}


def test_a_given_suffix_identifies_masks_side_by_side(tmp_path):
    write_files(tmp_path, "a.png", "b.png", "b_label.png")
    write_mask(tmp_path / "a_t.png")
    assert pairs_of(tmp_path, mask_suffix="_t")["a.png"] == ("a_t.png", None)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), r"No image in .*: looked for \.jpg"),
        (
            ("photos/a.jpg", "photos/b.jpg"),
            r"Nothing in .* looks like masks; found images in photos \(2 \.jpg\)\. Exp",
        ),
        (
            ("images/a.jpg", "truth/a.png"),
            r"images \(1 \.jpg\), truth \(1 \.png\).*{\"images\": \"images\", \"masks\": \"truth\"}",
        ),
        (("images/a.jpg", "masks/a.png", "masks/b.png"), r"1 of 2 masks in .* belong to no image: masks/b\.png"),
        (
            ("train/images/a.jpg", "train/masks/a.png", "train/masks/b.png", "val/images/b.jpg"),
            r"1 of 2 masks in .* belong to no image: train/masks/b\.png",
        ),
        (("a.jpg", "a_mask.png", "b_mask.png"), r"1 of 2 masks in .* belong to no image: b_mask\.png"),
        (
            ("images/a.jpg", "masks/a_color.png", "masks/a.png", "masks/a_mask.png"),
            r"images/a\.jpg: masks/a\.png and masks/a_mask\.png\. Choose one: .*\"mask_suffix\"",
        ),
        (
            ("images/a.jpg", "masks/a.png", "labels/a.png"),
            r"1 images in .* have more than one mask, e\.g\. images/a\.jpg: .* '{\"masks\": \"labels\"}",
        ),
        (
            ("images/a.jpg", "images/a.png", "masks/a.png"),
            r"masks/a\.png .* matches more than one image: images/a\.jpg an",
        ),
        (("images/a.jpg", "masks/a.jpg"), r"1 of 1 masks .* may change values: masks/a\.jpg.*save them as PNG"),
        (
            ("shots/a.jpg", "depth/a.jpg", "masks/a.png"),
            r"Masks were found .*, but not their images: .*match equally.*\"images\": \"(shots|depth)\"",
        ),
        (("shots/x.jpg", "masks/a.png"), "no image has the name of a mask"),
        (
            ("leftImg8bit/a.png", "gtFine/a_gtFine_labelIds.png"),
            "Cityscapes' folders: read it with `--dataset cityscapes",
        ),
    ],
)
def test_ambiguous_layouts_report_findings_and_advice(tmp_path, files, said):
    write_files(tmp_path, *files)
    with pytest.raises(ValueError, match=said) as error:
        find_layout(tmp_path)
    assert "\n" not in str(error.value)


def test_boxes_and_lists_are_not_masks(tmp_path):
    write_files(tmp_path, "images/a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 1 1")
    with pytest.raises(ValueError, match=r"labels/a\.txt: boxes and polygons must first be converted to masks"):
        find_layout(tmp_path)
    (tmp_path / "images" / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="--dataset folder --data_root .*images`"):
        find_layout(tmp_path)


def test_a_missing_folder_and_a_wrong_name_are_errors(tmp_path):
    with pytest.raises(ValueError, match="No folder .*nowhere"):
        find_layout(tmp_path / "nowhere")
    write_files(tmp_path, "images/a.jpg", "masks/a.png")
    with pytest.raises(ValueError, match=r"`masks`: no folder 'truth' .*folders there: images, masks"):
        find_layout(tmp_path, masks="truth")


def test_unlabeled_images_may_be_anywhere_without_masks(tmp_path):
    write_files(tmp_path, "a.jpg", "a_mask.png", "x/b.jpg", "images/c_mask.jpg", "masks/c.png", "overlays/a.jpg")
    assert sorted(pair.id for pair in images_alone(tmp_path)) == ["a", "c_mask", "x/b"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="`unlabeled_root`: no image in"):
        images_alone(tmp_path / "none")
    with pytest.raises(ValueError, match="`unlabeled_root`: No folder"):
        images_alone(tmp_path / "nowhere")


def test_test_masks_without_images_are_ignored(tmp_path):
    write_files(tmp_path, "train/images/a.jpg", "train/masks/a.png", "test/masks/z.png")
    assert len(pairs_of(tmp_path)) == 1
