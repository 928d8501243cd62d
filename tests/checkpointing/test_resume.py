"""A resumed run is bit for bit the uninterrupted one, or it says why it cannot be."""

import dataclasses
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.utils.other import TORCH_SAFE_GLOBALS
from safetensors.torch import load_file
from support.resume_cases import (
    BROKEN,
    LAST,
    SAVED,
    BrokenOff,
    Case,
    break_off,
    differences,
    differences_in_processes,
    make_trainer,
    read_world,
    run_broken,
    run_resumed,
    same,
    without_cards_and_pictures,
    write_resume_world,
)
from support.toy import run_python, toy_models
from transformers import EarlyStoppingCallback

from cps_hf.checkpointing import fingerprint
from cps_hf.checkpointing.checkpoints import newest_checkpoint, seal
from cps_hf.config import GROUPS, names_of_kind
from cps_hf.objectives import OBJECTIVES, CrossPseudoSupervision
from cps_hf.training.setup import train_streams
from cps_hf.training.trainer import CPSTrainer

# All pairs of objective, data, workers and processes; benchmarks/resume_grid.py runs the full grid.
CASES = [
    Case(objective, *rest)
    for index, objective in enumerate(OBJECTIVES)
    for rest in (
        [("map", 0, 1), ("stream", 2, 2)],
        [("map", 2, 1), ("stream", 0, 2)],
        [("stream", 0, 1), ("map", 2, 2)],
        [("stream", 2, 1), ("map", 0, 2)],
    )[index % 4]
]
CPS = Case("cps", "map", workers=0, processes=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_resume_world(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """The folder of a CPS run that was interrupted in step 5, with its newest checkpoint at step 3."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with without_cards_and_pictures():
        run_broken(root, CPS, out)
    return out


@pytest.fixture(scope="module")
def in_two_processes(root, tmp_path_factory):
    """The cases with two processes, all in one launch; case i has its runs in `case-i`."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    return folder, differences_in_processes(root, [case for case in CASES if case.processes == 2], folder)


def test_the_cases_cover_all_pairs_of_values():
    columns = [[getattr(case, name) for case in CASES] for name in ("objective", "data", "workers", "processes")]
    assert [sorted({*column}, key=str) for column in columns[1:]] == [["map", "stream"], [0, 2], [1, 2]]
    for a, b in itertools.combinations(columns, 2):
        assert {*zip(a, b, strict=True)} == {*itertools.product({*a}, {*b})}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.processes == 1], ids=str)
def test_an_interrupted_run_resumes_bit_for_bit(root, tmp_path, case):
    assert differences(root, case, tmp_path) == []


@pytest.mark.slow
def test_an_interrupted_run_resumes_in_two_processes(in_two_processes):
    _, found = in_two_processes
    assert found == {str(case): [] for case in CASES if case.processes == 2}


@pytest.mark.slow
def test_the_order_survives_another_process_count(root, tmp_path, in_two_processes, caplog):
    """From two processes to one, with twice the accumulation: the global batch stays the same."""
    folder, _ = in_two_processes
    there = [case for case in CASES if case.processes == 2]
    index = there.index(next(case for case in there if case.objective == "cps"))
    checkpoint = folder / f"case-{index}" / "whole" / f"checkpoint-{SAVED}"
    lines = [json.loads(line) for line in (checkpoint.parent / "metrics.jsonl").read_text().splitlines()]
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "save_steps": None}
    alone = replace(there[index], processes=1, workers=1)
    with without_cards_and_pictures():
        resumed = run_resumed(root, alone, tmp_path / "out", resume_from_checkpoint=str(checkpoint), **fields)
    t = make_trainer(root, alone, tmp_path / "unused")
    sets = (t.train_dataset, t.unlabeled_dataset)
    streams = train_streams(t.args, t.augmentation, t.accelerator, t.objective, *sets, {}, num_labels=3)
    expected = [stream.ids(8 * SAVED, 20) for stream in streams]  # eight images per step
    assert [*resumed["ids of the next 20 samples"].values()] == expected
    assert "not bit for bit" in caplog.text and "processes: 2 -> 1" in caplog.text
    assert "gradient_accumulation_steps: 2 -> 4" in caplog.text and "order of samples" in caplog.text
    rates = {line["step"]: line["learning_rate"] for line in resumed["log"] if "loss" in line}
    assert rates == {line["step"]: line["learning_rate"] for line in lines if "loss" in line and line["step"] > SAVED}


