"""Peak memory and time of cross entropy on resized logits: in pieces, compared with the plain way.

    python benchmarks/loss.py --batch 2 --classes 150 --size 512 --stride 4

Forward and backward of the mean cross entropy at full size, from float32 logits at a coarser stride. Memory: how far a
new process's peak rises above its memory with the coarse logits and labels (on a GPU, allocated memory). Both ways
grow in proportion to the batch, except for the piece that is resized at a time. Time: the median of alternating pairs
in one process; CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from cps_hf.functional.losses import pixel_cross_entropy
from cps_hf.functional.strided import StridedLogits


def plain_loss(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.interpolate(values, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return pixel_cross_entropy(logits, labels)


def loss_of(way: str, values: torch.Tensor, labels: torch.Tensor) -> None:
    if way == "plain":
        plain_loss(values, labels).backward()
    else:
        pixel_cross_entropy(StridedLogits(values, tuple(labels.shape[-2:])), labels).backward()
    values.grad = None


def inputs(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    coarse = options.size // options.stride
    values = torch.randn(options.batch, options.classes, coarse, coarse, device=device, requires_grad=True)
    labels = torch.randint(0, options.classes, (options.batch, options.size, options.size), device=device)
    labels[:, :16] = 255
    return values, labels


def peak_mib(options: argparse.Namespace) -> float:
    values, labels = inputs(options)
    warm = torch.zeros(1, 2, 2, 2, device=values.device, requires_grad=True)  # what libraries load at first use
    loss_of(options.way, warm, torch.zeros(1, 4, 4, dtype=torch.long, device=values.device))
    if values.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(options.way, values, labels)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss_of(options.way, values, labels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def seconds(options: argparse.Namespace) -> dict[str, float]:
    values, labels = inputs(options)
    spent: dict[str, list[float]] = {"plain": [], "lean": []}
    for pair in range(options.pairs + 1):  # the first is not counted
        for way, times in spent.items():
            start = _clock(values)
            loss_of(way, values, labels)
            times += [_clock(values) - start] if pair else []
    return {way: statistics.median(times) for way, times in spent.items()}


def _clock(values: torch.Tensor) -> float:
    if not values.is_cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--size", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--stride", type=int, default=4, help="of the logits")
    parser.add_argument("--pairs", type=int, default=7, help="for the times; 0: only memory")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU although there is a GPU")
    parser.add_argument("--way", choices=("plain", "lean", "both"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.way:
        print(json.dumps(seconds(options) if options.way == "both" else peak_mib(options)))
        return
    ways = ["plain", "lean"] + (["both"] if options.pairs else [])
    found = {}
    for way in ways:
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    times = found.get("both", {"plain": float("nan"), "lean": float("nan")})
    case = f"{options.batch} x {options.classes} x {options.size} x {options.size}, stride {options.stride}"
    print(f"| {case} | memory | time |\n|---|---|---|")
    for way in ("plain", "lean"):
        print(f"| {way} | {found[way]:.0f} MiB | {times[way]:.3f} s |")
    print(f"| lean / plain | {found['lean'] / found['plain']:.3f} | {times['lean'] / times['plain']:.2f} |")


if __name__ == "__main__":
    main()
