"""benchmarks/real: valid settings of every arm, equal time by arithmetic, and a report of differences per seed."""

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

import pytest

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
    cells = {
        ("steel", 24, length, arm): {1: cell(arm, 1, score, length=length)}
        for length, arm, score in (
            (1500, "recommended", 0.60),
            (1500, "control_equal_time", 0.62),
            (3000, "recommended", 0.65),
            (3000, "control_equal_time", 0.63),
        )
    }
    (axes,) = report.gain_figure(cells).axes
    means = [line for line in axes.lines if line.get_label().startswith("over")]
    assert [[*map(round, line.get_ydata())] for line in means] == [[-2, 2]]
    assert [*means[0].get_xdata()] == [1500, 3000]


def test_a_teacher_is_scored_if_the_method_has_one():
    found = cell("mean_teacher", 1, 0.5)
    found["scores"]["teacher"] = {"mean_iou": 0.75, "per_category_iou": []}
    assert report.single(found) == 75
