"""Label Studio, YOLO, Supervisely and VIA: their other shapes, and invalid exports."""

import base64
import json
import zlib

import numpy as np
import pytest
from support.convert import assert_error, masks_of, picture
from support.exports import label_studio, png, supervisely, via, write_json, yolo

from cps_hf.annotations.project import ReadOptions
from cps_hf.annotations.readers import read_project

HEIGHT, WIDTH = 40, 50
Y, X = np.mgrid[:HEIGHT, :WIDTH] + 0.5


# ------------------------------------------------------------------------------------------------ Label Studio


def task(*values, image="/data/upload/1/0a1b2c3d-a.png", **fields):
    size = {"original_height": HEIGHT, "original_width": WIDTH, "image_rotation": 0}
    results = [{"id": str(i), "type": "labels", **size, "value": value} for i, value in enumerate(values)]
    return {"id": 1, "data": {"image": image}, "annotations": [{"id": 1, "result": results, **fields}]}


def tasks_of(tmp_path, *tasks):
    picture(tmp_path / "s" / "a.png", HEIGHT, WIDTH)
    write_json(tmp_path / "s" / "export.json", tasks)
    return tmp_path / "s"


def test_label_studios_rectangles_ellipses_and_points(tmp_path):
    def drawn(**value):
        return masks_of(tasks_of(tmp_path, task({"labels": ["road"], **value})))[1]["a"] == 1

    box = drawn(x=10, y=25, width=40, height=50, rotation=0)
    assert box[10:30, 5:25].all() and box.sum() == 400
    turned = drawn(x=50, y=25, width=40, height=25, rotation=90)  # about its upper left corner
    assert turned[10:30, 15:25].all() and turned.sum() == 200
    ellipse = drawn(x=50, y=50, radiusX=30, radiusY=25, rotation=0)
    assert np.array_equal(ellipse, ((X - 25) / 15) ** 2 + ((Y - 20) / 10) ** 2 <= 1)
    assert np.array_equal(drawn(x=50, y=50, width=1), np.hypot(X - 25, Y - 20) <= 5)


def test_label_studio_uses_the_newest_annotation_not_cancelled(tmp_path):
    box = {"x": 0, "y": 0, "width": 100, "height": 100, "rotation": 0}
    one = task(box | {"rectanglelabels": ["road"]}, updated_at="2026-01-01")
    later = task(box | {"rectanglelabels": ["car"]}, updated_at="2026-02-01")["annotations"]
    cancelled = task(box | {"rectanglelabels": ["tree"]}, updated_at="2026-03-01", was_cancelled=True)["annotations"]
    one["annotations"] += later + cancelled
    empty = {"id": 2, "data": {"image": "b.png"}, "annotations": []}
    project = read_project(tasks_of(tmp_path, one, empty), ReadOptions())
    assert project.labels == ["car"] and len(project.images) == 1
    assert project.notes == [
        "1 images were labeled more than once; the newest labels count",
        "1 images are not labeled yet and are skipped",
    ]


@pytest.mark.parametrize(
    "image", ["s3://bucket/x/a.png", "https://host/a.png?token=1", "/data/local-files/?d=x/a.png", "a.png"]
)
def test_label_studio_finds_the_image_for_any_storage(tmp_path, image):
    assert [*masks_of(tasks_of(tmp_path, task(image=image)))[1]] == ["a"]


def test_label_studio_finds_images_whose_names_the_upload_changed(tmp_path):
    picture(tmp_path / "s" / "Straße (1) b.png", HEIGHT, WIDTH)
    source = tasks_of(tmp_path, task(image="/data/upload/1/0a1b2c3d-Stra%C3%9Fe_1_b.png"))
    assert [*masks_of(source)[1]] == ["Straße (1) b"]
    picture(tmp_path / "s" / "Straße 1 b.png", HEIGHT, WIDTH)
    assert_error(source, "matches two files: .*Rename the images")


