"""Configuration of DeepLabV3+ on any backbone. Copied with a pushed model: imports nothing from the package."""

from __future__ import annotations

import re

from transformers import AutoConfig, PreTrainedConfig, TimmBackboneConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEADS = ("original", "textbook")


class DeepLabV3PlusConfig(PreTrainedConfig):
    r"""DeepLabV3+ (ECCV 2018, arXiv 1802.02611), with the head of the CPS release or of the paper.

    Args:
        backbone: a timm network with five feature levels (default: "resnet50s", a ResNet-50 with the deep stem
            64-64-128). Omit it if `backbone_config` is given.
        backbone_config: any transformers backbone with at least two feature maps. The first one is the low-level map,
            the last one goes into the pyramid.
        output_stride: the last feature map's stride, 8 or 16 (default). Only for a timm backbone; others have their
            own.
        head: "original": the CPS release's, with one norm over the concatenated pyramid, the pooled branch added,
            LeakyReLU, and no dropout. "textbook": norm and ReLU in each of five branches, concatenated, then dropout.
        multi_grid: dilations of the last stage's blocks as multiples of the stage's own (2 at stride 16, 4 at 8);
            only for timm ResNets. Default: [1, 2, 4] for the original head on a ResNet-50, -101 or -152 (dilations
            2, 4, 8 at stride 16; 4, 8, 16 at stride 8), otherwise timm's own dilations.
        atrous_rates: dilations of the pyramid's three 3 x 3 convolutions. Default: 6, 12, 18; twice these for the
            textbook head at stride 8.
        aspp_channels: the number of channels of the pyramid's output and of the decoder.
        low_level_channels: the number of channels that the low-level map is reduced to.
        dropout: the dropout after the textbook head's pyramid. Default 0.1 (the TensorFlow release keeps 0.9); the
            original head has none.
        align_corners: used in every bilinear resize, including the logits'. Default: true for the original head.
        input_shrink: average blocks of this many by this many input pixels before the network sees them, so that one
            trained on shrunk photographs accepts whole ones. 1: no shrinking.
        initializer_range: the standard deviation for weights of neither convolutions nor norms, as in transformers.
        semantic_loss_ignore_index: the label that the built-in loss ignores.

    Raises:
        ValueError: values are contradictory or not supported.
    """

    model_type = "deeplabv3_plus"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone: str | None = None,
        backbone_config: dict | PreTrainedConfig | None = None,
        output_stride: int | None = None,
        head: str = "original",
        multi_grid: list[int] | None = None,
        atrous_rates: list[int] | None = None,
        aspp_channels: int = 256,
        low_level_channels: int = 48,
        dropout: float | None = None,
        align_corners: bool | None = None,
        input_shrink: int = 1,
        initializer_range: float = 0.02,
        semantic_loss_ignore_index: int = 255,
        **kwargs,
    ):
        if head not in HEADS:
            raise ValueError(f"`head` must be one of {', '.join(HEADS)}, got {head!r}.")
        backbone_config = _backbone_config(backbone, backbone_config, output_stride)
        is_timm = backbone_config.model_type == "timm_backbone"
        self.backbone_config = backbone_config
        self.backbone = backbone_config.backbone if is_timm else None
        self.output_stride = backbone_config.output_stride if is_timm else None
        self.head = head
        if multi_grid is None and head == "original" and re.match(r"resnet(50|101|152)", self.backbone or ""):
            multi_grid = [1, 2, 4]
        self.multi_grid = None if multi_grid is None else [int(factor) for factor in multi_grid]
        if self.multi_grid is not None and not (self.backbone or "").startswith("resnet"):
            raise ValueError(
                f"`multi_grid` is for timm's ResNets; the backbone is {self.backbone or backbone_config}."
            )
        if atrous_rates is None:
            doubled = head == "textbook" and self.output_stride == 8
            atrous_rates = [12, 24, 36] if doubled else [6, 12, 18]
        self.atrous_rates = [int(rate) for rate in atrous_rates]
        if len(self.atrous_rates) != 3 or min(self.atrous_rates) < 1:
            raise ValueError(f"`atrous_rates` must be three numbers of at least 1, got {atrous_rates}.")
        self.aspp_channels = aspp_channels
        self.low_level_channels = low_level_channels
        if head == "original" and dropout:
            raise ValueError(f'The original head has no dropout, got dropout={dropout}. Use head="textbook".')
        self.dropout = (0.1 if head == "textbook" else 0.0) if dropout is None else dropout
        self.align_corners = (head == "original") if align_corners is None else align_corners
        if input_shrink < 1:
            raise ValueError(f"`input_shrink` must be at least 1, got {input_shrink}.")
        self.input_shrink = input_shrink
        self.initializer_range = initializer_range
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


def _backbone_config(
    backbone: str | None, backbone_config: dict | PreTrainedConfig | None, output_stride: int | None
) -> PreTrainedConfig:
    if backbone_config is None:
        backbone_config = TimmBackboneConfig(backbone=backbone or "resnet50s", out_indices=[1, 4])
        backbone_config.output_stride = 16 if output_stride is None else output_stride
    elif isinstance(backbone_config, dict):
        values = dict(backbone_config)
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"`backbone_config` needs a `model_type` that transformers knows, got {model_type!r}.")
        backbone_config = CONFIG_MAPPING[model_type](**values)
    if backbone_config.model_type == "timm_backbone":
        if backbone is not None and backbone != backbone_config.backbone:
            raise ValueError(f"`backbone` is {backbone!r}, but `backbone_config` says {backbone_config.backbone!r}.")
        if output_stride is not None and output_stride != backbone_config.output_stride:
            raise ValueError(
                f"`output_stride` is {output_stride}, but `backbone_config` says {backbone_config.output_stride}."
            )
        if backbone_config.output_stride not in (None, 8, 16, 32):
            raise ValueError(f"`output_stride` must be 8, 16 or 32, got {backbone_config.output_stride}.")
    elif backbone is not None or output_stride is not None:
        raise ValueError(
            f"`backbone` and `output_stride` are for timm backbones; `backbone_config` is a "
            f"{backbone_config.model_type!r}, which has its own strides. Remove them."
        )
    return backbone_config
