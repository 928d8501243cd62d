"""Write docs/architectures.md: the size and behaviour of every architecture.

    python benchmarks/architectures.py [--output docs/architectures.md]

Full-size models are built as branches on the meta device: shapes without values, so no memory and no weights. The tiny
ones of tests/support/architectures.py are trained, exported, loaded by two other processes and given an odd image.
Takes a few minutes on one CPU core and downloads nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedModel
from transformers import logging as transformers_logging

from cps_hf.hub.card import escape_markdown
from cps_hf.hub.export import export_branch
from cps_hf.modeling import Branch, build_branches, check_input_size, freeze_unused_parameters

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from support.architectures import ARCHITECTURES, FULL_SIZES, KNOWN, Architecture, FullSize  # noqa: E402

STEPS = 20
ODD_SIZE = (75, 53)
NAMES = {0: "road", 1: "car", 2: "tree", 3: "sky", 4: "person"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Footnotes:
    """Texts below a table, numbered in the order they are met; the same text has one number."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f"[^{self.prefix}{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"[^{self.prefix}{number}]: {text}" for number, text in enumerate(self.texts, 1)]


def millions(model: PreTrainedModel, only_trainable: bool = False) -> float:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable) / 1e6


def rejection(model: PreTrainedModel, height: int, width: int) -> str:
    """The message of `check_input_size` for this size; empty if it passes."""
    try:
        check_input_size(model, height, width)
    except ValueError as error:
        return str(error)
    return ""


def allowed_sizes(model: PreTrainedModel) -> str:
    """The sizes that pass `check_input_size`, in words.

    The smallest step of which odd multiples pass, for two oblong shapes or else squares.
    """
    for oblong in (True, False):
        for step in (1, 8, 14, 16, 32, 64):
            short = 256 // step | 1
            longs = (int(1.3 * short) | 1, int(1.6 * short) | 1) if oblong else (short,)
            if not any(rejection(model, step * short, step * long) for long in longs):
                words = "any" if oblong else "square"
                return words if step == 1 else f"{words.replace('any', '')} multiples of {step}".strip()
    side = model.config.image_size
    return "none found" if rejection(model, side, side) else f"{side} x {side} only"


def full_size_row(row: FullSize) -> dict[str, str]:
    """Counts and sizes of one full-size model, built as `build_branches` builds a branch, on the meta device."""
    config = AutoConfig.for_model(row.model_type, num_labels=row.num_labels, **row.arguments())
    with torch.device("meta"):
        whole = AutoModelForSemanticSegmentation.from_config(config)
        model = build_branches(config, num_branches=1)[0]
    sizes = allowed_sizes(model)
    side = model.config.image_size if sizes.endswith("only") else 448
    with torch.no_grad():
        logits = model.eval()(pixel_values=torch.empty(1, 3, side, side, device="meta")).logits
    parameters = millions(model)
    freeze_unused_parameters(model, side)
    return {
        "classes": str(row.num_labels),
        "parameters": f"{parameters:.2f}",
        "used": f"{millions(model, only_trainable=True):.2f}",
        "with auxiliary head": f"{millions(whole):.2f}" if millions(whole) > parameters else "-",
        "published": row.published,
        "stride": f"{side / logits.shape[-1]:g}",
        "sizes": sizes,
    }


