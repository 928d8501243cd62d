"""Several trainers in one process: each trains with its own settings."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.toy import settings, toy_models, write_world
from transformers import TrainerCallback

from cps_hf.objectives import Supervised
from cps_hf.training.trainer import CPSTrainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), [(20, 20)] * 6)


def make(world, out, *callbacks, dropout=0.0, **fields):
    values = {"output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 2, "crop_size": [16, 16]}
    values |= {"dataloader_num_workers": 0, "disable_tqdm": True, "num_pictures": 0, "agreement_images": 0}
    values |= {"save_steps": None, "optim": "adamw", "learning_rate": 1e-2} | fields
    models = toy_models(1, dropout=dropout)
    return CPSTrainer(
        models, **settings(**values), objective=Supervised(), train_dataset=world, callbacks=[*callbacks]
    )


def trained(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.module.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ours, others", [(1, 2), (2, 1), (3, 2)])
def test_a_later_trainer_does_not_change_accumulation(world, tmp_path, ours, others):
    alone = trained(make(world, tmp_path / "alone", gradient_accumulation_steps=ours))
    first = make(world, tmp_path / "first", gradient_accumulation_steps=ours)
    second = make(world, tmp_path / "second", gradient_accumulation_steps=others)
    assert equal(trained(first), alone)
    assert {int(state["step"]) for state in first.optimizer.state.values()} == {3}
    assert equal(trained(second), trained(make(world, tmp_path / "other alone", gradient_accumulation_steps=others)))


def test_another_trainer_between_two_steps_changes_nothing(world, tmp_path):
    class TrainAnother(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                make(world, tmp_path / "another", gradient_accumulation_steps=3).train()
            Accelerator(gradient_accumulation_steps=5)  # a user's own

    alone = trained(make(world, tmp_path / "alone", gradient_accumulation_steps=2))
    assert equal(trained(make(world, tmp_path / "out", TrainAnother(), gradient_accumulation_steps=2)), alone)


def test_dropout_uses_the_trainers_own_seed(world, tmp_path):
    alone = trained(make(world, tmp_path / "alone", dropout=0.5, seed=1))
    first = make(world, tmp_path / "first", dropout=0.5, seed=1)
    make(world, tmp_path / "second", dropout=0.5, seed=2)
    torch.rand(3)
    assert equal(trained(first), alone)
    assert not equal(trained(make(world, tmp_path / "again", dropout=0.0, seed=1)), alone)


@pytest.fixture
def fresh_process():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("first, second", [("bf16", None), ("bf16", "no"), (None, "bf16"), ("no", "fp16")])
def test_a_second_precision_in_one_process_is_rejected(world, tmp_path, fresh_process, monkeypatch, first, second):
    make(world, tmp_path / "first", mixed_precision=first)
    make(world, tmp_path / "same", mixed_precision=first)
    present, wanted = first or "no", second or "no"
    with pytest.raises(ValueError, match=f"`mixed_precision` is '{wanted}'.*Set `mixed_precision='{present}'`"):
        make(world, tmp_path / "second", mixed_precision=second)
    advised = make(world, tmp_path / "advised", mixed_precision=present)
    assert advised.accelerator.mixed_precision == present
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", present)  # the setting of `accelerate launch`
    assert make(world, tmp_path / "launched").accelerator.mixed_precision == present
