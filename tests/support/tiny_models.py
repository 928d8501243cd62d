"""Tiny segmentation models of several kinds, built like branches."""

from transformers import Dinov2Config, SegformerConfig, SwinConfig, UperNetConfig

from cps_hf.modeling import DeepLabV3PlusConfig, build_branches

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def build(config):
    return build_branches(config, num_branches=1)[0]


def segformer(depths=(1, 1, 1, 1)):
    return build(
        SegformerConfig(
            hidden_sizes=[8, 16, 24, 32], depths=list(depths), num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16
        )
    )


def upernet(backbone_config):
    return build(UperNetConfig(hidden_size=16, backbone_config=backbone_config))


def swin(depths=(1, 1, 2, 1)):
    return SwinConfig(
        image_size=64, embed_dim=8, depths=list(depths), num_heads=[1, 2, 2, 2], window_size=4, out_features=STAGES
    )


def dinov2():
    return Dinov2Config(
        image_size=56, patch_size=14, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, out_features=STAGES
    )


def deeplab(backbone="test_resnet"):
    return build(DeepLabV3PlusConfig(backbone=backbone, aspp_channels=16))
