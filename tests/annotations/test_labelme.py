"""LabelMe: its shapes, its special labels, and images that are not labeled yet."""

import base64
import json

import numpy as np
import pytest
from support.convert import assert_error, masks_of, picture
from support.exports import inside, png, write_json

from cps_hf.annotations.project import ReadOptions
from cps_hf.annotations.readers import read_project

HEIGHT, WIDTH = 60, 80
TWO_BY_TWO = base64.b64encode(png(np.eye(2, dtype=bool))).decode()


def write(tmp_path, *shapes, name="a", **fields):
    source = tmp_path / "export"
    picture(source / f"{name}.jpg", HEIGHT, WIDTH)
    rows = [{"label": "road", "group_id": None, "flags": {}, **shape} for shape in shapes]
    content = {"version": "5.4.1", "shapes": rows, "imagePath": f"{name}.jpg", "imageData": None}
    write_json(source / f"{name}.json", content | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | fields)
    return source


def drawn(tmp_path, kind, points, **fields):
    return masks_of(write(tmp_path, {"shape_type": kind, "points": points, **fields}))[1]["a"] == 1


def distance(points):
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return np.min([np.hypot(x - a, y - b) for a, b in points], axis=0)


def test_every_shape_is_drawn_as_it_looks(tmp_path):
    outline = [[5.3, 5.2], [60.4, 8.1], [30.7, 50.3]]
    assert np.array_equal(drawn(tmp_path, "polygon", outline), inside(outline, HEIGHT, WIDTH))
    rectangle = np.zeros((HEIGHT, WIDTH), bool)
    rectangle[15:40, 10:44] = True
    for corners in ([[10, 15], [44, 40]], [[44, 15], [10, 40]], [[44, 40], [10, 15]]):
        assert np.array_equal(drawn(tmp_path, "rectangle", corners), rectangle) and rectangle.sum() == 850
    turned = [[20.2, 10.3], [40.1, 20.4], [30.3, 40.2], [10.4, 30.1]]
    assert np.array_equal(drawn(tmp_path, "oriented_rectangle", turned), inside(turned, HEIGHT, WIDTH))
    circle = drawn(tmp_path, "circle", [[30, 28], [46.45, 28]])
    assert np.array_equal(circle, distance([(30, 28)]) <= 16.45) and abs(circle.sum() - 850) < 10
    assert np.array_equal(drawn(tmp_path, "point", [[20, 20]]), distance([(20, 20)]) <= 5)
    along = [(20 + t, 20) for t in np.linspace(0, 30, 301)]
    assert np.array_equal(drawn(tmp_path, "line", [[20, 20], [50, 20]]), distance(along) <= 5)
    down = [(50, 20 + t) for t in np.linspace(0, 15, 151)]
    assert np.array_equal(drawn(tmp_path, "linestrip", [[20, 20], [50, 20], [50, 35]]), distance(along + down) <= 5)
    pixels = np.random.default_rng(0).random((7, 9)) < 0.5
    text = base64.b64encode(png(pixels)).decode()
    mask = drawn(tmp_path, "mask", [[4, 3], [12, 9]], mask=text)
    assert np.array_equal(mask[3:10, 4:13], pixels) and mask.sum() == pixels.sum()


def test_lines_have_the_given_width(tmp_path):
    source = write(tmp_path, {"shape_type": "line", "points": [[20, 20], [50, 20]]})
    mask = masks_of(source, line_width=2)[1]["a"]
    assert mask[19:21, 19:51].all() and mask.sum() == 32 * 2  # its ends are round


def test_later_shapes_are_on_top_and_special_labels_apply(tmp_path):
    whole = {"shape_type": "rectangle", "points": [[0, 0], [80, 60]]}
    source = write(
        tmp_path,
        whole | {"label": "sky"},
        whole | {"points": [[0, 30], [80, 60]]},
        whole | {"label": "__ignore__", "points": [[0, 50], [80, 60]]},
        whole | {"label": "_background_", "points": [[0, 0], [10, 10]]},
    )
    names, masks = masks_of(source)
    assert names == ("_background_", "road", "sky")
    assert [int(masks["a"][row, 40]) for row in (20, 40, 55)] == [2, 1, 255] and masks["a"][5, 5] == 0
    (source / "labels.txt").write_text("__ignore__\n_background_\nsky\nroad\nbicycle\n")
    assert masks_of(source)[0] == ("_background_", "sky", "road", "bicycle")


def test_images_without_a_file_are_unlabeled_without_shapes_labeled(tmp_path):
    source = write(tmp_path)
    picture(source / "sub" / "b.jpg")
    project = read_project(source, ReadOptions())
    assert [image.name for image in project.images] == ["a"] and "1 images have no JSON file" in project.notes[0]
    assert not masks_of(source)[1]["a"].any()
    assert_error(source, "no labeled image", skip_empty=True)


def test_the_image_is_found_after_folders_were_moved(tmp_path):
    source = write(tmp_path, {"shape_type": "point", "points": [[3, 3]]}, imagePath="..\\old\\photos\\a.jpg")
    assert [*masks_of(source)[1]] == ["a"]
    source = write(tmp_path, {"shape_type": "point", "points": [[3, 3]]}, imagePath="renamed.jpg")
    assert [*masks_of(source)[1]] == ["a"]
    (source / "a.jpg").unlink()
    assert_error(source, "1 of 1 labeled images are missing: renamed.jpg.*`--skip_bad_images`")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"shape_type": "cuboid", "points": [[1, 2]]}, "a.json, shape 1: the shape type 'cuboid' is not supported"),
        ({"shape_type": "circle", "points": [[1, 2]]}, "a circle has 2 points, found 1"),
        ({"shape_type": "polygon", "points": []}, "expected at least 1 points"),
        ({"points": [[1, "x"]]}, "expected at least 1 points"),
        ({"points": [[1, float("nan")]]}, "expected at least 1 points"),
        ({"label": "", "points": [[1, 2]]}, "1 shapes have no label"),
        ({"label": None, "points": [[1, 2]]}, "`label` must be a text"),
        ({"shape_type": "mask", "points": [[1, 2], [3, 4]], "mask": "§"}, "not a PNG in base64"),
        (
            {
                "shape_type": "mask",
                "points": [[1, 2], [3, 4]],
                "mask": TWO_BY_TWO,
            },
            "its mask is 2 x 2, its corners span 3 x 3",
        ),
    ],
)
def test_invalid_shapes_are_named_in_the_error(tmp_path, shape, said):
    assert_error(write(tmp_path, shape), said)


def test_a_file_of_another_program_is_skipped_and_noted(tmp_path):
    source = write(tmp_path, {"points": [[0, 0], [9, 0], [9, 9]]})
    (source / "z.json").write_text(json.dumps({"version": 1}))
    project = read_project(source, ReadOptions(), format="labelme")
    assert len(project.images) == 1 and "z.json is not a LabelMe file" in project.notes[0]
    assert_error(source / "z.json", "z.json is not a LabelMe file", format="labelme")
    assert_error(source / "z.json", "format of .*z.json is not recognized")
