"""The two worked examples run unchanged, on little data."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cps_hf.scenes.write import write_street_scenes

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.mark.slow
def test_a_custom_method_trains_and_logs_its_numbers(tmp_path, capsys):
    import custom_objective

    root = write_street_scenes(
        tmp_path / "set", num_train=10, num_train_extra=0, num_val=2, size=(64, 128), progress=False
    )
    words = ["--data_root", str(root), "--labeled", "4", "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    results = custom_objective.main(words)
    assert results["objective"] == {
        "name": "EntropyMinimization",
        **{"weight": 0.1, "ramp_up": 0.3, "labeled_loss": "cross_entropy"},
        **{"ohem_threshold": 0.7, "ohem_min_kept": 50_000, "joint_forward": False},
        **{"class_weights": None, "focal_gamma": 2.0},
    }
    logged = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[1])
    assert logged["entropy_loss"] > 0 and logged["supervised_loss"] > 0
    assert "branch_1: mIoU" in capsys.readouterr().out


@pytest.mark.slow
def test_polygons_in_json_become_a_data_set_that_trains(tmp_path):
    import custom_dataset

    folder = custom_dataset.draw_polygons(tmp_path / "polygons", count=12)
    dataset = custom_dataset.load_polygons(folder)
    shape = json.loads((folder / "003.json").read_text())["shapes"][-1]
    x, y = (sum(values) // len(values) for values in zip(*shape["points"], strict=True))  # inside: it is convex
    assert dataset[3]["label"].getpixel((min(x, 79), min(y, 59))) == custom_dataset.NAMES.index(shape["label"])
    results = custom_dataset.main([str(folder), "--max_steps", "2", "--output_dir", str(tmp_path / "out")])
    assert len(results["final"]["mean"]["per_category_iou"]) == 3 and results["num_labeled"] == 4


def test_outlines_follow_a_photos_rotation(tmp_path):
    import custom_dataset

    shown = Image.new("RGB", (30, 20), (90, 90, 90))
    ImageDraw.Draw(shown).rectangle([20, 1, 28, 10], fill=(255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # "Orientation": to be turned clockwise
    shown.rotate(90, expand=True).save(tmp_path / "p.png", exif=exif)
    corners = [[20, 1], [28, 1], [28, 10], [20, 10]]
    annotation = {"imagePath": "p.png", "shapes": [{"label": "house", "points": corners}]}
    (tmp_path / "p.json").write_text(json.dumps(annotation))
    label = np.asarray(custom_dataset.load_polygons(tmp_path)[0]["label"])
    assert (label == (np.asarray(shown)[..., 0] == 255)).all() and label.sum() == 9 * 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "No *.json in nowhere."),
        (["classes"], "classes/classes.json: expected {"),
        (["other"], "other/a.json: a shape is called 'car'; the classes are background, house, tree"),
        (["--labeled", "100000"], "`--labeled` must be from 1 to 23"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("classes").mkdir()
    Path("classes/classes.json").write_text('["background", "house"]')
    Path("other").mkdir()
    Path("other/a.json").write_text('{"imagePath": "a.png", "shapes": [{"label": "car", "points": []}]}')
    Image.new("RGB", (4, 4)).save("other/a.png")
    monkeypatch.setattr(sys, "argv", ["custom_dataset.py", *words])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / "custom_dataset.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1


def test_no_labeled_image_is_one_line(tmp_path, monkeypatch, capsys):
    root = write_street_scenes(
        tmp_path / "set", num_train=2, num_train_extra=0, num_val=1, size=(64, 128), progress=False
    )
    monkeypatch.setattr(sys, "argv", ["custom_objective.py", "--data_root", str(root), "--labeled", "0"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / "custom_objective.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [(["--help"], 0, "voc_cps_r50"), (["--nope"], 2, "--nope"), (["nope"], 2, "no recipe 'nope'")],
)
def test_run_recipes_rejects_unknown_names(capfd, words, status, said):
    import run_recipes

    with pytest.raises(SystemExit) as exit_:
        run_recipes.main(words)
    assert exit_.value.code == status and said in "".join(capfd.readouterr())
