"""Two stages in one run: supervised branches, then the method from these; bit for bit the same across the border."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.resume_cases import (
    LAST,
    BrokenOff,
    Case,
    break_off,
    make_trainer,
    run_whole,
    same,
    without_cards_and_pictures,
    write_resume_world,
)
from transformers import TrainerCallback

from cps_hf.checkpointing.checkpoints import newest_checkpoint
from cps_hf.config import CPSConfig
from cps_hf.objectives import CrossPseudoSupervision, MeanTeacher, Supervised
from cps_hf.training.setup import make_schedule

CPS = Case("cps", "map", workers=0, processes=1)
BORDER = 3
STAGES = {"pretrain_steps": BORDER, "second_stage_learning_rate_factor": 0.5, "ema_decay": 0.8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_resume_world(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run of three supervised and three CPS steps, saved at 2, 3 (the border), 4 and 6."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with without_cards_and_pictures():
        return out, run_whole(root, CPS, out, save_steps=2, **STAGES)


def test_each_stage_has_its_own_schedule():
    args = CPSConfig(max_steps=10, pretrain_steps=4, learning_rate=0.2, second_stage_learning_rate_factor=0.5)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.6}], lr=0.2)
    schedule, rates = make_schedule(optimizer, args), []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [0.2 * (1 - k / 4) ** 0.9 for k in range(4)] + [0.1 * (1 - k / 6) ** 0.9 for k in range(6)]
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [rate for _, rate in rates] == pytest.approx([3 * rate for rate in expected])


def test_the_first_stage_equals_a_supervised_run(root, tmp_path, whole):
    out, found = whole
    with without_cards_and_pictures():
        alone = make_trainer(root, replace(CPS, objective="supervised"), tmp_path / "out", max_steps=BORDER)
        scores = alone.train()["final"]
    assert found["results"]["stages"]["supervised"]["branch_0"] == scores["branch_0"]
    assert found["results"]["stages"]["supervised"].keys() == {*scores, "branch_0_average", "branch_1_average"}
    assert found["results"]["stages"]["final"] == found["results"]["final"]
    for i in (0, 1):
        exported = load_file(out / f"supervised_{i}" / "model.safetensors")
        assert same(exported, load_file(tmp_path / "out" / f"branch_{i}" / "model.safetensors"))
    assert (out / "supervised_0_average" / "config.json").is_file()
    state = json.loads((out / f"checkpoint-{BORDER}" / "trainer_state.json").read_text())
    assert state["streams"]["unlabeled"]["position"] == 0 and state["streams"]["labeled"]["position"] == 8 * BORDER
    last = json.loads((out / f"checkpoint-{LAST}" / "trainer_state.json").read_text())
    assert last["streams"]["unlabeled"]["position"] == 8 * (LAST - BORDER)
    assert len(found["ids of the last steps"]["unlabeled_dataset"]) == 2 * (LAST - BORDER)


def test_the_second_stage_equals_a_new_run_from_its_branches(root, tmp_path, whole):
    """Optimizer, schedule and progress start again; labeled samples continue where the first stage stopped."""
    out, found = whole
    trainer = make_trainer(root, CPS, tmp_path / "out", max_steps=LAST - BORDER, learning_rate=0.5e-2)
    for i, branch in enumerate(trainer.module.branches):
        branch.model.load_state_dict(load_file(out / f"supervised_{i}" / "model.safetensors"))
    trainer._train_streams = lambda _: type(trainer)._train_streams(
        trainer, {"labeled": {"position": 8 * BORDER, "length": None}}
    )
    torch_state = torch.load(out / f"checkpoint-{BORDER}" / "random_states_0.pkl", weights_only=False)
    trainer.callback_handler.add_callback(RestoreRandomness(torch_state["torch_manual_seed"]))
    with without_cards_and_pictures():
        trainer.train()
    weights = {k: v for k, v in found["weights, teacher, statistics"].items() if not k.startswith("averages")}
    assert same(weights, dict(trainer.module.state_dict()))


class RestoreRandomness(TrainerCallback):
    """For dropout."""

    def __init__(self, state):
        self.state = state

    def on_train_begin(self, args, state, control, **kwargs):
        torch.set_rng_state(self.state)


@pytest.mark.parametrize("step", [BORDER, BORDER + 1, BORDER + 2])
def test_a_run_resumes_bit_for_bit_around_the_border(root, tmp_path, whole, step):
    """In the first stage's last step, right after the border's checkpoint, and later."""
    with without_cards_and_pictures():
        broken = make_trainer(root, CPS, tmp_path / "out", save_steps=2, **STAGES)
        break_off(broken, step=step, micro_batch=2)
        with pytest.raises(BrokenOff):
            broken.train()
        expected = {BORDER: 2, BORDER + 1: BORDER, BORDER + 2: 4}[step]
        assert newest_checkpoint(tmp_path / "out").name == f"checkpoint-{expected}"
        resumed = run_whole(root, CPS, tmp_path / "out", save_steps=2, resume_from_checkpoint="auto", **STAGES)
    compared = [name for name in whole[1] if not name.startswith("ids of")]  # it saw other steps
    assert [name for name in compared if not same(whole[1][name], resumed[name])] == []


@pytest.mark.parametrize("when", ["the export", "the evaluation"])
def test_a_run_killed_at_the_border_after_saving_is_complete(root, tmp_path, whole, when):
    with without_cards_and_pictures():
        broken = make_trainer(root, CPS, tmp_path / "out", save_steps=2, **STAGES)
        if when == "the export":
            broken._export_supervised = raise_broken_off
        else:
            scores = broken.evaluator.scores
            broken.evaluator.scores = lambda d: raise_broken_off() if broken.state.global_step == BORDER else scores(d)
        with pytest.raises(BrokenOff):
            broken.train()
        resumed = run_whole(root, CPS, tmp_path / "out", save_steps=2, resume_from_checkpoint="auto", **STAGES)
    assert resumed["results"]["stages"] == whole[1]["results"]["stages"]
    compared = [name for name in whole[1] if not name.startswith("ids of")]  # it saw other steps
    assert [name for name in compared if not same(whole[1][name], resumed[name])] == []


class Lengthen(TrainerCallback):
    """Gives the second stage another length, as a time limit does."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == args.pretrain_steps:
            state.max_steps = self.steps


