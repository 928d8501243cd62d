"""benchmarks/real: valid settings of every arm, equal time by arithmetic, and a report of differences per seed."""

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cps_hf.commands import train

REAL = Path(__file__).parents[2] / "benchmarks" / "real"


def load(name):
    spec = importlib.util.spec_from_file_location(f"real_{name}", REAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


arms, report, sets = load("arms"), load("report"), load("sets")


@pytest.mark.parametrize("name", arms.ARMS)
def test_the_settings_of_every_arm_are_accepted(name):
    arm = arms.ARMS[name]
    steps = 30
    settings = train.parse([f"--objective={arm.objective}", "--dataset=folder", "--data_root=somewhere"])
    values = dict(arm.options)
    if not arm.two_stages:
        values.pop("second_stage_learning_rate_factor", None)
    settings = settings.with_values(**values, max_steps=steps, pretrain_steps=arm.pretrain_steps(steps))
    assert settings.args.pretrain_steps == (15 if arm.two_stages else None)
    assert settings.objective.min_branches <= arm.branches


def test_the_control_only_differs_in_the_labeled_side():
    plain, control, recommended = (arms.ARMS[name].options for name in ("plain", "control", "recommended"))
    changed = {name for name in control if plain.get(name) != control[name]}
    assert {"class_weights", "labeled_color_jitter", "freeze_norms"} <= changed
    assert not changed & {"learning_rate", "optim", "random_scale", "per_device_train_batch_size"}
    assert control.items() <= recommended.items()


def test_equal_time_covers_both_stages():
    seconds = {"supervised_1": 0.1, "supervised_2": 0.2, "cps": 0.5}
    # 750 steps of a pair and as many of CPS: 150 + 375 seconds, in which one network takes 5,250 steps
    assert arms.ARMS["recommended"].seconds(1500, seconds) == pytest.approx(525)
    assert arms.ARMS["control_equal_time"].max_steps(1500, seconds, arms.ARMS) == 5250
    assert arms.ARMS["control"].max_steps(1500, seconds, arms.ARMS) == 1500


def test_the_fixed_teacher_replaces_the_second_stage():
    assert arms.ARMS["fixed_teacher"].max_steps(1500, {}, arms.ARMS) == 750
    assert arms.ARMS["fixed_teacher"].pretrain_steps(750) is None


def cell(arm, seed, score, supervised=None, length=1500):
    rows = {"branch_0": {"mean_iou": score, "per_category_iou": [score, score]}}
    staged = {"branch_0": {"mean_iou": supervised, "per_category_iou": []}} if supervised else {}
    return {
        **{"dataset": "steel", "labels": 24, "seed": seed, "arm": arm, "length": length, "split": "test"},
        **{"steps": 1500, "pretrain_steps": 1000, "scores": rows, "supervised_scores": staged},
        "training": {"cpu_seconds": 60.0},
    }


def test_differences_are_paired_by_seed_with_students_interval(tmp_path):
    scores = {"recommended": [0.65, 0.66, 0.70], "control_equal_time": [0.62, 0.65, 0.64]}
    for arm, by_seed in scores.items():
        for seed, score in enumerate(by_seed, 1):
            text = json.dumps(cell(arm, seed, score, supervised=0.6))
            (tmp_path / f"{arm}-{seed}.json").write_text(text, encoding="utf-8")
    text = report.write(tmp_path, tmp_path)
    differences = [3.0, 1.0, 6.0]
    half = 4.303 * statistics.stdev(differences) / math.sqrt(3)
    mean = sum(differences) / 3
    assert f"{mean:+.1f} (+3.0, +1.0, +6.0; 95 % interval over seeds {mean - half:+.1f} to {mean + half:+.1f})" in text
    assert not (tmp_path / "gain.png").exists()  # a single length is no curve


def test_the_curve_of_gains_has_a_point_per_length_and_arm():
    scores = {
        (1500, "recommended"): [0.60, 0.61, 0.60],
        (1500, "control_equal_time"): [0.62, 0.59, 0.50],
        (3000, "recommended"): [0.65, 0.66],
        (3000, "control_equal_time"): [0.63, 0.62],
    }
    cells = {
        ("steel", 24, length, arm): {seed: cell(arm, seed, score, length=length) for seed, score in enumerate(found)}
        for (length, arm), found in scores.items()
    }
    cells["camvid", 23, 800, "recommended"] = cells["camvid", 23, 800, "control_equal_time"] = {1: cell("", 1, 0.5)}
    (axes,) = report.gain_figure(cells).axes  # a set with one length has no curve
    seeds, mean = axes.lines[:3], axes.lines[3]
    assert [[*map(round, line.get_ydata())] for line in seeds] == [[-2, 2], [2, 4], [10]]
    assert [round(value) for value in mean.get_ydata()] == [0, 3]  # of the seeds that have both lengths
    assert mean.get_label() == "over control equal time, mean of seeds 0, 1"
    assert [*mean.get_xdata()] == [1500, 3000]


def test_a_teacher_is_scored_if_the_method_has_one():
    found = cell("mean_teacher", 1, 0.5)
    found["scores"]["teacher"] = {"mean_iou": 0.75, "per_category_iou": []}
    assert report.single(found) == 75


@pytest.fixture
def small_sets(tmp_path, monkeypatch):
    """Both sets in their published layout, with few images; the module `pack`."""
    monkeypatch.syspath_prepend(str(REAL))
    pack = load("pack")
    small = {"camvid": {"train": 3, "val": 2, "test": 1}, "steel": {"train": 3, "val": 2, "test": 1}}
    for module in (sets, pack, sys.modules["sets"]):
        monkeypatch.setattr(module, "COUNTS", small)
    rng = np.random.default_rng(0)
    for name, size in (("camvid", (24, 18)), ("steel", (200, 200))):
        for split in ("train", "val", "test") if name == "camvid" else ("train", "test"):
            count = small[name][split] + (small[name]["val"] if (name, split) == ("steel", "train") else 0)
            for index in range(count):
                for kind, suffix, high in (("images", "jpg", 256), ("masks", "png", 4)):
                    blocks = rng.integers(0, high, (size[1] // 2, size[0] // 2), dtype=np.uint8)
                    path = tmp_path / "real" / name / split / kind / f"{split}{index}.{suffix}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(blocks.repeat(2, 0).repeat(2, 1)).save(path)
        (tmp_path / "real" / name / "classes.json").write_text("{}")
    return pack


def files(root):
    return {path.relative_to(root).with_suffix(""): path for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["camvid", "steel"])
def test_a_packed_set_has_the_same_files_and_masks(small_sets, tmp_path, name):
    small_sets.pack(tmp_path / "real", tmp_path / "real.zip")
    from_folder = files(sets.prepare(tmp_path / "real", tmp_path / "a", name))
    from_pack = files(sets.prepare(tmp_path / "real.zip", tmp_path / "b", name))
    assert from_folder.keys() == from_pack.keys()
    for key, path in from_folder.items():
        if "images" in path.parts:
            first, second = (np.asarray(Image.open(p).convert("RGB"), float) for p in (path, from_pack[key]))
            assert first.shape == second.shape and np.abs(first - second).mean() < 25  # noise, which WebP smooths
        else:
            assert path.read_bytes() == from_pack[key].read_bytes()


def test_steel_is_halved_and_part_of_its_training_images_held_back(small_sets, tmp_path):
    root = sets.prepare(tmp_path / "real", tmp_path / "a", "steel")
    assert {split.name: len([*(split / "masks").iterdir()]) for split in root.iterdir() if split.is_dir()} == {
        **{"train": 3, "val": 2, "test": 1, "timing": 2}
    }
    mask = np.asarray(Image.open(root / "test" / "masks" / "test0.png"))
    original = np.asarray(Image.open(tmp_path / "real" / "steel" / "test" / "masks" / "test0.png"))
    np.testing.assert_array_equal(mask, original[::2, ::2])


def test_a_set_that_is_not_complete_is_an_error(small_sets, tmp_path):
    (tmp_path / "real" / "camvid" / "val" / "images" / "val0.jpg").unlink()
    with pytest.raises(ValueError, match=r"camvid should hold .*'val': 2.*found .*'val': 1"):
        sets.prepare(tmp_path / "real", tmp_path / "a", "camvid")
