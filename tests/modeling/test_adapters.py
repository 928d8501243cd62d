"""Low-rank adapters: where they are, what they add, what learns, and that merged they are part of the weights."""

import copy
import importlib.util

import pytest
import torch
from support.architectures import CONVNEXT, DINOV2, DPT, SEGFORMER, STAGES, UNIVERSAL
from support.tiny_models import deeplab, upernet
from torch import nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation, Dinov2Config, SegformerConfig

from cps_hf.modeling import ViTDPTConfig, add_adapters, build_branches, parameter_groups
from cps_hf.modeling.adapters import merged, share_frozen_weights
from cps_hf.modeling.backbones import backbone_of, backbone_parameters, head_parameters

pytest.importorskip("peft")


def build(config):
    return build_branches(config, num_branches=1)[0]


def vit_dpt():
    return build(ViTDPTConfig(backbone_config=Dinov2Config(**DINOV2), num_labels=3, **DPT))


def segformer():
    return build(SegformerConfig(**SEGFORMER, decoder_hidden_size=16, drop_path_rate=0.0, classifier_dropout_prob=0.0))


def convnext():
    return upernet(
        AutoConfig.for_model("dinov3_convnext", **CONVNEXT, layer_scale_init_value=1.0, out_features=STAGES)
    )


def eomt():
    return build(next(row for row in UNIVERSAL if row.name == "eomt").config())


MODELS = {"vit_dpt": vit_dpt, "segformer": segformer, "upernet": lambda: upernet(Dinov2Config(**DINOV2))}
MODELS |= {"convnext": convnext, "eomt": eomt}
SIZES = {"segformer": 64, "convnext": 64, "eomt": 64}


def adapters(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def drawn(model):
    """Adapters that act: their second matrix starts at zero."""
    torch.manual_seed(3)
    for parameter in adapters(model).values():
        nn.init.normal_(parameter, 0, 0.2)
    return model


def logits(model, size):
    torch.manual_seed(4)
    with torch.no_grad():
        output = model.eval()(torch.randn(2, 3, size, size))
    return output.logits if "logits" in output else output.masks_queries_logits


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_get_adapters_that_start_as_the_identity(name):
    model, size = MODELS[name](), SIZES.get(name, 56)
    before, heads = logits(model, size), head_parameters(model)
    linear = {key for key, module in backbone_of(model).named_modules() if isinstance(module, nn.Linear)}
    shapes = {key: p.shape for key, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert set(add_adapters(model, rank=2, seed=0)) == linear
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model, size), before)
    assert len(adapters(model)) == 2 * len(linear)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters(model)) | heads
    assert set(adapters(model)) <= backbone_parameters(model) and head_parameters(model) == heads
    for key in linear:
        layer = backbone_of(model).get_submodule(key)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape == (2, layer.in_features) and b.shape == (layer.out_features, 2)
        assert a.any() and not b.any() and layer.scaling["default"] == 2.0
    assert shapes.keys() - dict(model.named_parameters()).keys() <= {f for f in shapes if f not in heads}


@pytest.mark.parametrize("name", MODELS)
def test_merged_it_is_the_plain_model_with_the_products_added(name, tmp_path):
    plain, size = MODELS[name](), SIZES.get(name, 56)
    model = copy.deepcopy(plain)
    add_adapters(model, rank=3, seed=1, alpha=12)
    drawn(model)
    expected = logits(model, size)
    result = merged(model)
    assert type(result) is type(plain) and adapters(model) and not adapters(result)
    assert result.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(result, size), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(plain, size), expected, atol=1e-3)
    own = backbone_of(model)
    for key, module in backbone_of(plain).named_modules():
        if isinstance(module, nn.Linear):
            layer, found = own.get_submodule(key), backbone_of(result).get_submodule(key)
            product = 12 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            torch.testing.assert_close(found.weight, module.weight + product, rtol=1e-5, atol=1e-6)
            assert type(found) is type(module)
    assert torch.equal(logits(model, size), expected)  # the model itself trains on
    if name == "segformer":
        result.save_pretrained(tmp_path)
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, size), logits(result, size))


