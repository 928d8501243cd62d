"""Writes a branch as an ONNX file that is checked against PyTorch: pixel_values (B, 3, H, W) -> logits (B, C, H, W).

    python examples/export_onnx.py outputs/train_cps/best best.onnx
    python examples/export_onnx.py nvidia/segformer-b0-finetuned-ade-512-512 segformer.onnx --size 512 512

Any model of AutoModelForSemanticSegmentation will do. Logits come at the input's size. Batch, height and width are
free where the model allows; where it does not, the file takes images of `--size`, and the script says so. Class names
and the normalisation are in the file's metadata. Needs `pip install "cps_hf[onnx]"`.
"""

from __future__ import annotations

import argparse
import logging

from cps_hf.inference.ensemble import Ensemble
from cps_hf.inference.onnx import export_onnx
from cps_hf.training.failures import one_line


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("branch", help="a folder or a Hub id")
    parser.add_argument("out", help="the file to write")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("H", "W"), help="default: 256 320")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the branch")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        branch = Ensemble.from_pretrained([options.branch], device="cpu", trust_remote_code=options.trust_remote_code)
        model, processor = branch.networks[0].model, branch.processors[0]
        written = export_onnx(model, processor, options.out, size=tuple(options.size))
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"export_onnx.py: {one_line(error, options.out)}") from error
    height, width = written.size
    sizes = "any height and width that the model takes" if written.dynamic else f"images of {height} x {width} only"
    tried = ", ".join(" x ".join(map(str, shape)) for shape in written.checked)
    print(f"{written.path}: {sizes}, any batch; logits at the input's size.")
    print(f"onnxruntime and PyTorch differ by at most {written.max_difference:.1g} of the largest logit ({tried}).")


if __name__ == "__main__":
    main()
