"""step.py replaces functions of the trainer by name: each must exist, and be restored afterwards."""

import importlib.util
import sys
from pathlib import Path

from support.toy import settings, toy_models, write_world

from cps_hf.training.trainer import CPSTrainer

STEP = Path(__file__).parents[2] / "benchmarks" / "step.py"


def test_every_part_that_is_timed_is_a_part_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(STEP.parent))
    spec = importlib.util.spec_from_file_location("benchmark_step", STEP)
    step = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, step)
    spec.loader.exec_module(step)
    world = {
        "train_dataset": write_world(tmp_path / "labeled", [(40, 56)] * 2),
        "unlabeled_dataset": write_world(tmp_path / "unlabeled", [(40, 56)] * 2, labels=False),
    }
    trainer = CPSTrainer(toy_models(2), **settings(max_steps=1, output_dir=str(tmp_path / "out")), **world)
    fetch = trainer._fetch
    with step.Measuring(pairs=1, on_gpu=False, profile=False).attached(trainer):
        assert trainer._fetch != fetch
    assert trainer._fetch == fetch
