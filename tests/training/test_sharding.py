"""FSDP2 with the launch file of examples/, on two CPU processes; and unsupported setups."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from support.processes import launch
from support.toy import EXAMPLES, SUPPORT, run_python, toy_models

from cps_hf.config import CPSConfig, ModelConfig
from cps_hf.training import sharding
from cps_hf.training.trainer import CPSTrainer

FSDP2 = EXAMPLES / "configs" / "accelerate" / "fsdp2.yaml"
PROGRAM = str(SUPPORT / "run_toy_steps.py")


def run(tmp_path, name, *words, **options):
    out = tmp_path / f"{name}.pt"
    done = launch(PROGRAM, str(out), *words, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out) | {"folder": out.with_suffix(".run")}


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
def test_two_sharded_processes_equal_one_process(tmp_path):
    """Branches are clipped, evaluated, drawn and saved; each process only has its shard of the weights."""
    settings = {"max_grad_norm": 2.0, "logging_steps": 1, "eval_steps": 2, "save_steps": 2, "agreement_images": 3}
    words = ["--cutmix", "--evaluate", "--settings", json.dumps(settings | {"num_pictures": 2})]
    one = run(tmp_path, "one", "--batch", "4", *words)
    two = run(tmp_path, "two", "--batch", "1", "--accumulation", "2", *words, processes=2, config_file=FSDP2)
    assert two["processes"] == 2 and two["held"] < 0.7 * one["held"]
    assert len(one["logs"]) == 3
    for a, b in zip(one["logs"], two["logs"], strict=True):
        for key in ("loss", "supervised_loss", "cps_loss", "grad_norm_branch_0", "grad_norm_branch_1"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    for name, expected in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], expected, rtol=1e-4, atol=2e-6)
    for row, scores in one["results"]["final"].items():
        assert two["results"]["final"][row]["mean_iou"] == pytest.approx(scores["mean_iou"], abs=0.01), row
    assert sorted(path.name for path in two["folder"].glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    check_exported(two["folder"], two["parameters"], best=two["results"]["best"])


def check_exported(folder: Path, parameters: dict[str, torch.Tensor], best: dict) -> None:
    """A new process without sharding reads what was trained."""
    program = (
        "import sys, torch; from support import toy\n"
        "from transformers import AutoConfig, AutoModelForSemanticSegmentation as Auto\n"
        "AutoConfig.register('toy_segmentation', toy.ToyConfig); Auto.register(toy.ToyConfig, toy."
        "ToyForSemanticSegmentation)\n"
        "torch.save({n: Auto.from_pretrained(f'{sys.argv[1]}/{n}').state_dict() for n in sys.argv[3:]}, sys.argv[2])"
    )
    out = folder / "loaded.pt"
    done = run_python("-c", program, str(folder), str(out), "branch_0", "branch_1", "best")
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = torch.load(out)
    for index in (0, 1):
        for name, weight in loaded[f"branch_{index}"].items():
            assert torch.equal(weight, parameters[f"branches.{index}.model.{name}"]), name
    assert loaded["best"].keys() == loaded["branch_0"].keys()
    if best["step"] == 3:
        assert all(torch.equal(loaded["best"][name], weight) for name, weight in loaded[best["branch"]].items())


@pytest.mark.slow
def test_a_sharded_teacher_is_averaged_and_exported(tmp_path):
    one = run(tmp_path, "one", "--batch", "4", "--teacher", "--evaluate")
    two = run(tmp_path, "two", "--batch", "2", "--teacher", "--evaluate", processes=2, config_file=FSDP2)
    names = [name for name in one["parameters"] if name.startswith("teacher.")]
    assert names and (two["folder"] / "teacher" / "model.safetensors").is_file()
    for name in names:
        torch.testing.assert_close(two["parameters"][name], one["parameters"][name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_sharded_stages_averages_and_dice_equal_one_process(tmp_path):
    fields = {"pretrain_steps": 2, "ema_decay": 0.6, "logging_steps": 1}
    objective = {"labeled_loss": "cross_entropy_dice", "class_weights": 0.5}
    words = ["--evaluate", "--settings", json.dumps(fields), "--objective", json.dumps(objective)]
    one = run(tmp_path, "one", "--batch", "4", *words)
    two = run(tmp_path, "two", "--batch", "2", *words, processes=2, config_file=FSDP2)
    for name, expected in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], expected, rtol=1e-4, atol=4e-6)
    assert {path.name for path in two["folder"].glob("*_average")} >= {"branch_0_average", "supervised_1_average"}


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit(tmp_path):
    """A SegFormer, whose head has batch norm, with checkpointed blocks."""
    settings = {"gradient_checkpointing": True, "save_steps": 2, "logging_steps": 1}
    launch = {"processes": 2, "config_file": FSDP2}
    whole = run(tmp_path, "whole", "--batch", "2", "--segformer", "--settings", json.dumps(settings), **launch)
    settings["resume_from_checkpoint"] = str(whole["folder"] / "checkpoint-2")
    rest = run(tmp_path, "rest", "--batch", "2", "--segformer", "--settings", json.dumps(settings), **launch)
    assert [log["step"] for log in rest["logs"]] == [3]
    assert rest["logs"][-1]["loss"] == whole["logs"][-1]["loss"]
    assert all(torch.equal(rest["parameters"][name], value) for name, value in whole["parameters"].items())


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "variable, name", [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")]
)
def test_unsupported_engines_are_rejected_early_with_advice(variable, name, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"is configured for {name}.*--multi_gpu.*fsdp2.yaml"):
        CPSTrainer(toy_models(), CPSConfig(output_dir=str(tmp_path)), train_dataset=None)


def test_an_accelerator_with_deepspeed_is_rejected():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="configured for DeepSpeed.*Launch with DDP"):
        sharding.reject_unsupported(accelerator, CPSConfig(), ModelConfig())


@pytest.mark.slow
def test_the_training_script_reports_it_in_one_line():
    done = run_python(str(EXAMPLES / "train_cps.py"), ACCELERATE_USE_DEEPSPEED="true")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: This launch is configured for DeepSpeed")


def sharded(mixed_precision="no", **options):
    """The parts of a launch with FSDP2 that `reject_unsupported` checks."""
    plugin = {"fsdp_version": 2, "auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": False, **options}
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**plugin))
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state, mixed_precision=mixed_precision)


def test_the_examples_configuration_is_supported():
    sharding.reject_unsupported(
        sharded(), CPSConfig(gradient_checkpointing=True, mixed_precision="bf16"), ModelConfig()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fsdp_version": 1}, "set `fsdp_version: 2`"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy.*NO_WRAP"),
        ({"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, "fsdp_auto_wrap_policy.*NO_WRAP"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading.*false"),
        ({"cpu_offload": True}, "fsdp_offload_params.*false"),
        ({"activation_checkpointing": True}, "`gradient_checkpointing` instead"),
        ({"mixed_precision": "fp16"}, 'fp16: use "bf16"'),
    ],
)
def test_an_unsupported_launch_is_an_error_with_advice(options, message):
    with pytest.raises(ValueError, match=message):
        sharding.reject_unsupported(sharded(**options), CPSConfig(), ModelConfig())


@pytest.mark.parametrize("setting", ["channels_last", "torch_compile", "auto_find_batch_size"])
def test_a_setting_without_sharding_support_is_an_error(setting):
    with pytest.raises(ValueError, match=f"FSDP2 does not support `{setting}`"):
        sharding.reject_unsupported(sharded(), CPSConfig(**{setting: True}), ModelConfig())


def test_fsdp2_does_not_support_adapters():
    with pytest.raises(ValueError, match="FSDP2 does not support `lora_rank`: .*launch with DDP"):
        sharding.reject_unsupported(sharded(), CPSConfig(), ModelConfig(lora_rank=2))


def test_without_shards_nothing_is_gathered():
    (model,) = toy_models(1)
    assert sharding.weights(model) is None
    tensor = torch.ones(3)
    assert sharding.gathered(tensor) is tensor
    with sharding.whole(model):
        assert not hasattr(model, "is_whole")
