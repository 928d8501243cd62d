"""Out of memory: the message, and the batch size that is found. The errors are torch's; no memory is really short."""

import json

import pytest
import torch
import yaml
from support.toy import settings, toy_models, write_world

from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training.trainer import CPSTrainer

CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    " 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {
        "train_dataset": write_world(root / "labeled", [(24, 24), (20, 30), (30, 20), (16, 16)] * 2),
        "unlabeled_dataset": write_world(root / "unlabeled", [(24, 24), (12, 12)] * 4, first=50, labels=False),
    }


def trainer_for(world, tmp_path, *, room=None, error=None, **fields):
    """`room`: how many images fit into a forward pass."""
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 8}
    values |= {"crop_size": [16, 16], "dataloader_num_workers": 0, "agreement_images": 0, "logging_steps": 1}
    args = settings(**(values | {"disable_tqdm": True, "num_pictures": 0, "learning_rate": 0.1} | fields))
    models = toy_models()
    for model in models if room else ():
        model.register_forward_pre_hook(
            lambda module, given, kwargs: run_out_of_memory(kwargs.get("pixel_values", *given), room, error),
            with_kwargs=True,
        )
    return CPSTrainer(models, **args, objective=CrossPseudoSupervision(weight=1.5), **world)


def run_out_of_memory(images, room, error):
    if len(images) > room:
        raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.module.named_parameters()}


def test_the_cpu_error_is_the_one_that_torch_raises():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        torch.empty(10**15)


@pytest.mark.parametrize("error", [None, CPU_ERROR], ids=["GPU", "CPU"])
def test_an_out_of_memory_error_has_batch_crop_and_advice(world, tmp_path, error):
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer_for(world, tmp_path, room=4, error=error, crop_size=[16, 24]).train()
    said = str(raised.value)
    assert "at step 1" in said and "8 labeled + 8 unlabeled images of 16 x 24 pixels" in said
    for setting in ("gradient_checkpointing", "mixed_precision=bf16", "per_device_train_batch_size", "crop_size"):
        assert f"`{setting}" in said
    assert "`auto_find_batch_size`" in said and ("Tried to allocate" in said or "Cannot allocate" in said)


def test_a_smaller_batch_is_found_and_takes_the_same_steps(world, tmp_path):
    big = trainer_for(world, tmp_path / "big")
    big.train()
    found = trainer_for(world, tmp_path / "found", room=2, error=CPU_ERROR, auto_find_batch_size=True)
    start = parameters(found)
    found.train()
    args = found.args
    assert (args.per_device_train_batch_size, args.unlabeled_batch_size, args.gradient_accumulation_steps) == (2, 2, 4)
    written = yaml.safe_load((tmp_path / "found" / "out" / "config.yaml").read_text())
    assert written["per_device_train_batch_size"] == 2 and written["gradient_accumulation_steps"] == 4
    moved = 0.0
    for name, expected in parameters(big).items():
        torch.testing.assert_close(parameters(found)[name], expected, rtol=1e-4, atol=2e-6)
        moved = max(moved, (expected - start[name]).abs().max().item())
    assert moved > 1e-2
    # Bit for bit the run with these sizes set manually, so the trial left no trace.
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    by_hand = trainer_for(world, tmp_path / "hand", **options)
    by_hand.train()
    assert all(torch.equal(parameters(by_hand)[name], value) for name, value in parameters(found).items())


def test_only_batches_that_do_not_fit_are_halved(world, tmp_path):
    trainer = trainer_for(world, tmp_path / "fits", room=8, auto_find_batch_size=True)
    trainer.train()
    assert trainer.args.per_device_train_batch_size == 8 and trainer.args.gradient_accumulation_steps == 1
    lines = (tmp_path / "fits" / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size=3` does not fit .* cannot be halved"):
        trainer_for(world, tmp_path / "odd", room=2, per_device_train_batch_size=6, auto_find_batch_size=True).train()


def test_errors_unrelated_to_memory_are_raised_unchanged(world, tmp_path):
    for auto in (True, False):
        trainer = trainer_for(world, tmp_path, room=4, error=RuntimeError("boom"), auto_find_batch_size=auto)
        with pytest.raises(RuntimeError, match="^boom$"):
            trainer.train()