@pytest.mark.parametrize("steps", [LAST - 1, LAST + 2])
def test_a_changed_second_stage_equals_one_of_that_length_and_resumes(root, tmp_path, steps):
    """The schedule, the progress and the last step are those of a run that was `steps` long from the beginning."""
    options = {"save_steps": 1, **STAGES}
    with without_cards_and_pictures():
        expected = run_whole(root, CPS, tmp_path / "expected", max_steps=steps, **options)
        broken = make_trainer(root, CPS, tmp_path / "out", callbacks=[Lengthen(steps)], **options)
        rates = []
        broken.callback_handler.add_callback(NoteRates(rates))
        break_off(broken, step=steps, micro_batch=2)
        with pytest.raises(BrokenOff):
            broken.train()
        assert (broken.args.max_steps, broken.state.max_steps) == (steps, steps)
        later = steps - BORDER
        assert rates[BORDER:] == pytest.approx([0.5e-2 * (1 - k / later) ** 0.9 for k in range(later)])
        # resumed with the command line of its beginning
        resumed = run_whole(root, CPS, tmp_path / "out", resume_from_checkpoint="auto", **options)
    compared = [name for name in expected if not name.startswith("ids of")]  # it saw other steps
    assert [name for name in compared if not same(expected[name], resumed[name])] == []
    saved = json.loads((tmp_path / "out" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert (saved["planned_steps"], saved["settings"]["max_steps"]) == (LAST, steps)
    with without_cards_and_pictures():  # a given length is kept
        longer = make_trainer(root, CPS, tmp_path / "out", max_steps=20, resume_from_checkpoint=True, **options)
        break_off(longer, step=steps + 1, micro_batch=1)
        with pytest.raises(BrokenOff):
            longer.train()
        assert longer.state.max_steps == 20 and longer.state.planned_steps is None


class NoteRates(TrainerCallback):
    """The learning rate of each step."""

    def __init__(self, rates: list[float]):
        self.rates = rates

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def raise_broken_off(*_):
    raise BrokenOff


def test_obstacles_to_supervised_exports_are_found_early(root, tmp_path):
    with without_cards_and_pictures():
        broken = make_trainer(root, CPS, tmp_path / "out", save_steps=2, **STAGES)
        break_off(broken, step=3, micro_batch=1)
        with pytest.raises(BrokenOff):
            broken.train()
        (tmp_path / "out" / "supervised_1" / ".git").mkdir(parents=True)
        again = make_trainer(root, CPS, tmp_path / "out", resume_from_checkpoint="auto", save_steps=2, **STAGES)
        with pytest.raises(ValueError, match="supervised_1 contains files that are not of an exported model"):
            again.train()
    assert again.state.global_step == 0 and not (tmp_path / "out" / "supervised_0").exists()


def test_log_and_cards_say_the_stage(root, tmp_path, caplog):
    fields = {"logging_steps": 2, "max_steps": 4, "pretrain_steps": 2, "save_steps": None, "eval_steps": None}
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(root, CPS, tmp_path / "out", **fields)
        results = trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [(line["step"], line["stage"]) for line in lines] == [(1, 1), (2, 1), (4, 2)]
    assert all("cps_loss" not in line for line in lines[:2]) and lines[-1]["cps_loss"] > 0
    for said in ("Steps 1 to 2 are stage 1 of 2: supervised.", "is done at step 2: branch_0 mIoU "):
        assert said in caplog.text
    assert "Steps 3 to 4 are stage 2 of 2: CrossPseudoSupervision." in caplog.text
    score = f"{100 * results['stages']['supervised']['branch_1']['mean_iou']:.2f}"
    card = (tmp_path / "out" / "supervised_1" / "README.md").read_text()
    assert "Supervised" in card and score in card and "CrossPseudoSupervision" not in card
    assert "CrossPseudoSupervision" in (tmp_path / "out" / "branch_1" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["stages"].keys() == {"supervised", "final"}


def test_a_teacher_starts_as_the_supervised_branch(root, tmp_path):
    case = Case("mean_teacher", "map", workers=0, processes=1)
    fields = {"max_steps": 4, "pretrain_steps": 2, "save_steps": 1, "objective": MeanTeacher(decay=0.9)}
    with without_cards_and_pictures():
        make_trainer(root, case, tmp_path / "out", **fields).train()
    for step in (1, 2, 3, 4):
        state = load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")
        teacher = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
        equal = all(torch.equal(value, state[f"branches.0.{name}"]) for name, value in teacher.items())
        assert equal == (step <= 2)
    assert not (tmp_path / "out" / "supervised_1").exists() and not (tmp_path / "out" / "supervised_teacher").exists()


def test_the_supervised_part_of_a_method_has_its_labeled_loss():
    method = CrossPseudoSupervision(labeled_loss="focal", focal_gamma=1.5, class_weights=0.5, joint_forward=True)
    assert Supervised.of(method) == Supervised(labeled_loss="focal", focal_gamma=1.5, class_weights=0.5)


def test_two_stages_do_not_need_unlabeled_images(root, tmp_path):
    case = replace(CPS, objective="supervised")
    fields = {"max_steps": 4, "pretrain_steps": 2, "second_stage_learning_rate_factor": 0.5, "logging_steps": 1}
    with without_cards_and_pictures():
        trainer = make_trainer(root, case, tmp_path / "out", unlabeled_dataset=None, **fields)
        trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == pytest.approx([0.5**0.9 * 1e-2, 0.5e-2, 0.5**0.9 * 0.5e-2, 0])  # logged after each step


def test_impossible_stages_are_rejected():
    for fields, said in (
        ({"max_steps": 5, "pretrain_steps": 5}, "`pretrain_steps` 5 is part of `max_steps` 5"),
        ({"second_stage_learning_rate_factor": 0.5}, "would be ignored.*Set `pretrain_steps`"),
        ({"pretrain_steps": 1, "second_stage_learning_rate_factor": 0.0}, "must be above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            CPSConfig(**fields)
    assert CPSConfig(pretrain_steps=0).pretrain_steps == 0
