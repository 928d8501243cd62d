"""Configuration of a DPT head on a plain vision transformer. Travels with a pushed model: imports nothing of the
package."""

from __future__ import annotations

from transformers import AutoConfig, Dinov2Config, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LEVELS = 4


class ViTDPTConfig(PreTrainedConfig):
    r"""A DPT head (Vision Transformers for Dense Prediction, ICCV 2021, arXiv 2103.13413) on a plain transformer.

    It is the head of Depth Anything (CVPR 2024) and UniMatch V2 (TPAMI 2025): patch tokens only, no norms.

    Args:
        backbone_config: a backbone of transformers that gives four maps of one size and width, such as DINOv2, DINOv2
            with registers or the ViT of DINOv3. Default: DINOv2-S, of which it takes the layers 3, 6, 9 and 12.
        neck_hidden_sizes: channels of the four maps in the head. Default: 48, 96, 192, 384, as UniMatch V2 has them
            for a ViT-S; for a ViT-B they are twice as many, for a ViT-L 256, 512, 1024, 1024.
        fusion_hidden_size: channels of the fused maps; UniMatch V2 has 64 for a ViT-S, 128 for a ViT-B and 256 for a
            ViT-L.
        align_corners: in every bilinear resize, also in that of the logits.
        initializer_range: standard deviation for what is neither convolution nor norm, as elsewhere in transformers.
        semantic_loss_ignore_index: the label that the built-in loss leaves out.

    Raises:
        ValueError: `neck_hidden_sizes` are not four, the backbone gives other than four maps, or its tokens are not
            reshaped to maps.
    """

    model_type = "cps_vit_dpt"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: dict | PreTrainedConfig | None = None,
        neck_hidden_sizes: list[int] | None = None,
        fusion_hidden_size: int = 64,
        align_corners: bool = True,
        initializer_range: float = 0.02,
        semantic_loss_ignore_index: int = 255,
        **kwargs,
    ):
        if backbone_config is None:
            stages = [f"stage{layer}" for layer in (3, 6, 9, 12)]
            sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
            backbone_config = Dinov2Config(**sizes, image_size=518, patch_size=14, out_features=stages)
        elif isinstance(backbone_config, dict):
            values = dict(backbone_config)
            model_type = values.pop("model_type", None)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"`backbone_config` needs a `model_type` that transformers knows, got {model_type!r}."
                )
            backbone_config = CONFIG_MAPPING[model_type](**values)
        self.backbone_config = backbone_config
        self.neck_hidden_sizes = [48, 96, 192, 384] if neck_hidden_sizes is None else [*neck_hidden_sizes]
        if len(self.neck_hidden_sizes) != LEVELS:
            raise ValueError(f"`neck_hidden_sizes` must be four numbers, got {neck_hidden_sizes}.")
        given = getattr(backbone_config, "out_features", None) or []
        if len(given) != LEVELS:
            raise ValueError(
                f"A DPT head takes four feature maps; `backbone_config`, a {backbone_config.model_type!r}, gives "
                f"{len(given)}. Name four stages in its `out_features`, such as stage3, stage6, stage9 and stage12."
            )
        if not getattr(backbone_config, "reshape_hidden_states", True):
            raise ValueError(
                "`backbone_config` has `reshape_hidden_states` false, and this head takes maps: leave it out."
            )
        self.fusion_hidden_size = fusion_hidden_size
        self.align_corners = align_corners
        self.initializer_range = initializer_range
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)
