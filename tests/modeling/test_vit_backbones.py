"""DINOv2 with registers and DINOv3 under our heads: what the head gets is what the pretrained network computes."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.architectures import CONVNEXT, DINOV2, DINOV3_VIT, DPT, STAGES
from transformers import AutoBackbone, AutoConfig, AutoModel, Dinov2WithRegistersConfig, UperNetConfig

from cps_hf.modeling import Branch, DeepLabV3PlusConfig, ViTDPTConfig, build_branches, freeze
from cps_hf.modeling.backbones import backbone_parameters

REGISTERS = 4
LAYERS = ["stage1", "stage2", "stage4"]  # of four: one is left out, so an index that is one off shows


def dinov2(**changes):
    values = {**DINOV2, "out_features": STAGES, "num_register_tokens": REGISTERS, **changes}
    return Dinov2WithRegistersConfig(**values)


def dinov3(**changes):
    return AutoConfig.for_model("dinov3_vit", **{**DINOV3_VIT, "num_register_tokens": REGISTERS, **changes})


def convnext(**changes):
    return AutoConfig.for_model("dinov3_convnext", **{**CONVNEXT, "out_features": STAGES, **changes})


def upernet(backbone):
    return UperNetConfig(hidden_size=16, backbone_config=backbone, num_labels=3)


def vit_dpt(backbone):
    return ViTDPTConfig(backbone_config=backbone, num_labels=3, **DPT)


def tipsv2_dpt(backbone):
    return AutoConfig.for_model("tipsv2_dpt", backbone_config=backbone, num_labels=3, **DPT)


def deeplab(backbone):
    return DeepLabV3PlusConfig(backbone_config=backbone, head="textbook", aspp_channels=16, num_labels=3)


def trained_like(model):
    """Nothing is left at 0 or 1: norms, layer scales, tokens and biases act."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


def maps_of(model, images, head, **how):
    """What enters the head of a branch in evaluation mode."""
    seen = []
    branch = Branch(model.eval())
    handle = getattr(model, head).register_forward_pre_hook(lambda _, args: seen.extend(args))
    with torch.no_grad():
        branch(images, **how)
    handle.remove()
    return list(seen[0]) if isinstance(seen[0], tuple | list) else seen


def patches(hidden, norm, rows, columns):
    tokens = norm(hidden)[:, 1 + REGISTERS :]
    assert tokens.shape[1] == rows * columns
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


