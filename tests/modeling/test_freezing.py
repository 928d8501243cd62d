"""What freezing changes, and what it does not."""

import copy

import pytest
import torch
from support.tiny_models import deeplab, dinov2, segformer, swin, upernet
from torch import nn

from cps_hf.modeling import check_input_size, enable_gradient_checkpointing, freeze, freeze_unused_parameters


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
def test_unused_parameters_are_those_without_gradient(model, checkpointing):
    model = model()
    if checkpointing:
        enable_gradient_checkpointing(model)
    model.eval()(torch.randn(2, 3, 56, 84)).logits.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert freeze_unused_parameters(model, (56, 84)) == without
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == without


def test_a_model_that_needs_values_is_really_run():
    model = segformer()
    model.decode_head.spare = nn.Linear(2, 2)

    def looks_at_the_values(module, args, kwargs):
        kwargs["pixel_values"].sum().item()

    model.register_forward_pre_hook(looks_at_the_values, with_kwargs=True)
    assert freeze_unused_parameters(model, 64) == ["decode_head.spare.weight", "decode_head.spare.bias"]
    check_input_size(model, 64, 96)
    with pytest.raises(ValueError, match="cannot process images of 0 x 0 pixels.*It does not accept 32 x 32"):
        check_input_size(model, 0, 0)
