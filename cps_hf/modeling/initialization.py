"""Initialises weights that no checkpoint provides, with a seed per branch."""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbones import backbone_of
from .norms import NORMS
from .universal import initialize_by_own_rule, is_universal


def branch_seed(seed: int, index: int) -> int:
    """The seed that initialises branch `index`: different for each pair, and the same on every machine."""
    return random.Random(f"cps_hf branch {seed} {index}").getrandbits(63)


def head_has_norms(model: PreTrainedModel) -> bool:
    """Whether there is a norm layer outside the backbone, which gives logits of a sane scale whatever the weights."""
    inside = set(backbone_of(model).modules())
    outside = [module for module in model.modules() if module not in inside]
    return any(isinstance(module, NORMS) or type(module).__name__.endswith("Norm") for module in outside)


@torch.no_grad()
def initialize_weights(model: PreTrainedModel, names: set[str]) -> None:
    """Initialise the named parameters in place, from torch's global generator, in the model's order.

    Convolutions: kaiming normal, fan-in, relu, with biases by torch's default; norms: weight 1, bias 0 (as the CPS
    release initialises its heads). Everything else: the model's own rule.

    In a head without norm layers (Tipsv2Dpt's), convolutions, transposed ones and linear layers get torch's default
    instead. Kaiming normal keeps the variance through every layer, so it grows with a deep stack's residual sums: a
    DPT head on DINOv2 would start with logits with a standard deviation in the hundreds. With torch's default it is
    below 0.1.

    The decoders of universal models have their own rules, which are kept.
    """
    if is_universal(model.config):
        initialize_by_own_rule(model, names, backbone_of(model))
        return
    plain = not head_has_norms(model)
    in_backbone = set(backbone_of(model).modules())
    for prefix, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if f"{prefix}.{key}".lstrip(".") in names}
        if not own:
            continue
        if plain and module not in in_backbone and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            _reset_to_torchs_default(module, own)
        elif isinstance(module, nn.Conv2d):
            if "weight" in own:
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if "bias" in own:
                bound = (module.weight.shape[1] * module.weight[0, 0].numel()) ** -0.5
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            for key, parameter in own.items():
                parameter.fill_(1.0 if key == "weight" else 0.0)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        else:
            for parameter in own.values():
                parameter._is_hf_initialized = False  # transformers skips tensors with this flag
            model._init_weights(module)


def _reset_to_torchs_default(module: nn.Module, own: dict[str, nn.Parameter]) -> None:
    kept = {key: p.clone() for key, p in module.named_parameters(recurse=False) if key not in own}
    module.reset_parameters()
    for key, tensor in kept.items():
        getattr(module, key).copy_(tensor)