def test_label_studio_ignores_other_results_and_names_bad_ones(tmp_path):
    row = task({"choices": ["sunny"]}, {"text": ["x"]})
    assert not masks_of(tasks_of(tmp_path, row))[1]["a"].any()
    assert_error(
        tasks_of(tmp_path, task({"labels": ["road"], "format": "rle", "rle": [1, 2]})),
        "result 0: its brush strokes are truncated",
    )
    assert_error(
        tasks_of(tmp_path, task({"labels": ["road"], "points": [[1, None]]})), "task 1, result 0: expected at least 2"
    )
    assert_error(tasks_of(tmp_path, task({"labels": ["road"]})), "a shape with labels is not supported")
    turned = task({"labels": ["road"], "x": 1})
    turned["annotations"][0]["result"][0]["image_rotation"] = 90
    assert_error(tasks_of(tmp_path, turned), "images rotated in Label Studio are not supported")
    assert_error(tasks_of(tmp_path, task(image="no file")), "its data names no image file")
    assert_error(
        tasks_of(tmp_path, {"image": "a.png", "label": []}), 'Choose "JSON", not JSON-MIN', format="label_studio"
    )
    label_studio(tmp_path / "p")
    path = tmp_path / "p" / "project-1.json"
    path.write_text(path.read_text(encoding="utf-8")[:300], encoding="utf-8")
    assert_error(tmp_path / "p", "project-1.json is not a complete JSON file")


# ------------------------------------------------------------------------------------------------ YOLO


def test_yolo_errors_name_the_line(tmp_path):
    yolo(tmp_path)
    text = tmp_path / "labels" / "train" / "a.txt"
    for line, said in (
        ("9 0 0 1 0 1 1", "a.txt, line 1: the class '9' is none of"),
        ("x 0 0 1 0 1 1", "the class 'x' is none of"),
        ("0 0 0 1 0 1", "at least three points, found 5 numbers"),
        ("0 0 0 1 0 1 y", "expected numbers"),
        ("0 0.5 0.5 0.5 0.5", "contains a box and no outline.*`--boxes`"),
    ):
        text.write_text(line)
        assert_error(tmp_path, said)
    assert (masks_of(tmp_path, boxes=True)[1]["train/a"] == 1).sum() == 48 * 64 / 4
    text.unlink()  # an image without a file has no object
    assert not masks_of(tmp_path)[1]["train/a"].any()
    assert [*masks_of(tmp_path, skip_empty=True)[1]] == ["train/ümlaut b"]
    (tmp_path / "labels" / "train" / "gone.txt").write_text("")
    assert_error(tmp_path, "1 of 4 labeled images are missing: .*gone.txt")
    (tmp_path / "labels" / "train" / "gone.txt").unlink()
    (tmp_path / "data.yaml").write_text("names: 3")
    assert_error(tmp_path, "data.yaml names no classes")
    (tmp_path / "data.yaml").write_text("names: [road, car, tree]")
    assert masks_of(tmp_path)[0] == ("background", "road", "car", "tree")
    (tmp_path / "data.yaml").unlink()
    assert_error(tmp_path, "contains no data.yaml", format="yolo")
    (tmp_path / "classes.txt").write_text("road\ncar\ntree\n")  # as Label Studio writes it
    assert masks_of(tmp_path)[0] == ("background", "road", "car", "tree")
    assert masks_of(tmp_path, format="yolo", classes=("x", "y", "z"))[0] == ("background", "x", "y", "z")


# ------------------------------------------------------------------------------------------------ Supervisely


