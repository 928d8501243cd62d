"""Configurations of every architecture of AutoModelForSemanticSegmentation, and of this package: tiny and full-size.

Used by the tests and by the script that writes docs/architectures.md (benchmarks/architectures.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

import cps_hf.modeling  # noqa: F401  (registers our own)

KNOWN = set(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES) | {"deeplabv3_plus", "cps_hrnet", "cps_vit_dpt"}


@dataclass(frozen=True)
class Architecture:
    """A size (H, W) that the tiny model accepts, a non-square one, and whether it accepts that too."""

    name: str
    model_type: str
    arguments: Callable[[], dict[str, Any]]  # called late: older transformers have fewer configurations
    size: tuple[int, int] = (64, 64)
    oblong: tuple[int, int] = (75, 53)
    takes_oblong: bool = True

    def config(self, **labels: Any) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **(labels or {"num_labels": 5}), **self.arguments())


STAGES = ["stage1", "stage2", "stage3", "stage4"]
LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
DINOV2 = {**LAYERS, "image_size": 56, "patch_size": 14, "out_features": STAGES}
VIT = {**LAYERS, "image_size": 64, "patch_size": 16}
DINOV3 = {**VIT, "num_register_tokens": 4, "out_features": STAGES}
DPT = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 16}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 2, 2], "window_size": 4}
SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
DINOV3_VIT = {**DINOV3, "hidden_size": 32, "intermediate_size": 64}  # wide enough for most weights to be in layers
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}
MOBILEVIT = {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 12, 32], "num_attention_heads": 2}
ASPP = {"image_size": 64, "output_stride": 16, "aspp_out_channels": 8}
SAPIENS2_HEAD = {"upsample_out_channels": [8, 8], "conv_out_channels": [8], "conv_kernel_sizes": [1]}
DEEPLAB = {"aspp_channels": 16, "low_level_channels": 8}


def upernet(model_type: str, **backbone: Any) -> dict[str, Any]:
    config = AutoConfig.for_model(model_type, **backbone)
    return {"hidden_size": 16, "auxiliary_channels": 8, "backbone_config": config}


def swin(**arguments: Any) -> PreTrainedConfig:
    return AutoConfig.for_model("swin", **SWIN, **arguments)


def dinov2_with_registers() -> PreTrainedConfig:
    """With the DPT head of TIPSv2: transformers' own DPT ignores a custom backbone."""
    return AutoConfig.for_model("dinov2_with_registers", **DINOV2, reshape_hidden_states=False)


def dinov2_registers() -> dict[str, Any]:
    return {"backbone_config": AutoConfig.for_model("dinov2_with_registers", **DINOV2, num_register_tokens=4)}


def dinov3_vit() -> dict[str, Any]:
    return {"backbone_config": AutoConfig.for_model("dinov3_vit", **DINOV3_VIT)}


def dinov3_convnext(*stages: str) -> dict[str, Any]:
    return {"backbone_config": AutoConfig.for_model("dinov3_convnext", **CONVNEXT, out_features=[*(stages or STAGES)])}


