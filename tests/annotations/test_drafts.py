"""Drafts for annotation tools, and the round trip: converting a draft gives the masks again."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from support.convert import masks_of, picture

from cps_hf.annotations.drafts import Draft, write_drafts
from cps_hf.data.masks import write_mask
from cps_hf.visualization import palette

NAMES = ["background", "road", "Bäume & <mehr>"]


def masks():
    """A hole in a region, a region in the hole, touching corners, the image's edges, a single class."""
    rings = np.zeros((40, 50), np.uint8)
    rings[2:38, 3:47], rings[8:30, 10:40], rings[12:20, 15:30], rings[15, 20] = 1, 0, 2, 1
    y, x = np.mgrid[:60, :70]
    waves = (np.sin(x / 9) + np.cos(y / 7) + np.sin((x + y) / 11) > 0.2).astype(np.uint8)
    waves[np.hypot(x - 50, y - 40) < 12.3] = 2
    return {
        "a": rings,
        "sub/ü b": waves,
        "checkers": np.indices((8, 9)).sum(0).astype(np.uint8) % 3,
        "all": rings * 0 + 1,
    }


def drafts_of(tmp_path):
    found = []
    for name, ids in masks().items():
        image = picture(tmp_path / "photos" / f"{name}.png", *ids.shape)
        mask = tmp_path / "predictions" / "masks" / f"{name}.png"
        write_mask(mask, ids, palette(3))
        found.append(Draft(name, image, f"{name}.png", mask))
    return found


@pytest.mark.parametrize("format", ["coco", "labelme", "cvat"])
def test_a_draft_converts_back_to_the_masks_within_the_tolerance(tmp_path, format):
    drafts, out = drafts_of(tmp_path), tmp_path / "predictions"
    for tolerance in (0, 1):
        [path] = write_drafts(out, drafts, NAMES, format=format, tolerance=tolerance)
        names, back = masks_of(path, images=tmp_path / "photos")
        assert names == (*NAMES[:1], *sorted(NAMES[1:])) or names == tuple(NAMES)
        order = np.array([NAMES.index(name) for name in names])
        for name, ids in masks().items():
            changed = order[back[name]] != ids
            assert not changed[~near_a_boundary(ids)].any()
            if tolerance == 0:
                assert not changed.any()
            elif name != "checkers":
                assert changed.mean() < 0.05


def near_a_boundary(ids):
    """Pixels next to another class or to the image's edge, including at a corner."""
    padded = np.pad(ids.astype(int), 1, constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return (windows != ids[..., None, None]).any((-1, -2))


def test_coco_drafts_have_what_readers_expect(tmp_path):
    [path] = write_drafts(tmp_path, drafts_of(tmp_path), NAMES, format="coco", tolerance=0)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [row["name"] for row in content["categories"]] == NAMES[1:]
    assert [row["file_name"] for row in content["images"]] == ["a.png", "sub/ü b.png", "checkers.png", "all.png"]
    whole = content["annotations"][-1]
    assert whole["segmentation"] == [[0, 0, 50, 0, 50, 40, 0, 40]] and whole["area"] == 2000
    assert whole["bbox"] == [0, 0, 50, 40] and whole["iscrowd"] == 0
    assert len({row["id"] for row in content["annotations"]}) == len(content["annotations"])
    library = pytest.importorskip("pycocotools.mask")
    for name, image in zip(("a", "sub/ü b"), content["images"], strict=False):
        ids = masks()[name]
        for class_id in (1, 2):
            rows = [r for r in content["annotations"] if (r["image_id"], r["category_id"]) == (image["id"], class_id)]
            theirs = np.zeros(ids.shape, bool)
            for row in rows:
                theirs |= library.decode(library.merge(library.frPyObjects(row["segmentation"], *ids.shape))) > 0
            assert (theirs != (ids == class_id)).mean() < 0.02  # it has another rule for pixels on an edge


def test_labelme_finds_the_image_from_each_file(tmp_path):
    [folder] = write_drafts(tmp_path / "out", drafts_of(tmp_path), NAMES, format="labelme")
    path = folder / "sub" / "ü b.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (path.parent / content["imagePath"]).resolve() == (tmp_path / "photos" / "sub" / "ü b.png").resolve()
    assert (content["imageHeight"], content["imageWidth"], content["imageData"]) == (60, 70, None)
    assert {row["label"] for row in content["shapes"]} == {*NAMES[1:]}
    assert {row["shape_type"] for row in content["shapes"]} == {"polygon"}


def test_cvat_has_labels_with_colors_and_sizes(tmp_path):
    [path] = write_drafts(tmp_path, drafts_of(tmp_path), NAMES, format="cvat")
    root = ElementTree.parse(path).getroot()
    assert root.findtext("version") == "1.1"
    assert [row.findtext("name") for row in root.iter("label")] == NAMES[1:]
    assert all(row.findtext("color").startswith("#") for row in root.iter("label"))
    assert [image.get("name") for image in root.iter("image")][1] == "sub/ü b.png"
    assert root.find("image").get("width") == "50" and root.find("image/polygon").get("source") == "auto"


def test_small_regions_are_filled_and_any_class_can_be_background(tmp_path):
    drafts = drafts_of(tmp_path)
    [path] = write_drafts(tmp_path, drafts, NAMES, format="coco", min_area=5)
    areas = [
        row["area"] for row in json.loads(path.read_text(encoding="utf-8"))["annotations"] if row["image_id"] == 1
    ]
    assert sorted(areas) == [120, 36 * 44 - 22 * 30]  # the pixel in the hole takes the class around it
    [path] = write_drafts(tmp_path, drafts, NAMES, format="coco", background="road")
    categories = json.loads(path.read_text(encoding="utf-8"))["categories"]
    assert [row["name"] for row in categories] == ["background", NAMES[2]]
    [path] = write_drafts(tmp_path, drafts, NAMES, format="coco", background="nothing", tolerance=0)
    names, back = masks_of(path, images=tmp_path / "photos", table={"background": "ignored"})
    assert names == tuple(NAMES) and all(np.array_equal(back[name], ids) for name, ids in masks().items())


def test_png_drafts_have_class_names_that_are_read_back(tmp_path):
    [path] = write_drafts(tmp_path / "predictions", drafts_of(tmp_path), NAMES, format="png")
    assert json.loads(path.read_text(encoding="utf-8")) == NAMES
    words = {"format": "ids", "classes": tuple(NAMES), "images": tmp_path / "photos"}
    names, back = masks_of(tmp_path / "predictions", **words)
    assert names == tuple(NAMES) and all(np.array_equal(back[name], ids) for name, ids in masks().items())


def test_a_negative_tolerance_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must not be negative"):
        write_drafts(tmp_path, [], NAMES, format="coco", tolerance=-1)
