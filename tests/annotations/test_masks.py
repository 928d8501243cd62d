"""Mask files: by colour, by number, in black and white, one per object, and Roboflow's."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support.convert import assert_error, masks_of, picture
from support.exports import objects

from cps_hf.annotations.label_maps import read_color_table
from cps_hf.annotations.project import ReadOptions
from cps_hf.annotations.readers import read_project

IDS = (np.indices((20, 30)).sum(0) // 17 % 3).astype(np.uint8)


def write(tmp_path, values, name="a", masks="masks", image="images/{}.png"):
    source = tmp_path / "set"
    picture(source / image.format(name))
    (source / masks).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(source / masks / f"{name}.png")
    return source


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", '{"road": [128, 64, 128], "sky": [70, 130, 180]}'),
        ("t.json", '{"#804080": "road", "#4682b4": "sky"}'),
        ("t.json", '{"128, 64, 128": "road", "4682B4": "sky"}'),
        ("class_dict.csv", "name,r,g,b\nroad,128,64,128\nsky,70,130,180\n"),
        ("t.csv", "\ufeffroad, 128, 64, 128\nsky, 70, 130, 180"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:128,64,128::\nsky:70,130,180::\n"),
        ("t.txt", "road:128,64,128\nsky:70,130,180"),
    ],
)
def test_color_tables_are_read_in_every_common_format(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_color_table(tmp_path / name) == {(128, 64, 128): "road", (70, 130, 180): "sky"}


@pytest.mark.parametrize("text", ["[1]", '{"road": [1, 2]}', '{"road": [1, 2, 300]}', '{"#80408": "road"}', "{", "{}"])
def test_an_invalid_color_table_is_an_error(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match="t.json is not a colour table .*expected JSON like"):
        read_color_table(tmp_path / "t.json")


def test_colors_map_to_labels_and_null_is_ignored(tmp_path):
    colors = np.array([(0, 0, 0), (128, 64, 128), (9, 9, 9)], np.uint8)
    source = write(tmp_path, colors[IDS])
    table = tmp_path / "table.json"
    table.write_text('{"#000000": "other", "#804080": "road", "#090909": null}')
    names, masks = masks_of(source, format="colors", colors=table)
    assert names == ("other", "road") and np.array_equal(masks["a"], np.array([0, 1, 255])[IDS])
    table.write_text('{"#000000": "other", "#804080": "road"}')
    assert_error(source, r"\(9, 9, 9\) \(\d+ pixels\). Fix the mask, or add", format="colors", colors=table)
    assert_error(source, "RGB masks need a colour table, `--colors FILE`", format="colors")


def test_ids_start_at_first_id_and_lower_values_have_no_label(tmp_path):
    source = write(tmp_path, IDS)
    zero = {"format": "ids", "classes": ("x", "y", "z")}
    assert np.array_equal(masks_of(source, **zero)[1]["a"], IDS) and masks_of(source, **zero)[0] == ("x", "y", "z")
    one = {"format": "ids", "classes": ("y", "z"), "first_id": 1}
    names, masks = masks_of(source, **one)
    assert names == ("background", "y", "z") and np.array_equal(masks["a"], IDS)
    names, masks = masks_of(source, **one, table={"background": "ignored"})
    assert names == ("y", "z") and np.array_equal(masks["a"], np.array([255, 0, 1])[IDS])
    source = write(tmp_path, np.where(IDS == 2, 255, IDS))
    assert np.array_equal(masks_of(source, **zero)[1]["a"], np.array([0, 1, 255])[IDS])
    assert_error(source, "need the names of their classes", format="ids")
    assert_error(write(tmp_path, IDS * 7), r"contains 7 \(", **zero)


def test_black_and_white_is_two_classes(tmp_path):
    for white in (255, 1):
        names, masks = masks_of(write(tmp_path, (IDS == 1) * white), format="binary", classes=("ground", "crack"))
        assert names == ("ground", "crack") and np.array_equal(masks["a"], IDS == 1)
    assert masks_of(write(tmp_path, (IDS == 1) * 255), format="binary")[0] == ("background", "foreground")
    assert_error(write(tmp_path, (IDS == 1) * 128), r"contains 128 \(", format="binary")
    assert_error(write(tmp_path, IDS), "`--classes` names 3", format="binary", classes=("a", "b", "c"))


def test_grey_masks_may_have_three_equal_channels(tmp_path):
    for mode in ("RGB", "RGBA"):
        source = write(tmp_path / mode, (IDS == 1) * 255)
        path = source / "masks" / "a.png"
        Image.open(path).convert(mode).save(path)
        assert np.array_equal(masks_of(source, format="binary")[1]["a"], IDS == 1)
        (source / "masks" / "a").mkdir()
        path.rename(source / "masks" / "a" / "crack.png")
        assert np.array_equal(masks_of(source, format="objects")[1]["a"], IDS == 1)


@pytest.mark.parametrize(
    ("color", "said"), [((255, 0, 0, 255), "is colored; .*`--format colors"), ((0, 0, 0, 0), "transparent pixels")]
)
def test_colored_and_transparent_masks_are_no_grey_masks(tmp_path, color, said):
    source = write(tmp_path, (IDS == 1) * 255)
    pixels = np.zeros((20, 30, 4), np.uint8) + np.array(color, np.uint8)
    Image.fromarray(pixels).save(source / "masks" / "a.png")
    assert_error(source, said, format="binary")


@pytest.mark.parametrize(
    ("options", "values", "said"),
    [
        ({"format": "binary"}, IDS * 9, "contains 9 .*For a value per class use `--format ids`"),
        ({"format": "ids", "classes": ("x", "y"), "first_id": 1}, IDS * 9, "names the values 1 to 2, .*`--first_id`"),
        ({"format": "colors"}, np.array([(0, 0, 0), (9, 9, 9), (1, 2, 3)])[IDS], "or add its colours to .*`--colors`"),
        ({"format": "objects"}, np.zeros((20, 30, 4)), "Save the mask of one object as grey values"),
        ({"format": "binary"}, np.zeros((40, 60)), "is 40 x 60. Each pixel needs a label: replace one of the files"),
    ],
)
def test_errors_in_masks_advise_options_of_the_command(tmp_path, options, values, said):
    source = write(tmp_path, values)
    (source / "masks" / "a").mkdir()
    if options["format"] == "colors":
        options = {**options, "colors": tmp_path / "table.csv"}
        options["colors"].write_text("x,0,0,0\n")
    if options["format"] == "objects":
        Image.fromarray(np.zeros((20, 30, 4), np.uint8), mode="CMYK").save(source / "masks" / "a" / "crack.tif")
        (source / "masks" / "a.png").unlink()
    with pytest.raises(ValueError, match=said) as error:
        masks_of(source, **options)
    assert not re.search("load_options|`colors|`values|class_names|resize_masks", str(error.value))


def test_two_masks_of_an_image_or_two_images_of_a_mask_are_an_error(tmp_path):
    source = write(tmp_path, (IDS == 1) * 255)
    (source / "masks" / "a.tif").write_bytes((source / "masks" / "a.png").read_bytes())
    assert_error(source, "Two masks belong to the image 'a': .*a.png and .*a.tif. Remove one", format="binary")
    (source / "masks" / "a.tif").unlink()
    picture(source / "images" / "a.jpg")
    assert_error(source, "a.png fits two images: .*a.jpg and .*a.png. Remove or rename one", format="binary")
    (source / "masks" / "a_road.png").write_bytes((source / "masks" / "a.png").read_bytes())
    (source / "masks" / "a.png").unlink()
    assert_error(source, "Two images are called 'a'", format="objects")
    (source / "images" / "a.jpg").rename(source / "images" / "b.jpg")
    assert masks_of(source, format="objects")[0] == ("background", "road")


def test_unknown_values_in_masks_of_tools_name_the_tools_table(tmp_path):
    source = write(tmp_path, IDS, name="a_mask", masks="train", image="train/a.jpg")
    (source / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, road\n")
    assert_error(source, r"contains 2 \(.*_classes.csv lists no such value. Export again, or fix the mask")
    source = write(tmp_path / "cvat", np.array([(0, 0, 0), (9, 9, 9), (1, 2, 3)])[IDS], masks="SegmentationClass")
    (source / "labelmap.txt").write_text("background:0,0,0::\nroad:9,9,9::\n")
    assert_error(source, r"contains \(1, 2, 3\) .*labelmap.txt lists no such colour. Export again, or add it there")


def test_object_masks_without_images_are_an_error(tmp_path):
    objects(tmp_path)
    shutil.rmtree(tmp_path / "images")
    assert_error(tmp_path, "contains no images besides the masks.*`--images DIR`", format="objects")


def test_masks_are_matched_with_images_in_every_common_layout(tmp_path):
    words = {"format": "binary"}
    white = np.full((20, 30), 255)
    inner = write(tmp_path / "1", white, masks="train/masks", image="train/images/{}.jpg")
    assert [*masks_of(inner, **words)[1]] == ["train/a"]
    outer = write(tmp_path / "2", white, masks="masks/train", image="images/train/{}.jpg")
    assert [*masks_of(outer, **words)[1]] == ["train/a"]
    beside = write(tmp_path / "3", white, name="a_mask", masks=".", image="a.jpg")
    assert [*masks_of(beside, **words, mask_suffix="_mask", masks=".")[1]] == ["a"]
    named = write(tmp_path / "4", white, name="a_gt", masks="gt", image="rgb/a_img.png")
    words |= {"images": named / "rgb", "masks": "gt", "mask_suffix": "_gt", "image_suffix": "_img"}
    assert [*masks_of(named, **words)[1]] == ["a_img"]  # a mask is written under its image's name
    project = read_project(write(tmp_path / "5", white, name="b"), ReadOptions(), format="binary")
    picture(tmp_path / "5" / "set" / "images" / "c.png")
    project = read_project(tmp_path / "5" / "set", ReadOptions(), format="binary")
    assert "1 images have no mask and are skipped: c" in project.notes
    assert_error(
        tmp_path / "5" / "set", "contains no masks: looked for a folder 'labels'", format="binary", masks="labels"
    )


def test_lossy_masks_are_an_error_and_stored_size_ones_rotate(tmp_path):
    source = write(tmp_path, np.zeros((20, 30)))
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(source / "masks" / "a.png", format="JPEG")
    assert_error(source, "is stored as JPEG, which changes values", format="binary")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated clockwise by viewers
    picture(source / "images" / "a.png", exif=exif)
    Image.fromarray(((IDS == 1) * 255).astype(np.uint8)).save(source / "masks" / "a.png")
    assert np.array_equal(masks_of(source, format="binary")[1]["a"], np.rot90(IDS == 1, -1))


@pytest.mark.parametrize(
    "layout",
    ["{image}/{label}.png", "{image}/{label}_{number}.png", "{label}/{image}.png", "{image}_{label}_{number}.png"],
)
def test_object_files_get_image_and_class_from_their_path(tmp_path, layout):
    objects(tmp_path, layout)
    names, masks = masks_of(tmp_path, format="objects")
    assert names == ("background", "Bäume", "car", "road") and {*masks} == {"a", "ümlaut b"}
    assert all((masks["a"] == index).any() for index in range(4))


def test_with_one_class_every_file_is_an_object_of_it(tmp_path):
    objects(tmp_path, "{image}/3fa85f64{number}.png")
    options = {"format": "objects", "classes": ("background", "nucleus")}
    names, masks = masks_of(tmp_path, **options, table={"classes": ("background", "nucleus")})
    assert names == ("background", "nucleus") and 0 < (masks["a"] == 1).sum() < masks["a"].size
    (tmp_path / "masks" / "nobody_road.png").write_bytes((next((tmp_path / "masks").rglob("*.png"))).read_bytes())
    assert_error(tmp_path, "1 of 6 masks .* belong to no image or name no class: nobody_road.png", **options)
    (tmp_path / "masks" / "nobody_road.png").unlink()
    many = np.arange(48 * 64).reshape(48, 64).astype(np.uint8)
    Image.fromarray(many).save(next((tmp_path / "masks" / "a").iterdir()))
    assert_error(tmp_path, "the mask of one object has 0 and one other value", **options)
    assert_error(tmp_path, "nothing contains no masks", format="objects", masks="nothing")


def test_roboflows_splits_must_name_the_same_classes(tmp_path):
    source = write(tmp_path, IDS, name="a_mask", masks="train", image="train/a.jpg")
    for split, text in (
        ("train", "Pixel Value, Class\n0, background\n1, road\n2, car\n"),
        ("test", "Pixel Value, Class\n0, x\n"),
    ):
        (source / split).mkdir(exist_ok=True)
        (source / split / "_classes.csv").write_text(text)
    assert_error(source, "name different classes: the splits are from two exports")
    (source / "test" / "_classes.csv").write_text("nonsense\nx\n")
    assert_error(source, "expected the columns")
    (source / "test" / "_classes.csv").unlink()
    names, masks = masks_of(source)
    assert names == ("background", "road", "car") and np.array_equal(masks["train/a"], IDS)


def test_the_format_of_plain_pngs_is_not_detected(tmp_path):
    source = write(tmp_path, IDS)
    assert_error(
        source, r"contains no export whose format is recognized. Set it: `--format coco\|.*masks as PNGs: colors"
    )
    (source / "a.json").write_text(json.dumps({"shapes": [], "imagePath": "a.png"}))
    (source / "b.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    assert_error(source, "may be coco or labelme")
    assert_error(source / "a.json", "reads a folder, but .* is a file", format="binary")
    (tmp_path / "x.zip").touch()
    assert_error(tmp_path / "x.zip", "is an archive. Unpack it.*: `unzip x.zip -d x`")
    assert_error(tmp_path / "nowhere", "No such file or folder")
    assert_error(source, "`--images`: no folder", images=tmp_path / "nowhere")
