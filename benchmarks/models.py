"""What each network costs and what others measured with it, as the table in docs/models.md.

    python benchmarks/models.py [--output docs/models.md]

Built from configurations: nothing is downloaded. Memory and operations are counted on tensors without data; steps are
timed with random weights, in some minutes on one CPU core, and on a GPU if there is one. Scores are published ones
with their sources, never ours.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, EomtConfig, Mask2FormerConfig, PreTrainedConfig, SegformerConfig, SwinConfig
from transformers import logging as transformers_logging

from cps_hf.modeling import Branch, build_branches, freeze_unused_parameters
from cps_hf.modeling.around import architecture_around
from cps_hf.modeling.licences import conditions
from cps_hf.modeling.offline_backbone import SOURCE
from cps_hf.modeling.universal import auto_class
from cps_hf.planning.machine import Machine, candidates

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "examples" / "configs" / "models"
BEGIN, END = "<!-- benchmarks/models.py writes from here -->", "<!-- to here -->"
CLASSES, BATCH = 21, 2
COUNTED, TIMED = 512, 96  # the crop's side in pixels: what is counted, and timed on a CPU
STEPS = 3

UNIMATCH = "UniMatch V2, arXiv 2410.10777, with the labels alone (read from public material)"
MMSEG = "mmsegmentation's model zoo, 160k steps of 16 images of 512 x 512"
EOMT = "EoMT's model zoo: COCO panoptic quality, no mIoU is published for this size"


@dataclass(frozen=True)
class Candidate:
    """A network that a user could train.

    Args:
        weights: what its backbone or all of it starts from, as `--backbone` or `--models` names it.
        licence: of the weights.
        ade20k, cityscapes: published scores, with `sources` as footnotes; cityscapes: with 186 labeled images.
    """

    name: str
    weights: str
    licence: str
    config: Callable[[], PreTrainedConfig]
    ade20k: str = "-"
    cityscapes: str = "-"
    source: str = ""


def from_file(name: str) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.from_pretrained(CONFIGS / f"{name}.json")


def around(backbone: str) -> Callable[[], PreTrainedConfig]:
    return lambda: architecture_around(backbone).config


def segformer_b2() -> PreTrainedConfig:
    return SegformerConfig(depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768)


def eomt(hidden_size: int, heads: int) -> Callable[[], PreTrainedConfig]:
    sizes: dict[str, Any] = {"hidden_size": hidden_size, "num_attention_heads": heads, "num_hidden_layers": 12}
    return lambda: EomtConfig(**sizes, num_blocks=3, num_queries=100, image_size=COUNTED, patch_size=16)


def mask2former() -> PreTrainedConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return Mask2FormerConfig(backbone_config=SwinConfig(depths=[2, 2, 6, 2], out_features=stages))


APACHE, NVIDIA, DINOV3 = "Apache 2.0", "NVIDIA: no commercial use", "DINOv3 License, gated"
CANDIDATES = [
    Candidate(
        "DeepLabV3+, EfficientNet-Lite0",
        SOURCE,
        APACHE,
        around(SOURCE),
        source="no segmentation score is published; ImageNet top-1 is 75.1 % (EfficientNet-Lite's README)",
    ),
    Candidate(
        "DeepLabV3+, ResNet-50",
        "timm/resnet50s.gluon_in1k",
        APACHE,
        around("timm/resnet50s.gluon_in1k"),
        "43.95",
        source=f"{MMSEG}; there at stride 8 and with 512 head channels",
    ),
    Candidate(
        "DeepLabV3+, ResNet-101",
        "timm/resnet101s.gluon_in1k",
        APACHE,
        around("timm/resnet101s.gluon_in1k"),
        "45.47",
        source=f"{MMSEG}; there at stride 8 and with 512 head channels",
    ),
    Candidate(
        "UperNet, ConvNeXt-T",
        "facebook/convnext-tiny-224",
        APACHE,
        from_file("upernet_convnext_t"),
        "46.0",
        source="ConvNeXt's repository",
    ),
    Candidate(
        "ViT-DPT, DINOv2-S", "facebook/dinov2-small", APACHE, from_file("vit_dpt_dinov2_s"), "-", "77.2", UNIMATCH
    ),
    Candidate(
        "ViT-DPT, DINOv2-B", "facebook/dinov2-base", APACHE, from_file("vit_dpt_dinov2_b"), "-", "80.8", UNIMATCH
    ),
    Candidate("UperNet, DINOv2-S", "facebook/dinov2-small", APACHE, from_file("upernet_dinov2_s")),
    Candidate(
        "ViT-DPT, DINOv3 ViT-S",
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        DINOV3,
        from_file("vit_dpt_dinov3_s"),
        "47.0",
        source="DINOv3, arXiv 2508.10104, a linear layer on the frozen network (paper, unverified)",
    ),
    Candidate("SegFormer-B0", "nvidia/mit-b0", NVIDIA, SegformerConfig, "37.41", source=MMSEG),
    Candidate("SegFormer-B2", "nvidia/mit-b2", NVIDIA, segformer_b2, "45.58", source=MMSEG),
    Candidate(
        "EoMT-S", "tue-mps/coco_panoptic_eomt_small_640_2x", "see the card", eomt(384, 6), "- (46.7 PQ)", source=EOMT
    ),
    Candidate(
        "EoMT-B", "tue-mps/coco_panoptic_eomt_base_640_2x", "see the card", eomt(768, 12), "- (51.6 PQ)", source=EOMT
    ),
    Candidate(
        "Mask2Former, Swin-T",
        "facebook/mask2former-swin-tiny-ade-semantic",
        "CC BY-NC 4.0: no commercial use",
        mask2former,
        "47.7",
        source="Mask2Former's model zoo",
    ),
]


def picked() -> dict[str, str]:
    """The weights that the plan of `cps-hf train DIR` takes where they can be had, with the machine they are for."""
    machines = {
        "CPU": Machine(),
        "GPU from 6 GiB": Machine(device="cuda", memory=6.0),
        "GPU from 24 GiB": Machine(device="cuda", memory=24.0),
    }
    return {candidates(machine)[0]: name for name, machine in machines.items()}


@dataclass
class Cost:
    """Of a supervised step of one branch, in float32: cross entropy, AdamW.

    Args:
        parameters: in millions.
        state: weights, gradients and AdamW's two averages, in MiB.
        activations: what autograd keeps for each image of `COUNTED` pixels a side, in MiB. `None`: not counted.
        flops: of a forward pass of such an image. `None`: not counted.
        seconds: of a step with two images of `TIMED` pixels a side; of 512 on a GPU. `None`: not timed.
    """

    parameters: float
    state: float
    activations: float | None = None
    flops: float | None = None
    seconds: float | None = None


def side_of(config: PreTrainedConfig, wanted: int) -> int:
    """The crop's side nearest below `wanted` that the network takes; a network of one size is set to it."""
    if config.model_type == "eomt":
        config.image_size = wanted
    patch = getattr(getattr(config, "backbone_config", None), "patch_size", None)
    return wanted // 14 * 14 if patch == 14 else wanted


