"""CVAT: the shapes of its XML, their order, and its masks with a color table."""

import numpy as np
import pytest
from PIL import Image
from support.convert import assert_error, masks_of, picture
from support.exports import runs_of

HEIGHT, WIDTH = 40, 60


def write(tmp_path, shapes, labels=("road", "car"), meta="task"):
    source = tmp_path / "export"
    picture(source / "images" / "a.png", HEIGHT, WIDTH)
    names = "".join(f"<label><name>{name}</name></label>" for name in labels)
    text = f"<annotations><version>1.1</version><meta><{meta}><labels>{names}</labels></{meta}></meta>"
    text += f'<image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image></annotations>'
    (source / "annotations.xml").write_text(text, encoding="utf-8")
    return source


def drawn(tmp_path, shape):
    return masks_of(write(tmp_path, shape))[1]["a"] == 1


def test_every_shape_is_drawn_as_it_looks(tmp_path):
    box = drawn(tmp_path, '<box label="road" xtl="5" ytl="10" xbr="25" ybr="20" occluded="0" z_order="0"/>')
    assert box[10:20, 5:25].all() and box.sum() == 200
    turned = '<box label="road" xtl="10" ytl="10" xbr="30" ybr="20" rotation="90.0" z_order="0"></box>'
    assert drawn(tmp_path, turned)[5:25, 15:25].all()
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    ellipse = drawn(tmp_path, '<ellipse label="road" cx="30" cy="20" rx="20" ry="8" z_order="0"/>')
    assert np.array_equal(ellipse, ((x - 30) / 20) ** 2 + ((y - 20) / 8) ** 2 <= 1)
    ellipse = drawn(tmp_path, '<ellipse label="road" cx="30" cy="20" rx="18" ry="8" rotation="90" z_order="0"/>')
    assert np.array_equal(ellipse, ((x - 30) / 8) ** 2 + ((y - 20) / 18) ** 2 <= 1)
    line = drawn(tmp_path, '<polyline label="road" points="10.0,20.0;50.0,20.0"/>')
    assert line[15:25, 10:50].all() and abs(line.sum() - 400 - 25 * np.pi) < 10
    points = drawn(tmp_path, '<points label="road" points="10.0,10.0;40.0,30.0"/>')
    assert np.array_equal(points, np.minimum(np.hypot(x - 10, y - 10), np.hypot(x - 40, y - 30)) <= 5)
    pixels = np.random.default_rng(0).random((6, 9)) < 0.5
    runs = ", ".join(map(str, runs_of(pixels.ravel())))
    mask = drawn(tmp_path, f'<mask label="road" rle="{runs}" left="3" top="4" width="9" height="6" z_order="0"/>')
    assert np.array_equal(mask[4:10, 3:12], pixels) and mask.sum() == pixels.sum()


def test_z_order_comes_first_then_file_order_or_area(tmp_path):
    box = '<box label="{}" xtl="0" ytl="0" xbr="{}" ybr="10" z_order="{}"/>'
    source = write(
        tmp_path, box.format("car", 20, 1) + box.format("road", 30, 0) + box.format("road", 10, 1), meta="project"
    )
    names, masks = masks_of(source)
    assert names == ("background", "road", "car")
    assert [int(masks["a"][5, column]) for column in (5, 15, 25, 35)] == [1, 2, 1, 0]
    assert masks_of(source, overlap="area")[1]["a"][5, 5] == 1
    assert masks_of(source, table={"background": "ignored"})[1]["a"][5, 35] == 255


def test_attributes_and_tags_are_not_shapes(tmp_path):
    shapes = (
        '<tag label="rain"/><box label="road" xtl="0" ytl="0" xbr="5" ybr="5"><attribute name="x">1</attribute></box>'
    )
    assert drawn(tmp_path, shapes).sum() == 25


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ('<skeleton label="road"/>', "image a.png, skeleton 'road': this kind of shape is not supported"),
        ('<polygon label="road" points="1,2;3,x;5,6"/>', "expected at least 3 points"),
        ('<polygon label="road" points="1,2;3,4"/>', "expected at least 3 points"),
        ('<box label="road" xtl="1"/>', "expected numbers, found"),
        ('<mask label="road" rle="1, 2" left="0" top="0" width="2" height="2"/>', "cover 3 pixels, expected 2 x 2"),
        ('<box xtl="1" ytl="1" xbr="2" ybr="2"/>', "shapes have no label"),
        ("</image><track/><image>", "CVAT for video"),
        ("<oops", "not a complete XML file"),
    ],
)
def test_invalid_shapes_are_named_in_the_error(tmp_path, shapes, said):
    assert_error(write(tmp_path, shapes), said)


def test_foreign_xml_is_an_error(tmp_path):
    (tmp_path / "a.xml").write_text("<annotation/>")
    assert_error(tmp_path / "a.xml", "expected <annotations>, found <annotation>")
    assert_error(tmp_path, "contains no XML file|expected <annotations>")


# ------------------------------------------------------------------------------------------------ masks


def write_masks(tmp_path, table="background:0,0,0::\nroad:128,64,128::\n", images="JPEGImages"):
    source = tmp_path / "masks"
    (source / "SegmentationClass").mkdir(parents=True, exist_ok=True)
    (source / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + table, encoding="utf-8")
    colors = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colors[:10] = (128, 64, 128)
    Image.fromarray(colors).save(source / "SegmentationClass" / "a.png")
    if images:
        picture(source / images / "a.jpg", HEIGHT, WIDTH)
    return source


def test_masks_are_read_by_their_table_with_images_anywhere(tmp_path):
    names, masks = masks_of(write_masks(tmp_path))
    assert names == ("background", "road") and (masks["a"] == 1).sum() == 10 * WIDTH
    source = write_masks(tmp_path / "b", images=None)
    assert_error(source, "1 of 1 labeled images are missing: a. .*`--images DIR`")
    picture(tmp_path / "photos" / "a.jpg", HEIGHT, WIDTH)
    assert masks_of(source, images=tmp_path / "photos")[1].keys() == {"a"}


def test_an_invalid_color_table_is_an_error(tmp_path):
    assert_error(
        write_masks(tmp_path, "background:0,0,0::\nother:0,0,0::\n"), r"the color \(0, 0, 0\) means 'background' and"
    )
    assert_error(write_masks(tmp_path, "background:0,0,0::\n"), r"\(128, 64, 128\) \(600 pixels\)")
    assert_error(write_masks(tmp_path, "nonsense"), "labelmap.txt is not a color table")
    assert_error(write_masks(tmp_path, ""), "labelmap.txt is not a color table .it is empty")
