"""Averages of branches: their values, and that they are scored, exported, resumed, and passed to methods."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from support.resume_cases import Case, differences, make_trainer, without_cards_and_pictures, write_resume_world

from cps_hf.config import CPSConfig
from cps_hf.objectives import CrossPseudoSupervision, MeanTeacher, ObjectiveOutput, Supervised, warmed_up

CPS = Case("cps", "map", workers=0, processes=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_resume_world(tmp_path_factory.mktemp("resume"))


def train(root, out, **fields):
    with without_cards_and_pictures():
        trainer = make_trainer(root, CPS, out, **{"max_steps": 3, "eval_steps": 1, **fields})
        return trainer, trainer.train()


def test_the_average_is_a_true_mean_at_first_and_then_decays(root, tmp_path):
    """Compared with the written-out sum over the weights after each step."""
    seen, decay = [], 0.6
    trainer = make_trainer(root, CPS, tmp_path / "out", max_steps=5, ema_decay=decay)
    before = {k: v.clone().double() for k, v in trainer.module.branches[1].state_dict().items()}
    update = trainer._update_averages
    trainer._update_averages = lambda: (seen.append({k: v.clone() for k, v in branch().items()}), update())

    def branch():
        return trainer.module.branches[1].state_dict()

    with without_cards_and_pictures():
        trainer.train()
    expected = before
    for step, state in enumerate(seen, 1):
        share = 1 / (step + 1) if 1 - 1 / (step + 1) < decay else 1 - decay
        expected = {k: v + (state[k].double() - v) * share for k, v in expected.items()}
    assert len(seen) == 5 and [warmed_up(0.6, step) for step in (1, 2, 9)] == [0.5, 0.6, 0.6]
    for name, value in trainer.module.averages[1].state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(value, branch()[name])
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in trainer.module.averages.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in trainer.module.averages.parameters()}


def test_each_average_is_scored_exported_and_may_be_the_best(root, tmp_path):
    trainer, results = train(root, tmp_path / "out", ema_decay=0.9, learning_rate=0.05)
    rows = ["branch_0", "branch_1", "branch_0_average", "branch_1_average"]
    assert [*results["final"]] == [*rows, "mean"]
    last = [line for line in trainer.state.log_history if "eval_mean_iou" in line][-1]
    for i in (0, 1):
        average = load_file(tmp_path / "out" / f"branch_{i}_average" / "model.safetensors")
        own = trainer.module.averages[i].model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in average.items())
        branch = load_file(tmp_path / "out" / f"branch_{i}" / "model.safetensors")
        assert any(not torch.equal(branch[name], value) for name, value in average.items())
        assert last[f"eval_branch_{i}_average_mean_iou"] == results["final"][f"branch_{i}_average"]["mean_iou"]
    assert last["eval_mean_iou"] == max(results["final"][row]["mean_iou"] for row in rows)
    assert trainer.best.row_of({row: {"mean_iou": row == "branch_1_average"} for row in rows}) == "branch_1_average"
    assert trainer.exporter.network("1_average") is trainer.module.averages[1]
    assert len([*trainer.predict(trainer.eval_dataset, branch="0_average")]) == len(trainer.eval_dataset)


def test_the_card_of_an_average_can_be_written(root, tmp_path):
    make_trainer(root, CPS, tmp_path / "out", max_steps=1, ema_decay=0.9, num_pictures=0).train()
    assert "branch\\_0\\_average" in (tmp_path / "out" / "branch_0_average" / "README.md").read_text()


def test_the_branches_are_trained_as_without_averages(root, tmp_path):
    plain, _ = train(root, tmp_path / "plain")
    averaged, _ = train(root, tmp_path / "averaged", ema_decay=0.9)
    assert plain.module.averages is None
    own = averaged.module.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in plain.module.state_dict().items())


def test_a_run_with_averages_is_resumed_bit_for_bit(root, tmp_path):
    assert differences(root, CPS, tmp_path, ema_decay=0.7) == []


@dataclass(frozen=True, kw_only=True)
class TaughtByAverages(CrossPseudoSupervision):
    averages: ClassVar[bool] = True

    def __call__(self, branches, labeled, unlabeled, *, averages, teacher=None, progress=0.0):
        assert len(averages) == len(branches) and not unlabeled.weak.requires_grad
        with torch.no_grad():
            shift = sum(one(unlabeled.weak).values.mean() for one in averages)
        output = super().__call__(branches, labeled, unlabeled, progress=progress)
        return ObjectiveOutput(output.loss, {**output.logs, "of_averages": shift})


def test_a_method_with_averages_gets_them_and_needs_a_decay(root, tmp_path):
    trainer, _ = train(root, tmp_path / "out", objective=TaughtByAverages(), ema_decay=0.9, logging_steps=1)
    seen = [line["of_averages"] for line in trainer.state.log_history if "of_averages" in line]
    assert len({*seen}) == 3 and not trainer.module.train().averages.training
    with pytest.raises(ValueError, match="TaughtByAverages is taught by averages of the branches: set `ema_decay"):
        make_trainer(root, CPS, tmp_path / "none", objective=TaughtByAverages())
    assert not Supervised.averages
    with pytest.raises(ValueError, match="`ema_decay` must be 0 or more and less than 1, or none, got 1.0"):
        CPSConfig(ema_decay=1.0)


def test_a_teacher_and_averages_can_be_combined(root, tmp_path):
    case = Case("mean_teacher", "map", workers=0, processes=1)
    with without_cards_and_pictures():
        trainer = make_trainer(root, case, tmp_path / "out", max_steps=2, ema_decay=0.1, objective=MeanTeacher())
        results = trainer.train()
    assert [*results["final"]] == ["branch_0", "branch_0_average", "teacher"]
    assert (tmp_path / "out" / "branch_0_average").is_dir() and (tmp_path / "out" / "teacher").is_dir()
