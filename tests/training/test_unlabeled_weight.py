"""The run's factor on the unlabeled term: its effect, what lowers it, and that it helps."""

import json
import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.processes import launch
from support.resume_cases import (
    BrokenOff,
    Case,
    break_off,
    differences,
    make_trainer,
    run_whole,
    same,
    without_cards_and_pictures,
    write_resume_world,
)
from support.toy import SUPPORT, settings, toy_models, write_world

from cps_hf.checkpointing.fingerprint import _judged_by
from cps_hf.config import CPSConfig, EvaluationConfig, flat
from cps_hf.objectives import CrossPseudoSupervision, MeanTeacher, Supervised
from cps_hf.training import watch
from cps_hf.training.reporting import Averages
from cps_hf.training.state import RunState
from cps_hf.training.trainer import CPSTrainer
from cps_hf.training.unlabeled_weight import UnlabeledWeight

CPS = Case("cps", "map", workers=0, processes=1)
AUTO = {"unlabeled_weight": "auto", "eval_steps": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_resume_world(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def always_fallen(monkeypatch):
    """Every score counts as fallen once there are a reference and a previous score."""
    monkeypatch.setattr(watch, "TOLERANCE", -2.0)


def lines(trainer, key):
    return [line for line in trainer.state.log_history if key in line]


# ------------------------------------------------------------------------------------------------ the factor


def test_a_number_scales_the_unlabeled_term_and_is_logged(root, tmp_path):
    fields = {"max_steps": 3, "pretrain_steps": 1, "logging_steps": 1, "unlabeled_weight": 0.25}
    with without_cards_and_pictures():
        trainer = make_trainer(root, CPS, tmp_path / "out", objective=CrossPseudoSupervision(weight=3.0), **fields)
        results = trainer.train()
    first, *second = lines(trainer, "loss")
    assert "unlabeled_weight" not in first and len(second) == 2
    for line in second:
        assert line["loss"] == pytest.approx(line["supervised_loss"] + 0.25 * 3 * line["cps_loss"], rel=1e-5)
        assert line["unlabeled_weight"] == 0.25
    assert results["unlabeled_weight"] == {"setting": 0.25, "last": 0.25, "end": None}


@dataclass(frozen=True, kw_only=True)
class OfEarlierDays(CrossPseudoSupervision):
    def __call__(self, branches, labeled, unlabeled, *, teacher=None, progress=0.0):
        return super().__call__(branches, labeled, unlabeled, progress=progress)


def test_only_methods_with_the_argument_support_the_setting(root, tmp_path):
    with without_cards_and_pictures():
        make_trainer(root, CPS, tmp_path / "out", max_steps=1, objective=OfEarlierDays()).train()
    with pytest.raises(ValueError, match="OfEarlierDays.__call__ has no argument `unlabeled_weight`. Add"):
        make_trainer(root, CPS, tmp_path / "none", objective=OfEarlierDays(), unlabeled_weight=0.5)


def test_a_setting_without_effect_is_rejected(root, tmp_path):
    with pytest.raises(ValueError, match='`unlabeled_weight="auto"` needs evaluations .* Set `eval_steps`'):
        CPSConfig(unlabeled_weight="auto")
    for value in (-1.0, "much"):
        with pytest.raises(ValueError, match=f'`unlabeled_weight` must be 0 or more, or "auto", got .?{value}'):
            CPSConfig(unlabeled_weight=value)
    with pytest.raises(ValueError, match="`unlabeled_weight='auto'` would be ignored: Supervised has no unlabeled"):
        make_trainer(root, CPS, tmp_path / "out", objective=Supervised(), **AUTO)
    with pytest.raises(ValueError, match="`unlabeled_weight='auto'` needs evaluations: pass `eval_dataset`"):
        make_trainer(root, CPS, tmp_path / "out", eval_dataset=None, **AUTO)


# ------------------------------------------------------------------------------------------------ the rule


def test_the_weight_is_halved_at_each_fall_and_ends_at_zero(caplog):
    state = RunState()
    weight = UnlabeledWeight(CPSConfig(**AUTO), state)
    found = []
    for _ in range(4):
        state.global_step += 10
        weight.lower()
        found.append((weight.value, state.unlabeled_end))
    assert found == [(0.5, None), (0.25, None), (0.125, None), (0.0, 40)]
    assert "Step 40: `unlabeled_weight` is 0 from here on" in caplog.text


def test_the_rule_only_uses_the_methods_stage(root, tmp_path, always_fallen):
    """With a reference from step 2 it falls at steps 4, 5, 6 and 7: a stage's first evaluation is not judged."""
    fields = {"max_steps": 9, "pretrain_steps": 2, "logging_steps": 1, "save_steps": None, **AUTO}
    read = []
    with without_cards_and_pictures():
        trainer = make_trainer(root, CPS, tmp_path / "out", **fields)
        trainer.module.register_forward_pre_hook(
            lambda module, words: read.append((type(module.objective).__name__, words[1] is not None))
        )
        results = trainer.train()
    assert [line.get("unlabeled_weight") for line in lines(trainer, "loss")] == [
        None,
        None,
        1,
        1,
        0.5,
        0.25,
        0.125,
        0,
        0,
    ]
    assert read == [("Supervised", False)] * 4 + [("CrossPseudoSupervision", True)] * 10 + [("Supervised", False)] * 4
    assert results["unlabeled_weight"] == {"setting": "auto", "last": 0.0, "end": 7}
    last = json.loads((tmp_path / "out" / "checkpoint-9" / "trainer_state.json").read_text())
    assert last["streams"]["unlabeled"]["position"] == 8 * 5 and last["streams"]["labeled"]["position"] == 8 * 9


def test_with_one_stage_two_evaluations_set_the_reference(root, tmp_path, always_fallen):
    with without_cards_and_pictures():
        trainer = make_trainer(root, CPS, tmp_path / "out", max_steps=5, logging_steps=1, **AUTO)
        trainer.train()
    assert [line["unlabeled_weight"] for line in lines(trainer, "loss")] == [1, 1, 1, 0.5, 0.25]


def simulated(difference, noise, runs=1000, evaluations=20):
    """The shares of two-stage runs in which the factor is lowered, and reaches 0; in points of mIoU."""
    random, falls = np.random.default_rng(0), []
    for _ in range(runs):
        level = watch.Level({})
        level.begin(0.5 + noise / 100 * random.normal())
        scores = 0.5 + difference / 100 + noise / 100 * random.normal(size=evaluations)
        falls.append(sum(level.has_fallen(score) for score in scores))
    return np.mean(np.array(falls) > 0), np.mean(np.array(falls) >= 4)


def test_the_rule_rarely_acts_in_error():
    """The table of docs/unlabeled_weight.md."""
    for difference, noise, lowered, ended in (
        *((1, 0.3, 0.00, 0.00), (1, 0.5, 0.00, 0.00), (1, 1.0, 0.14, 0.04)),
        *((0, 0.3, 0.01, 0.00), (0, 0.5, 0.14, 0.04), (0, 1.0, 0.44, 0.20)),
        *((-2, 0.3, 1.00, 1.00), (-2, 0.5, 1.00, 0.98), (-2, 1.0, 0.96, 0.86)),
    ):
        assert simulated(difference, noise) == pytest.approx((lowered, ended), abs=0.03)


@pytest.mark.parametrize(
    ("objective", "stages"),
    [
        pytest.param(CrossPseudoSupervision(), {}, marks=pytest.mark.slow),
        (CrossPseudoSupervision(), {"pretrain_steps": 1}),
        (MeanTeacher(), {}),
        pytest.param(MeanTeacher(), {"pretrain_steps": 1}, marks=pytest.mark.slow),
    ],
    ids=["cps", "cps in two stages", "mean_teacher", "mean_teacher in two stages"],
)
def test_an_automatic_weight_resumes_bit_for_bit(root, tmp_path, always_fallen, objective, stages):
    case = Case("mean_teacher" if objective.teacher else "cps", "map", workers=0, processes=1)
    assert differences(root, case, tmp_path, objective=objective, **AUTO, **stages) == []
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["unlabeled_weight"] == 0 and state["unlabeled_end"] == 6


WITHOUT_THEM = {"ema_decay": 0.8, **AUTO}


@pytest.fixture(scope="module")
def whole_without_them(root, tmp_path_factory):
    """A run whose unlabeled images end with the evaluation of step 3."""
    with pytest.MonkeyPatch.context() as patch, without_cards_and_pictures():
        patch.setattr(watch, "TOLERANCE", -2.0)
        patch.setattr("cps_hf.training.unlabeled_weight.LEAST", 1.0)
        return run_whole(root, CPS, tmp_path_factory.mktemp("whole") / "out", **WITHOUT_THEM)


@pytest.mark.parametrize(
    ("save_steps", "breaks"), [(2, 4), (3, 6), (4, 6), (3, None)], ids=["before", "at", "after", "in its evaluation"]
)
def test_a_run_without_its_unlabeled_images_is_resumed_bit_for_bit(
    root, tmp_path, monkeypatch, always_fallen, whole_without_them, save_steps, breaks
):
    """They end with the evaluation of step 3, and the run is resumed before, at or after that."""
    monkeypatch.setattr("cps_hf.training.unlabeled_weight.LEAST", 1.0)
    whole, fields = whole_without_them, {**WITHOUT_THEM, "save_steps": save_steps}
    with without_cards_and_pictures():
        broken = make_trainer(root, CPS, tmp_path / "broken", **fields)
        if breaks:
            break_off(broken, step=breaks, micro_batch=1)
        else:  # its checkpoint lists the evaluation as pending
            scores = broken.evaluator.scores
            broken.evaluator.scores = lambda d: scores(d) if broken.state.global_step < 3 else raise_broken_off()
        with pytest.raises(BrokenOff):
            broken.train()
        resumed = run_whole(root, CPS, tmp_path / "broken", resume_from_checkpoint="auto", **fields)
    compared = [name for name in whole if not name.startswith("ids of")]
    assert [name for name in compared if not same(whole[name], resumed[name])] == []
    assert whole["results"]["unlabeled_weight"]["end"] == 3


def raise_broken_off():
    raise BrokenOff


def test_means_are_over_the_steps_that_have_a_value():
    """A log record may cover steps with unlabeled images and steps without."""
    averages = Averages()
    for values in ({"loss": 3.0, "cps_loss": 2.0}, {"loss": 2.0, "cps_loss": 1.0}, {"loss": 1.0}):
        averages.keep(values)
    saved = json.loads(json.dumps(averages.state_dict()))
    older = {name: value for name, value in saved.items() if name != "steps_of"}
    for state, expected in ((saved, 1.5), (older, 1.0)):
        resumed = Averages()
        resumed.load_state_dict(state)
        assert resumed.read() == {"loss": 2.0, "cps_loss": expected}
    assert averages.read() == {"loss": 2.0, "cps_loss": 1.5} and averages.read() == {}


def test_the_evaluation_set_is_part_of_such_a_run(root, tmp_path):
    with without_cards_and_pictures():
        make_trainer(root, CPS, tmp_path / "out", max_steps=1, save_steps=1, **AUTO).train()
        fields = {**AUTO, "eval_steps": 3, "resume_from_checkpoint": "auto"}
        with pytest.raises(ValueError, match="(?s)run with other settings.*eval_steps: 1 -> 3"):
            make_trainer(root, CPS, tmp_path / "out", **fields).train()


def test_the_evaluation_mode_is_part_of_such_a_run():
    """Settings that otherwise only affect the choice of the best branch."""
    fixed = _judged_by(flat(CPSConfig(), EvaluationConfig()), None)
    assert fixed.keys() >= {"eval_steps", "eval_mode", "eval_shrink", "eval_crop_size", "eval_stride"}


@pytest.mark.slow
def test_the_rule_is_the_same_on_two_processes(tmp_path):
    program, found = str(SUPPORT / "run_toy_steps.py"), []
    fields = {"max_steps": 8, "logging_steps": 1, "learning_rate": 0.05, "num_pictures": 0, **AUTO}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        words = ["--batch", str(4 // processes), "--cutmix", "--evaluate", "--always_fallen"]
        done = launch(program, str(out), *words, "--settings", json.dumps(fields), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out))
    one, two = found
    weights = [[log["unlabeled_weight"] for log in run["logs"]] for run in found]
    assert weights[0] == weights[1] == [1, 1, 1, 0.5, 0.25, 0.125, 0, 0]
    assert one["results"]["unlabeled_weight"]["end"] == two["results"]["unlabeled_weight"]["end"] == 6
    for name, expected in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], expected, rtol=1e-4, atol=4e-6)
    shares = [run["results"]["pseudo_labels"]["shares"] for run in found]
    for name, of_class in shares[0].items():
        assert shares[1][name] == pytest.approx(of_class, abs=0.02)


# ------------------------------------------------------------------------------------------------ its benefit


@dataclass(frozen=True, kw_only=True)
class Poisoned(CrossPseudoSupervision):
    """All pseudo labels are wrong: each is the next class."""

    def _pseudo_labels(self, logits, batch):
        maps, agreed = super()._pseudo_labels(logits, batch)
        return [(labels + 1) % 3 for labels in maps], agreed


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root, sizes = tmp_path_factory.mktemp("drawn"), [(40, 56)] * 6
    return {
        "train_dataset": write_world(root / "labeled", sizes),
        "unlabeled_dataset": write_world(root / "unlabeled", sizes * 2, first=50, labels=False),
        "eval_dataset": write_world(root / "eval", sizes * 2, first=90),  # enough for `best/` to tell harm from chance
    }


def final_score(world, folder, objective, **fields):
    """The trainer, and the better branch's mean IoU at the last step, 40 steps after 20 supervised ones."""
    values = {"max_steps": 60, "pretrain_steps": 20, "eval_steps": 4, "logging_steps": 10, "crop_size": [32, 40]}
    values |= {"per_device_train_batch_size": 4, "random_scale": [1.0], "optim": "adamw", "learning_rate": 2e-2}
    values |= {"dataloader_num_workers": 0, "disable_tqdm": True, "num_pictures": 0, "agreement_images": 0}
    values |= {"check_labels_seconds": 0, "output_dir": str(folder)}
    with without_cards_and_pictures():
        trainer = CPSTrainer(toy_models(2), **settings(**(values | fields)), objective=objective, **world)
        results = trainer.train()
    return trainer, max(results["final"][f"branch_{i}"]["mean_iou"] for i in (0, 1))


@pytest.mark.slow
def test_the_rule_helps_if_pseudo_labels_are_wrong(drawn, tmp_path):
    _, fixed = final_score(drawn, tmp_path / "fixed", Poisoned())
    trainer, auto = final_score(drawn, tmp_path / "auto", Poisoned(), unlabeled_weight="auto")
    assert auto > fixed + 0.1 and trainer.state.unlabeled_weight == 0
    # The best network is the supervised stage's, which no unlabeled image harmed.
    assert trainer.state.best["step"] == 20 and trainer.state.best_metric > auto


@pytest.mark.slow
def test_the_rule_does_not_affect_an_improving_run(drawn, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "cps_hf.training"):
        trainer, score = final_score(drawn, tmp_path / "out", CrossPseudoSupervision(), unlabeled_weight="auto")
    assert trainer.state.unlabeled_weight == 1 and "do harm" not in caplog.text
    supervised = trainer.state.stages["supervised"]
    assert score > max(supervised[f"branch_{i}"]["mean_iou"] for i in (0, 1))


def test_a_weight_of_1_changes_nothing(root, tmp_path):
    fields, found = {"max_steps": 3, "eval_steps": 1}, []
    for name, how in (("auto", AUTO), ("plain", {})):
        with without_cards_and_pictures():
            trainer = make_trainer(root, CPS, tmp_path / name, **(fields | how))
            trainer.train()
        found.append(trainer.module.state_dict())
    assert same(*found)