def counted(config: PreTrainedConfig, wanted: int = COUNTED) -> Cost:
    """Everything but the time, on tensors that have shapes and no data; Mask2Former's decoder needs data."""
    config.num_labels, side = CLASSES, side_of(config, wanted)
    config.use_auxiliary_head = False  # as in a branch
    with torch.device("meta"):
        branch = Branch(auto_class(config).from_config(config)).train()
        images = torch.empty(BATCH, 3, side, side)
        labels = torch.empty(BATCH, side, side, dtype=torch.long)
    if hasattr(branch.model, "attn_mask_probs"):  # an EoMT looks at these values: 0, as a branch starts
        branch.model.attn_mask_probs = torch.zeros(config.num_blocks)
    count = sum(parameter.numel() for parameter in branch.parameters())
    found = Cost(count / 1e6, 16 * count / 2**20)
    if config.model_type == "mask2former":
        return found
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no address is used again
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        F.cross_entropy(branch(images), labels)  # the counter is wrong on the backward pass of grouped convolutions
    own = {parameter.untyped_storage()._cdata for parameter in branch.parameters()}
    activations = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    found.activations, found.flops = activations / BATCH / 2**20, counter.get_total_flops() / BATCH
    return found


def timed(config: PreTrainedConfig, device: str) -> float:
    """Seconds of a step; on a CPU those that this thread used, which other processes do not change."""
    config.num_labels, side = CLASSES, side_of(config, COUNTED if device == "cuda" else TIMED)
    model = build_branches(config, num_branches=1)[0]
    freeze_unused_parameters(model, side)  # as a run does
    branch = Branch(model.to(device)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    images = torch.randn(BATCH, 3, side, side, device=device)
    labels = torch.randint(0, CLASSES, (BATCH, side, side), device=device)
    clock, times = (time.perf_counter if device == "cuda" else time.process_time), []
    for _ in range(STEPS):
        began = clock()
        F.cross_entropy(branch(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    return min(times[1:])


def measure(*, times: bool) -> list[Cost]:
    found = []
    for candidate in CANDIDATES:
        torch.manual_seed(0)
        found.append(counted(candidate.config()))
        if times:
            found[-1].seconds = timed(candidate.config(), "cpu")
        print(candidate.name, found[-1], flush=True)
        gc.collect()
    return found


def page(costs: Sequence[Cost], on_gpu: Sequence[float] | None = None) -> str:
    """The text between the two marks."""
    plans, notes = picked(), []
    least = min((cost.seconds for cost in costs if cost.seconds), default=None)
    header = ["network", "weights", "licence of the weights", "ADE20K", "Cityscapes, 186 labels", "parameters"]
    header += [
        "weights, gradients, AdamW",
        "activations per image",
        "GFLOP, forward",
        "step on a CPU",
        *(["step on a GPU"] if on_gpu else []),
        "the plan",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for index, (candidate, cost) in enumerate(zip(CANDIDATES, costs, strict=True)):
        mark = ""
        if candidate.source:
            notes += [candidate.source] if candidate.source not in notes else []
            mark = f"[^m{notes.index(candidate.source) + 1}]"
        of_ade20k = candidate.cityscapes == "-"
        said = conditions(candidate.weights) is not None
        cells = [
            candidate.name,
            f"`{candidate.weights}`",
            f"**{candidate.licence}**" if said else candidate.licence,
            candidate.ade20k + (mark if of_ade20k else ""),
            candidate.cityscapes + ("" if of_ade20k else mark),
            f"{cost.parameters:.1f} M",
            f"{cost.state:.0f} MiB",
            f"{cost.activations:.0f} MiB" if cost.activations else "",
            f"{cost.flops / 1e9:.0f}" if cost.flops else "",
            f"{cost.seconds / least:.1f} x" if cost.seconds else "",
            *([f"{1e3 * on_gpu[index]:.0f} ms"] if on_gpu else []),
            plans.get(candidate.weights, ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    date = f"{datetime.date.today():%d %B %Y}".lstrip("0")
    where = f", on an {torch.cuda.get_device_name()}" if on_gpu else ""
    written = (
        f"Written by `python benchmarks/models.py` on {date} with torch {torch.__version__.split('+')[0]}{where}. Do "
        "not edit manually."
    )
    return "\n".join([written, "", *lines, "", *(f"[^m{i}]: {note}" for i, note in enumerate(notes, 1))])


def with_table(text: str, table: str) -> str:
    """A page with `table` between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "models.md")
    parser.add_argument("--no_times", action="store_true", help="count only: a minute, and empty columns of times")
    arguments = parser.parse_args()
    text = arguments.output.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{arguments.output} has no lines {BEGIN!r} and {END!r} to write between.")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    costs, on_gpu = measure(times=not arguments.no_times), None
    if torch.cuda.is_available() and not arguments.no_times:
        on_gpu = [timed(candidate.config(), "cuda") for candidate in CANDIDATES]
    arguments.output.write_text(with_table(text, page(costs, on_gpu)), encoding="utf-8")
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