def toy_batch(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Four images (4, 3, H, W) of sixteen coloured blocks with noise, and labels (4, H, W): one colour per class."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, len(NAMES), (4, 1, 4, 4), generator=generator)
    labels = F.interpolate(blocks.float(), size=size, mode="nearest").squeeze(1).long()
    colours = torch.randn(len(NAMES), 3, generator=generator)
    images = colours[labels].permute(0, 3, 1, 2)
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


def train(model: PreTrainedModel, size: tuple[int, int]) -> list[float]:
    """The losses of STEPS steps of AdamW on one batch."""
    branch = Branch(model).train()
    images, labels = toy_batch(size)
    optimizer = torch.optim.AdamW(branch.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(branch(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def odd_size(model: PreTrainedModel) -> tuple[str, str]:
    """Whether the model takes an image of ODD_SIZE, and the error if not.

    Raises:
        RuntimeError: `check_input_size` and the forward pass disagree.
    """
    image = torch.randn(1, 3, *ODD_SIZE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rejected = rejection(model, *ODD_SIZE)
    try:
        logits = Branch(model).eval()(image)
    except (RuntimeError, ValueError) as error:
        if rejected:
            return "no", rejected
        raise RuntimeError(f"check_input_size lets {ODD_SIZE} pass, the forward does not") from error
    if rejected:
        raise RuntimeError(f"the forward takes {ODD_SIZE}; check_input_size: {rejected}")
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    seen = image.grad.abs().sum((0, 1))  # zero where no logit depends on the pixel
    rows, columns = (ODD_SIZE[dim] - 1 - int(seen.sum(1 - dim).nonzero().max()) for dim in (0, 1))
    if not rows and not columns:
        return "yes", ""
    lost = [f"{count} {name}{'s' * (count > 1)}" for count, name in ((rows, "row"), (columns, "column")) if count]
    return f"yes, less {' and '.join(lost)}", ""


def shortened(text: str, most: int = 330) -> str:
    """One line of Markdown, cut after a word."""
    text = " ".join(text.split())
    return escape_markdown(text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ...")


def tiny_row(architecture: Architecture, folder: Path) -> dict[str, Any]:
    """Train the tiny model, try the odd size, and write to `folder` what the other processes load and expect."""
    torch.manual_seed(0)
    model = build_branches(architecture.config(), num_branches=1, id2label=NAMES)[0]
    losses = train(model, architecture.size)
    model.eval()
    odd, error = odd_size(model)
    folder.mkdir(parents=True)
    export_branch(model, folder / "branch", image_mean=MEAN, image_std=STD)
    images, _ = toy_batch(architecture.size)
    with torch.no_grad():
        torch.save({"images": images, "logits": model(pixel_values=images).logits}, folder / "expected.pt")
    return {"losses": losses, "odd": odd, "odd error": error}


# Runs alone in a new process. Arguments: "with" or "without" cps_hf, then folders of `tiny_row`.
LOADER = """
import json, sys
package, folders = sys.argv[1], sys.argv[2:]
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, logging, pipeline
if package == "with":
    import cps_hf.modeling  # the models' code comes from the package
    options = {}
else:
    sys.modules["cps_hf"] = None  # importing it fails; the models' code, if any, comes from the folder
    options = {"trust_remote_code": True}
torch.set_num_threads(1)
logging.set_verbosity(logging.CRITICAL)
results = []
for folder in folders:
    result = {}
    try:
        model = AutoModelForSemanticSegmentation.from_pretrained(f"{folder}/branch", **options).eval()
        home = type(model).__module__.split(".")[0]
        allowed = ("transformers", "cps_hf") if package == "with" else ("transformers", "transformers_modules")
        assert home in allowed, f"the code came from {home}"
        expected = torch.load(f"{folder}/expected.pt")
        with torch.no_grad():
            logits = model(pixel_values=expected["images"]).logits
        result["difference"] = (logits - expected["logits"]).abs().max().item()
        result["scale"] = expected["logits"].abs().max().item()
    except Exception as error:
        result["reload error"] = f"{type(error).__name__}: {error}"
    try:
        image = Image.effect_noise((96, 64), 80).convert("RGB")
        masks = pipeline("image-segmentation", model=f"{folder}/branch", **options)(image)
        names = set(model.config.id2label.values())
        assert masks and all(m["mask"].size == image.size and m["label"] in names for m in masks), masks
        result["pipeline"] = len(masks)
    except Exception as error:
        result["pipeline error"] = f"{type(error).__name__}: {error}"
    results.append(result)
print(json.dumps(results))
"""


def reload(folders: list[Path], package: str) -> list[dict[str, Any]]:
    """Load the folders of `tiny_row` in a process `package` = "with" or "without" cps_hf; one dict for each.

    Raises:
        RuntimeError: the process itself failed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    if package == "with":
        environment["PYTHONPATH"] = str(REPOSITORY)
    with tempfile.TemporaryDirectory() as home:  # for the code that came along; and away from the repository
        done = subprocess.run(
            [sys.executable, "-c", LOADER, package, *(str(folder.resolve()) for folder in folders)],
            env={**environment, "HF_HOME": home},
            cwd=home,
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(f"The process {package} cps_hf failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def reload_cell(result: dict[str, Any], notes: Footnotes) -> str:
    if "reload error" in result:
        return f"**no**{notes.mark(shortened(result['reload error']))}"
    if result["difference"] == 0:
        return "equal"
    answer = "equal" if result["difference"] <= 1e-5 * result["scale"] else "**no**"
    return f"{answer}, to {result['difference']:.0e}"


def pipeline_cell(results: list[dict[str, Any]], notes: Footnotes) -> str:
    errors = [result["pipeline error"] for result in results if "pipeline error" in result]
    return f"**no**{notes.mark(shortened(errors[0]))}" if errors else "yes"


def loss_cell(losses: list[float]) -> str:
    text = f"{losses[0]:.2f} → {losses[-1]:.2f}"
    return text if losses[-1] < losses[0] else f"**no**: {text}"


def table(header: list[str], rows: list[list[str]], numeric: int = 0) -> list[str]:
    """Markdown; the `numeric` columns after the first are aligned to the right."""
    rule = [":--" if not 0 < index <= numeric else "--:" for index in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def page(full: list[tuple[FullSize, dict[str, str]]], tiny: list[tuple[Architecture, dict, dict, dict]]) -> str:
    """docs/architectures.md as text."""
    sources, errors = Footnotes("p"), Footnotes("e")
    full_rows = [
        [
            row.name,
            cells["classes"],
            cells["parameters"],
            cells["used"],
            cells["with auxiliary head"],
            cells["published"] + sources.mark(row.source),
            cells["stride"],
            cells["sizes"],
            f"`{row.family}`",
        ]
        for row, cells in full
    ]
    tiny_rows = [
        [
            f"`{architecture.name}`",
            loss_cell(own["losses"]),
            reload_cell(without, errors),
            reload_cell(with_package, errors),
            pipeline_cell([without, with_package], errors),
            own["odd"] + errors.mark(shortened(own["odd error"])),
        ]
        for architecture, own, without, with_package in tiny
    ]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "timm"))
    date = f"{datetime.date.today():%d %B %Y}".lstrip("0")
    written = (
        f"Written by `python benchmarks/architectures.py` on {date} with Python {platform.python_version()}, "
        f"{libraries}; do not edit it."
    )
    return INTRODUCTION.format(
        written=textwrap.fill(written, 119),
        model_types=textwrap.fill(", ".join(f"`{name}`" for name in sorted(KNOWN)), 119, break_on_hyphens=False),
        full_table="\n".join([*table(FULL_HEADER, full_rows, numeric=6), "", *sources.lines()]),
        tiny_table="\n".join([*table(TINY_HEADER, tiny_rows), "", *errors.lines()]),
        odd=f"{ODD_SIZE[0]} x {ODD_SIZE[1]}",
        steps=STEPS,
    )


FULL_HEADER = ["Architecture", "Classes", "Branch", "Trained", "With auxiliary head", "Published", "Logits stride"]
FULL_HEADER += ["Input sizes", "Family"]
TINY_HEADER = ["Family", f"{STEPS} steps: loss", "Reloaded without `cps_hf`", "Reloaded with `cps_hf`", "Pipeline"]
TINY_HEADER += [f"{ODD_SIZE[0]} x {ODD_SIZE[1]} image"]
INTRODUCTION = """# Architectures

This page covers every model type of `AutoModelForSemanticSegmentation` in the installed transformers, and the three of
this package:
{model_types}.

{written}

## At full size

Built from configurations, without weights. Parameters are in millions.

- *Branch*: the model as `build_branches` builds it for this number of classes, without auxiliary heads. *Trained*:
  without the parameters that do not affect the logits, which are frozen before training. *Published*: the number in
  the paper or the release; "-" if we know of none.
- *Logits stride*: the input's side divided by the logits' side. `Branch` resizes the logits to the input.
- *Input sizes*: sizes that pass `check_input_size`, for height and width alike; tested on oblong and square images
  with sides from 256 to about 640 pixels. *Any* takes 257 x 335 and 257 x 411 (patch-based networks drop incomplete
  patches: see the last column of the second table).
- *Family*: the row of the second table that is built by the same code.

{full_table}

## At toy width

These models run the same code with few channels and random weights, on the CPU.

- *{steps} steps*: cross entropy at the first and the last step of AdamW (learning rate 0.01) on one fixed batch of
  four images of coloured blocks with five classes.
- *Reloaded*: exported by `cps_hf.hub.export_branch`, loaded by `AutoModelForSemanticSegmentation.from_pretrained` in
  two new processes. In one, `cps_hf` cannot be imported, and `trust_remote_code=True` runs the exported code of this
  package's three model types; in the other it can, without that flag. "Equal": the same logits as before the export, to
  the last bit unless a difference is given.
- *Pipeline*: `pipeline("image-segmentation", model=folder)` in both processes, on an image of 64 x 96
  (height x width; DPT's and Data2Vec's exported image processors resize it).
- *{odd} image* (height x width): odd and not square. "Less 5 rows": no logit depends on the last 5 rows, because
  they do not fill a patch; the other logits are stretched over the image. A crop of whole patches avoids this.

{tiny_table}

## Mask-classification networks

These models of `AutoModelForUniversalSegmentation` can be branches, also paired with a network of the first table:

| Model type | Logits stride | Input sizes | Frozen: no effect on scores | Semantic map of the exported processor |
| :-- | --: | :-- | :-- | :-- |
| `mask2former` | 4 | any | the last norm of a Swin backbone | through 384 x 384: nearly ours |
| `maskformer` | 4 | any | the last norm of a Swin backbone | ours, to the pixel |
| `eomt` | 16 / 2^`num_upscale_blocks` | `image_size` only | nothing | through the input's size: nearly ours |
| `eomt_dinov3` | 16 / 2^`num_upscale_blocks` | `image_size` only | nothing | through the input's size: nearly ours |

- A class's score at a pixel is the sum over queries of class probability (without the no-object class) times mask
  probability. The scores are resized to the image, and the logits are log((s + 1e-6) / sum over classes of
  (s + 1e-6)) in float32. Losses, pseudo labels, windows and ensembles all take these. With `--labeled_loss set`,
  training uses the networks' own set loss instead (docs/models.md).
- The "semantic map" column is about one network and a whole image in one pass, if every pixel has a query that scores
  it: where all scores are below 1e-6, the constant decides. The processors of Mask2Former and EoMT resize the
  masks' logits before the scores are summed, so pixels along boundaries may differ; `cps-hf predict` and `evaluate`
  give the same as training's evaluation. `pipeline("image-segmentation")` needs `subtask="semantic"`.
- EoMT only takes images of `image_size`. Training needs this `crop_size` (a message says so before it starts).
  Evaluation and prediction automatically use windows of that size, every two thirds of it, for other images. The
  exported image processor resizes the shorter side to that size and cuts windows, as the library's own checkpoints do;
  `cps-hf evaluate --own_size` skips the resizing, as training's evaluation does.
- With a loss on pixels, an EoMT built from a configuration trains without masked attention: such a loss does not train
  the masks of the earlier blocks. A checkpoint keeps its `attn_mask_probs`.
- EoMT cannot be started from the weights of a plain vision transformer (`backbone`), and has no decoder whose input
  could be dropped (`feature_dropout`).
- `oneformer` is not supported: it needs a task text with each image.
"""  # noqa: E501 (a table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "architectures.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    full = []
    for row in FULL_SIZES:
        full.append((row, full_size_row(row)))
        print(row.name, full[-1][1], flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / architecture.name for architecture in ARCHITECTURES]
        own = []
        for architecture, folder in zip(ARCHITECTURES, folders, strict=True):
            own.append(tiny_row(architecture, folder))
            print(architecture.name, loss_cell(own[-1]["losses"]), own[-1]["odd"], flush=True)
        tiny = zip(ARCHITECTURES, own, reload(folders, "without"), reload(folders, "with"), strict=True)
        text = page(full, list(tiny))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
