"""HRNet for segmentation. Copied with a pushed model: imports only torch, transformers, timm and its neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TimmBackboneConfig
from transformers.modeling_outputs import SemanticSegmenterOutput

from .configuration_hrnet import HRNetConfig
from .segmentation_model import SegmentationModel
from .timm_features import TimmFeatures


class HRNetHead(nn.Module):
    """Four streams, resized to the first and concatenated; 1 x 1 convolution, norm, ReLU; classifier."""

    def __init__(self, config: HRNetConfig, channels: list[int]):
        super().__init__()
        total = sum(channels)  # 48 + 96 + 192 + 384 = 720 for HRNet-W48
        self.fuse = nn.Sequential(nn.Conv2d(total, total, 1), nn.BatchNorm2d(total), nn.ReLU())
        self.classifier = nn.Conv2d(total, config.num_labels, 1)
        self.align_corners = config.align_corners

    def forward(self, streams: list[Tensor]) -> Tensor:
        size = streams[0].shape[-2:]
        resized = [
            F.interpolate(stream, size=size, mode="bilinear", align_corners=self.align_corners)
            for stream in streams[1:]
        ]
        return self.classifier(self.fuse(torch.cat([streams[0], *resized], dim=1)))


class HRNetForSemanticSegmentation(SegmentationModel):
    """HRNetV2 with logits at stride 4.

    Args:
        config: see `HRNetConfig`.
    """

    config_class = HRNetConfig

    def __init__(self, config: HRNetConfig):
        super().__init__(config)
        streams = TimmBackboneConfig(backbone=config.backbone, out_indices=[1, 2, 3, 4])
        # By default timm returns its classifier's widened maps; segmentation uses the streams themselves
        self.backbone = TimmFeatures(streams, feature_location="")
        self.decode_head = HRNetHead(config, self.backbone._backbone.feature_info.channels())
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs
    ) -> SemanticSegmenterOutput | tuple:
        """Compute logits at stride 4, and a loss if labels are given.

        Args:
            pixel_values: (B, 3, H, W) float, H and W multiples of 32.
            labels: (B, H, W) long; `config.semantic_loss_ignore_index` is ignored.
            return_dict: False for a tuple.
            **kwargs: for the backbone (`output_hidden_states`, ...).

        Returns:
            `logits` (B, num_labels, H/4, W/4); `loss`: the mean cross entropy at label size, None without labels.

        Raises:
            ValueError: H or W is not a multiple of 32: the streams' sizes would not match.
        """
        height, width = pixel_values.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(
                f"HRNet needs height and width in multiples of 32, got {height} x {width}: pad to "
                f"{-height % 32 + height} x {-width % 32 + width}."
            )
        features = self.backbone(pixel_values, **kwargs)
        logits = self.decode_head(features.feature_maps)
        return self.output(logits, labels, features.hidden_states, return_dict)
