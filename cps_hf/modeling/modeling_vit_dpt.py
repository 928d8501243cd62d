"""A DPT head on a plain vision transformer. Travels with a pushed model: imports torch, transformers and its
neighbours only.

Vision Transformers for Dense Prediction, Ranftl et al., ICCV 2021, arXiv 2103.13413, with the head of UniMatch V2. The
DPT networks of transformers need the class token in each map; the backbone of DINOv3 does not give it there.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone
from transformers.modeling_outputs import SemanticSegmenterOutput

from .configuration_vit_dpt import ViTDPTConfig
from .segmentation_model import SegmentationModel


class ResidualUnit(nn.Module):
    """x + two 3 x 3 convolutions, each after a ReLU: (B, channels, h, w) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.conv2(F.relu(self.conv1(F.relu(maps))))


class Fusion(nn.Module):
    """Joins the fused map of the coarser levels, if any, with a level's own, and resizes the sum to `size`."""

    def __init__(self, channels: int, *, coarsest: bool):
        super().__init__()
        self.own = nn.Identity() if coarsest else ResidualUnit(channels)
        self.both = ResidualUnit(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, own: Tensor, coarser: Tensor | None, size: tuple[int, int], align_corners: bool) -> Tensor:
        maps = self.own(own) if coarser is None else coarser + self.own(own)
        resized = F.interpolate(self.both(maps), size=size, mode="bilinear", align_corners=align_corners)
        return self.projection(resized)


class ViTDPTHead(nn.Module):
    """Four maps (B, C, h, w) of one transformer, from shallow to deep -> logits (B, num_labels, 8 h, 8 w).

    The maps become a pyramid of 4, 2, 1 and 1/2 times their size, which is fused from its coarsest level.
    """

    def __init__(self, config: ViTDPTConfig, in_channels: int):
        super().__init__()
        sizes, width = config.neck_hidden_sizes, config.fusion_hidden_size
        self.projections = nn.ModuleList(nn.Conv2d(in_channels, size, 1) for size in sizes)
        self.resizes = nn.ModuleList(
            [
                nn.ConvTranspose2d(sizes[0], sizes[0], 4, stride=4),
                nn.ConvTranspose2d(sizes[1], sizes[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(sizes[3], sizes[3], 3, stride=2, padding=1),
            ]
        )
        self.levels = nn.ModuleList(nn.Conv2d(size, width, 3, padding=1, bias=False) for size in sizes)
        self.fusions = nn.ModuleList(Fusion(width, coarsest=level == len(sizes) - 1) for level in range(len(sizes)))
        self.output = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(width, config.num_labels, 1)
        self.align_corners = config.align_corners

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        parts = zip(maps, self.projections, self.resizes, self.levels, strict=True)
        levels = [level(resize(project(one))) for one, project, resize, level in parts]
        finest = levels[0].shape[-2:]
        sizes = [(2 * finest[0], 2 * finest[1]), *(tuple(level.shape[-2:]) for level in levels[:-1])]
        fused = None
        for own, fusion, size in reversed([*zip(levels, self.fusions, sizes, strict=True)]):
            fused = fusion(own, fused, size, self.align_corners)
        return self.classifier(self.output(fused))


class ViTDPTForSemanticSegmentation(SegmentationModel):
    """A plain vision transformer under a DPT head; the logits' stride is an eighth of the patch's side.

    Args:
        config: see `ViTDPTConfig`.

    Raises:
        ValueError: the backbone's maps differ in width: it is no plain transformer.
    """

    config_class = ViTDPTConfig
    _supports_sdpa = True  # of the backbone; the head has no attention

    def __init__(self, config: ViTDPTConfig):
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        channels = self.backbone.channels
        if len(set(channels)) != 1:
            raise ValueError(
                f"A DPT head takes four maps of one width, as a plain vision transformer gives; the "
                f"{config.backbone_config.model_type!r} backbone gives {channels}. Use UperNetConfig or "
                "DeepLabV3PlusConfig around it."
            )
        self.decode_head = ViTDPTHead(config, channels[0])
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs
    ) -> SemanticSegmenterOutput | tuple:
        """Logits at an eighth of the patch's side, and a loss where labels are given.

        Args:
            pixel_values: (B, 3, H, W) float. Rows and columns that fill no whole patch are not seen.
            labels: (B, H, W) long; `config.semantic_loss_ignore_index` is left out.
            return_dict: False for a tuple.
            **kwargs: for the backbone (`output_hidden_states`, ...).

        Returns:
            `logits` (B, num_labels, 8 * (H // patch), 8 * (W // patch)); `loss`: the mean cross entropy at label size,
            None without labels.
        """
        features = self.backbone(pixel_values, **kwargs)
        logits = self.decode_head(features.feature_maps)
        return self.output(logits, labels, features.hidden_states, return_dict)