CASES = {
    "dinov2, upernet": (dinov2(out_features=LAYERS), upernet, "decode_head", 14),
    "dinov2, vit_dpt": (dinov2(), vit_dpt, "decode_head", 14),
    "dinov3, upernet": (dinov3(out_features=LAYERS), upernet, "decode_head", 16),
    "dinov3, vit_dpt": (dinov3(), vit_dpt, "decode_head", 16),
    "convnext, upernet": (convnext(), upernet, "decode_head", None),
    "convnext, deeplab": (convnext(out_features=["stage1", "stage4"]), deeplab, "decode_head", None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_head_gets_the_maps_of_the_pretrained_network(name, tmp_path):
    """At another size than it was trained at, and oblong: layers, norm, tokens and places are the network's own."""
    backbone, around, head, patch = CASES[name]
    source = trained_like(AutoModel.from_config(backbone))
    source.save_pretrained(tmp_path)
    model = build_branches(around(backbone), num_branches=1, backbone=tmp_path)[0]
    rows, columns = 3, 5
    side = patch or 32
    images = torch.randn(2, 3, rows * side, columns * side)
    found = maps_of(model, images, head)
    with torch.no_grad():
        hidden = source(images, output_hidden_states=True).hidden_states
        own = AutoBackbone.from_config(model.config.backbone_config).eval()
        own.load_state_dict(model.backbone.state_dict())
        expected = own(images).feature_maps
    indices = [backbone.stage_names.index(stage) for stage in backbone.out_features]
    if patch:
        norm = source.layernorm if hasattr(source, "layernorm") else source.norm
        reference = [patches(hidden[index], norm, rows, columns) for index in indices]
    else:
        reference = [hidden[index] for index in indices]
    assert len(found) == len(expected) == len(reference) == len(backbone.out_features)
    for ours, theirs, typed in zip(found, expected, reference, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, typed, atol=1e-5, rtol=1e-5)


def test_position_embeddings_of_dinov2_are_resized_to_the_image():
    """As a network that has the resized ones from the start."""
    small = AutoBackbone.from_config(dinov2())
    trained_like(small)
    large = AutoBackbone.from_config(dinov2(image_size=84))
    state = small.state_dict()
    places = state["embeddings.position_embeddings"]
    grid = places[:, 1:].unflatten(1, (4, 4)).movedim(3, 1)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    state["embeddings.position_embeddings"] = torch.cat([places[:, :1], grid], 1)
    large.load_state_dict(state)
    images = torch.randn(1, 3, 84, 84)
    with torch.no_grad():
        for one, other in zip(small(images).feature_maps, large.eval()(images).feature_maps, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_dinov3_rotary_positions_and_their_scale_in_training():
    model = build_branches(vit_dpt(dinov3()), num_branches=1)[0]
    rope = model.backbone.rope_embeddings.eval()
    cos, sin = rope(torch.empty(1, 3, 3 * 16, 5 * 16))
    y, x = torch.meshgrid((torch.arange(3) + 0.5) / 3 * 2 - 1, (torch.arange(5) + 0.5) / 5 * 2 - 1, indexing="ij")
    frequencies = 1 / 100.0 ** (torch.arange(4) / 4)  # of a head of 16 channels
    angles = 2 * math.pi * torch.stack([y.flatten(), x.flatten()], 1)[:, :, None] * frequencies
    angles = angles.flatten(1).repeat(1, 2)
    torch.testing.assert_close((cos, sin), (angles.cos(), angles.sin()), atol=1e-5, rtol=1e-5)

    images = torch.randn(1, 3, 64, 64)
    freeze(model, backbone=True)
    with torch.no_grad():
        assert not torch.equal(model.train()(images).logits, model(images).logits)  # as dropout: frozen or not
        assert torch.equal(model.eval()(images).logits, model(images).logits)
        still = build_branches(vit_dpt(dinov3(pos_embed_rescale=None)), num_branches=1)[0].train()
        assert torch.equal(still(images).logits, still(images).logits)


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_backbone_stays_and_frozen_norms_are_its_norms(name):
    backbone, around, _, patch = CASES[name]
    model = build_branches(around(backbone), num_branches=1)[0]
    norms = {
        f"{module}.{kind}"
        for module, layer in model.named_modules()
        if isinstance(layer, torch.nn.LayerNorm) and module.startswith("backbone.")
        for kind in ("weight", "bias")
    }
    assert norms and set(freeze(model, norms=True)) == norms
    assert set(freeze(model, backbone=True)) == backbone_parameters(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    side = 4 * (patch or 32)
    model.train()(torch.randn(2, 3, side, side)).logits.square().mean().backward()
    optimizer.step()
    moved = {key.split(".")[0] for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == {"decode_head"}


DROPPED = {
    **{name: case for name, case in CASES.items() if "convnext" not in name},
    "dinov2, tipsv2_dpt": (dinov2(reshape_hidden_states=False), tipsv2_dpt, "neck", 14),
}


@pytest.mark.parametrize("name", DROPPED)
def test_complementary_dropout_acts_alike_on_the_maps_of_all_layers(name):
    """Also in the DPT networks of transformers, whose neck takes them before the head (UniMatch V2)."""
    backbone, around, head, patch = DROPPED[name]
    torch.manual_seed(0)
    model = build_branches(around(backbone), num_branches=1)[0]
    trained_like(model.backbone)
    images = torch.randn(2, 3, 4 * patch, 4 * patch)
    clean = maps_of(model, images, head)
    dropped = maps_of(model, images, head, complementary_dropout=1.0)
    draws = []
    for before, after in zip(clean, dropped, strict=True):
        if before.ndim == 3:  # tokens
            before, after = before.transpose(1, 2), after.transpose(1, 2)
        assert before.shape[:2] == (2, backbone.hidden_size)
        factors = after.flatten(2).sum(2) / before.flatten(2).sum(2)
        torch.testing.assert_close(
            after.flatten(2), before.flatten(2) * factors[..., None].round(), rtol=1e-4, atol=1e-4
        )
        assert set(factors.round().unique().tolist()) == {0.0, 2.0}
        assert torch.equal(factors[0].round() + factors[1].round(), torch.full((backbone.hidden_size,), 2.0))
        draws.append(factors.round())
    assert len(draws) == len(backbone.out_features) and all(torch.equal(draws[0], draw) for draw in draws)
    single = maps_of(model, images, head, feature_dropout=0.5)
    gone = [(one == 0).flatten(2).all(2 if one.ndim == 4 else 1).float().mean() for one in single]
    assert all(0 < share < 1 for share in gone)
