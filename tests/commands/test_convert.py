"""`cps-hf convert`: its report, format detection, and one-line errors."""

import json

import pytest
from support.convert import fails
from support.exports import labelme, roboflow_masks, write_json

from cps_hf.commands.convert import main


@pytest.fixture
def source(tmp_path):
    labelme(tmp_path / "source")
    return tmp_path / "source"


def convert(source, out, *words):
    return main([str(source), str(out), *map(str, words)])


def relabel(source, name, change):
    path = source / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def test_it_prints_what_it_wrote_and_the_next_step(tmp_path, source, capsys):
    convert(source, tmp_path / "out")
    said = capsys.readouterr().out
    assert "3 images: 3 written, 0 done before" in said and "shapes: road 2, car 2, Bäume 1" in said
    assert f"then run `cps-hf check {tmp_path / 'out'}`." in said
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["format"] == "labelme"


def test_the_format_of_a_single_file_is_detected_like_its_folder(tmp_path, source):
    assert convert(source / "a.json", tmp_path / "one")["images"] == 1
    roboflow_masks(tmp_path / "masks")
    assert convert(tmp_path / "masks", tmp_path / "two", "--format", "roboflow_masks")["format"] == "roboflow_masks"


def test_unknown_labels_are_named_before_anything_is_written(tmp_path, source, capsys):
    out = tmp_path / "out"
    said = fails(capsys, source, out, "--classes", "_background_", "road", "Baume")
    assert "labels that are not in `--classes` (_background_, road, Baume): 'car' (2), 'Bäume' (1)" in said
    said = fails(capsys, source, out, "--classes", "_background_", "road", "car", "Baume")
    assert "Is 'Bäume' meant to be 'Baume'?" in said
    said = fails(capsys, source, out, "--classes", "road", "car", "Bäume", "--background", "background")
    assert "Pixels without a label are 'background', which is not in `--classes`" in said
    assert "names 'road' twice" in fails(capsys, source, out, "--classes", "_background_", "road", "road")
    write_json(tmp_path / "map.json", {"raod": "road"})
    assert "`--map` names 'raod', which is not a label of" in fails(
        capsys, source, out, "--map", tmp_path / "map.json"
    )
    write_json(tmp_path / "map.json", {"road": 1})
    assert "expected a JSON mapping like" in fails(capsys, source, out, "--map", tmp_path / "map.json")
    assert not out.exists()


def test_an_export_without_any_shape_is_an_error(tmp_path, source, capsys):
    for name in ("a", "ümlaut b"):
        relabel(source, name, lambda content: content.update(shapes=[]))
    assert "contains no shape: none of its 3 images has a label" in fails(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_and_leave_nothing_half_written(tmp_path, source, capsys):
    out = tmp_path / "out"
    relabel(source, "a", lambda content: content.update(imageHeight=50))
    said = fails(capsys, source, out)
    assert "a.json: its shapes were drawn on 50 x 64 pixels (height x width)" in said and "has 48 x 64" in said
    assert not out.exists()
    relabel(source, "a", lambda content: content.update(imageHeight=48))
    (source / "ümlaut b.png").write_bytes(b"no image")
    assert "ümlaut b.png): image of 8 bytes, of no kind that PIL knows" in fails(capsys, source, out)
    assert not out.exists()
    (source / "ümlaut b.png").unlink()
    assert "1 of 3 labeled images are missing: ümlaut b.png" in fails(capsys, source, out)
    assert any("skipped" in note for note in convert(source, out, "--skip_bad_images")["notes"])
    for words, said in (
        (("--line_width", "0"), "`--line_width` must be above 0"),
        (("--first_id", "-1"), "`--first_id` must be 0 or more"),
        (("--format", "cocoa"), "invalid choice: 'cocoa'"),
        (("--images", tmp_path / "no"), "`--images`: no folder"),
    ):
        assert said in fails(capsys, source, out, *words)
