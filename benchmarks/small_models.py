"""Small networks of each kind that `benchmarks/step.py` measures: seconds per step on one CPU core.

They have the layers and heads of the published networks with fewer channels and blocks. Images of 112 x 112 pixels fit
patches of 14 and 16.
"""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from cps_hf.modeling import ViTDPTConfig

SIDE, CLASSES = 112, 21
STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
QUERIES = {"num_queries": 50, "num_labels": CLASSES}


def mask2former() -> PreTrainedConfig:
    widths = {"feature_size": 96, "mask_feature_size": 96, "hidden_dim": 96, "num_attention_heads": 3}
    deep = {"encoder_layers": 3, "decoder_layers": 4, "encoder_feedforward_dim": 384, "dim_feedforward": 384}
    return AutoConfig.for_model("mask2former", backbone_config=swin(), **widths, **deep, **QUERIES)


def maskformer() -> PreTrainedConfig:
    deep = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
    wide = {"d_model": 96, "encoder_ffn_dim": 384, "decoder_ffn_dim": 384, "num_queries": QUERIES["num_queries"]}
    decoder = AutoConfig.for_model("detr", **deep, **wide)
    widths = {"fpn_feature_size": 96, "mask_feature_size": 96, "num_labels": CLASSES}
    return AutoConfig.for_model("maskformer", backbone_config=swin(), decoder_config=decoder, **widths)


def swin() -> PreTrainedConfig:
    sizes = {"embed_dim": 48, "depths": [2] * 4, "num_heads": [3, 3, 6, 6]}
    return AutoConfig.for_model("swin", **sizes, image_size=SIDE, out_features=STAGES)


def eomt(kind: str, **sizes) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **VIT, **QUERIES, **sizes, image_size=SIDE, patch_size=16, num_blocks=2)


def upernet(backbone: PreTrainedConfig) -> PreTrainedConfig:
    widths = {"hidden_size": 96, "pool_scales": [1, 2, 3, 6], "num_labels": CLASSES}
    return AutoConfig.for_model("upernet", backbone_config=backbone, **widths)


def vit_dpt(backbone: PreTrainedConfig) -> PreTrainedConfig:
    widths = {"neck_hidden_sizes": [48, 96, 192, 192], "fusion_hidden_size": 64}
    return ViTDPTConfig(backbone_config=backbone, num_labels=CLASSES, **widths)


def vit(kind: str) -> PreTrainedConfig:
    sizes = {"dinov3_vit": {"patch_size": 16, "intermediate_size": 768, "num_register_tokens": 4}}
    sizes = sizes.get(kind, {"patch_size": 14, "image_size": 518})
    return AutoConfig.for_model(kind, **VIT, **sizes, out_features=STAGES)


def convnext() -> PreTrainedConfig:
    sizes = {"hidden_sizes": [48, 96, 192, 384], "depths": [2] * 4}
    return AutoConfig.for_model("dinov3_convnext", **sizes, out_features=STAGES)


SMALL = {
    "small-mask2former": mask2former(),
    "small-maskformer": maskformer(),
    "small-eomt": eomt("eomt"),
    "small-eomt-dinov3": eomt("eomt_dinov3", intermediate_size=768),
    "small-upernet-dinov2": upernet(vit("dinov2")),
    "small-upernet-dinov2-registers": upernet(vit("dinov2_with_registers")),
    "small-upernet-dinov3": upernet(vit("dinov3_vit")),
    "small-upernet-dinov3-convnext": upernet(convnext()),
    "small-vit-dpt-dinov2": vit_dpt(vit("dinov2")),
    "small-vit-dpt-dinov2-registers": vit_dpt(vit("dinov2_with_registers")),
    "small-vit-dpt-dinov3": vit_dpt(vit("dinov3_vit")),
}