def test_supervisely_has_holes_and_other_geometries(tmp_path):
    supervisely(tmp_path)
    path = tmp_path / "ds0" / "ann" / "a.png.json"
    content = json.loads(path.read_text(encoding="utf-8"))

    def drawn(kind, exterior=None, interior=(), **fields):
        points = {"points": {"exterior": exterior, "interior": interior}} if exterior else {}
        content["objects"] = [{"classTitle": "road", "geometryType": kind, **points, **fields}]
        write_json(path, content)
        return masks_of(tmp_path)[1]["ds0/a"] == 1

    hole = drawn("polygon", [[0, 0], [20, 0], [20, 20], [0, 20]], [[[5, 5], [10, 5], [10, 10], [5, 10]]])
    assert hole.sum() == 400 - 25 and not hole[5:10, 5:10].any()
    assert drawn("rectangle", [[4, 2], [9, 5]])[2:6, 4:10].all()
    assert drawn("line", [[10, 10], [30, 10]])[5:15, 10:30].all()
    y, x = np.mgrid[:48, :64] + 0.5
    assert np.array_equal(drawn("point", [[20, 20]]), np.hypot(x - 20, y - 20) <= 5)
    rgba = np.zeros((3, 4, 4), np.uint8)
    rgba[0, :, 3], rgba[1:, :2] = 255, 255
    data = base64.b64encode(zlib.compress(png(rgba))).decode()
    bitmap = drawn("bitmap", bitmap={"data": data, "origin": [7, 9]})
    assert bitmap.sum() == 4 and bitmap[10:12, 7:9].all()
    with pytest.raises(ValueError, match="a.png.json, object 1: the geometry 'cuboid' is not supported"):
        drawn("cuboid", [[1, 1]])
    with pytest.raises(ValueError, match="object 1: its bitmap cannot be read"):
        drawn("bitmap", bitmap={"data": "AAAA", "origin": [7, 9]})
    with pytest.raises(ValueError, match="`points` must be a mapping"):
        drawn("polygon")


# ------------------------------------------------------------------------------------------------ VIA


def test_via_shapes_and_its_ambiguous_label_attribute(tmp_path):
    via(tmp_path)
    path = tmp_path / "via.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content["_via_img_metadata"]["a.png123"]
    y, x = np.mgrid[:48, :64] + 0.5

    def drawn(label="road", **shape):
        rows["regions"] = [{"shape_attributes": shape, "region_attributes": {"what": label}}]
        write_json(path, content)
        return masks_of(tmp_path)[1]["a"] == 1

    assert drawn(name="rect", x=5, y=10, width=20, height=7)[10:17, 5:25].sum() == 140
    assert np.array_equal(drawn(name="circle", cx=20, cy=20, r=9.5), np.hypot(x - 20, y - 20) <= 9.5)
    tilted = drawn(name="ellipse", cx=30, cy=20, rx=15, ry=5, theta=np.pi / 2)
    assert np.array_equal(tilted, ((x - 30) / 5) ** 2 + ((y - 20) / 15) ** 2 <= 1)
    assert drawn(name="polyline", all_points_x=[10, 30], all_points_y=[10, 10])[5:15, 10:30].all()
    assert drawn({"road": True, "car": False}, name="point", cx=20, cy=20).sum() > 70  # a checkbox
    for shape, said in (
        ({"name": "blob"}, "a.png, region 1: the shape 'blob' is not supported"),
        ({"name": "rect", "x": 1}, "expected numbers"),
        ({"name": "polygon", "all_points_x": [1], "all_points_y": [1, 2]}, "1 x and 2 y"),
    ):
        with pytest.raises(ValueError, match=said):
            drawn(**shape)
    with pytest.raises(ValueError, match="has no 'what', the attribute of its label"):
        drawn(None, name="circle", cx=20, cy=20, r=9)
    rows["regions"] = [
        {
            "shape_attributes": {"name": "circle", "cx": 9, "cy": 9, "r": 3},
            "region_attributes": {"what": "road", "id": "7"},
        }
    ]
    write_json(path, content["_via_img_metadata"])  # "annotations (as JSON)"
    assert_error(tmp_path, "which region attribute is the label\\? There are id, what. .*`--attribute NAME`")
    assert masks_of(tmp_path, attribute="what")[0] == ("background", "car", "road")
