"""Chooses the segmentation network around a backbone that is given by name only."""

from __future__ import annotations

from functools import cache
from os import PathLike
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, TimmBackboneConfig

from . import offline_backbone
from .backbones import backbone_of
from .configuration_deeplabv3_plus import DeepLabV3PlusConfig
from .universal import auto_class

SMALL = 10e6
"""A backbone with at most this many parameters gets a head of 64 channels, which is cheaper than it; others get
256."""


class Around(NamedTuple):
    """`config`: the network's configuration. `said`: it in words. `has_batch_norms`: of the backbone."""

    config: DeepLabV3PlusConfig
    said: str
    has_batch_norms: bool


def architecture_around(backbone: str | PathLike) -> Around:
    """DeepLabV3+ with the textbook head around a timm network.

    The low-level map is the network's at stride 4. The high-level one is its last, at stride 16 if the network
    supports dilation. The head has 64 channels on small backbones and 256 on others.

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
            f"`backbone` {str(backbone)!r} is not a network of timm, so the segmentation network around it is not "
            "known. Name one with `models`: a config.json (examples/configs/models has some), a "
            f"folder or a Hub id. Without `models`, it may be a timm name or {offline_backbone.SOURCE}."
        )
    found = _features(name)
    if found is None or 4 not in found.strides[:-1] or not found.channels_first:
        maps = "no feature maps" if found is None else f"maps at the strides {list(found.strides)}"
        raise ValueError(
            f"timm's {name!r} gives {maps}; DeepLabV3+, which is built around timm networks, needs convolutional "
            "maps at stride 4 and above it. Choose another backbone, or name the network around this one with "
            "`models`."
        )
    low = found.strides.index(4)
    backbone_config = TimmBackboneConfig(backbone=name, out_indices=[found.indices[low], found.indices[-1]])
    backbone_config.output_stride = 16 if found.dilated else None
    channels = 64 if found.size <= SMALL else 256
    config = DeepLabV3PlusConfig(backbone_config=backbone_config, head="textbook", aspp_channels=channels)
    said = (
        f"DeepLabV3+ (textbook head, {channels} channels) on timm's {name} ({found.size / 1e6:.1f} million "
        f"parameters), whose feature maps at strides 4 and {found.strides[-1]} it uses"
    )
    return Around(config, said, found.has_batch_norms)


def has_batch_norms(config: PreTrainedConfig) -> bool:
    """Whether the backbone of the configured network has batch norms."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = auto_class(config).from_config(config)
    return _any_batch_norm(backbone_of(model))


class _Features(NamedTuple):
    """A timm network's properties as a backbone. `dilated`: its last map is at stride 16 because of dilation."""

    strides: tuple[int, ...]
    indices: tuple[int, ...]
    dilated: bool
    channels_first: bool
    size: int
    has_batch_norms: bool


@cache
def _features(name: str) -> _Features | None:
    """Determined on a network without values. `None` if it has no feature maps."""
    import timm

    for how in ({"output_stride": 16}, {}):
        try:
            with torch.device("meta"):
                network = timm.create_model(name, pretrained=False, features_only=True, **how)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            continue  # timm's networks have no common way to say that they lack strides or feature maps
        strides = tuple(network.feature_info.reduction())
        if not how or strides[-1] == 16:
            return _Features(
                strides,
                tuple(network.feature_info.out_indices),
                bool(how),
                _gives_channels_first(network),
                sum(parameter.numel() for parameter in network.parameters()),
                _any_batch_norm(network),
            )
    return None


def _gives_channels_first(network: nn.Module) -> bool:
    """Whether maps are (B, C, h, w), as from convolutions; some of timm's transformers give (B, h, w, C)."""
    try:
        with torch.no_grad():
            maps = network.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    except (AssertionError, RuntimeError, TypeError, ValueError):
        return False  # an image size that the network does not accept, or an operation without meta tensors
    return all(m.ndim == 4 and m.shape[1] == c for m, c in zip(maps, network.feature_info.channels(), strict=True))


def _any_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
