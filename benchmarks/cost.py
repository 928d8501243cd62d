"""Count the cost of a step for each objective and recipe: passes, FLOPs, bytes, and the hours on a GPU.

    python benchmarks/cost.py --output benchmarks/cost.md
        a few minutes on a CPU: every number of the first two tables is counted, on tensors without data.

    python benchmarks/cost.py --measured benchmarks/results/h100/gpu.jsonl
        compared with what benchmarks/gpu.py measured: seconds, share of the GPU's peak, memory; hours with that share.

    python benchmarks/cost.py --efficiency 0.42
        hours with a given share of a GPU's peak; without either option, the share is assumed.

FLOPs are those of convolutions and matrix products, forward and backward, from torch's counter. Activations are the
bytes that autograd keeps until the backward pass, each storage once, with bfloat16 networks and float32 losses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, SegformerConfig

from cps_hf import OBJECTIVES, CPSConfig, Objective
from cps_hf.checkpointing.fingerprint import versions
from cps_hf.commands.parser import parse
from cps_hf.commands.settings import Settings
from cps_hf.objectives import LabeledBatch, UnlabeledBatch
from cps_hf.training.module import TrainingModule

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
GPUS = {"H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}  # dense bfloat16 with float32 sums, by their data sheets
PEAKS = {"H100 80GB": 989e12, **GPUS}  # by a part of the device's name
CLASSES = {"voc": 21, "cityscapes": 19}
# Models that recipes name by a Hub id, since nothing is read from the Hub here.
HUB_CONFIGS = {
    "nvidia/mit-b2": SegformerConfig(depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768)
}


@dataclass
class Cost:
    """The cost per process and micro-batch.

    Args:
        with_grad, without_grad: forward passes of a branch (or the teacher).
        flops: forward and backward. parameters: of all branches. activations: bytes kept for the backward pass.
    """

    with_grad: int
    without_grad: int
    flops: float
    parameters: int
    activations: int

    def memory(self, optim: str) -> int:
        """Bytes: float32 weights, gradients and optimizer states, a bfloat16 copy of the weights, activations."""
        states = {"sgd": 1, "adamw": 2}["adamw" if "adamw" in optim else "sgd"]
        return self.parameters * (4 + 4 + 4 * states + 2) + self.activations


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--efficiency", type=float, help="the share of the GPU's peak FLOPs that was measured")
    parser.add_argument("--measured", type=Path, help="the gpu.jsonl that benchmarks/gpu.py wrote")
    parser.add_argument("--pairs", type=int, default=5, help="timed steps per objective for the check on this CPU")
    parser.add_argument("--output", type=Path, help="write the page there instead of printing it")
    options = parser.parse_args(argv)
    if options.measured and not options.measured.is_file():
        parser.error(f"--measured: there is no {options.measured}; benchmarks/gpu.py writes such a file.")
    measured = measured_table(options) if options.measured else []
    parts = [head(options), objectives_table(), recipes_table(options), measured, check_table(options.pairs)]
    page = "\n".join(line for part in parts for line in part)
    if options.output:
        options.output.write_text(page + "\n", encoding="utf-8")
    else:
        print(page)


def head(options: argparse.Namespace) -> list[str]:
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "transformers"))
    return [
        "# What training costs",
        "",
        f"Made by `python benchmarks/cost.py`, {datetime.date.today()}, {used}. Passes, FLOPs and bytes are counted;",
        f"hours are computed from them with {share_said(options)}.",
        "",
    ]


def share_said(options: argparse.Namespace) -> str:
    """Where the share of the GPU's peak, used to compute hours, comes from."""
    if options.measured:
        return (
            f"a share of {options.efficiency:.0%} of the GPU's peak, the median of what was\nmeasured below on one "
            "card at some 8 + 8 images; other cards and batches reach other shares"
        )
    if options.efficiency:
        return f"a share of {options.efficiency:.0%} of the GPU's peak, as it was given"
    return "an **assumed** share of 30 % of the GPU's peak: pass `--measured` or `--efficiency`"


def cost_of(
    configs: Sequence[PreTrainedConfig], objective: Objective, args: CPSConfig, crop_size: Sequence[int]
) -> Cost:
    """Count one micro-batch on tensors that have shapes and no data.

    One image per process is counted as half of two: batch norm over one pooled pixel needs the other processes.
    """
    times = 2 if args.per_device_train_batch_size == 1 else 1
    args = replace(
        args,
        per_device_train_batch_size=times * args.per_device_train_batch_size,
        per_device_unlabeled_batch_size=times * args.unlabeled_batch_size,
    )
    with torch.device("meta"):
        models = [AutoModelForSemanticSegmentation.from_config(config).to(torch.bfloat16) for config in configs]
        models = models[:1] if objective.teacher else models
        module = TrainingModule(models, objective, averages=objective.averages).train()
        batches = make_batches(objective, args, crop_size, torch.bfloat16)
        progress = torch.zeros(())
    calls, kept = {True: 0, False: 0}, {}

    def count_call(*_):
        calls[torch.is_grad_enabled()] += 1

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # kept, so that no address is reused
        return tensor

    for branch in module.networks().values():
        branch.register_forward_pre_hook(count_call)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(*batches, progress).loss
        loss.backward()
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    return Cost(
        with_grad=calls[True],
        without_grad=calls[False],
        flops=counter.get_total_flops() / times,
        parameters=sum(p.numel() for p in module.branches.parameters()),
        activations=sum(storage.nbytes() for address, storage in kept.items() if address not in own) // times,
    )


