"""COCO: crowds, parts, overlaps, several files, and invalid exports."""

import json

import numpy as np
import pytest
from support.convert import assert_error, masks_of, picture
from support.exports import compressed, runs_of, write_json

from cps_hf.annotations.project import ReadOptions
from cps_hf.annotations.readers import read_project

CATEGORIES = [{"id": 7, "name": "road"}, {"id": 2, "name": "car"}]


def square(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def write(tmp_path, *annotations, name="instances.json", file_name="a.png", categories=CATEGORIES, **image):
    source = tmp_path / "export"
    picture(source / "images" / file_name)
    rows = [{"id": i, "image_id": 1, "iscrowd": 0, **row} for i, row in enumerate(annotations, 1)]
    image = {"id": 1, "file_name": file_name, "height": 20, "width": 30, **image}
    write_json(source / name, {"images": [image], "annotations": rows, "categories": categories})
    return source


def test_the_smaller_object_is_on_top_or_the_later_one(tmp_path):
    small = {"category_id": 2, "segmentation": [square(5, 5, 10, 10)]}
    large = {"category_id": 7, "segmentation": [square(0, 0, 20, 20)]}
    source = write(tmp_path, small, large)
    names, masks = masks_of(source)
    assert names == ("background", "road", "car") and (masks["a"][5:10, 5:10] == 2).all()
    assert not (masks_of(source, overlap="order")[1]["a"] == 2).any()


def test_a_crowd_is_ignored_and_lies_below_every_object(tmp_path):
    crowd = np.zeros((20, 30), bool)
    crowd[4:8, 3:9] = True
    car = {"category_id": 2, "segmentation": [square(0, 0, 30, 6)]}
    rows = {"size": [20, 30], "counts": runs_of(crowd.T.ravel())}
    for counts in (rows["counts"], compressed(rows["counts"])):
        source = write(tmp_path, car, {"category_id": 7, "iscrowd": 1, "segmentation": rows | {"counts": counts}})
        for overlap in ("area", "order"):
            mask = masks_of(source, overlap=overlap)[1]["a"]
            assert (mask[:6] == 2).all() and (mask[6:8, 3:9] == 255).all() and (mask == 255).sum() == 12


def test_brush_masks_of_cvat_are_crowds_that_can_be_drawn(tmp_path):
    runs = runs_of(np.ones(600, bool))
    rows = [{"category_id": 7, "iscrowd": 1, "segmentation": {"size": [20, 30], "counts": runs}}]
    rows.append({"category_id": 2, "segmentation": [square(0, 0, 30, 6)]})
    source = write(tmp_path, *rows)
    [note] = read_project(source, ReadOptions()).notes
    assert note.startswith("1 objects are crowds") and "`--crowds`" in note
    _, masks = masks_of(source, crowds=True)
    assert (masks["a"][:6] == 2).all() and (masks["a"][6:] == 1).all()
    assert not read_project(source, ReadOptions(crowds=True)).notes


def test_the_parts_of_an_object_are_joined_even_if_they_overlap(tmp_path):
    parts = [square(0, 0, 10, 10), square(5, 5, 15, 15), square(20, 0, 22, 2)]
    _, masks = masks_of(write(tmp_path, {"category_id": 7, "segmentation": parts}))
    assert (masks["a"] == 1).sum() == 100 + 100 - 25 + 4


def test_several_files_are_read_by_the_names_of_their_categories(tmp_path):
    write(tmp_path, {"category_id": 7, "segmentation": [square(0, 0, 5, 5)]}, name="train.json")
    other = [{"id": 1, "name": "car"}, {"id": 2, "name": "road"}, {"id": 3, "name": "tree"}]
    source = write(
        tmp_path,
        {"category_id": 2, "segmentation": [square(0, 0, 6, 6)]},
        name="val.json",
        file_name="val/b.png",
        categories=other,
    )
    names, masks = masks_of(source)
    assert names == ("background", "road", "car", "tree")
    assert {name: int((mask == 1).sum()) for name, mask in masks.items()} == {"a": 25, "val/b": 36}


def test_boxes_are_an_error_without_the_boxes_option(tmp_path):
    source = write(tmp_path, {"category_id": 7, "segmentation": [], "bbox": [2, 3, 10, 5]})
    assert_error(source, "annotation 1 has no outline .*`--boxes`")
    assert (masks_of(source, boxes=True)[1]["a"] == 1).sum() == 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": 5}, "no category has the id 5; there are .*two exports"),
        ({"image_id": 9}, "no image has the id 9"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "expected at least 2 points"),
        ({"segmentation": [[1, 2, None, 4, 5, 6]]}, "expected at least 2 points"),
        ({"segmentation": {"size": [20, 31], "counts": "x"}}, "runs are for 20 x 31 pixels .* the image has 20 x 30"),
        ({"segmentation": {"size": [20, 30], "counts": [3]}}, "runs cover 3 pixels, expected 20 x 30"),
        ({"segmentation": {"size": [20, 30], "counts": "5P"}}, "annotation 1: its compressed runs are truncated"),
        ({"segmentation": "text"}, "`segmentation` must be a list or a mapping"),
    ],
)
def test_invalid_annotations_are_named_in_the_error(tmp_path, change, said):
    row = {"category_id": 7, "segmentation": [square(0, 0, 5, 5)]}
    assert_error(write(tmp_path, row | change), said)


def test_duplicate_category_ids_are_an_error(tmp_path):
    source = write(tmp_path, categories=[*CATEGORIES, {"id": 2, "name": "tree"}])
    assert_error(source, "'car' and 'tree' in `categories` have the same id, 2. Two exports were merged")


def test_unicode_forms_of_a_category_name_are_equal(tmp_path):
    row = {"category_id": 7, "segmentation": [square(0, 0, 5, 5)]}
    source = write(tmp_path, row, categories=[{"id": 7, "name": "Ba\u0308ume "}])
    names, masks = masks_of(source, table={"classes": ("background", "Bäume")})
    assert names[1] == "Bäume" and (masks["a"] == 1).sum() == 25


def test_a_truncated_or_foreign_file_is_an_error(tmp_path):
    source = write(tmp_path, {"category_id": 7, "segmentation": [square(0, 0, 5, 5)]})
    path = source / "instances.json"
    path.write_text(path.read_text()[:-20])
    assert_error(source, "instances.json is not a complete JSON file: .* Export it again", format="coco")
    path.write_text("[" * 100_000)
    assert_error(source, "not a complete JSON file", format="coco")
    path.write_text(json.dumps({"images": []}))
    assert_error(source, "contains no COCO file", format="coco")


def test_images_are_found_by_folder_and_by_either_unicode_form(tmp_path):
    row = {"category_id": 7, "segmentation": [square(0, 0, 5, 5)]}
    source = write(tmp_path, row, file_name="Bäume.png")
    composed = source / "images" / "Bäume.png"
    composed.rename(composed.with_name("Ba\u0308ume.png"))
    assert [*masks_of(source)[1]] == ["Bäume"]
    picture(source / "other" / "Bäume.png")
    assert_error(source, "matches two files: .*`--images DIR`")
    assert [*masks_of(source, images=source / "other")[1]] == ["Bäume"]
