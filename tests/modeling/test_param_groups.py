"""Parameter groups: every parameter once, with its rate and its weight decay."""

import pytest
import torch
from support.architectures import DINOV3_VIT
from support.tiny_models import STAGES, build, deeplab, dinov2, segformer, swin, upernet
from torch import nn
from transformers import (
    AutoConfig,
    BeitConfig,
    ConvNextConfig,
    ConvNextV2Config,
    DinatConfig,
    Dinov2WithRegistersConfig,
    Swinv2Config,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitDetConfig,
)

from cps_hf.modeling import HRNetConfig, parameter_groups
from cps_hf.modeling.param_groups import layer_numbers


@pytest.mark.parametrize(
    "model",
    [segformer, deeplab, lambda: upernet(swin()), lambda: upernet(dinov2())],
    ids=["segformer", "deeplab", "swin", "dinov2"],
)
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_trainable_parameter_is_in_exactly_one_group(model, layer_decay):
    model = model()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()} - {id(frozen)}
    assert len({group["name"] for group in groups}) == len(groups)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            hints = ("position_embedding", "mask_token", "cls_token", "relative_position_bias")
            decays = parameter.ndim > 1 and not any(hint in name for hint in hints)
            assert group["weight_decay"] == (0.05 if decays else 0.0), name


WIDTHS = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": STAGES}
STACK = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {  # with a multi-dimensional parameter of this name
    "layer_scale": lambda: DinatConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, layer_scale_init_value=1e-5),
    "gamma": lambda: TimmBackboneConfig(backbone="fastvit_t8", out_indices=[0, 1, 2, 3]),
    "grn": lambda: ConvNextV2Config(**WIDTHS),
    "logit_scale": lambda: Swinv2Config(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4),
    "relative_position_bias": lambda: swin(),
    "pos_embed": lambda: TimmBackboneConfig(backbone="test_vit", out_indices=[0, 1, 2, 3]),
    "rel_pos": lambda: VitDetConfig(
        **{name: value for name, value in STACK.items() if name != "intermediate_size"},
        image_size=64,
        pretrain_image_size=64,
        use_relative_position_embeddings=True,
    ),
    "register_token": lambda: Dinov2WithRegistersConfig(**STACK, image_size=56, patch_size=14),
    "mask_token": lambda: dinov2(),
    "position_embedding": lambda: BeitConfig(
        **STACK, image_size=64, use_absolute_position_embeddings=True, use_relative_position_bias=True
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_only_linear_maps_and_convolutions_decay(name, monkeypatch):
    """So not tokens, positions, layer scales and norms, which have more than one dimension in some models."""
    monkeypatch.setattr("transformers.models.dinat.modeling_dinat.requires_backends", lambda *_: None)  # not run here
    config = MODELS[name]()
    if hasattr(config, "stage_names"):
        config.out_features = config.stage_names[1:5]
    model = UperNetForSemanticSegmentation(UperNetConfig(hidden_size=16, backbone_config=config))
    assert any(name in key and parameter.ndim > 1 for key, parameter in model.named_parameters())
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1)
    decay = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    maps = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert {key for key, p in model.named_parameters() if (id(p) in decay) != (id(p) in maps)} == set()


def test_head_and_backbone_have_their_own_rates():
    groups = parameter_groups(
        segformer(),
        learning_rate=1e-3,
        weight_decay=0.1,
        head_learning_rate_factor=40,
        backbone_learning_rate_factor=0.5,
    )
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "backbone": (pytest.approx(5e-4), 0.1),
        "backbone, no decay": (pytest.approx(5e-4), 0.0),
        "head": (pytest.approx(0.04), 0.1),
        "head, no decay": (pytest.approx(0.04), 0.0),
    }


# model, L, {a part of a parameter's name: its layer}
DEPTHS = [
    (
        lambda: upernet(dinov2()),
        4,
        {"cls_token": 0, "patch_embeddings": 0, "layer.0.norm1": 1, "layer.3.mlp": 4, "backbone.layernorm": 4},
    ),
    (
        lambda: upernet(swin()),  # blocks 1, 1, 2, 1
        5,
        {
            "patch_embeddings": 0,
            "layers.0.blocks.0": 1,
            "layers.0.downsample": 1,
            "layers.2.blocks.0": 3,
            "layers.2.blocks.1": 4,
            "layers.2.downsample": 4,
            "layers.3.blocks.0": 5,
            "hidden_states_norms": 5,
        },
    ),
    (
        lambda: upernet(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[2, 1, 1, 1], out_features=STAGES)),
        5,
        {
            "embeddings": 0,
            "stages.0.layers.1": 2,
            "stages.1.downsampling_layer": 3,
            "stages.1.layers.0": 3,
            "stages.3.layers.0": 5,
        },
    ),
    (deeplab, 4, {"_backbone.conv1": 0, "layer1.0": 1, "layer4.0": 4}),
    (
        lambda: upernet(Dinov2WithRegistersConfig(**{**STACK, "hidden_size": 32}, image_size=56, out_features=STAGES)),
        4,
        {"register_tokens": 0, "position_embeddings": 0, "layer.0.mlp": 1, "layer_scale2.lambda1": {1, 2, 3, 4}}
        | {"layer.3.attention": 4, "backbone.layernorm": 4},
    ),
    (
        lambda: upernet(AutoConfig.for_model("dinov3_vit", **DINOV3_VIT)),
        4,
        {"embeddings.register_tokens": 0, "patch_embeddings": 0, "model.layer.0.norm1": 1, "layer.2.layer_scale1": 3}
        | {"model.layer.3.mlp.down_proj": 4, "backbone.norm": 4},
    ),
    (
        lambda: upernet(
            AutoConfig.for_model(
                "dinov3_convnext", hidden_sizes=[8, 16, 24, 32], depths=[2, 1, 1, 1], out_features=STAGES
            )
        ),
        5,
        {
            "stages.0.downsample_layers": 0,
            "stages.0.layers.1": 2,
            "stages.1.downsample_layers": 3,
            "stages.1.layers.0.gamma": 3,
            "stages.3.layers.0": 5,
        },
    ),
]