def make_batches(
    objective: Objective, args: CPSConfig, crop_size: Sequence[int], dtype: torch.dtype
) -> tuple[LabeledBatch, UnlabeledBatch | None]:
    """A labeled and an unlabeled micro-batch as the trainer would pass them, on the default device."""
    height, width = crop_size

    def images(count):
        return torch.rand(count, 3, height, width, dtype=dtype)

    def marks(count):
        return torch.ones(count, height, width, dtype=torch.bool)

    size = args.per_device_train_batch_size
    labels = torch.zeros(size, height, width, dtype=torch.long)
    pixels = torch.tensor(float(size * height * width))
    labeled = LabeledBatch(
        pixel_values=images(size), labels=labels, valid=marks(size), num_labels=pixels, num_pixels=pixels
    )
    if not objective.views:
        return labeled, None
    size = args.unlabeled_batch_size
    unlabeled = {"valid": marks(size), "num_pixels": torch.tensor(float(size * height * width))}
    for view in objective.views:
        unlabeled[view] = marks(size) if "mask" in view else images(size)
        if "mask" in view:  # half an image, so that a check on real tensors mixes
            unlabeled[view][:, : height // 2] = False
        if view == "pseudo_labels":
            unlabeled[view] = torch.zeros(size, height, width, dtype=torch.long)
        if view == "second_crop":
            unlabeled["second_valid"] = marks(size)
    if size % 2:  # the neighbour's images are sent along
        sent = {"weak", "strong", "strong_2"} & set(objective.views)
        unlabeled |= {f"partner_{view}": images(size) for view in sent}
        unlabeled |= {f"partner_{view}": unlabeled[view] for view in {"pseudo_labels"} & set(objective.views)}
        unlabeled["partner_valid"] = marks(size)
    return labeled, UnlabeledBatch(**unlabeled)


def objectives_table() -> list[str]:
    args = CPSConfig(per_device_train_batch_size=8)
    config = model_config("models/deeplabv3_plus_r50.json", 21)
    rows = [
        "## Each objective",
        "",
        "Two DeepLabV3+ on ResNet-50 (Mean Teacher: one and its teacher), 8 labeled and 8 unlabeled images of",
        "512 x 512.",
        "",
        "| objective | passes with gradient | without | TFLOPs per step | relative to supervised | activations, GiB |",
        "|---|---|---|---|---|---|",
    ]
    first = None
    for name, objective in objectives().items():
        cost = cost_of([config, config], objective, args, (512, 512))
        first = first or cost.flops
        rows.append(
            f"| {name} | {cost.with_grad} | {cost.without_grad} | {cost.flops / 1e12:.2f} | "
            f"{cost.flops / first:.2f} | {cost.activations / 2**30:.1f} |"
        )
    return [*rows, ""]


def measured_table(options: argparse.Namespace) -> list[str]:
    """Counted FLOPs and memory compared with a GPU's seconds and peak; sets the share of its peak if not given."""
    models = {
        "deeplabv3plus-r50": "models/deeplabv3_plus_r50.json",
        "dpt-dinov2-b": "models/dpt_dinov2_b.json",
        "segformer-b2": "nvidia/mit-b2",
    }
    lines = [json.loads(line) for line in options.measured.read_text(encoding="utf-8").splitlines()]
    steps = [one for one in lines if one["kind"] == "step" and "error" not in one]
    steps = [one for one in steps if one["settings"].get("mixed_precision") == "bf16"]
    if not steps:
        sys.exit(f"{options.measured} holds no bfloat16 step: run `benchmarks/gpu.py --only step`.")
    peak = next((value for name, value in PEAKS.items() if name in steps[0]["device"]), None)
    if peak is None:
        sys.exit(f"No peak is known of {steps[0]['device']}: add it to PEAKS in {__file__}.")
    rows = [
        f"## Checked against a GPU: {steps[0]['device']}, {steps[0]['date']}",
        "",
        "bfloat16; the peak is the data sheet's 989 TFLOP/s. Counted memory is without the allocator's slack and the",
        "libraries' work space, and for attention an upper bound.",
        "",
        "| | TFLOPs | seconds | TFLOP/s | of the peak | counted, GiB | peak measured, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    shares = []
    for one in steps:
        told, kind = one["settings"], OBJECTIVES[one["settings"]["objective"]]
        objective = kind() if told["cutmix"] is None else kind(cutmix=type(kind.cutmix)(told["cutmix"] == "true"))
        args = CPSConfig(per_device_train_batch_size=told["batch"])
        config = model_config(models[told["model"]], 21)
        cost = cost_of([config, config], objective, args, (told["crop"], told["crop"]))
        rate = cost.flops / one["step_s"]
        shares.append(rate / peak)
        rows.append(
            f"| {one['name']} | {cost.flops / 1e12:.2f} | {one['step_s']:.3f} | {rate / 1e12:.0f} | "
            f"{shares[-1]:.1%} | {cost.memory('sgd') / 2**30:.1f} | {one['peak_gib']:.1f} |"
        )
    options.efficiency = options.efficiency or statistics.median(shares)
    return [*rows, ""]


def objectives() -> dict[str, Objective]:
    found = {"supervised": OBJECTIVES["supervised"]()}
    found |= {"cps, CutMix": OBJECTIVES["cps"](cutmix=True), "cps": OBJECTIVES["cps"](cutmix=False)}
    return found | {name: cls() for name, cls in OBJECTIVES.items() if name not in ("supervised", "cps")}


def recipes_table(options: argparse.Namespace) -> list[str]:
    efficiency = options.efficiency or 0.3
    rows = [
        "## Each recipe",
        "",
        "Memory is that of one process: weights, gradients, optimizer, activations; without the allocator's slack and",
        "the libraries' work space. Attention is counted with its maps kept, as the plain path keeps them: fused",
        "kernels keep less, so the memory of DINOv2 and Swin is an upper bound. Hours are of all processes together.",
        "",
        "| recipe | processes x (labeled + unlabeled) x crop | steps | TFLOPs a step | GiB a process | "
        + " | ".join(f"{gpu}, GPU hours" for gpu in GPUS)
        + " |",
        "|---" * (5 + len(GPUS)) + "|",
    ]
    for path in sorted(CONFIGS.glob("*.yaml")):
        settings = parse(Settings, ["--config", str(path), "--data_root", "DIR"])
        args, data, objective = settings.args, settings.data, settings.objective
        crop_size = settings.augmentation.crop_size
        models = data.models * 2 if len(data.models) == 1 else data.models
        configs = [model_config(model, CLASSES[data.dataset]) for model in models]
        cost = cost_of(configs, objective, args, crop_size)
        shares = (args.num_processes or 1) * args.gradient_accumulation_steps
        flops = cost.flops * shares
        hours = [flops * args.max_steps / (peak * efficiency) / 3600 for peak in GPUS.values()]
        unlabeled = args.unlabeled_batch_size if objective.views else 0
        rows.append(
            f"| {path.stem} | {shares} x ({args.per_device_train_batch_size} + {unlabeled}) x {crop_size[0]} | "
            f"{args.max_steps} | {flops / 1e12:.2f} | {cost.memory(args.optim) / 2**30:.1f} | "
            + " | ".join(f"{h:.1f}" for h in hours)
            + " |"
        )
    return [*rows, ""]


def model_config(name: str, num_labels: int) -> PreTrainedConfig:
    """A recipe's model: a file next to the recipes, or one of `HUB_CONFIGS`."""
    if name in HUB_CONFIGS:
        config = SegformerConfig(**HUB_CONFIGS[name].to_dict())
    else:
        config = AutoConfig.from_pretrained(CONFIGS / name)
    config.id2label = {i: f"class {i}" for i in range(num_labels)}
    return config


def check_table(pairs: int) -> list[str]:
    """Counted ratios compared with timed ones: real steps on this CPU, medians of process time, alternating."""
    torch.set_num_threads(1)
    args, crop_size = CPSConfig(per_device_train_batch_size=2), (96, 96)
    config = model_config("models/deeplabv3_plus_r50.json", 21)
    counted, timed, modules = {}, {}, {}
    for name, objective in objectives().items():
        counted[name] = cost_of([config, config], objective, args, crop_size).flops
        networks = 1 if objective.teacher else 2
        models = [AutoModelForSemanticSegmentation.from_config(config) for _ in range(networks)]
        modules[name], timed[name] = TrainingModule(models, objective).train(), []
    for _ in range(pairs + 1):
        for name, module in modules.items():
            batches = make_batches(module.objective, args, crop_size, torch.float32)
            start = time.process_time()
            module(*batches, torch.zeros(())).loss.backward()
            timed[name].append(time.process_time() - start)
            module.zero_grad(set_to_none=True)
    medians = {name: statistics.median(times[1:]) for name, times in timed.items()}  # the first one warms up
    rows = [
        "## Checked against the clock",
        "",
        f"The same networks at 2 + 2 x 96 x 96, forward and backward on one CPU thread, medians of {pairs} steps,",
        "alternating; counted FLOPs compared with measured times, as ratios to supervised.",
        "",
        "| objective | by FLOPs | timed |",
        "|---|---|---|",
    ]
    for name in modules:
        by_flops, by_time = counted[name] / counted["supervised"], medians[name] / medians["supervised"]
        rows.append(f"| {name} | {by_flops:.2f} | {by_time:.2f} |")
    return rows


if __name__ == "__main__":
    main()
