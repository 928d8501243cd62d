"""A made-up project in each tool's format becomes the masks that an independent library draws."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from support.exports import EXPORTS, LABELS, PROJECT

from cps_hf.commands.convert import main
from cps_hf.data.folder import load_folder


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_becomes_the_drawn_masks_and_resumes(tmp_path, capsys, name):
    export, source, out = EXPORTS[name], tmp_path / "source", tmp_path / "out"
    source.mkdir()
    export.write(source)
    words = [str(source), str(out), *(word.replace("SOURCE", str(source)) for word in export.words)]
    report = main(words)
    assert report["format"] == (export.format or name)
    names = json.loads((out / "classes.json").read_text(encoding="utf-8"))
    assert names[0].strip("_") == "background" and sorted(names[1:]) == sorted(LABELS)
    assert names[1:] == [*LABELS] or name.startswith("label_studio")  # its export has no list of labels
    below = {drawn.name: export.below for drawn in PROJECT}
    if name == "roboflow_masks":
        below = {"a": "train/", "ümlaut b": "train/", "empty": "valid/"}
    drawn = [d for d in PROJECT if d.shapes or export.has_empty]
    for one in drawn:
        mask = np.asarray(Image.open(out / "masks" / f"{below[one.name]}{one.name}.png"))
        assert np.array_equal(mask, one.mask(("background", *names[1:])))
        image = out / "images" / f"{below[one.name]}{one.name}.png"
        assert any(os.path.samefile(image, path) for path in source.rglob(f"{one.name}.png"))
    assert report["images"] == report["written"] == len(drawn)
    assert (out / "contact_sheet.png").is_file() and json.loads((out / "report.json").read_text())["format"]
    assert len(load_folder(out)) == len(drawn)
    before = {path: path.stat().st_mtime_ns for path in (out / "masks").rglob("*.png")}
    report = main(words)
    assert report["written"] == 0 and report["done before"] == len(drawn)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "masks").rglob("*.png")}
    assert f"{len(drawn)} images: 0 written, {len(drawn)} done before" in capsys.readouterr().out


def test_a_project_with_splits_is_read_split_by_split(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    EXPORTS["roboflow_masks"].write(source)
    main([str(source), str(tmp_path / "out")])
    assert load_folder(tmp_path / "out", "train")["id"] == ["a", "ümlaut b"]
    assert load_folder(tmp_path / "out", "valid")["id"] == ["empty"]
