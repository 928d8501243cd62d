"""The network of the benchmarks on real images: DeepLabV3+ on EfficientNet-Lite0, from ImageNet's weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from cps_hf.modeling import DeepLabV3PlusConfig


def add_backbone_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        default="package:efficientnet-lite0",
        help="weights of tf_efficientnet_lite0: a file, or what `cps-hf train --backbone` takes",
    )


def write_config(runs: Path) -> Path:
    """The folder RUNS/model with the network's configuration; written once."""
    folder = runs / "model"
    if not (folder / "config.json").is_file():
        DeepLabV3PlusConfig(backbone="tf_efficientnet_lite0", head="textbook", aspp_channels=64).save_pretrained(
            folder
        )
    return folder
