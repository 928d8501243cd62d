"""Measure all GPU numbers of the benchmarks' tables in one command.

    python benchmarks/gpu.py --output benchmarks/results/gpu
    python benchmarks/gpu.py --output OUT --only options loss --seconds 300

There are four kinds of case. Each is written as a line of OUT/gpu.jsonl and OUT/gpu.md as soon as it is measured, and
replaces its old line if it is measured again. A case that fails is recorded with its error, and the next one runs.

- **step**: `benchmarks/step.py` at recipes' sizes: the step's parts and its floor, host reads, kernels.
- **options**: images/s and peak memory of whole steps, nothing measured inside, by setting.
- **loss**: cross entropy from logits at stride 4: plain, compiled (whole, in pieces), and in pieces of several sizes.
- **card**: the speed of a large matrix product and a copy, for reference.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import loss as loss_benchmark  # files next to this one
import step as step_benchmark
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from cps_hf.checkpointing.fingerprint import versions
from cps_hf.functional import IGNORE_INDEX, strided

BF16 = {"mixed_precision": "bf16"}
FAST = BF16 | {"channels_last": True}
VOC = {"batch": 8, "crop": 512}
STEPS = {
    "R50 DeepLabV3+, CPS + CutMix, 8 + 8 x 512": {**VOC, "cutmix": "true", "settings": FAST, "profile": True},
    "R50 DeepLabV3+, CPS + CutMix, 4 + 4 x 800": {"batch": 4, "crop": 800, "cutmix": "true", "settings": FAST},
    "SegFormer-B2, CPS + CutMix, 8 + 8 x 512": {
        **VOC,
        "model": "segformer-b2",
        "cutmix": "true",
        "settings": BF16,
        "profile": True,
    },
    "DINOv2-B DPT, CPS + CutMix, 8 + 8 x 518": {
        "batch": 8,
        "crop": 518,
        "model": "dpt-dinov2-b",
        "cutmix": "true",
        "settings": BF16,
        "profile": True,
    },
    "R50 DeepLabV3+, CPS + CutMix, 8 + 8 x 512, float32": {**VOC, "cutmix": "true"},
    "R50 DeepLabV3+, supervised, 8 x 512": {**VOC, "objective": "supervised", "settings": FAST},
    "R50 DeepLabV3+, CPS, 8 + 8 x 512": {**VOC, "cutmix": "false", "settings": FAST},
} | {
    f"R50 DeepLabV3+, {name}, 8 + 8 x 512": {**VOC, "objective": name, "settings": FAST}
    for name in ("cpc", "mean_teacher", "pseudoseg", "fixmatch", "unimatch")
}

COMPILED = {"torch_compile": True}
OPTIONS = {
    "R50 DeepLabV3+, float32": {**VOC},
    "R50 DeepLabV3+, bf16": {**VOC, "settings": BF16},
    "R50 DeepLabV3+, bf16, channels_last": {**VOC, "settings": FAST},
    "R50 DeepLabV3+, bf16, channels_last, optim_fused off": {**VOC, "settings": FAST | {"optim_fused": False}},
    "R50 DeepLabV3+, bf16, channels_last, gradient_checkpointing": {
        **VOC,
        "settings": FAST | {"gradient_checkpointing": True},
    },
    "R50 DeepLabV3+, bf16, channels_last, joint_forward": {**VOC, "settings": FAST, "fields": {"joint_forward": True}},
    "SegFormer-B2, float32": {**VOC, "model": "segformer-b2"},
    "SegFormer-B2, bf16": {**VOC, "model": "segformer-b2", "settings": BF16},
    "SegFormer-B2, bf16, channels_last": {**VOC, "model": "segformer-b2", "settings": FAST},
    "SegFormer-B2, bf16, gradient_checkpointing": {
        **VOC,
        "model": "segformer-b2",
        "settings": BF16 | {"gradient_checkpointing": True},
    },
    "DINOv2-B DPT, bf16": {"batch": 8, "crop": 518, "model": "dpt-dinov2-b", "settings": BF16},
    "DINOv2-B DPT, bf16, eager attention": {
        "batch": 8,
        "crop": 518,
        "model": "dpt-dinov2-b",
        "settings": BF16 | {"attn_implementation": {"backbone_config": "eager"}},
    },
    "DINOv2-B DPT, bf16, gradient_checkpointing": {
        "batch": 8,
        "crop": 518,
        "model": "dpt-dinov2-b",
        "settings": BF16 | {"gradient_checkpointing": True},
    },
    "SegFormer-B2, bf16, torch_compile": {**VOC, "model": "segformer-b2", "settings": BF16 | COMPILED},
    "R50 DeepLabV3+, bf16, channels_last, torch_compile": {**VOC, "settings": FAST | COMPILED},
}

LOSSES = {"8 x 21 x 512 x 512": (8, 21, 512), "16 x 150 x 512 x 512": (16, 150, 512)}
PIECES = [2**n for n in (22, 23, 24, 25, 26, 27, 28)]


class Steps(TrainerCallback):
    """Time whole steps, and wait for the device only at both ends."""

    def __init__(self, warm_up: int, steps: int):
        self.warm_up, self.steps, self.seconds = warm_up, steps, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up:
            _synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.since = time.perf_counter()
        if state.global_step == self.warm_up + self.steps:
            _synchronize()
            self.seconds = time.perf_counter() - self.since
            raise step_benchmark.Enough


def options_of(case: dict, workers: int) -> argparse.Namespace:
    """A case as benchmarks/step.py would read it."""
    options = step_benchmark.parse([])
    for name, value in {"workers": workers, **case}.items():
        setattr(options, name, value)
    return options


def measure_step(case: dict, workers: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return step_benchmark.measure(options_of(case, workers), folder)


def measure_options(case: dict, workers: int, warm_up: int = 6, steps: int = 15) -> dict:
    timing, options = Steps(warm_up, steps), options_of({"cutmix": "true", **case}, workers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = step_benchmark.trainer_of(options, folder, timing)
        began = time.perf_counter()
        with contextlib.suppress(step_benchmark.Enough):
            trainer.train()
    return {
        "images_per_s": 2 * options.batch * steps / timing.seconds,
        "step_s": timing.seconds / steps,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "warm_up_s": timing.since - began,
    }


def measure_loss(size: tuple[int, int, int]) -> dict:
    """Milliseconds and MiB above the inputs for each way: medians of 10, alternating."""
    batch, classes, side = size
    values, labels = loss_benchmark.inputs(
        argparse.Namespace(batch=batch, classes=classes, size=side, stride=4, cpu=False)
    )
    compiled = torch.compile(loss_benchmark.plain_loss)

    def run_compiled() -> None:
        compiled(values, labels).backward()
        values.grad = None

    def in_pieces(gradient_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What the package's pieces could reach with another loss, on images up to the size of a piece."""
        num_images = max(1, strided.PIECE["cuda"] // (classes * side * side))
        parts = [slice(first, first + num_images) for first in range(0, batch, num_images)]
        gradient = torch.empty_like(values)
        for part in parts:
            gradient[part] = gradient_of(values.detach()[part].requires_grad_(), labels[part])
        return gradient

    def of_compiled(coarse: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(compiled(coarse, labels), coarse)[0]

    ways: dict[str, Callable[[], None]] = {
        "plain": lambda: loss_benchmark.loss_of("plain", values, labels),
        "compiled": run_compiled,
        "pieces, compiled": lambda: in_pieces(of_compiled),
        "pieces, gradient by hand": lambda: in_pieces(gradient_by_hand),
    }
    for piece in PIECES:
        ways[f"pieces of 2^{piece.bit_length() - 1}"] = lambda piece=piece: _with_piece(piece, values, labels)
    found: dict[str, dict] = {}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way, run in ways.items():
        with _noted(found, way):
            run()  # compiles, warms up
            _synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            found[way] = {"mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    for _ in range(10):
        for way in [way for way in ways if "mib" in found[way]]:
            _synchronize()
            start = time.perf_counter()
            ways[way]()
            _synchronize()
            times[way].append(1000 * (time.perf_counter() - start))
    for way, taken in times.items():
        if taken:
            found[way]["ms"] = statistics.median(taken)
    return {"ways": found}


def gradient_by_hand(coarse: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of cross entropy summed over pixels (its value is made too, as a loss must): soft-max minus one-hot, in place.

    One full-size tensor in all, where autograd makes three.
    """
    full_size = F.interpolate(coarse, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    logits, counts = full_size.detach(), (labels != IGNORE_INDEX).unsqueeze(1)
    labels, weights = torch.where(counts, labels.unsqueeze(1), 0), counts.to(logits.dtype)
    logits.sub_(logits.amax(1, keepdim=True))
    of_label = logits.gather(1, labels)
    total = logits.exp_().sum(1, keepdim=True)
    (weights * (total.log() - of_label)).sum()
    logits.mul_(weights / total)
    logits.scatter_(1, labels, logits.gather(1, labels) - weights)
    return torch.autograd.grad(full_size, coarse, logits)[0]


def _with_piece(piece: int, values: torch.Tensor, labels: torch.Tensor) -> None:
    before, strided.PIECE["cuda"] = strided.PIECE["cuda"], piece
    try:
        loss_benchmark.loss_of("lean", values, labels)
    finally:
        strided.PIECE["cuda"] = before


@contextlib.contextmanager
def _noted(found: dict, way: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # one way of several: keep the others
        found[way] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def measure_card() -> dict:
    """TFLOP/s of a bfloat16 product of 8192 x 8192 matrices, and TB/s of a copy, read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.randn(2**30, device="cuda")

    def seconds(run: Callable[[], object], times: int = 10) -> float:
        for _ in range(3):
            run()
        _synchronize()
        start = time.perf_counter()
        for _ in range(times):
            run()
        _synchronize()
        return (time.perf_counter() - start) / times

    return {
        "matmul_tflops": 2 * 8192**3 / seconds(lambda: a @ b) / 1e12,
        "copy_tb_s": 2 * big.numel() * 4 / seconds(lambda: big.clone()) / 1e12,
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cases(workers: int) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    yield "card", "card", measure_card
    for name, size in LOSSES.items():
        yield "loss", name, lambda size=size: measure_loss(size)
    for name, case in STEPS.items():
        yield "step", name, lambda case=case: measure_step(case, workers)
    for name, case in OPTIONS.items():
        yield "options", name, lambda case=case: measure_options(case, workers)


def table(lines: list[dict]) -> str:
    first = lines[0]
    known = {name: version for name, version in first["versions"].items() if version != "not installed"}
    used = ", ".join(f"{name} {version}" for name, version in known.items())
    page = [
        "# Measured on a GPU",
        "",
        f"`python benchmarks/gpu.py` on {first['device']}, {first['date']}; {used}.",
        "",
    ]
    by_kind = {kind: [one for one in lines if one["kind"] == kind] for kind in ("card", "step", "options", "loss")}
    for one in by_kind["card"]:
        if "error" not in one:
            page += [
                f"Here a bfloat16 product of 8192 x 8192 matrices runs at {one['matmul_tflops']:.0f} TFLOP/s, a copy "
                f"at {one['copy_tb_s']:.2f} TB/s; {one['memory_gib']:.0f} GiB.",
                "",
            ]
    page += [
        "## The step and its floor",
        "",
        "bfloat16 unless float32 is stated, channels_last for convolutional networks; overhead without loss and",
        "optimizer, and the shares of loss and optimizer in the step.",
        "",
        "| case | images/s | peak, GiB | overhead | loss | optimizer | data wait | host reads | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    page += [_step_row(one) for one in by_kind["step"]]
    page += ["", "## Settings", "", "CPS + CutMix, 8 + 8 images, whole steps timed, nothing measured inside.", ""]
    page += ["| case | images/s | peak, GiB | seconds before the first timed step |", "|---|---|---|---|"]
    for one in by_kind["options"]:
        page.append(
            f"| {one['name']} | {one['error']} | | |"
            if "error" in one
            else f"| {one['name']} | {one['images_per_s']:.1f} | {one['peak_gib'] or 0:.1f} | {one['warm_up_s']:.0f} |"
        )
    page += ["", "## The loss", "", "Cross entropy, forward and backward, from float32 logits at stride 4.", ""]
    for one in by_kind["loss"]:
        page += [f"| {one['name']} | ms | MiB above the inputs |", "|---|---|---|"]
        page += [f"| {one['error']} | | |"] if "error" in one else []
        for way, found in one.get("ways", {}).items():
            page.append(
                f"| {way} | {found['error']} | |"
                if "error" in found
                else f"| {way} | {found['ms']:.2f} | {found['mib']:.0f} |"
            )
        page.append("")
    for one in by_kind["step"]:
        if one.get("kernels"):
            page += [f"## What a step's time goes to: {one['name']}", "", "| ms | calls | |", "|---|---|---|"]
            page += [f"| {k['ms']:.2f} | {k['calls']} | `{k['name']}` |" for k in one["kernels"]]
            page.append("")
    return "\n".join(page) + "\n"


def _step_row(one: dict) -> str:
    if "error" in one:
        return f"| {one['name']} | {one['error']} |" + " |" * 7
    parts, step = one["parts_s"], one["step_s"]
    apart = sum(parts.values())

    def share(seconds: float, whole: float) -> str:
        return f"{100 * seconds / whole:.1f} %"

    return (
        f"| {one['name']} | {one['images_per_s']:.1f} | {one['peak_gib'] or 0:.1f} | {one['overhead']:.3f} | "
        f"{share(one['loss_s'], step)} | {share(parts.get('optimizer', 0) + parts.get('teacher', 0), apart)} | "
        f"{share(parts.get('data wait', 0), apart)} | {one['host_reads']} | {one['passes']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder of gpu.jsonl and gpu.md")
    parser.add_argument("--only", nargs="+", choices=("card", "step", "loss", "options"), help="kinds; default: all")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--workers", type=int, default=2, help="data workers per stream")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    options = parser.parse_args()
    logging.getLogger("cps_hf").setLevel(logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)
    began, before = time.monotonic(), options.output / "gpu.jsonl"
    lines = [json.loads(line) for line in before.read_text("utf-8").splitlines()] if before.is_file() else []
    for kind, name, run in cases(options.workers):
        if (options.only and kind not in options.only) or options.match not in name:
            continue
        if time.monotonic() - began > options.seconds:
            print(f"not run for want of time: {kind}, {name}")
            continue
        AcceleratorState._reset_state(reset_partial_state=True)  # each case has its own mixed precision
        line = {"kind": kind, "name": name, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
        line["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        since = time.monotonic()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                line |= run()
        except Exception as error:  # recorded; run the other cases
            traceback.print_exc()
            line["error"] = f"{type(error).__name__}: {str(error)[:300]}".replace("\n", " ")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch._dynamo.reset()
        lines = [one for one in lines if (one["kind"], one["name"]) != (kind, name)] + [line]
        (options.output / "gpu.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
        (options.output / "gpu.md").write_text(table(lines), encoding="utf-8")
        said = {key: line[key] for key in ("overhead", "images_per_s", "peak_gib", "ways", "error") if key in line}
        print(f"{kind}: {name} ({time.monotonic() - since:.0f} s): {said}", flush=True)


if __name__ == "__main__":
    main()