_ALL = [
    Architecture("segformer", "segformer", lambda: {**SEGFORMER, "decoder_hidden_size": 16}),
    Architecture("upernet-resnet", "upernet", lambda: upernet("resnet", **RESNET, out_features=STAGES)),
    Architecture("upernet-convnext", "upernet", lambda: upernet("convnext", **CONVNEXT, out_features=STAGES)),
    Architecture("upernet-swin", "upernet", lambda: upernet("swin", **SWIN, out_features=STAGES)),
    Architecture("upernet-swinv2", "upernet", lambda: upernet("swinv2", **SWIN, out_features=STAGES)),
    Architecture("upernet-dinov2", "upernet", lambda: upernet("dinov2", **DINOV2), (56, 56), (84, 70)),
    Architecture("upernet-dinov3", "upernet", lambda: upernet("dinov3_vit", **DINOV3), oblong=(96, 64)),
    Architecture(
        "upernet-dinov2-registers",
        "upernet",
        lambda: upernet("dinov2_with_registers", **DINOV2, num_register_tokens=4),
        (56, 56),
        (84, 70),
    ),
    Architecture(
        "upernet-dinov3-convnext", "upernet", lambda: upernet("dinov3_convnext", **CONVNEXT, out_features=STAGES)
    ),
    Architecture(
        "upernet-timm-resnet", "upernet", lambda: upernet("timm_backbone", backbone="test_resnet", out_indices=[1, 4])
    ),
    Architecture(
        "upernet-timm-hrnet",
        "upernet",
        lambda: upernet("timm_backbone", backbone="hrnet_w18_small", out_indices=[1, 2, 3, 4]),
        takes_oblong=False,
    ),
    Architecture("mobilenet_v2", "mobilenet_v2", lambda: {"depth_multiplier": 0.25, "output_stride": 16}),
    Architecture("mobilevit", "mobilevit", lambda: {**MOBILEVIT, **ASPP}),
    Architecture("mobilevitv2", "mobilevitv2", lambda: {"width_multiplier": 0.25, **ASPP}),
    Architecture(
        "dpt",
        "dpt",
        lambda: {**VIT, **DPT, "backbone_out_indices": [0, 1, 2, 3]},
        oblong=(96, 64),
        takes_oblong=False,
    ),
    Architecture("beit", "beit", lambda: {**VIT, "out_indices": [1, 2, 3, 4]}, oblong=(96, 64)),
    Architecture(
        "data2vec",
        "data2vec-vision",
        lambda: {**VIT, "out_indices": [1, 2, 3, 4]},
        oblong=(96, 64),
        takes_oblong=False,
    ),
    Architecture("sapiens2", "sapiens2", lambda: {**VIT, "head_config": SAPIENS2_HEAD}, oblong=(96, 64)),
    Architecture(
        "dpt-dinov2", "tipsv2_dpt", lambda: {**DPT, "backbone_config": dinov2_with_registers()}, (56, 56), (84, 70)
    ),
    Architecture("deeplabv3_plus-timm", "deeplabv3_plus", lambda: {**DEEPLAB, "backbone": "test_resnet"}),
    Architecture(
        "deeplabv3_plus-textbook-swin",
        "deeplabv3_plus",
        lambda: {**DEEPLAB, "head": "textbook", "backbone_config": swin(out_features=["stage1", "stage4"])},
    ),
    Architecture(
        "deeplabv3_plus-dinov3-convnext",
        "deeplabv3_plus",
        lambda: {**DEEPLAB, "head": "textbook", **dinov3_convnext("stage1", "stage4")},
    ),
    Architecture("vit_dpt-dinov2-registers", "cps_vit_dpt", lambda: {**DPT, **dinov2_registers()}, (56, 56), (84, 70)),
    Architecture("vit_dpt-dinov3", "cps_vit_dpt", lambda: {**DPT, **dinov3_vit()}, oblong=(96, 64)),
    Architecture("hrnet", "cps_hrnet", lambda: {"backbone": "hrnet_w18_small"}, takes_oblong=False),
]
ARCHITECTURES = [architecture for architecture in _ALL if architecture.model_type in KNOWN]

