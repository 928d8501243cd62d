"""Freezing, size and batch checks, parameter groups, checkpointing, synchronised norms."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    ConvNextConfig,
    ConvNextV2Config,
    Data2VecVisionConfig,
    DinatConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DPTConfig,
    MobileNetV2Config,
    SegformerConfig,
    SwinConfig,
    Swinv2Config,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitDetConfig,
)

from cps_hf.modeling import (
    DeepLabV3PlusConfig,
    HRNetConfig,
    build_branches,
    check_input_size,
    check_train_batch,
    convert_sync_batchnorm,
    enable_gradient_checkpointing,
    freeze,
    freeze_unused_parameters,
    parameter_groups,
)
from cps_hf.modeling.backbones import backbone_of, timm_network

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


# --- freezing


def test_unused_parameters_are_frozen_and_nothing_else_changes():
    model = upernet(swin()).train()
    model.decode_head.eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    used = model.decode_head.classifier.weight
    used.grad = torch.ones_like(used)
    assert freeze_unused_parameters(model, 64) == ["backbone.swin.layernorm.weight", "backbone.swin.layernorm.bias"]
    assert not model.backbone.swin.layernorm.weight.requires_grad and used.requires_grad
    assert torch.equal(used.grad, torch.ones_like(used))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and model.backbone.training and not model.decode_head.training
    assert freeze_unused_parameters(model, (64, 96)) == []


def test_a_frozen_backbone_does_not_move_in_training():
    model = deeplab()
    frozen = freeze(model, backbone=True)
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    optimizer.step()
    moved = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {"decode_head"}


@pytest.mark.parametrize("build_model", [deeplab, segformer])
def test_frozen_norms_stay_in_evaluation_mode_through_train_and_copies(build_model):
    model = build_model()
    frozen = freeze(model, norms=True)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.train()
        kinds = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
        norms = {name: m for name, m in each.named_modules() if isinstance(m, kinds)}
        inside = {name: m for name, m in norms.items() if not name.startswith("decode_head")}
        assert inside and not any(m.training for m in inside.values())
        assert all(m.training for name, m in norms.items() if name not in inside)
        assert {f"{name}.{kind}" for name in inside for kind in ("weight", "bias")} == set(frozen)
        trainable = {name for name, p in each.named_parameters() if p.requires_grad}
        assert trainable == {name for name, _ in each.named_parameters()} - set(frozen)


@pytest.mark.parametrize("model", [lambda: upernet(swin()), lambda: upernet(dinov2()), deeplab, segformer])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_counts_as_unused_is_what_a_backward_pass_leaves_without_a_gradient(model, checkpointing):
    model = model()
    if checkpointing:
        enable_gradient_checkpointing(model)
    model.eval()(torch.randn(2, 3, 56, 84)).logits.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert freeze_unused_parameters(model, (56, 84)) == without
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == without


def test_a_model_that_needs_values_and_not_only_shapes_is_tried_for_real():
    model = segformer()
    model.decode_head.spare = nn.Linear(2, 2)

    def looks_at_the_values(module, args, kwargs):
        kwargs["pixel_values"].sum().item()

    model.register_forward_pre_hook(looks_at_the_values, with_kwargs=True)
    assert freeze_unused_parameters(model, 64) == ["decode_head.spare.weight", "decode_head.spare.bias"]
    check_input_size(model, 64, 96)
    with pytest.raises(ValueError, match="cannot take images of 0 x 0 pixels.*Nor does it take 32 x 32"):
        check_input_size(model, 0, 0)


# --- checks


def test_a_batch_of_one_is_refused_where_a_norm_sees_an_image_pooled_map():
    model = deeplab().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cannot be trained with 1 image a process"):
        check_train_batch(model, 1)
    check_train_batch(model, 2)
    check_train_batch(segformer(), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    freeze(model, backbone=True)  # the head's norm is still there
    with pytest.raises(ValueError, match="image-pooled"):
        check_train_batch(model, 1)
    check_train_batch(convert_sync_batchnorm(model), 1)
    with pytest.raises(ValueError, match="MobileNetV2.*image-pooled"):
        check_train_batch(build(MobileNetV2Config(depth_multiplier=0.25)), 1)
    fixed_size = {"image_size": 48, "patch_size": 16, "hidden_size": 16, "intermediate_size": 32}
    data2vec = Data2VecVisionConfig(**fixed_size, num_hidden_layers=4, num_attention_heads=2, out_indices=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="Data2Vec.*image-pooled"):
        check_train_batch(build(data2vec), 1)


def test_size_errors_name_what_is_allowed():
    hrnet = build(HRNetConfig("hrnet_w18_small"))
    with pytest.raises(ValueError, match="cannot take images of 769 x 769.*for instance, 768 x 768; multiples of 32"):
        check_input_size(hrnet, 769, 769)
    dpt = build(
        DPTConfig(
            image_size=64,
            patch_size=16,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=16,
        )
    )
    with pytest.raises(ValueError, match="for instance, 96 x 96 or 64 x 64, no oblong image"):
        check_input_size(dpt, 96, 64)
    check_input_size(dpt, 128, 128)


# --- parameter groups


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
MODELS = {  # with a parameter of several dimensions called so
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
    """So not tokens, positions, layer scales and norms, which some models hold as more than vectors."""
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
]


@pytest.mark.parametrize("model, last, expected", DEPTHS, ids=["dinov2", "swin", "convnext", "timm resnet"])
def test_layer_decay_lowers_the_rate_layer_by_layer(model, last, expected):
    model = model()
    groups = parameter_groups(
        model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5, backbone_learning_rate_factor=0.5
    )
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for part, layer in expected.items():
        found = {
            rate[id(p)] for name, p in model.named_parameters() if f"{part}." in f"{name}." and "backbone" in name
        }
        assert found == {0.5 * 0.5 ** (last + 1 - layer)}, (part, found)
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
    with pytest.raises(ValueError, match="needs a backbone of stacked layers; HighResolutionNetFeatures has none"):
        parameter_groups(model, learning_rate=1, weight_decay=0, layer_decay=0.9)
    with pytest.raises(ValueError, match=r"`layer_decay` must be in \(0, 1\], got 1.5"):
        parameter_groups(model, learning_rate=1, weight_decay=0, layer_decay=1.5)
    with pytest.raises(ValueError, match="`head_learning_rate_factor` must be above 0, got 0"):
        parameter_groups(model, learning_rate=1, weight_decay=0, head_learning_rate_factor=0)


# --- memory and norms


@pytest.mark.parametrize(
    "model",
    [segformer, lambda: upernet(swin()), deeplab],
    ids=["the model's own", "its backbone's", "timm's"],
)
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(model):
    torch.manual_seed(0)
    model = model().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "DropPath" in type(module).__name__:
            module.drop_prob = 0.0
    images = torch.randn(2, 3, 64, 64)
    model(images).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    enable_gradient_checkpointing(model)
    calls = []
    norm = [m for m in backbone_of(model).modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))][3]
    norm.register_forward_hook(lambda *_: calls.append(1))
    model(images).logits.square().mean().backward()
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-5), name
    assert len(calls) == 2  # forward, and again in the backward pass


def test_no_layer_overwrites_what_a_checkpointed_timm_network_recomputes_from():
    """timm before 1.0.30 checkpoints the stem's activation by itself, which worked in place: backward was an error."""
    model = deeplab()
    network = timm_network(backbone_of(model))
    assert any(getattr(child, "inplace", False) for child in network.children())
    enable_gradient_checkpointing(model)
    assert not any(getattr(child, "inplace", False) for child in network.children())


def test_gradient_checkpointing_is_an_error_where_there_is_none():
    with pytest.raises(ValueError, match="Neither MobileNetV2ForSemanticSegmentation nor its backbone"):
        enable_gradient_checkpointing(build(MobileNetV2Config(depth_multiplier=0.25)))


def test_synchronised_norms_keep_timms_fused_activations_weights_and_frozen_norms():
    model = build(
        DeepLabV3PlusConfig(
            backbone_config=TimmBackboneConfig(backbone="efficientnet_b0", out_indices=[1, 4]), aspp_channels=16
        )
    ).eval()
    expected, state = model(torch.ones(1, 3, 64, 64)).logits, copy.deepcopy(model.state_dict())
    freeze(model, norms=True)
    model = convert_sync_batchnorm(model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.decode_head.modules())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.backbone.modules())
    whole = convert_sync_batchnorm(build(model.config)).eval()
    whole.load_state_dict(state)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in whole.backbone.modules())
    assert torch.allclose(whole(torch.ones(1, 3, 64, 64)).logits, expected, atol=1e-4)
