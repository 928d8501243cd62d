"""Each option that makes a step faster or smaller is applied, and changes numbers only by rounding."""

import pytest
import torch
from accelerate.state import AcceleratorState
from support.toy import settings, tiny_upernet, toy_models, write_world
from transformers import AutoModelForSemanticSegmentation, SegformerConfig

from cps_hf.training.trainer import CPSTrainer

SIZES = [(40, 56), (56, 40), (48, 48), (64, 33)]
compiled_graphs, compile_modes = [], []


@torch._dynamo.register_backend(name="counting")
def counting(graph, example_inputs, mode=None):
    """Runs the graph unchanged, and records it and its options."""
    compiled_graphs.append(graph)
    compile_modes.append(mode)
    return graph.forward


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {
        "train_dataset": write_world(root / "labeled", SIZES),
        "unlabeled_dataset": write_world(root / "unlabeled", SIZES, first=50, labels=False),
        "eval_dataset": write_world(root / "eval", SIZES[:2], first=90),
    }


@pytest.fixture
def own_precision():
    """Accelerate keeps the first precision used in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_for(world, folder, models=None, **fields):
    values = {"max_steps": 2, "per_device_train_batch_size": 2, "crop_size": [32, 64], "learning_rate": 1e-2}
    values |= {"dataloader_num_workers": 0, "logging_steps": 1, "disable_tqdm": True, "num_pictures": 0}
    args = settings(output_dir=str(folder / "out"), agreement_images=0, **(values | fields))
    return CPSTrainer(tiny_upernet() if models is None else models, **args, **world)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tiny_segformer():
    return SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_the_fused_optimizer_takes_the_steps_of_the_plain_one(world, tmp_path, optim):
    parameters = []
    for fused in (False, True):
        trainer = trainer_for(world, tmp_path / str(fused), toy_models(), optim=optim, optim_fused=fused)
        assert trainer.optimizer.optimizer.defaults["fused"] is fused
        trainer.train()
        parameters.append(list(trainer.module.parameters()))
    for one, other in zip(*parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_channels_last_reaches_weights_and_maps_and_stays_after_resuming(world, tmp_path):
    plain = trainer_for(world, tmp_path / "plain", max_steps=1)
    plain.train()
    whole = trainer_for(world, tmp_path / "whole", channels_last=True)
    maps = []
    whole.models[0].backbone.register_forward_hook(lambda _, args, out: maps.append(out.feature_maps[-1]))
    whole.train()
    assert losses(whole)[0] == pytest.approx(losses(plain)[0], rel=1e-5)
    trainer_for(world, tmp_path / "parts", channels_last=True, max_steps=1, lr_scheduler_type="constant").train()
    on = trainer_for(world, tmp_path / "parts", channels_last=True, lr_scheduler_type="constant")
    on.train(resume_from_checkpoint=True)
    for trainer in (whole, on):
        weights = [p for p in trainer.module.parameters() if p.dim() == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert maps[0].is_contiguous(memory_format=torch.channels_last) and not maps[0].is_contiguous()
    exported = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "whole" / "out" / "branch_1")
    for key, value in whole.models[1].state_dict().items():
        assert torch.equal(exported.state_dict()[key], value)


def test_networks_are_only_compiled_for_training(world, tmp_path):
    plain = trainer_for(world, tmp_path / "plain", toy_models())
    plain.train()
    compiled_graphs.clear()
    fields = {"torch_compile": True, "torch_compile_backend": "counting"}
    trainer = trainer_for(world, tmp_path / "compiled", toy_models(), **fields)
    trainer.evaluator.check_first_batch(world["eval_dataset"])
    assert not compiled_graphs  # evaluation is not compiled
    trainer.train()
    assert len(compiled_graphs) >= 2  # two networks
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    assert trainer.module.state_dict().keys() == plain.module.state_dict().keys()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_the_compiler_gets_the_mode(world, tmp_path, mode):
    torch._dynamo.reset()  # or the graph of an earlier test is used
    compile_modes.clear()
    fields = {"torch_compile": True, "torch_compile_backend": "counting", "torch_compile_mode": mode}
    trainer = trainer_for(world, tmp_path, toy_models(), **fields)
    trainer.module.branches[0].strided(torch.zeros(1, 3, 32, 32))
    assert compile_modes == [mode]


@pytest.mark.slow
def test_all_speed_options_work_together_and_resume(world, tmp_path, own_precision):
    """bf16, channels last, compiled, fused, checkpointing, accumulation: stopped after one step and resumed."""
    fields = {"mixed_precision": "bf16", "channels_last": True, "gradient_checkpointing": True, "optim": "adamw"}
    fields |= {"torch_compile": True, "torch_compile_backend": "eager", "gradient_accumulation_steps": 2}
    fields |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "attn_implementation": "sdpa"}
    whole = trainer_for(world, tmp_path / "whole", tiny_segformer(), **fields)
    whole.train()
    trainer_for(world, tmp_path / "parts", tiny_segformer(), max_steps=1, **fields).train()
    on = trainer_for(world, tmp_path / "parts", tiny_segformer(), **fields)
    on.train(resume_from_checkpoint=True)
    for one, other in zip(whole.module.parameters(), on.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.models[0].config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_gradient_checkpointing_runs_blocks_again_and_keeps_the_loss(world, tmp_path):
    runs, found = {}, {}
    for on in (False, True):
        trainer = trainer_for(world, tmp_path / str(on), tiny_segformer(), max_steps=1, gradient_checkpointing=on)
        block = next(m for m in trainer.models[0].modules() if type(m).__name__ == "SegformerLayer")
        runs[on] = []
        # On an inner layer, since the block's own hooks do not run again; before it, since recomputation stops as soon
        # as it has what the backward pass needs.
        block.attention.register_forward_pre_hook(lambda module, *_, seen=runs[on]: seen.append(module.training))
        trainer.train()
        found[on] = losses(trainer)
    assert sum(runs[True]) == sum(runs[False]) + 2  # the two passes with gradient, again
    assert found[True] == pytest.approx(found[False], rel=1e-5)