def test_a_checkpoint_has_no_pickle_that_could_run_code(stopped):
    checkpoint = newest_checkpoint(stopped)
    assert checkpoint.name == f"checkpoint-{SAVED}"
    suffixes = {path.suffix for path in checkpoint.rglob("*") if path.is_file()} - {".safetensors", ".json", ".md"}
    assert suffixes == {".bin", ".pkl"}  # Accelerate's: the optimizer's state and the random states
    for path in [*checkpoint.glob("*.bin"), *checkpoint.glob("*.pkl")]:
        with torch.serialization.safe_globals(TORCH_SAFE_GLOBALS):
            torch.load(path, weights_only=True)


CHANGES = {
    "a rate": ({"learning_rate": 0.5}, "learning_rate: 0.01 -> 0.5"),
    "the seed": ({"seed": 1}, "seed: 42 -> 1"),
    "the batch": ({"gradient_accumulation_steps": 1}, "labeled images a step: 8 -> 4"),
    "the augmentation": ({"crop_size": [32, 32]}, r"crop_size: \[24, 32\] -> \[32, 32\]"),
    "the partition": ({"partition_sha256": "ab"}, 'partition_sha256: none -> "ab"'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_that_changes_the_run_is_an_error_that_lists_it(root, tmp_path, stopped, change):
    fields, said = CHANGES[change]
    trainer = make_trainer(
        root, CPS, tmp_path / "out", resume_from_checkpoint=str(newest_checkpoint(stopped)), **fields
    )
    with pytest.raises(ValueError, match=rf"(?s)other settings.*{said}.*--resume_force"):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_changed_data_objective_and_models_are_listed(root, tmp_path, stopped):
    data = read_world(root, "map")
    first = make_trainer(root, CPS, tmp_path / "out")
    groups = {"args": first.args, "augmentation": first.augmentation, "evaluation": first.evaluation}
    first.args.resume_from_checkpoint = str(newest_checkpoint(stopped))
    data["train_dataset"] = data["train_dataset"].select([0, 1, 2, 3, 4, 5, 6, 8])
    data["unlabeled_dataset"] = data["unlabeled_dataset"].select([1, 0, 2, 3, 4, 5, 6, 7, 8])
    models = toy_models(dropout=0.3, norm=True, width=6)
    trainer = CPSTrainer(models, **groups, objective=CrossPseudoSupervision(weight=2.0), **data)
    with pytest.raises(ValueError) as error:
        trainer.train()
    for said in (
        "objective.weight: 1.0 -> 2.0",
        "train_dataset, rows: 9 -> 8",
        "unlabeled_dataset, hash of the ids:",
        "model 1, dropout: 0.2 -> 0.3",
        "model 0, hash of the parameters' names and shapes:",
    ):
        assert said in str(error.value)
    assert "unlabeled_dataset, rows" not in str(error.value) and "eval_dataset" not in str(error.value)


def test_every_setting_has_a_kind_on_resuming():
    groups = [group() for group in GROUPS]
    kinds = [names_of_kind(kind, *groups) for kind in (None, "free", "rounding", "choice")]
    everything = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert sorted(everything) == sorted(name for kind in kinds for name in kind)
    assert len({*everything}) == len(everything), "a command line holds all groups side by side"


def test_older_checkpoints_resume_with_default_fields(root, tmp_path, stopped):
    """Fields that are newer than the checkpoint count as their default; with another value it is a different run."""
    folder = tmp_path / "old"
    shutil.copytree(newest_checkpoint(stopped), folder / "checkpoint-3")
    path = folder / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    for name in ("ema_decay", "norm_momentum", "objective.labeled_loss"):
        del state["fingerprint"]["run"][name]
    path.write_text(json.dumps(state))
    seal(folder / "checkpoint-3")
    options = {"resume_from_checkpoint": str(folder / "checkpoint-3"), "max_steps": 4}
    with without_cards_and_pictures():
        assert make_trainer(root, CPS, tmp_path / "a", **options).train()["steps"] == 4
        with pytest.raises(ValueError, match="ema_decay: none -> 0.5"):
            make_trainer(root, CPS, tmp_path / "b", ema_decay=0.5, **options).train()


def test_free_settings_may_change_on_resuming(root, tmp_path, stopped):
    """A poly schedule of 12 steps from step 3 on, in another folder, with other logging and saving."""
    fields = {"max_steps": 12, "logging_steps": 1, "save_steps": 5, "eval_steps": 12, "dataloader_num_workers": 1}
    with without_cards_and_pictures():
        found = run_resumed(
            root, CPS, tmp_path / "out", resume_from_checkpoint=str(newest_checkpoint(stopped)), **fields
        )
    rates = {line["step"]: line["learning_rate"] for line in found["log"] if "loss" in line}
    # What is logged after step k is the rate of the next one.
    assert rates == pytest.approx({k: 1e-2 * (1 - k / 12) ** 0.9 for k in range(SAVED + 1, 13)}, abs=1e-12)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert steps == [5, 10, 12]


def test_with_resume_force_new_rates_apply_at_once(root, tmp_path, stopped, caplog):
    fields = {"learning_rate": 0.25, "weight_decay": 0.125, "resume_force": True}
    checkpoint = str(newest_checkpoint(stopped))
    trainer = make_trainer(root, CPS, tmp_path / "out", resume_from_checkpoint=checkpoint, **fields)
    used = []
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(dict(optimizer.param_groups[0]))
    )
    with without_cards_and_pictures():
        trainer.train()
    assert "learning_rate: 0.01 -> 0.25" in caplog.text
    assert [group["lr"] for group in used] == pytest.approx([0.25 * (1 - k / LAST) ** 0.9 for k in range(SAVED, LAST)])
    assert used[0]["weight_decay"] == 0.125


def test_a_changed_choice_of_best_is_made_again(root, tmp_path, stopped, caplog):
    fields = {"metric_for_best_model": "overall_accuracy", "resume_from_checkpoint": str(newest_checkpoint(stopped))}
    with without_cards_and_pictures():
        found = run_resumed(root, CPS, tmp_path / "out", **fields)
    assert "best branch is chosen again" in caplog.text and found["results"]["best"]["step"] > SAVED


def test_without_an_evaluation_set_old_scores_are_dropped(root, tmp_path, stopped):
    """The best branch stays, with its step and its weights; the last step's score is unknown."""
    checkpoint = newest_checkpoint(stopped)
    best = json.loads((checkpoint / "trainer_state.json").read_text())["best"]
    fields = {"resume_from_checkpoint": str(checkpoint), "max_steps": 6}
    with without_cards_and_pictures():
        results = make_trainer(root, CPS, tmp_path / "out", eval_dataset=None, **fields).train()
    assert results["final"] == {} and results["best"] == best and best["step"] == 2
    kept, there = (load_file(path / "best" / "model.safetensors") for path in (checkpoint, tmp_path / "out"))
    assert all(torch.equal(value, there[name]) for name, value in kept.items())


def test_a_finished_run_can_be_scored_on_another_set(root, tmp_path):
    with without_cards_and_pictures():
        first = make_trainer(root, CPS, tmp_path / "out", max_steps=4).train()
        trainer = make_trainer(root, CPS, tmp_path / "out", max_steps=4, resume_from_checkpoint="auto")
        trainer.eval_dataset = trainer.eval_dataset.select([0])
        results = trainer.train()
        expected = trainer.evaluator.scores(trainer.eval_dataset)
    assert results["final"] != first["final"] and results["final"] == expected
    assert results["best"] == {**expected, "step": 4, "branch": results["best"]["branch"]}


def test_a_stream_with_an_older_order_is_a_different_run(root, tmp_path):
    """Its checkpoint has no order; resuming would skip samples and repeat others."""
    now = make_trainer(root, replace(CPS, data="stream"), tmp_path / "out")._fingerprint()
    old = {key: value for key, value in now["run"].items() if not key.endswith(", order")}
    new_order = ', order: none -> "by seed, stream and pass"'
    assert fingerprint.differences(old, now["run"]) == [
        f"{name}_dataset{new_order}" for name in ("train", "unlabeled")
    ]
    assert not any("order" in key for key in now["best"])


def test_a_checkpoint_beyond_the_last_step_is_an_error(root, tmp_path, stopped):
    checkpoint = str(newest_checkpoint(stopped))
    trainer = make_trainer(root, CPS, tmp_path / "out", resume_from_checkpoint=checkpoint, max_steps=SAVED - 1)
    with pytest.raises(ValueError, match=f"is at step {SAVED}, beyond `max_steps` {SAVED - 1}"):
        trainer.train()


def test_the_current_settings_decide_on_the_fused_optimizer(root, tmp_path, stopped):
    fields = {"resume_from_checkpoint": str(newest_checkpoint(stopped)), "optim_fused": False}
    with without_cards_and_pictures():
        trainer = make_trainer(root, CPS, tmp_path / "out", **fields)
        trainer.train()
    assert [group["fused"] for group in trainer.optimizer.param_groups] == [False] * len(
        trainer.optimizer.param_groups
    )


def test_callbacks_continue_counting(root, tmp_path):
    def patience():
        return EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=2.0)  # never satisfied

    fields = {"eval_steps": 1, "save_steps": 2, "max_steps": 20}
    with without_cards_and_pictures():
        whole = make_trainer(root, CPS, tmp_path / "whole", [patience()], **fields).train()
        broken = make_trainer(root, CPS, tmp_path / "out", [patience()], **fields)
        break_off(broken, step=4, micro_batch=1)
        with pytest.raises(BrokenOff):
            broken.train()
        fields |= {"resume_from_checkpoint": "auto"}
        resumed = make_trainer(root, CPS, tmp_path / "out", [patience()], **fields).train()
    assert SAVED < whole["steps"] == resumed["steps"] < 20


