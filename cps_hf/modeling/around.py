"""The segmentation network around a backbone that is given by its name alone."""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

import torch
from transformers import TimmBackboneConfig

from . import offline_backbone
from .configuration_deeplabv3_plus import DeepLabV3PlusConfig

SMALL = 10e6
"""Up to so many parameters a backbone gets a head of 64 channels, which costs less than the backbone; else 256."""


class Around(NamedTuple):
    """`config`: the network's configuration. `said`: what was chosen and why, in a sentence."""

    config: DeepLabV3PlusConfig
    said: str


def architecture_around(backbone: str | PathLike) -> Around:
    """DeepLabV3+ with the textbook head around a timm network.

    The low-level map is the network's at stride 4, the high-level one its last, at stride 16 where the network can be
    dilated. The head has 64 channels on a small backbone and 256 on others.

    Args:
        backbone: a timm name, with or without "timm/" and a tag, or `package:efficientnet-lite0`.

    Raises:
        ValueError: timm does not know the name, or the network has no such maps.
    """
    import timm

    packaged = offline_backbone.is_packaged(backbone)
    name = offline_backbone.TIMM_NAME if packaged else str(backbone).removeprefix("timm/").split(".")[0]
    if not timm.is_model(name):
        raise ValueError(
            f"`backbone` {str(backbone)!r} is no network that timm knows, so it does not say which segmentation "
            "network goes around it. Name one with `models`: a config.json (examples/configs/models has some), a "
            f"folder or a Hub id. Without `models` it may be a timm name or {offline_backbone.SOURCE}."
        )
    network, dilated = _features(name)
    strides = network.feature_info.reduction()
    low = next((index for index, stride in enumerate(strides) if stride == 4), None)
    if low is None or len(strides) < 2 or strides[-1] <= 4 or not _gives_channels_first(network):
        raise ValueError(
            f"timm's {name!r} gives maps at the strides {list(strides)}; DeepLabV3+, which is built around a timm "
            "network, needs convolutional maps at stride 4 and above it. Choose another backbone, or name the network "
            "around this one with `models`."
        )
    indices = [network.feature_info.out_indices[low], network.feature_info.out_indices[-1]]
    backbone_config = TimmBackboneConfig(backbone=name, out_indices=indices)
    backbone_config.output_stride = 16 if dilated else None
    size = sum(parameter.numel() for parameter in network.parameters())
    channels = 64 if size <= SMALL else 256
    config = DeepLabV3PlusConfig(backbone_config=backbone_config, head="textbook", aspp_channels=channels)
    said = (
        f"DeepLabV3+ (textbook head, {channels} channels) around timm's {name}, {size / 1e6:.1f} million parameters: "
        f"it has maps at stride 4 and {16 if dilated else strides[-1]}"
    )
    return Around(config, said)


def _features(name: str) -> tuple[torch.nn.Module, bool]:
    """The network without values, and whether its last map is at stride 16."""
    import timm

    for how in ({"output_stride": 16}, {}):
        try:
            with torch.device("meta"):
                network = timm.create_model(name, pretrained=False, features_only=True, **how)
        except (TypeError, AssertionError, NotImplementedError, ValueError, RuntimeError):
            continue
        if not how or network.feature_info.reduction()[-1] == 16:
            return network, bool(how)
    raise ValueError(
        f"timm's {name!r} gives no feature maps. Choose another backbone, or name the network around this one with "
        "`models`."
    )


def _gives_channels_first(network: torch.nn.Module) -> bool:
    """(B, C, h, w), as convolutions do; some transformers of timm give (B, h, w, C)."""
    try:
        with torch.no_grad():
            maps = network.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError):
        return False
    return all(m.ndim == 4 and m.shape[1] == c for m, c in zip(maps, network.feature_info.channels(), strict=True))
