"""What needs a CUDA device: the same steps as on the CPU, and mixed precision for real."""

from pathlib import Path

import pytest
import torch
from toy import run_python

PROGRAM = str(Path(__file__).with_name("run_toy_steps.py"))


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
