"""`cps-hf export`: export a branch to ONNX and check the file against PyTorch.

    cps-hf export outputs/train_cps/best best.onnx
    cps-hf export nvidia/segformer-b0-finetuned-ade-512-512 segformer.onnx --size 512 512

pixel_values (B, 3, H, W) become logits (B, C, H, W) at the input's size. Works with any
AutoModelForSemanticSegmentation model. Batch, height and width are dynamic if the model allows it. Otherwise the file
only takes images of `--size`, which the command reports. The file's metadata contains class names and normalization.
Requires `pip install "cps_hf[onnx]"`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..inference.ensemble import Ensemble
from ..inference.onnx import export_onnx
from .arguments import ArgumentParser
from .errors import user_errors
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    first = ("size", "trust_remote_code")
    parser = ArgumentParser("export", COMMANDS["export"], first=first, usage="BRANCH OUT.onnx [--size H W]")
    parser.add_argument("branch", metavar="BRANCH", help="a folder or a Hub id")
    parser.add_argument("out", metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("H", "W"), help="of the trial image")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the branch")
    return parser


def main(argv: Sequence[str]) -> None:
    options = make_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with user_errors(options.out, (OSError, ValueError, ImportError)):
        branch = Ensemble.from_pretrained([options.branch], device="cpu", trust_remote_code=options.trust_remote_code)
        model, processor = branch.networks[0].model, branch.processors[0]
        written = export_onnx(model, processor, options.out, size=tuple(options.size))
    height, width = written.size
    sizes = "any height and width that the model takes" if written.dynamic else f"images of {height} x {width} only"
    tried = ", ".join(" x ".join(map(str, shape)) for shape in written.checked)
    print(f"{written.path}: {sizes}, any batch; logits at the input's size.")
    print(f"onnxruntime and PyTorch differ by at most {written.max_difference:.1g} of the largest logit ({tried}).")
