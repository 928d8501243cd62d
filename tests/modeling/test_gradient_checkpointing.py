"""Gradient checkpointing changes memory, not gradients."""

import pytest
import torch
from support.tiny_models import build, deeplab, segformer, swin, upernet
from torch import nn
from transformers import MobileNetV2Config

from cps_hf.modeling import enable_gradient_checkpointing
from cps_hf.modeling.backbones import backbone_of, timm_network


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


def test_checkpointed_timm_layers_are_not_in_place():
    """timm before 1.0.30 checkpoints the stem's activation separately, which was in place: backward was an error."""
    model = deeplab()
    network = timm_network(backbone_of(model))
    assert any(getattr(child, "inplace", False) for child in network.children())
    enable_gradient_checkpointing(model)
    assert not any(getattr(child, "inplace", False) for child in network.children())


def test_unsupported_gradient_checkpointing_is_an_error():
    with pytest.raises(ValueError, match="Neither MobileNetV2ForSemanticSegmentation nor its backbone"):
        enable_gradient_checkpointing(build(MobileNetV2Config(depth_multiplier=0.25)))