DEPTHS_OF = ["dinov2", "swin", "convnext", "timm resnet", "dinov2 with registers", "dinov3 vit", "dinov3 convnext"]


@pytest.mark.parametrize("model, last, expected", DEPTHS, ids=DEPTHS_OF)
def test_layer_decay_lowers_the_rate_layer_by_layer(model, last, expected):
    model = model()
    groups = parameter_groups(
        model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5, backbone_learning_rate_factor=0.5
    )
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for part, layers in expected.items():
        found = {
            rate[id(p)] for name, p in model.named_parameters() if f"{part}." in f"{name}." and "backbone" in name
        }
        numbers = layers if isinstance(layers, set) else {layers}
        assert found == {0.5 * 0.5 ** (last + 1 - layer) for layer in numbers}, (part, found)
    decayed = {name for name, p in model.named_parameters() if "backbone" in name}
    assert {rate[id(p)] for name, p in model.named_parameters() if name in decayed} == {
        0.5 * 0.5 ** (last + 1 - layer) for layer in range(last + 1)
    }
    assert {rate[id(p)] for name, p in model.named_parameters() if name.startswith("decode_head")} == {1.0}


def test_segformer_stages_are_layers_too():
    model = segformer(depths=(2, 1, 1, 1))
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    layers = {group["name"].split(",")[0]: set() for group in groups}
    for group in groups:
        layers[group["name"].split(",")[0]] |= {names[id(p)] for p in group["params"]}
    assert sorted(layers) == [f"backbone layer {i}" for i in range(6)] + ["head"]
    assert all("patch_embed" in name or "proj" in name or "norm" in name for name in layers["backbone layer 0"])


def test_wrong_rates_are_errors():
    model = build(HRNetConfig("hrnet_w18_small"))
    with pytest.raises(
        ValueError, match="needs a backbone of stacked layers; HighResolutionNetFeatures has no known ones"
    ):
        parameter_groups(model, learning_rate=1, weight_decay=0, layer_decay=0.9)
    with pytest.raises(ValueError, match="`layer_decay` must be above 0 and at most 1, got 1.5"):
        parameter_groups(model, learning_rate=1, weight_decay=0, layer_decay=1.5)
    with pytest.raises(ValueError, match="`head_learning_rate_factor` must be above 0, got 0"):
        parameter_groups(model, learning_rate=1, weight_decay=0, head_learning_rate_factor=0)


@pytest.mark.parametrize(
    "name",
    [
        *("convnext_tiny", "swin_tiny_patch4_window7_224", "vit_small_patch16_224", "efficientnet_b0", "resnet50"),
        *("resnetv2_50", "edgenext_small", "res2net50_26w_4s", "beit_base_patch16_224", "mobilevitv2_100"),
    ],
)
def test_layers_are_numbered_as_timm_numbers_its_own_classifiers(name):
    import timm
    from timm.models import group_parameters

    with torch.device("meta"):
        model = timm.create_model(name)
    expected = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    numbers, last = layer_numbers(model)
    classifier = ("head", "classifier", "fc")
    numbers = {name: number for name, number in numbers.items() if not name.startswith(classifier)}
    assert numbers == {name: expected[name] for name in numbers}
    assert last == max(numbers.values()) > 4


def test_parameters_in_separate_lists_belong_to_their_stages():
    """SegFormer as transformers built it before 5.24: patch embeddings, blocks and norms in separate lists."""
    line = lambda: nn.Linear(2, 2, bias=False)  # noqa: E731
    encoder = nn.ModuleDict()
    encoder["patch_embeddings"] = nn.ModuleList(line() for _ in range(3))
    encoder["block"] = nn.ModuleList(nn.ModuleList(line() for _ in range(depth)) for depth in (2, 1, 3))
    encoder["layer_norm"] = nn.ModuleList(nn.LayerNorm(2, bias=False) for _ in range(3))
    numbers, last = layer_numbers(encoder)
    assert last == 6
    assert [numbers[f"patch_embeddings.{stage}.weight"] for stage in range(3)] == [0, 3, 4]
    assert [number for name, number in numbers.items() if "block" in name] == [1, 2, 3, 4, 5, 6]
    assert [numbers[f"layer_norm.{stage}.weight"] for stage in range(3)] == [2, 3, 6]