MASK2FORMER = {
    **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32},
    **{"dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "num_queries": 6},
}
DETR = {
    **{"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 6, "dropout": 0.0},
    **{"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
EOMT = {**VIT, "hidden_size": 32, "num_blocks": 2, "num_queries": 6, "num_upscale_blocks": 1}
del EOMT["intermediate_size"]


def universal_swin() -> PreTrainedConfig:
    return swin(out_features=STAGES, drop_path_rate=0.0)


UNIVERSAL = [
    Architecture("mask2former-swin", "mask2former", lambda: {**MASK2FORMER, "backbone_config": universal_swin()}),
    Architecture(
        "maskformer-swin",
        "maskformer",
        lambda: {
            **{"fpn_feature_size": 32, "mask_feature_size": 32, "backbone_config": universal_swin()},
            "decoder_config": AutoConfig.for_model("detr", **DETR),
        },
    ),
    Architecture("eomt", "eomt", lambda: {**EOMT, "mlp_ratio": 2}, takes_oblong=False),
    Architecture("eomt_dinov3", "eomt_dinov3", lambda: {**EOMT, "intermediate_size": 64}, takes_oblong=False),
]
"""Of AutoModelForUniversalSegmentation, with all randomness off, so that steps can be compared."""


@dataclass(frozen=True)
class FullSize:
    """A published size of an architecture; `family` is the name of its tiny one above."""

    name: str
    family: str
    num_labels: int
    arguments: Callable[[], dict[str, Any]]
    published: str = "-"  # millions of parameters
    source: str = ""

    @property
    def model_type(self) -> str:
        return next(a.model_type for a in ARCHITECTURES if a.name == self.family)


VIT_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
THIRDS = ["stage3", "stage6", "stage9", "stage12"]
SEGFORMER_HIDDEN = {"hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
CONVNEXT_TINY = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
DPT_LARGE = {
    **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    **{"backbone_out_indices": [5, 11, 17, 23], "neck_hidden_sizes": [256, 512, 1024, 1024]},
    "use_batch_norm_in_fusion_residual": True,
}
SAPIENS2_LARGE_HEAD = {"upsample_out_channels": [512, 256, 128, 64], "conv_out_channels": [64, 64, 64]}
SEGFORMER_SOURCE = "SegFormer, arXiv 2105.15203"
SWIN_SOURCE = "Swin, arXiv 2103.14030; with the auxiliary head"
CONVNEXT_SOURCE = "ConvNeXt, arXiv 2201.03545; with the auxiliary head"
CPS_SOURCE = "the CPS release's own network, counted"


def large_upernet(model_type: str, **backbone: Any) -> dict[str, Any]:
    return {**upernet(model_type, **backbone), "hidden_size": 512, "auxiliary_channels": 256}


def dinov2_small() -> Any:
    return AutoConfig.for_model(
        "dinov2_with_registers",
        **VIT_SMALL,
        image_size=518,
        patch_size=14,
        out_features=THIRDS,
        reshape_hidden_states=False,
    )


def registers_small() -> dict[str, Any]:
    sizes = {"image_size": 518, "patch_size": 14, "out_features": THIRDS}
    return {"backbone_config": AutoConfig.for_model("dinov2_with_registers", **VIT_SMALL, **sizes)}


def dinov3_small() -> dict[str, Any]:
    sizes = {"intermediate_size": 1536, "num_register_tokens": 4, "out_features": THIRDS}
    return {"backbone_config": AutoConfig.for_model("dinov3_vit", **VIT_SMALL, **sizes)}


def deeplab(depth: int, head: str, stride: int, published: str = "-", source: str = "") -> FullSize:
    return FullSize(
        f"DeepLabV3+, ResNet-{depth}, {head} head, stride {stride}",
        "deeplabv3_plus-timm",
        21,
        lambda: {"backbone": f"resnet{depth}s", "head": head, "output_stride": stride},
        published,
        source,
    )


_ALL_SIZES = [
    FullSize("SegFormer-B0", "segformer", 150, lambda: {}, "3.8", SEGFORMER_SOURCE),
    FullSize(
        "SegFormer-B2",
        "segformer",
        150,
        lambda: {**SEGFORMER_HIDDEN, "depths": [3, 4, 6, 3]},
        "27.5",
        SEGFORMER_SOURCE,
    ),
    FullSize(
        "SegFormer-B5",
        "segformer",
        150,
        lambda: {**SEGFORMER_HIDDEN, "depths": [3, 6, 40, 3]},
        "84.7",
        SEGFORMER_SOURCE,
    ),
    FullSize("UperNet, ResNet-50", "upernet-resnet", 150, lambda: large_upernet("resnet", out_features=STAGES)),
    FullSize(
        "UperNet, ResNet-101",
        "upernet-resnet",
        150,
        lambda: large_upernet("resnet", depths=[3, 4, 23, 3], out_features=STAGES),
        "86",
        SWIN_SOURCE,
    ),
    FullSize(
        "UperNet, ConvNeXt-T",
        "upernet-convnext",
        150,
        lambda: large_upernet("convnext", **CONVNEXT_TINY, out_features=STAGES),
        "60",
        CONVNEXT_SOURCE,
    ),
    FullSize(
        "UperNet, Swin-T", "upernet-swin", 150, lambda: large_upernet("swin", out_features=STAGES), "60", SWIN_SOURCE
    ),
    FullSize(
        "UperNet, SwinV2-T",
        "upernet-swinv2",
        150,
        lambda: large_upernet("swinv2", image_size=256, window_size=8, out_features=STAGES),
    ),
    FullSize(
        "UperNet, DINOv2-S",
        "upernet-dinov2",
        150,
        lambda: large_upernet("dinov2", **VIT_SMALL, image_size=518, patch_size=14, out_features=THIRDS),
    ),
    FullSize(
        "UperNet, DINOv3-S",
        "upernet-dinov3",
        150,
        lambda: large_upernet(
            "dinov3_vit", **VIT_SMALL, intermediate_size=1536, num_register_tokens=4, out_features=THIRDS
        ),
    ),
    FullSize(
        "UperNet, DINOv2-S with registers",
        "upernet-dinov2-registers",
        150,
        lambda: large_upernet(
            "dinov2_with_registers", **VIT_SMALL, image_size=518, patch_size=14, out_features=THIRDS
        ),
    ),
    FullSize(
        "UperNet, DINOv3 ConvNeXt-T",
        "upernet-dinov3-convnext",
        150,
        lambda: large_upernet("dinov3_convnext", out_features=STAGES),
    ),
    FullSize(
        "UperNet, timm's resnet50",
        "upernet-timm-resnet",
        150,
        lambda: large_upernet("timm_backbone", backbone="resnet50", out_indices=[1, 2, 3, 4]),
    ),
    FullSize(
        "UperNet, timm's hrnet_w48",
        "upernet-timm-hrnet",
        150,
        lambda: large_upernet("timm_backbone", backbone="hrnet_w48", out_indices=[1, 2, 3, 4]),
    ),
    FullSize(
        "MobileNetV2 1.0 (DeepLabV3)",
        "mobilenet_v2",
        21,
        lambda: {"output_stride": 16},
        "2.11",
        "MobileNetV2, arXiv 1801.04381; without the backbone's last convolution, which the logits do not use",
    ),
    FullSize(
        "MobileViT-S (DeepLabV3)",
        "mobilevit",
        21,
        lambda: {"output_stride": 16, "image_size": 512},
        "6.4",
        "MobileViT, arXiv 2110.02178",
    ),
    FullSize("MobileViTV2-1.0 (DeepLabV3)", "mobilevitv2", 21, lambda: {"output_stride": 16, "image_size": 512}),
    FullSize("DPT-Large", "dpt", 150, lambda: DPT_LARGE, "343", "DPT, arXiv 2103.13413; its network for depth"),
    FullSize(
        "BEiT-B",
        "beit",
        150,
        lambda: {"image_size": 640, "use_relative_position_bias": True, "out_indices": [3, 5, 7, 11]},
        "163",
        "BEiT's repository; with the auxiliary head",
    ),
    FullSize(
        "Data2Vec-B", "data2vec", 150, lambda: {"use_relative_position_bias": True, "out_indices": [3, 5, 7, 11]}
    ),
    FullSize(
        "Sapiens2-0.4B",
        "sapiens2",
        29,
        lambda: {"head_config": SAPIENS2_LARGE_HEAD},
        "400",
        "by the checkpoint's name",
    ),
    FullSize("TIPSv2-B/14 (DPT)", "dpt-dinov2", 150, lambda: {}),
    FullSize(
        "DINOv2-S with registers (DPT)",
        "dpt-dinov2",
        21,
        lambda: {"backbone_config": dinov2_small(), "neck_hidden_sizes": [48, 96, 192, 384]},
    ),
    deeplab(50, "original", 16, "40.48", CPS_SOURCE),
    deeplab(50, "original", 8, "40.48", CPS_SOURCE),
    deeplab(50, "textbook", 16),
    deeplab(50, "textbook", 8),
    deeplab(101, "original", 16),
    deeplab(101, "original", 8),
    deeplab(101, "textbook", 16),
    deeplab(101, "textbook", 8),
    FullSize(
        "DeepLabV3+, Swin-T, textbook head",
        "deeplabv3_plus-textbook-swin",
        21,
        lambda: {
            "head": "textbook",
            "backbone_config": AutoConfig.for_model("swin", out_features=["stage1", "stage4"]),
        },
    ),
    FullSize(
        "DeepLabV3+, DINOv3 ConvNeXt-T, textbook head",
        "deeplabv3_plus-dinov3-convnext",
        21,
        lambda: {
            "head": "textbook",
            "backbone_config": AutoConfig.for_model("dinov3_convnext", out_features=["stage1", "stage4"]),
        },
    ),
    FullSize("DINOv2-S with registers (ViT-DPT)", "vit_dpt-dinov2-registers", 21, lambda: registers_small()),
    FullSize("DINOv3 ViT-S (ViT-DPT)", "vit_dpt-dinov3", 21, lambda: dinov3_small()),
    FullSize("HRNet-W18", "hrnet", 19, lambda: {"backbone": "hrnet_w18"}),
    FullSize("HRNet-W48", "hrnet", 19, lambda: {"backbone": "hrnet_w48"}, "65.8", "HRNet's repository"),
]
FULL_SIZES = [row for row in _ALL_SIZES if row.family in {architecture.name for architecture in ARCHITECTURES}]
