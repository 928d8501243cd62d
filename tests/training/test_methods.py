"""Every method in the same loop: what it trains, logs, evaluates and exports."""

import json

import pytest
import torch
from support.by_hand import TinyBranch, batches
from support.toy import settings, tiny_upernet, toy_models, write_world
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSemanticSegmentation

from cps_hf.objectives import OBJECTIVES, CrossPseudoSupervision, FixMatch, MeanTeacher
from cps_hf.training.trainer import CPSTrainer

SIZES = [(40, 56), (56, 40), (48, 48), (37, 61), (64, 33)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {
        "train_dataset": write_world(root / "labeled", SIZES),
        "unlabeled_dataset": write_world(root / "unlabeled", SIZES * 2, first=50).rename_column(
            "label",
            "pseudo_label",  # few methods use it
        ),
        "eval_dataset": write_world(root / "eval", SIZES[:3], first=90),
    }


def train(world, folder, objective, models=None, **fields):
    values = {"max_steps": 2, "per_device_train_batch_size": 3, "crop_size": [32, 40], "learning_rate": 1e-2}
    values |= {"dataloader_num_workers": 0, "logging_steps": 1, "disable_tqdm": True, "num_pictures": 0}
    values |= {"ema_decay": 0.9} if objective.averages else {}
    args = settings(output_dir=str(folder / "out"), **(values | fields))
    models = toy_models(1 if objective.teacher else 2) if models is None else models
    trainer = CPSTrainer(models, **args, objective=objective, **world)
    return trainer, trainer.train()


def lines(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def own_numbers(objective):
    """The method's loss for a batch, by log names, which its own test checks."""
    branches = [TinyBranch(seed) for seed in range(1 if objective.teacher else 2)]
    options = {"averages": [TinyBranch(seed) for seed in (7, 8)]} if objective.averages else {}
    return set(objective(branches, *batches(objective.views), teacher=TinyBranch(9), **options).logs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_method_trains_in_the_loop_and_logs_its_numbers(world, tmp_path, name):
    """Also to a tracker. With an odd batch, whose CutMix partners come with the stream, and an odd crop."""
    objective = OBJECTIVES[name]()
    fields = {"crop_size": [33, 41], "report_to": ["tensorboard"], "run_name": "r"}
    fields |= {"ema_decay": 0.5} if objective.averages else {}
    trainer, results = train(world, tmp_path, objective, **fields)
    events = EventAccumulator(str(tmp_path / "out" / "r")).Reload()
    steps = [line for line in lines(tmp_path) if "loss" in line]
    numbers = own_numbers(objective)
    assert len(steps) == 2 and "supervised_loss" in numbers
    for line in steps:
        assert numbers <= line.keys() and all(torch.isfinite(torch.tensor(line[key])) for key in numbers)
        for key in numbers:
            tracked = {event.step: event.value for event in events.Scalars(key)}
            assert tracked[line["step"]] == pytest.approx(line[key], rel=1e-6)
    if objective.teacher:
        assert [event.step for event in events.Scalars("eval_teacher_mean_iou")] == [2]
    rows = {"branch_0", "teacher"} if objective.teacher else {"branch_0", "branch_1", "mean"}
    rows |= {"branch_0_average", "branch_1_average"} if objective.averages else set()
    assert results["final"].keys() == rows
    for row in rows - {"mean"}:
        assert (tmp_path / "out" / row / "model.safetensors").is_file()


def test_best_is_the_better_of_student_and_teacher(world, tmp_path):
    _, results = train(world, tmp_path, MeanTeacher(), models=tiny_upernet(), max_steps=3)
    evaluated = lines(tmp_path)[-1]
    scores = {row: results["final"][row]["mean_iou"] for row in ("branch_0", "teacher")}
    assert evaluated["eval_teacher_mean_iou"] == pytest.approx(scores["teacher"])
    assert evaluated["eval_mean_iou"] == pytest.approx(max(scores.values()))
    assert results["best"]["branch"] == max(scores, key=scores.get)


def test_the_teacher_stays_in_evaluation_mode(world, tmp_path):
    trainer, _ = train(world, tmp_path, MeanTeacher(decay=0.5), models=tiny_upernet(), max_steps=1)
    trainer.prepared.train()
    assert trainer.module.branches[0].training and not trainer.module.teacher.training
    counters = [v for k, v in trainer.module.teacher.state_dict().items() if k.endswith("num_batches_tracked")]
    student = [v for k, v in trainer.module.branches[0].state_dict().items() if k.endswith("num_batches_tracked")]
    assert counters == student  # copied from the student, not incremented by separate passes


def test_a_bfloat16_branchs_teacher_is_float32_throughout(world, tmp_path):
    trainer, results = train(world, tmp_path, MeanTeacher(), models=tiny_upernet(), max_steps=1, dtype="bfloat16")
    student, teacher = trainer.module.branches[0], trainer.module.teacher
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert 0 <= results["final"]["teacher"]["mean_iou"] <= 1
    exported = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out" / "teacher", dtype="auto")
    assert exported.dtype == torch.float32
    for name, value in exported.state_dict().items():
        assert torch.equal(value, teacher.model.state_dict()[name]), name


def test_a_teacher_method_takes_one_model(world, tmp_path):
    with pytest.raises(ValueError, match="MeanTeacher trains one model and its teacher, got 2"):
        train(world, tmp_path, MeanTeacher(), models=toy_models(2))


def test_the_masks_probability_reaches_the_stream(world, tmp_path):
    """At threshold 0, a run without CutMix differs from one with CutMix and equal settings otherwise."""
    found = []
    for share in (0.0, 1.0):
        objective = FixMatch(confidence_threshold=0.0, cutmix=share)
        train(world, tmp_path / str(share), objective, max_steps=1)
        found.append([line for line in lines(tmp_path / str(share)) if "loss" in line][0]["unsupervised_loss"])
    assert found[0] != found[1]


def test_the_other_crop_of_an_image_reaches_the_objective_normalised(world, tmp_path):
    seen = {}

    class Watching(CrossPseudoSupervision):
        def __call__(self, branches, labeled, unlabeled, **rest):
            seen.update(unlabeled.tensors())
            return super().__call__(branches, labeled, unlabeled, **rest)

    train(world, tmp_path, Watching(cutmix_partner="itself"), max_steps=1)
    assert seen["second_crop"].is_floating_point() and seen["second_crop"].abs().max() < 3
    assert (seen["second_crop"].permute(0, 2, 3, 1)[~seen["second_valid"]] == 0).all()


def test_an_unlabeled_order_that_never_changes_is_an_option(world, tmp_path):
    orders = {}
    for reshuffle in (True, False):
        options = {"max_steps": 1, "reshuffle_unlabeled": reshuffle}
        trainer, _ = train(world, tmp_path / str(reshuffle), CrossPseudoSupervision(), **options)
        reader = trainer.streams["unlabeled"].reader
        orders[reshuffle] = [[reader.source_at(p) for p in range(first, first + 10)] for first in (0, 10)]
    assert orders[True][0] != orders[True][1] and orders[False][0] == orders[False][1] == orders[True][0]
