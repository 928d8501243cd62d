"""Converting: what is written, what is repeated, what is counted, and which errors are raised."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from support.convert import fails, masks_of, picture
from support.exports import coco, labelme, write_json
from support.full_disk import full_disk

from cps_hf.commands.convert import main
from cps_hf.data.folder import load_folder
from cps_hf.data.reading import read_sample
from cps_hf.data.streams import undecoded


@pytest.fixture
def source(tmp_path):
    labelme(tmp_path / "source")
    return tmp_path / "source"


def convert(source, out, *words):
    return main([str(source), str(out), *map(str, words)])


def written(out):
    files = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def relabel(source, name, change):
    path = source / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def read(path):
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------ going on


def test_only_relabeled_images_are_converted_again(tmp_path, source):
    out = tmp_path / "out"
    convert(source, out)
    before = written(out / "masks")
    relabel(source, "a", lambda content: content["shapes"].pop())
    picture(source / "new.png")
    write_json(source / "new.json", {"shapes": [], "imagePath": "new.png"})
    report = convert(source, out)
    assert (report["images"], report["written"], report["done before"]) == (4, 2, 2)
    assert not (read(out / "masks" / "a.png") == 3).any() and (out / "masks" / "new.png").is_file()
    after = written(out / "masks")
    assert all(after[f"{name}.png"] == before[f"{name}.png"] for name in ("empty", "ümlaut b"))
    (source / "empty.json").unlink()
    report = convert(source, out)
    assert any(
        "1 images of an earlier call are no longer in this export and are kept: empty" in n for n in report["notes"]
    )
    assert convert(source, out, "--overwrite")["written"] == 3 and not (out / "masks" / "empty.png").exists()


def test_an_interrupted_call_resumes(tmp_path, source, capsys):
    out = tmp_path / "out"
    with full_disk(out / "masks" / "empty.png"):
        assert "No space left on device" in fails(capsys, source, out)
    assert sorted(path.name for path in out.rglob("*.png")) == ["a.png", "a.png"]  # image and mask, both whole
    with open(out / "converted.jsonl", "a") as file:
        file.write('{"name": "emp')  # as left by a killed process
    report = convert(source, out)
    assert (report["written"], report["done before"]) == (2, 1) and len(load_folder(out)) == 3
    whole = {name: text for name, (text, _) in written(out).items()}
    convert(source, tmp_path / "at once")
    once = {name: text for name, (text, _) in written(tmp_path / "at once").items()}
    differing = {name for name in whole | once if whole.get(name) != once.get(name)}
    assert differing <= {"report.json", "converted.jsonl"}


def test_settings_may_change_until_an_image_is_done(tmp_path, source, capsys):
    out, whole = tmp_path / "out", (source / "a.png").read_bytes()
    (source / "a.png").write_bytes(b"no image")
    assert "of no kind that PIL knows" in fails(capsys, source, out)
    (source / "a.png").write_bytes(whole)
    assert convert(source, out, "--overlap", "area", "--background", "rest")["written"] == 3
    assert json.loads((out / "classes.json").read_text(encoding="utf-8"))[0] == "rest"
    assert "now it is order" in fails(capsys, source, out, "--background", "rest")


@pytest.mark.parametrize(
    ("words", "values", "said"),
    [
        (("binary",), [0, 255, 128], "contains 128 .*Black and white masks contain 0 and 255.*`--format ids`"),
        (("ids", "--classes", "x", "y"), [0, 1, 7], "contains 7 .*`--classes` names the values 0 to 1"),
        (("colors", "--colors", "table.csv"), [[1, 1, 1], [2, 2, 2], [9, 9, 9]], r"contains \(9, 9, 9\)"),
        (("objects",), [0, 255, 128], "has 0 and one other value"),
    ],
)
def test_an_error_in_the_last_mask_leaves_nothing_or_what_was_there(
    tmp_path, capsys, monkeypatch, words, values, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("x,1,1,1\ny,2,2,2\n")
    source, out, fits = tmp_path / "set", tmp_path / "out", np.indices((20, 30)).sum(0) % 2
    for name in ("a", "b"):
        picture(source / "images" / f"{name}.png")
        (source / "masks" / name).mkdir(parents=True)
    paths = [source / "masks" / (f"{name}/car.png" if words[0] == "objects" else f"{name}.png") for name in "ab"]

    def draw(path, indices):
        Image.fromarray(np.array(values, np.uint8)[indices]).save(path)

    draw(paths[0], fits)
    draw(paths[1], fits + 1)
    assert re.search(said, fails(capsys, source, out, "--format", *words)) and not out.exists()
    draw(paths[1], fits)
    convert(source, out, "--format", *words)
    before = written(out)
    draw(paths[1], fits + 1)
    for more in ((), ("--overwrite",)):
        assert re.search(said, fails(capsys, source, out, "--format", *words, *more)) and written(out) == before


def test_an_unreadable_photograph_is_reported_with_status_1(tmp_path, source, capsys):
    whole = (source / "a.png").read_bytes()
    (source / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit) as exit_:
        convert(source, tmp_path / "out")
    said = capsys.readouterr().out
    assert exit_.value.code == 1 and "1 of the 3 images on the contact sheet cannot be read, first 'a'" in said
    assert "the PNG is truncated" in said and "Written to" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [problem["id"] for problem in report["unreadable"]] == ["a"]
    (source / "a.png").unlink()
    (source / "a.png").write_bytes(whole)
    report = convert(source, tmp_path / "out")
    assert report["written"] == 1 and not report["unreadable"]


def test_a_contact_sheet_that_cannot_be_written_is_an_error(tmp_path, source, capsys):
    with full_disk(tmp_path / "out" / "contact_sheet.png"):
        assert "contact_sheet.png: No space left on device" in fails(capsys, source, tmp_path / "out")


def test_images_are_linked_or_copied_without_link_support(tmp_path, source, monkeypatch):
    convert(source, tmp_path / "out")
    assert os.path.samefile(source / "a.png", tmp_path / "out" / "images" / "a.png")

    def no_links(*_):
        raise OSError("not on this disk")

    monkeypatch.setattr(os, "link", no_links)
    convert(source, tmp_path / "copies")
    copy = tmp_path / "copies" / "images" / "a.png"
    assert not os.path.samefile(source / "a.png", copy) and copy.read_bytes() == (source / "a.png").read_bytes()


def test_other_settings_in_an_occupied_folder_are_an_error(tmp_path, source, capsys):
    out = tmp_path / "out"
    convert(source, out)
    before = written(out)
    said = fails(capsys, source, out, "--overlap", "area")
    assert "was made with `--overlap` order, now it is area. Set `--overlap order`, or choose another OUT" in said
    said = fails(capsys, source, out, "--classes", "car", "road", "Bäume", "_background_")
    assert "contains masks of the classes _background_, road, car, Bäume; now they are car, road," in said
    classes = ("--classes", "_background_", "road", "car", "Bäume")
    assert "was made with `--background` _background_, now it is ignored" in fails(
        capsys, source, out, *classes, "--background", "ignored"
    )
    write_json(tmp_path / "map.json", {"car": "road"})
    assert "'car' is another class than now" in fails(capsys, source, out, *classes, "--map", tmp_path / "map.json")
    assert written(out) == before
    (source / "labels.txt").unlink()  # the tool's list changed between two exports
    assert "so that ids would change their meaning" in fails(capsys, source, out)
    assert convert(source, out, *classes, "--background", "_background_")["written"] == 0
    convert(source, out, "--overwrite", "--overlap", "area")
    other = tmp_path / "other"
    (other / "masks").mkdir(parents=True)
    assert "masks was not written by this command. Choose another OUT" in fails(capsys, source, other)
    assert "is inside" in fails(capsys, source, source / "out") and not (source / "out").exists()


def test_masks_that_label_every_pixel_fit_any_background_and_overlap(tmp_path, source):
    out, drafts = tmp_path / "out", tmp_path / "drafts"
    convert(source, out, "--overlap", "area")
    names = json.loads((out / "classes.json").read_text(encoding="utf-8"))
    picture(drafts / "images" / "draft.png")
    (drafts / "masks").mkdir()
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(drafts / "masks" / "draft.png")
    assert convert(drafts, out, "--format", "ids", "--classes", *names)["written"] == 1
    convert(source, out, "--overlap", "area")
    first = tmp_path / "drafts first"
    convert(drafts, first, "--format", "ids", "--classes", *names)
    assert convert(source, first, "--overlap", "area")["written"] == 3
    settings = [json.loads((folder / "convert.json").read_text(encoding="utf-8")) for folder in (out, first)]
    assert [(made["background"], made["overlap"]) for made in settings] == [("_background_", "area")] * 2


# ------------------------------------------------------------------------------------------------ classes


def test_labels_are_mapped_to_classes_or_ignored(tmp_path, source):
    map_ = tmp_path / "map.json"
    write_json(map_, {"car": "vehicle", "road": None, "*": "_background_"})
    names, masks = masks_of(source, table={"mapping": {"car": "vehicle", "road": "ignored", "*": "_background_"}})
    report = convert(source, tmp_path / "out", "--map", map_)
    assert names == ("_background_", "vehicle")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == [*names]
    mask = read(tmp_path / "out" / "masks" / "a.png")
    assert np.array_equal(mask, masks["a"]) and set(np.unique(mask)) == {0, 1, 255}
    assert report["shapes"] == {"road": 2, "car": 2, "Bäume": 1}  # as the tool calls them


def test_unlabeled_pixels_become_background_a_class_or_ignored(tmp_path, source):
    (source / "labels.txt").unlink()
    for words, first in ((("--background", "road"), "road"), (("--background", "rest"), "rest"), ((), "background")):
        convert(source, tmp_path / first, *words)
        assert json.loads((tmp_path / first / "classes.json").read_text())[0] == first
        assert not read(tmp_path / first / "masks" / "empty.png").any()
    convert(source, tmp_path / "out", "--background", "ignored", "--classes", "car", "road", "Bäume")
    assert (read(tmp_path / "out" / "masks" / "empty.png") == 255).all()
    assert set(np.unique(read(tmp_path / "out" / "masks" / "ümlaut b.png"))) == {0, 1, 255}


def test_a_class_without_shapes_keeps_its_id(tmp_path, source):
    (tmp_path / "names.json").write_text(
        '["_background_", "sky", "car", "road", "B\u0061\u0308ume"]', encoding="utf-8"
    )
    convert(source, tmp_path / "out", "--classes", tmp_path / "names.json")
    assert set(np.unique(read(tmp_path / "out" / "masks" / "a.png"))) == {0, 2, 3, 4}


# ------------------------------------------------------------------------------------------------ counts and errors


def test_overlapping_cut_and_lost_shapes_are_counted(tmp_path, source, capsys):
    def change(content):
        content["shapes"].append(
            {"label": "car", "points": [[5.1, 5.1], [5.2, 5.1], [5.2, 5.2]], "shape_type": "polygon"}
        )

    relabel(source, "a", change)
    report = convert(source, tmp_path / "out")
    masks = [masks_of(source, overlap=overlap)[1]["a"] for overlap in ("order", "area")]
    assert np.array_equal(*masks) and report["contested"] == 227  # the car stands on the road
    assert (report["cut"], report["lost"], report["empty"]) == (1, 1, ["empty"])
    said = capsys.readouterr().out
    assert "227 pixels have two labels (choose with `--overlap`), in a" in said
    assert "1 shapes extend beyond their image and are cut at its edge, in a" in said
    assert (
        "1 shapes cover no pixel, in a" in said
        and "1 images have no label (omit them with `--skip_empty`): empty" in said
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["shapes"]["car"] == 3
    assert convert(source, tmp_path / "out")["contested"] == 227  # including images done before


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("drawn_on", ["shown", "stored"])
def test_an_exif_rotated_image_has_the_mask_that_was_drawn(tmp_path, orientation, drawn_on):
    exif = Image.Exif()
    exif[0x0112] = orientation
    height, width = 20, 30
    stored = np.zeros((height, width, 3), np.uint8)
    stored[:6, :9] = 200
    source = tmp_path / "source"
    source.mkdir()
    Image.fromarray(stored).save(source / "a.png", exif=exif)
    turns = {3: 2, 6: -1, 8: 1}[orientation]
    bright = stored[..., 0] if drawn_on == "stored" else np.rot90(stored[..., 0], turns)
    (top, left), (bottom, right) = (f(np.argwhere(bright), axis=0).tolist() for f in (np.min, np.max))
    shape = {"label": "x", "shape_type": "rectangle", "points": [[left, top], [right + 1, bottom + 1]]}
    size = {"imageHeight": bright.shape[0], "imageWidth": bright.shape[1]}
    write_json(source / "a.json", {"shapes": [shape], "imagePath": "a.png"} | size)
    convert(source, tmp_path / "out")
    row = undecoded(load_folder(tmp_path / "out"), with_label=True, what="d")[0]
    image, label = read_sample(row, with_label=True)
    expected = image[0].numpy() > 100
    if orientation == 3 and drawn_on == "stored":  # both sizes are equal: taken as drawn in a viewer
        expected = expected[::-1, ::-1]
    assert np.array_equal(label.numpy() == 1, expected)


def test_two_images_with_one_name_are_an_error(tmp_path, capsys):
    coco(tmp_path / "source")
    path = tmp_path / "source" / "annotations" / "instances_default.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"].append({"id": 9, "file_name": "a.jpg", "height": 48, "width": 64})
    picture(tmp_path / "source" / "images" / "a.jpg", 48, 64)
    write_json(path, content)
    assert "Two entries have the same mask, a.png" in fails(capsys, tmp_path / "source", tmp_path / "out")


def test_images_that_are_links_to_a_store_keep_their_names(tmp_path, source):
    for name in ("a", "empty", "ümlaut b"):
        (source / f"{name}.png").rename(tmp_path / f"{len(name)}.bin")
        (source / f"{name}.png").symlink_to(tmp_path / f"{len(name)}.bin")
    convert(source, tmp_path / "out")
    image = tmp_path / "out" / "images" / "ümlaut b.png"
    assert os.path.samefile(image, tmp_path / "8.bin") and not image.is_symlink()


def test_a_name_outside_the_folder_is_moved_inside(tmp_path):
    coco(tmp_path / "deep" / "source")
    path = tmp_path / "deep" / "source" / "annotations" / "instances_default.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "deep" / "source" / "images" / "a.png").rename(tmp_path / "a.png")
    content["images"][0]["file_name"] = "../../../a.png"
    write_json(path, content)
    convert(tmp_path / "deep" / "source", tmp_path / "out")
    assert (tmp_path / "out" / "masks" / "a.png").is_file()
