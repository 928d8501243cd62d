"""DeepLabV3+ on any backbone. Copied with a pushed model: imports only torch, transformers, timm and its neighbours.

Encoder-Decoder with Atrous Separable Convolution, Chen et al., ECCV 2018, arXiv 1802.02611 (with plain convolutions).
The "original" head is that of the CPS release (CVPR 2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone
from transformers.modeling_outputs import SemanticSegmenterOutput

from .configuration_deeplabv3_plus import DeepLabV3PlusConfig
from .segmentation_model import SegmentationModel
from .timm_features import TimmFeatures


def norm_act(channels: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), activation)


def conv_norm_act(in_channels: int, channels: int, kernel_size: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class OriginalPyramid(nn.Module):
    """Atrous spatial pyramid pooling as in the CPS release: (B, C, h, w) -> (B, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int, rates: list[int]):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(in_channels, channels, 1, bias=False)])
        for rate in rates:
            self.convs.append(nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate, bias=False))
        self.norm = norm_act(4 * channels, nn.LeakyReLU(0.01))  # one norm over the concatenation of the four
        self.projection = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.pooled_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.pooled_norm = norm_act(channels, nn.LeakyReLU(0.01))
        self.pooled_projection = nn.Conv2d(channels, channels, 1, bias=False)
        self.output_norm = norm_act(channels, nn.LeakyReLU(0.01))

    def forward(self, features: Tensor) -> Tensor:
        pyramid = self.projection(self.norm(torch.cat([conv(features) for conv in self.convs], dim=1)))
        pooled = self.pooled_norm(self.pooled_conv(features.mean((2, 3), keepdim=True)))
        return self.output_norm(pyramid + self.pooled_projection(pooled))  # added, not concatenated


class TextbookPyramid(nn.Module):
    """Atrous spatial pyramid pooling as in the DeepLab papers: (B, C, h, w) -> (B, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int, rates: list[int], dropout: float):
        super().__init__()
        self.branches = nn.ModuleList([conv_norm_act(in_channels, channels)])
        self.branches.extend(conv_norm_act(in_channels, channels, 3, rate) for rate in rates)
        self.pooled = conv_norm_act(in_channels, channels)
        self.projection = conv_norm_act(5 * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.pooled(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[-2:])
        branches = [branch(features) for branch in self.branches]
        return self.dropout(self.projection(torch.cat([*branches, pooled], dim=1)))


class DeepLabV3PlusHead(nn.Module):
    """The pyramid on the high-level map, the decoder that combines it with the low-level map, and the classifier.

    (B, C1, h1, w1), (B, C2, h2, w2) -> logits (B, num_labels, h1, w1).
    """

    def __init__(self, config: DeepLabV3PlusConfig, low_level_channels: int, high_level_channels: int):
        super().__init__()
        channels = config.aspp_channels
        if config.head == "original":
            self.pyramid = OriginalPyramid(high_level_channels, channels, config.atrous_rates)
        else:
            self.pyramid = TextbookPyramid(high_level_channels, channels, config.atrous_rates, config.dropout)
        self.low_level = conv_norm_act(low_level_channels, config.low_level_channels)
        self.decoder = nn.Sequential(
            conv_norm_act(channels + config.low_level_channels, channels, 3), conv_norm_act(channels, channels, 3)
        )
        self.classifier = nn.Conv2d(channels, config.num_labels, 1)
        self.align_corners = config.align_corners

    def forward(self, low_level: Tensor, high_level: Tensor) -> Tensor:
        pyramid = self.pyramid(high_level)
        pyramid = F.interpolate(pyramid, size=low_level.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return self.classifier(self.decoder(torch.cat([pyramid, self.low_level(low_level)], dim=1)))


class DeepLabV3PlusForSemanticSegmentation(SegmentationModel):
    """DeepLabV3+ with logits at the low-level map's stride (4 for ResNets and hierarchical transformers).

    Args:
        config: see `DeepLabV3PlusConfig`.

    Raises:
        ValueError: the backbone has fewer than two feature maps, or its low-level map is not at stride 4 (timm), or
            `multi_grid` does not match its last stage.
    """

    config_class = DeepLabV3PlusConfig
    _supports_sdpa = True  # in the backbone; the head has no attention

    def __init__(self, config: DeepLabV3PlusConfig):
        super().__init__(config)
        if config.backbone_config.model_type == "timm_backbone":
            self.backbone = TimmFeatures(config.backbone_config)
            _check_timm_strides(self.backbone)
            if config.multi_grid is not None:
                dilate_blocks(self.backbone._backbone, config.output_stride, config.multi_grid)
        else:
            self.backbone = AutoBackbone.from_config(config.backbone_config)
        channels = self.backbone.channels
        if len(channels) < 2:
            names = config.backbone_config.stage_names
            raise ValueError(
                "DeepLabV3+ needs a low-level and a high-level feature map; the "
                f"{config.backbone_config.model_type!r} backbone gives {len(channels)}. Name two stages in its "
                f"`out_features`, such as {names[1]!r} and {names[-1]!r}."
            )
        self.decode_head = DeepLabV3PlusHead(config, channels[0], channels[-1])
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput | tuple:
        """Compute logits at stride 4, and a loss if labels are given.

        Args:
            pixel_values: (B, 3, H, W) float.
            labels: (B, H, W) long; `config.semantic_loss_ignore_index` is ignored.
            return_dict: False for a tuple.
            **kwargs: for the backbone (`output_hidden_states`, ...).

        Returns:
            `logits` (B, num_labels, H/4, W/4), smaller by the factor `input_shrink`; `loss`: the mean cross entropy at
            label size, None without labels.
        """
        shrink = self.config.input_shrink
        if shrink > 1:
            pixel_values = F.avg_pool2d(pixel_values, shrink, ceil_mode=True, count_include_pad=False)
        features = self.backbone(pixel_values, **kwargs)
        maps = features.feature_maps
        logits = self.decode_head(maps[0], maps[-1])
        return self.output(logits, labels, features.hidden_states, return_dict)


def _check_timm_strides(backbone: TimmFeatures) -> None:
    strides = backbone._backbone.feature_info.reduction()
    if len(strides) < 2 or strides[0] != 4:
        raise ValueError(
            f"DeepLabV3+ needs the low-level feature map at stride 4 first and another last; timm's "
            f"{backbone.config.backbone!r} with out_indices {list(backbone.config.out_indices)} gives the strides "
            f"{list(strides)}. Pass backbone_config=TimmBackboneConfig(backbone=..., out_indices=[...])."
        )


def dilate_blocks(network: nn.Module, output_stride: int | None, multi_grid: list[int]) -> None:
    """Dilate a timm ResNet's 3 x 3 convolutions as the CPS release does, block by block.

    Block b of stage 4 is dilated by d x multi_grid[b], including the first block (which timm dilates by half as much);
    d = 2 at stride 16, and 4 at stride 8, where stage 3 is dilated by 2.
    """
    if output_stride not in (8, 16):
        raise ValueError(f"`multi_grid` needs `output_stride` 8 or 16, got {output_stride}.")
    if len(multi_grid) != len(network.layer4):
        raise ValueError(
            f"`multi_grid` needs one factor per block of the last stage: {len(network.layer4)}, got {multi_grid}."
        )
    if output_stride == 8:
        for block in network.layer3:
            _dilate(block, 2)
    for block, factor in zip(network.layer4, multi_grid, strict=True):
        _dilate(block, (16 // output_stride) * 2 * factor)


def _dilate(block: nn.Module, dilation: int) -> None:
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (dilation, dilation)
