"""Configuration of HRNet for segmentation. Copied with a pushed model: imports nothing from the package."""

from __future__ import annotations

from transformers import PreTrainedConfig


class HRNetConfig(PreTrainedConfig):
    r"""HRNetV2 (Deep High-Resolution Representation Learning, TPAMI 2020, arXiv 1908.07919) for segmentation.

    Args:
        backbone: timm's name of the network: "hrnet_w18", "hrnet_w48", ...
        align_corners: used in the bilinear resizes of the streams and of the logits.
        initializer_range: the standard deviation for weights of neither convolutions nor norms, as in transformers.
        semantic_loss_ignore_index: the label that the built-in loss ignores.

    Raises:
        ValueError: the backbone is not an HRNet.
    """

    model_type = "cps_hrnet"

    def __init__(
        self,
        backbone: str = "hrnet_w48",
        align_corners: bool = False,
        initializer_range: float = 0.02,
        semantic_loss_ignore_index: int = 255,
        **kwargs,
    ):
        if not backbone.startswith("hrnet_"):
            raise ValueError(f'`backbone` must be one of timm\'s HRNets, such as "hrnet_w48", got {backbone!r}.')
        self.backbone = backbone
        self.align_corners = align_corners
        self.initializer_range = initializer_range
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)
