"""Tests that need a CUDA device: the same steps as on the CPU, and real mixed precision."""

import json

import pytest
import torch
import torch.nn.functional as F
from support.toy import SUPPORT, run_python

from cps_hf.functional import strided
from cps_hf.functional.losses import pixel_cross_entropy
from cps_hf.functional.strided import StridedLogits

PROGRAM = str(SUPPORT / "run_toy_steps.py")


def steps(tmp_path, name, *words, **env):
    out = tmp_path / f"{name}.pt"
    done = run_python(PROGRAM, str(out), "--batch", "4", "--cutmix", *words, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, map_location="cpu")


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_takes_the_steps_that_the_cpu_takes(tmp_path):
    gpu, cpu = steps(tmp_path, "gpu"), steps(tmp_path, "cpu", ACCELERATE_USE_CPU="1")
    for name, expected in cpu["parameters"].items():
        torch.testing.assert_close(gpu["parameters"][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_gpu_stays_near_full_precision(tmp_path, precision):
    full, mixed = steps(tmp_path, "full"), steps(tmp_path, precision, "--mixed_precision", precision)
    losses = [[log["loss"] for log in run["logs"]] for run in (full, mixed)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.slow
def test_full_determinism_repeats_steps_bit_for_bit(tmp_path):
    words = ("--mixed_precision", "bf16", "--settings", '{"full_determinism": true}')
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    first, second = steps(tmp_path, "first", *words, **env), steps(tmp_path, "second", *words, **env)
    assert first["logs"][-1]["loss"] == second["logs"][-1]["loss"]
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_recomputed_and_channels_last_in_bf16_trains_as_without(tmp_path):
    def run(name, **options):
        words = ("--segformer", "--settings", json.dumps({"logging_steps": 1, **options}))
        return steps(tmp_path, name, "--mixed_precision", "bf16", *words)

    plain = run("plain")
    fast = run("fast", torch_compile=True, gradient_checkpointing=True, channels_last=True)
    losses = [[log["loss"] for log in run["logs"]] for run in (plain, fast)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.gpu
def test_strided_losses_use_a_third_of_the_memory(monkeypatch):
    """In pieces, and with the default piece size."""
    labels = torch.randint(0, 60, (8, 256, 256), device="cuda")
    values = torch.randn(8, 60, 64, 64, device="cuda", requires_grad=True)

    def run(logits_of):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = pixel_cross_entropy(logits_of(), labels)
        (gradient,) = torch.autograd.grad(loss, values)
        return loss.detach(), gradient, torch.cuda.max_memory_allocated() - before

    plain = run(lambda: F.interpolate(values, size=(256, 256), mode="bilinear"))
    for piece in (strided.PIECE["cuda"], 2**21):
        monkeypatch.setitem(strided.PIECE, "cuda", piece)
        lean = run(lambda: StridedLogits(values, (256, 256)))
        torch.testing.assert_close(lean[0], plain[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lean[1], plain[1], rtol=1e-4, atol=1e-8)
    assert lean[2] < plain[2] / 3
