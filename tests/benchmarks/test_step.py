"""step.py replaces functions of the trainer by name: each must exist, and be restored afterwards."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch
from support.toy import settings, toy_models, write_world
from support.universal import BY_TYPE

from cps_hf.training.trainer import CPSTrainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("small_models", "step", "step_of_models")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield [importlib.import_module(name) for name in MODULES]
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def world(tmp_path):
    return {
        "train_dataset": write_world(tmp_path / "labeled", [(40, 56)] * 2),
        "unlabeled_dataset": write_world(tmp_path / "unlabeled", [(40, 56)] * 2, labels=False),
    }


def test_every_part_that_is_timed_is_a_part_of_the_trainer(world, scripts, tmp_path):
    _, step, _ = scripts
    trainer = CPSTrainer(toy_models(2), **settings(max_steps=1, output_dir=str(tmp_path / "out")), **world)
    fetch = trainer._fetch
    with step.Measuring(pairs=1, on_gpu=False, profile=False).attached(trainer):
        assert trainer._fetch != fetch
    assert trainer._fetch == fetch


@pytest.mark.parametrize("loss", ["cross_entropy", "set"])
def test_the_floor_of_queries_has_the_layers_that_the_step_trains(world, scripts, tmp_path, monkeypatch, loss):
    _, step, _ = scripts
    means, mean = [], step._mean_of_queries
    monkeypatch.setattr(step, "_mean_of_queries", lambda *layer: means.append(layer) or mean(*layer))
    monkeypatch.setattr(step, "WARM_UP", 0)
    measuring = step.Measuring(pairs=1, on_gpu=False, profile=False)
    values = {"max_steps": 9, "crop_size": [64, 64], "dataloader_num_workers": 0, "agreement_images": 0}
    values |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "output_dir": str(tmp_path / "out")}
    objective = step.OBJECTIVES["cps"](labeled_loss=loss, cutmix=False)
    config = BY_TYPE["mask2former"].config(num_labels=3)
    trainer = CPSTrainer(config, **settings(**values), objective=objective, callbacks=[measuring], **world)
    with measuring.attached(trainer), contextlib.suppress(step.Enough):
        trainer.train()
    row = measuring.rows[0]
    layers = 2 * 3 if loss == "set" else 0  # of both decoders, on labeled images
    assert row["passes"] == 4 and len(means) == 2 * (4 + layers)  # once for the time, once for the memory
    assert row["step"] > 0 and row["floor"] > 0 and row["loss alone"] > 0
    assert measuring.memory["step"] > measuring.memory["floor"] > 0
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in trainer.module.parameters())


def test_peak_memory_counts_what_is_freed_again_and_not_what_was_there(scripts):
    _, step, _ = scripts
    kept = torch.ones(2**20)
    with step.peak_memory(on_gpu=False) as found:
        kept.exp().exp()  # two at a time
        torch.ones(2**18)
    assert found[0] == pytest.approx(2 * 4 * 2**20, rel=0.05)


def test_the_committed_table_has_every_row_and_each_kind_of_branch(scripts):
    small, step, of_models = scripts
    page = of_models.OUTPUT.read_text(encoding="utf-8")
    rows = [*of_models.ROWS, *of_models.SHARING]
    assert all(row.model in step.MODELS and page.count(f"| {row.name} |") == 1 for row in rows)
    assert {row.model for row in of_models.ROWS} == {*small.SMALL}
    assert len({row.name for row in rows}) == len(rows)
