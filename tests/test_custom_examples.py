"""The two worked examples run as they stand, on little data."""

import json
import sys
from pathlib import Path

import pytest

from cps_hf.data.scenes import write_street_scenes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


@pytest.mark.slow
def test_a_method_of_ones_own_trains_and_logs_its_numbers(tmp_path, capsys):
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
