"""Export a branch to ONNX and check it against PyTorch: pixel_values (B, 3, H, W) -> logits (B, C, H, W).

    python examples/export_onnx.py outputs/train_cps/best best.onnx

The same as `cps-hf export`. Needs `pip install "cps_hf[onnx]"`.
"""

import sys

from cps_hf.commands.export import main

if __name__ == "__main__":
    main(sys.argv[1:])
