"""One optimizer step of each newer kind of branch compared with its floor; and what sharing a frozen backbone saves.

    python benchmarks/step_of_models.py

writes benchmarks/results/models/steps.md, in about ten minutes of one CPU core. `benchmarks/step.py` measures each row
and says what a floor is; `python benchmarks/step.py --model small-eomt --crop 112 --cutmix true --profile` shows where
the time of one row goes. `--only` selects rows by a part of their names and prints them alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import step
import torch
from small_models import CLASSES, SIDE
from transformers import AutoConfig, AutoModel
from transformers import logging as transformers_logging

from cps_hf.training import setup

OUTPUT = Path(__file__).parent / "results" / "models" / "steps.md"
LORA = {"lora_rank": 8}
SET = {"labeled_loss": "set"}


@dataclass(frozen=True)
class Row:
    """Two branches of a model trained with CPS and CutMix."""

    name: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    crop: int = SIDE
    pretrained: bool = False  # whether the branches start from one backbone, as from a checkpoint
    shares: bool = True  # whether branches with adapters share it


UNIVERSAL = {"Mask2Former, Swin": "mask2former", "MaskFormer, Swin": "maskformer", "EoMT": "eomt"}
UNIVERSAL |= {"EoMT, DINOv3": "eomt-dinov3"}
BACKBONES = {"DINOv2": "dinov2", "DINOv2 with registers": "dinov2-registers", "DINOv3 ViT": "dinov3"}
ROWS = [
    *(Row(name, f"small-{model}") for name, model in UNIVERSAL.items()),
    *(Row(f"{name}, set loss", f"small-{model}", fields=SET) for name, model in UNIVERSAL.items()),
    *(Row(f"UperNet, {name}", f"small-upernet-{model}") for name, model in BACKBONES.items()),
    Row("UperNet, DINOv3 ConvNeXt", "small-upernet-dinov3-convnext"),
    *(Row(f"ViT-DPT, {name}", f"small-vit-dpt-{model}") for name, model in BACKBONES.items()),
    Row("ViT-DPT, DINOv2, LoRA", "small-vit-dpt-dinov2", LORA),
]

OF_DINOV2_S = {"model": "vit-dpt-dinov2-s", "crop": 98, "pretrained": True}
SHARING = [
    Row("full fine-tuning", settings={"optim": "adamw"}, **OF_DINOV2_S),
    Row("LoRA, each branch with its own backbone", settings={"optim": "adamw", **LORA}, **OF_DINOV2_S, shares=False),
    Row("LoRA, one backbone (the default)", settings={"optim": "adamw", **LORA}, **OF_DINOV2_S),
]


def measured(row: Row) -> dict[str, Any]:
    """The numbers of `step.py` for a row; two images of each kind per step, one thread."""
    words = ["--model", row.model, "--crop", f"{row.crop}", "--cutmix", "true", "--batch", "2", "--cpu"]
    settings = {"learning_rate": 1e-5, **row.settings}  # random networks diverge with the set loss at the default
    options = step.parse([*words, "--settings", json.dumps(settings), "--fields", json.dumps(row.fields)])
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        if not row.shares:
            stack.enter_context(mock.patch.object(setup, "share_frozen_weights", lambda models: 0))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if row.pretrained:
            config = AutoConfig.from_pretrained(step.MODELS[row.model]).backbone_config
            AutoModel.from_config(config).save_pretrained(f"{folder}/backbone")
            options.settings["backbone"] = f"{folder}/backbone"
        found = step.measure(options, folder)
    print(row.name, step.table(found), sep="\n", flush=True)
    return found


def floors_table(names: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    header = "| branches | floor, time | step | range of pairs | without the loss | floor, peak memory | step |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    for name, one in zip(names, found, strict=True):
        memory, ratios = one["memory_mib"], sorted(one["ratios"])
        without_loss = one["overhead"] - one["loss_s"] / one["floor_s"]
        cells = [
            f"{one['floor_s']:.2f} s",
            f"{one['overhead']:.2f} x",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{without_loss:.2f} x",
            f"{memory['floor']:.0f} MiB",
            f"{memory['step'] / memory['floor']:.2f} x",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sharing_table(names: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    header = "| two branches | weights | AdamW's states | activations and gradients, peak | all | time of a step |"
    lines = [header, "|---|---|---|---|---|---|"]
    cells: list[Callable[[dict], float]] = [
        *(lambda one, name=name: one["memory_mib"][name] for name in ("weights", "optimizer", "step")),
        lambda one: sum(one["memory_mib"][name] for name in ("weights", "optimizer", "step")),
    ]
    for name, one in zip(names, found, strict=True):
        numbers = [f"{cell(one):.0f} MiB, {cell(one) / cell(found[0]):.2f} x" for cell in cells]
        lines.append(f"| {name} | {' | '.join(numbers)} | {one['step_s'] / found[0]['step_s']:.2f} x |")
    return "\n".join(lines)


PAGE = """# Steps of the newer kinds of branches

Written by `python benchmarks/step_of_models.py` on {date} with {versions},
on one thread of a CPU that was shared with other jobs. Do not edit manually.

One optimizer step of two small networks ([small_models.py](../../small_models.py): random weights, two labeled and two
unlabeled images of {side} x {side} pixels, CPS + CutMix, {classes} classes), compared with its floor: the same network
passes and the backward passes from the means of their outputs. Times are medians of CPU time, without the optimizer.

- A step adds data, class scores, losses and checks. The losses' cost depends on pixels and classes and not on the
  network: with these small networks, their share is larger than with full-size ones. *Without the loss*: the
  objective's own time, measured separately, is subtracted.
- The set loss compares masks at the number of points in the configuration (12,544 by default), in every layer.
- Memory is the peak of a step above weights and optimizer states. UperNet's logits have the size of the image, and a
  step keeps the losses' gradients with respect to them until the backward pass.

{floors}

## One frozen backbone for two branches

ViT-DPT on DINOv2-S, {crop} x {crop} pixels, `lora_rank` {rank} in all linear layers, AdamW, in float32. Ratios are to
full fine-tuning. Activations grow with the image and the batch, the other columns do not.

{sharing}
"""


def page(floors: str, sharing: str) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    return PAGE.format(
        date=f"{datetime.date.today():%d %B %Y}".lstrip("0"),
        versions=versions,
        side=SIDE,
        classes=CLASSES,
        floors=floors,
        crop=OF_DINOV2_S["crop"],
        rank=LORA["lora_rank"],
        sharing=sharing,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="a part of the names of the rows to measure; nothing is written")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("cps_hf").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    if options.only:
        for row in [*ROWS, *SHARING]:
            if options.only in row.name:
                measured(row)
        return
    floors = floors_table([row.name for row in ROWS], [measured(row) for row in ROWS])
    sharing = sharing_table([row.name for row in SHARING], [measured(row) for row in SHARING])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(floors, sharing), encoding="utf-8")
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