def test_trackers_show_no_step_twice(root, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fields = {"report_to": ["tensorboard"], "run_name": "run", "logging_steps": 1}
    with without_cards_and_pictures():
        run_broken(root, CPS, tmp_path / "out", **fields)  # has logged step 4
        run_resumed(root, CPS, tmp_path / "out", **fields)
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("events.*") if path.parent.name == "run"}
    steps = [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]
    assert steps == [*range(1, LAST + 1)] and BROKEN in steps


FULL_DISK = """
import resource, sys
from pathlib import Path
from support.resume_cases import Case, make_trainer
from transformers import TrainerCallback

class FullDisk(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # bytes that a file may have

fields = {"eval_steps": None, "max_steps": 8, "logging_steps": 4}  # at step 6 nothing but a save
make_trainer(Path(sys.argv[1]), Case("cps", "map", 0, 1), Path(sys.argv[2]), [FullDisk()], **fields).train()
"""


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_keeps_checkpoints(root, tmp_path):
    done = run_python("-c", FULL_DISK, str(root), str(tmp_path / "out"), timeout=500)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert "CheckpointError: The checkpoint of step 6 could not be written" in error and "Is the disk full?" in error
    assert f"checkpoint-{SAVED}: free some space and resume with `--resume_from_checkpoint auto`" in error
    assert newest_checkpoint(tmp_path / "out").name == f"checkpoint-{SAVED}"
    assert not [*(tmp_path / "out").glob("tmp-checkpoint-*")]


@pytest.mark.slow
def test_a_run_killed_three_times_ends_the_same(tmp_path):
    """In a separate process: the script forks, and must not have run torch before."""
    script = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"
    done = run_python(str(script), "--kills", "3", "--output", str(tmp_path / "report.md"), timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "3 kills" in done.stdout and "nothing, bit for bit" in done.stdout


def test_the_committed_reports_match_the_scripts():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    kills = (results / "kill_test.md").read_text(encoding="utf-8")
    assert kills.count("\n| ") == 21 and "nothing, bit for bit" in kills
    grid = (results / "resume_grid.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in grid.splitlines() if line.startswith("| ")]
    assert rows[0][1:] == [*OBJECTIVES] and len(rows) == 9
    assert {cell for row in rows[1:] for cell in row[1:]} <= {"identical", "not run"}


def test_equal_is_bit_for_bit():
    one = {"a": torch.tensor([1.0, 2.0]), "b": [float("nan"), {"c": 3}]}
    other = {"a": torch.tensor([1.0, 2.0]), "b": [float("nan"), {"c": 3}]}
    assert same(one, other)
    other["a"][1] += 2e-7
    assert not same(one, other)
