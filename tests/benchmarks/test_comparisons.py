"""compare_objectives.py and ablate_switches.py: what they run, what they do not run again, and their tables."""

import csv
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.toy import run_python, script
from transformers import UperNetForSemanticSegmentation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS / "comparisons"))  # the scripts import each other

import ablate_switches  # noqa: E402
import compare_objectives  # noqa: E402
from cells import TRAIN  # noqa: E402

from cps_hf.checkpointing.checkpoints import seal  # noqa: E402
from cps_hf.commands import train  # noqa: E402
from cps_hf.commands.models import small_model  # noqa: E402
from cps_hf.modeling.backbones import load_backbone_weights  # noqa: E402
from cps_hf.scenes.write import write_street_scenes  # noqa: E402

# Replaces a training run by known scores. Started as `python FAKE.py -m cps_hf train --config CELL.yaml`.
FAKE = """
import json, sys, yaml
from pathlib import Path
assert sys.argv[1:4] == ["-m", "cps_hf", "train"] or sys.argv[1].endswith("examples/self_training.py"), sys.argv
config = yaml.safe_load(open(sys.argv[-1]))
out = Path(config["output_dir"])
top = out.parent.parent
with open(top / "started.txt", "a") as file:
    print(out.name, config["max_steps"], config["learning_rate"], config["resume_from_checkpoint"], file=file)
assert not out.parts[-2] == "runs" or (top / "protocol.md").exists() or (top / "settings.json").exists()
if (top / f"break-{out.name}").exists():
    sys.exit("something broke")
cps = config["objective"] == "cps"
score = 0.25 if cps else 0.5 if config["partition"] == "1-1" else 0.2
score += 0.01 * config["seed"] ** 2 * (2 if cps else 1) - abs(config["learning_rate"] - 0.002)
score += 0.001 * config["max_steps"]
rows = {"branch_0": score - 0.01, "branch_1": score + 0.01, "mean": score + 0.05, "teacher": score}
keys = ("mean_iou", "mean_accuracy", "overall_accuracy")
final = {row: {**dict.fromkeys(keys, s), "per_category_iou": []} for row, s in rows.items()}
lines = [{"step": step, **{f"eval_{row}_{key}": s + better for row, s in rows.items() for key in keys}}
         for step, better in ((1, 0.03), (config["max_steps"], 0.0))]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
training = {"seconds": 99.0, "cpu_seconds": 30.0 if cps else 12.0, "images_per_second": 8.0, "peak_memory": 2**30,
            "device": "cpu", "num_processes": 1, "num_networks": 2}
results = {"final": final, "steps": config["max_steps"], "objective": {}, "partition": {}, "num_labeled": 12,
           "num_unlabeled": 388, "training": training, "agreement": {}, "versions": {}}
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return f"{sys.executable} {path}"


def compare(tmp_path, fake, *words):
    own = ("--output_dir", str(tmp_path / "out"), "--launch", fake, "--num_pictures", "0", "--learning_rate", "0.002")
    return compare_objectives.main([*words, *own, "--max_steps", "10"])


def started(tmp_path):
    return [line.split() for line in (tmp_path / "out" / "started.txt").read_text().splitlines()]


def rows(tmp_path):
    return {row["row"]: row for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}


def test_the_table_has_mean_spread_and_paired_difference(tmp_path, fake, capsys):
    words = ("--methods", "supervised", "cps_cutmix", "all_labels", "supervised_equal_time", "--seeds", "1", "2", "3")
    assert compare(tmp_path, fake, *words) == 0
    found = rows(tmp_path)
    supervised = [0.21 + 0.01 * seed**2 for seed in (1, 2, 3)]  # 0.2 + 0.01 for ten steps
    cps = [0.26 + 0.02 * seed**2 for seed in (1, 2, 3)]
    assert found["supervised"]["last"] == pytest.approx(statistics.mean(supervised))
    assert found["supervised"]["last_spread"] == pytest.approx(statistics.stdev(supervised))
    assert found["supervised"]["best"] == pytest.approx(statistics.mean(supervised) + 0.03)
    assert found["supervised_mean"]["last"] == pytest.approx(statistics.mean(supervised) + 0.05)
    differences = [b - a for a, b in zip(supervised, cps, strict=True)]
    assert found["cps_cutmix"]["minus_supervised"] == pytest.approx(statistics.mean(differences))
    assert found["cps_cutmix"]["minus_supervised_spread"] == pytest.approx(statistics.stdev(differences))
    assert found["all_labels"]["last"] == pytest.approx(0.51 + 0.14 / 3)
    # 10 steps x 30 seconds of CPS + CutMix / 12 of supervised training
    assert found["supervised_equal_time"]["steps"] == 25
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "| CPS + CutMix | 1, 2, 3 | 12 | 2 | 10 | **35.33 ± 8.08** | +9.67 ± 4.04 | 38.33 | 99 | 8.0 | 1024 MiB |"
        in table
    )
    assert table in capsys.readouterr().out and "All requested runs are finished." in table
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        assert [row["row"] for row in csv.DictReader(file)] == [*found]


def test_finished_runs_are_not_repeated(tmp_path, fake):
    compare(tmp_path, fake, "--methods", "supervised")
    compare(tmp_path, fake, "--methods", "cps", "--seeds", "1", "2")
    assert [name for name, *_ in started(tmp_path)] == ["supervised-12-seed1", "cps-12-seed1", "cps-12-seed2"]
    assert rows(tmp_path)["supervised"]["seeds"] == [1] and rows(tmp_path)["cps"]["seeds"] == [1, 2]


def test_stopped_runs_resume_if_they_have_a_checkpoint(tmp_path, fake):
    checkpoint = tmp_path / "out" / "runs" / "supervised-12-seed1" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    seal(checkpoint)
    compare(tmp_path, fake, "--methods", "supervised", "--seeds", "1", "2")
    assert [resumed for *_, resumed in started(tmp_path)] == ["True", "None"]
    assert not checkpoint.exists()  # a finished run needs no checkpoint


def test_a_failed_run_stops_no_other_and_is_printed_as_not_run(tmp_path, fake, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "break-supervised-12-seed1").touch()
    assert compare(tmp_path, fake, "--methods", "supervised", "cps", "self_training") == 1
    said = capsys.readouterr().out
    assert "supervised-12-seed1 FAILED, exit status 1" in said and "something broke" in said
    assert [name for name, *_ in started(tmp_path)] == ["supervised-12-seed1", "cps-12-seed1"]
    assert "| self-training | not run |" in said
    assert "**Not run**: supervised-12-seed1, self_training-12-seed1." in said
    (tmp_path / "out" / "break-supervised-12-seed1").unlink()
    assert compare(tmp_path, fake, "--methods", "supervised") == 0
    assert [name for name, *_ in started(tmp_path)][2:] == ["supervised-12-seed1", "self_training-12-seed1"]


def test_the_newest_methods_get_their_labelers_and_averages(tmp_path, fake):
    methods = ("fixed_teacher", "cps_averaged", "unimatch_v2")
    assert compare(tmp_path, fake, "--methods", *methods) == 0
    runs = tmp_path / "out" / "runs"
    settings = {m: yaml.safe_load((runs / f"{m}-12-seed1" / "cell.yaml").read_text()) for m in methods}
    pair = [str(runs / "supervised-12-seed1" / f"branch_{i}") for i in (0, 1)]
    assert settings["fixed_teacher"]["labelers"] == pair
    assert (settings["cps_averaged"]["ema_decay"], settings["unimatch_v2"]["ema_decay"]) == (0.996, None)
    found = rows(tmp_path)
    assert found["fixed_teacher"]["seconds"] == 2 * 99 and found["cps_averaged"]["seconds"] == 99


def test_a_folder_without_a_newer_method_can_be_extended(tmp_path, fake, capsys):
    compare(tmp_path, fake, "--methods", "supervised")
    path = tmp_path / "out" / "protocol.json"
    protocol = json.loads(path.read_text())
    del protocol["methods"]["unimatch_v2"]
    path.write_text(json.dumps(protocol))
    assert compare(tmp_path, fake, "--methods", "cps_averaged") == 0
    assert [name for name, *_ in started(tmp_path)] == ["supervised-12-seed1", "cps_averaged-12-seed1"]


def test_the_learning_rate_is_chosen_on_supervised_training_alone(tmp_path, fake):
    compare(
        tmp_path, fake, "--methods", "cps", "--learning_rates", "1e-3", "2e-3", "4e-3", "--learning_rate_seed", "7"
    )
    runs = started(tmp_path)
    assert [name for name, *_ in runs] == [f"learning_rate-{r}" for r in ("0.001", "0.002", "0.004")] + [
        "cps-12-seed1"
    ]
    assert runs[-1][2] == "0.002"
    assert "Chosen for every method: 0.002" in (tmp_path / "out" / "learning_rate.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_steps", "11"], "`max_steps` is 10 there and 11 here"),
        (["--method_options", '{"cps": {"weight": 2}}', "--max_steps", "10"], "other settings: `cps`"),
        (["--method_options", '{"cps": {"wait": 2}}', "--max_steps", "10"], "cps has no 'wait'; it has .*weight"),
        (["--objective", "cps"], "`--methods`, `--output_dir`"),
    ],
)
def test_runs_of_other_settings_are_not_mixed(tmp_path, fake, capsys, words, said):
    compare(tmp_path, fake, "--methods", "cps")
    capsys.readouterr()
    own = ["--output_dir", str(tmp_path / "out"), "--launch", fake, "--learning_rate", "0.002", "--methods", "cps"]
    assert compare_objectives.main([*own, *words]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert len(started(tmp_path)) == 1


@pytest.mark.slow
def test_each_arm_of_the_ablation_turns_one_switch(tmp_path, fake, capsys):
    own = ("--output_dir", str(tmp_path / "out"), "--launch", fake, "--learning_rate", "0.002", "--max_steps", "10")
    assert ablate_switches.main([*own, "--world_size", "8", "--seeds", "1", "2"]) == 0
    runs = tmp_path / "out" / "runs"
    settings = {path.parent.name: yaml.safe_load(path.read_text()) for path in runs.glob("*/cell.yaml")}
    assert len(settings) == 2 * (7 + 6)
    original, ours = settings["cps_cutmix-original-seed1"], settings["cps_cutmix-ours-seed1"]
    fields = ("loss_divisor", "cutmix_partner", "reshuffle_unlabeled", "teach_padding", "on_labeled")
    assert [original[f] for f in fields] == [8.0, "itself", False, True, False]
    assert [ours[f] for f in fields] == [1.0, "neighbour", True, False, False]
    for name, cell in settings.items():
        method, arm, seed = name.split("-")
        base = settings[f"{method}-original-{seed}"]
        if arm not in ("original", "ours"):
            assert len([f for f in cell if cell[f] != base[f] and f != "output_dir"]) == 1
    plain = settings["cps-original-seed1"]
    assert (plain["cutmix"], plain["cutmix_partner"], plain["on_labeled"]) == (False, "neighbour", True)
    table = capsys.readouterr().out
    assert "| cps_cutmix | loss not divided by the world size 8 | 1, 2 | 31.00 ± 4.24 | +0.00 ± 0.00 |" in table


@pytest.mark.slow
def test_the_comparison_runs_for_real_and_draws_its_plots_and_pictures(tmp_path, monkeypatch, capsys):
    """Two partitions, methods with different needs, in this process; every promised file exists."""
    root = write_street_scenes(
        tmp_path / "set", num_train=16, num_train_extra=0, num_val=3, size=(64, 128), progress=False
    )

    def in_this_process(cells, **_):
        for cell in cells:
            if not cell.finished:
                cell.folder.mkdir(parents=True)
                (cell.folder / "cell.yaml").write_text(cell.settings.to_yaml())
                program, words = (train, ()) if cell.program == TRAIN else (script("self_training"), cell.program[1:])
                program.main([*words, "--config", str(cell.folder / "cell.yaml")])
        return []

    monkeypatch.setattr(compare_objectives, "run_all", in_this_process)
    words = ("--dataset", "cityscapes", "--data_root", str(root), "--crop_size", "32", "--partitions", "4", "8")
    words += ("--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--max_steps", "2")
    methods = (
        "supervised",
        "cps_cutmix",
        "all_labels",
        "self_training",
        "fixed_teacher",
        "cps_averaged",
        "unimatch_v2",
    )
    out = tmp_path / "out"
    assert (
        compare_objectives.main([*words, "--output_dir", str(out), "--methods", *methods, "--num_pictures", "2"]) == 0
    )
    promised = {"protocol.md", "protocol.json", "table.md", "table.csv", "comparison.json", "scores.png", "curves.png"}
    promised |= {"agreement.png", "agreement_pictures.png", "agreement.md", "pictures.png", "runs"}
    assert {path.name for path in out.iterdir()} == promised
    found = json.loads((out / "comparison.json").read_text())["rows"]
    assert len(found) == 2 * 10 and all(row["seeds"] == [1] and row["last"] is not None for row in found)
    assert {row["partition"]: row["num_labeled"] for row in found if row["row"] == "self_training"} == {"4": 4, "8": 8}
    assert "All requested runs are finished." in capsys.readouterr().out


@pytest.mark.slow
def test_the_object_scenes_backbone_fits_the_small_network(tmp_path):
    program = str(BENCHMARKS / "object_backbone.py")
    out = tmp_path / "backbone"
    done = run_python(program, "--output", str(out), "--scenes", "12", "--steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    network = UperNetForSemanticSegmentation(small_model())
    load_backbone_weights(network, out)
    weights, prefix = load_file(out / "model.safetensors"), "resnet."
    found = network.backbone.state_dict()
    convolutions = [name for name, weight in weights.items() if name.startswith(prefix) and weight.ndim == 4]
    assert len(convolutions) > 6
    for name in convolutions:
        assert torch.equal(found[name.removeprefix(prefix)], weights[name]), name
    again = run_python(program, "--output", str(out), "--scenes", "12", "--steps", "2")
    assert again.returncode == 2 and "is not empty" in again.stderr