@pytest.mark.parametrize("name", MODELS)
def test_equal_frozen_weights_are_shared_and_nothing_else(name):
    size = SIZES.get(name, 56)
    one = MODELS[name]()
    other, third = copy.deepcopy(one), copy.deepcopy(one).bfloat16()
    changed = next(key for key in backbone_parameters(one) if key.endswith("weight"))
    with torch.no_grad():
        other.get_parameter(changed).add_(1)
    heads = head_parameters(one)
    networks = [one, other, third]
    for seed, model in enumerate(networks):
        add_adapters(model, rank=2, seed=seed)
        drawn(model)
    expected = [logits(model, size) for model in networks[:2]]
    names = [dict(model.named_parameters()) for model in networks]
    whole = sum(p.nbytes for p in {*one.parameters(), *other.parameters()})
    saved = share_frozen_weights(networks)
    names = [dict(model.named_parameters()) for model in networks]
    assert saved == whole - sum(p.nbytes for p in {*one.parameters(), *other.parameters()}) > 0
    for key, parameter in names[0].items():
        frozen = key in backbone_parameters(one) and ".lora_" not in key
        assert frozen == (key not in heads and not parameter.requires_grad)
        differs = key.replace(".base_layer", "") == changed
        assert (names[1][key] is parameter) == (frozen and not differs), key
        assert names[2][key] is not parameter
    buffers = [{id(buffer) for buffer in model.buffers()} for model in networks[:2]]
    assert not buffers[0] & buffers[1]
    assert all(torch.equal(logits(model, size), before) for model, before in zip(networks[:2], expected, strict=True))
    assert share_frozen_weights(networks) == 0
    merged(one)
    assert all(torch.equal(logits(model, size), before) for model, before in zip(networks[:2], expected, strict=True))


def test_weights_without_adapters_are_not_shared():
    one = vit_dpt()
    other = copy.deepcopy(one)
    add_adapters(one, rank=2, seed=0)
    assert share_frozen_weights([one, other]) == share_frozen_weights([other, copy.deepcopy(other)]) == 0
    assert not {*map(id, one.parameters())} & {*map(id, other.parameters())}


def test_a_model_without_adapters_is_itself_merged():
    model = segformer()
    assert merged(model) is model


def test_the_seed_alone_decides_what_is_drawn():
    def first(seed):
        model = segformer()
        add_adapters(model, rank=2, seed=seed)
        return next(p for name, p in adapters(model).items() if "lora_A" in name)

    assert torch.equal(first(5), first(5)) and not torch.equal(first(5), first(6))


def test_named_layers_alone_are_adapted_and_dropout_acts_in_training():
    model = vit_dpt()
    found = add_adapters(model, rank=2, seed=0, dropout=0.5, target_modules=["q_proj", "layer.3.attention.v_proj"])
    assert sorted(found) == sorted(
        [*(f"encoder.layer.{i}.attention.q_proj" for i in range(4)), "encoder.layer.3.attention.v_proj"]
    )
    assert len(adapters(model)) == 2 * 5
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        drawn(model).train()
        assert not torch.equal(model(images).logits, model(images).logits)
        model.eval()
        assert torch.equal(model(images).logits, model(images).logits)


def test_convolutions_are_adapted_where_they_are_named():
    model = deeplab()
    found = add_adapters(model, rank=2, seed=0, target_modules=["layer1.0.conv2", "conv1"])
    assert "_backbone.layer1.0.conv2" in found and len(found) > 2
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train()
    assert norms and not any(norm.training for norm in norms)
    drawn(model)
    torch.testing.assert_close(logits(merged(model), 64), logits(model, 64), rtol=1e-4, atol=1e-5)


def test_adapters_learn_at_the_rate_of_their_layer_in_the_backbone():
    model = vit_dpt()
    add_adapters(model, rank=2, seed=0)
    how = {"learning_rate": 1.0, "weight_decay": 0.1, "backbone_learning_rate_factor": 0.5, "layer_decay": 0.5}
    rate = {id(p): group["lr"] for group in parameter_groups(model, **how) for p in group["params"]}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            layer = 1 + int(name.split("encoder.layer.")[1].split(".")[0])
            assert rate[id(parameter)] == 0.5 * 0.5 ** (4 + 1 - layer), name
        else:
            assert rate.get(id(parameter)) == (1.0 if name.startswith("decode_head") else None), name


def test_what_cannot_be_adapted_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"has no linear layer or convolution named 'query'. It has .*q_proj.*v_proj"):
        add_adapters(vit_dpt(), rank=2, seed=0, target_modules=["q_proj", "query"])
    with pytest.raises(ValueError, match="FeatureListNet, has no linear layer. Name convolutions.*conv1"):
        add_adapters(deeplab(), rank=2, seed=0)
    with pytest.raises(ValueError, match="stages.0.layers.0.depthwise_conv of UperNet.* with groups or dilation"):
        add_adapters(convnext(), rank=3, seed=0, target_modules=["depthwise_conv"])
    dilated = deeplab()
    with pytest.raises(ValueError, match="layer4.0.conv2 of DeepLabV3Plus.* with groups or dilation"):
        add_adapters(dilated, rank=2, seed=0, target_modules=["conv2"])
    assert all(parameter.requires_grad for parameter in dilated.parameters())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a))
    with pytest.raises(ValueError, match=r'not installed: `pip install peft`, or `pip install "cps_hf\[lora\]"`'):
        add_adapters(vit_dpt(), rank=2, seed=0)
