"""Freezes the backbone, its norm layers, or parameters that would get no gradient."""

from __future__ import annotations

import types

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbones import backbone_of
from .dry_run import in_mode, meta_tensors
from .norms import NORMS
from .universal import pixel_outputs


def freeze(model: PreTrainedModel, *, backbone: bool = False, norms: bool = False) -> list[str]:
    """Freeze the backbone, or only its norm layers. Returns the names of the parameters that this froze.

    A frozen norm stays in evaluation mode (`.train()` does not change that), so its statistics do not move either.
    (timm.utils.freeze replaces batch norms by modules of another kind, and does not handle other norms.)

    Args:
        model: a segmentation model.
        backbone: freeze all parameters of the backbone, and its norms' statistics. Dropout and stochastic depth stay
            active.
        norms: freeze the backbone's norm layers: batch, group and layer norms.

    Raises:
        ValueError: `norms` on a backbone without any.
    """
    network = backbone_of(model)
    layers = [module for module in network.modules() if isinstance(module, NORMS)]
    if norms and not layers:
        raise ValueError(f"`norms`: the backbone of {type(model).__name__} has none of torch's norm layers.")
    frozen: set[int] = set()
    if backbone:
        frozen |= {id(parameter) for parameter in network.parameters()}
    if backbone or norms:
        for layer in layers:
            frozen |= {id(parameter) for parameter in layer.parameters()}
            layer.eval()
            layer.train = types.MethodType(_stay_in_eval_mode, layer)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in frozen]
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    return names


def _stay_in_eval_mode(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


def freeze_unused_parameters(model: PreTrainedModel, size: int | tuple[int, int]) -> list[str]:
    """Freeze the parameters that the logits do not depend on. Returns their names.

    DDP waits for a gradient of every parameter that requires one. Swin, DINOv2, DPT, MobileNetV2 and others have
    parameters that never get one. Batch-norm statistics, random numbers and existing gradients are not changed.

    Args:
        model: in any mode; the mode is kept.
        size: a height and width (one number: both) that the model accepts.
    """
    height, width = (size, size) if isinstance(size, int) else size
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = meta_tensors(model)
    dtype = next(model.parameters()).dtype
    with in_mode(model, training=False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        pixel_values = torch.empty(2, 3, height, width, dtype=dtype, device="meta")
        gradients_of = _LogitGradients(model, [tensors[name] for name in wanted])
        try:
            under_wrapper = {f"model.{name}": tensor for name, tensor in tensors.items()}
            gradients = torch.func.functional_call(gradients_of, under_wrapper, (pixel_values,))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            # a model that needs values, not only shapes (or a wrong size: then this raises)
            device = next(model.parameters()).device
            pixel_values = torch.zeros(2, 3, height, width, dtype=dtype, device=device)
            gradients = _LogitGradients(model, list(wanted.values()))(pixel_values)
    unused = [name for name, gradient in zip(wanted, gradients, strict=True) if gradient is None]
    for name in unused:
        wanted[name].requires_grad_(False)
    return unused


class _LogitGradients(nn.Module):
    """The backward pass inside a forward pass, so that recomputed activations see the same tensors as before."""

    def __init__(self, model: nn.Module, tensors: list[torch.Tensor]):
        super().__init__()
        self.model = model
        self.tensors = tensors

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values = pixel_outputs(self.model, pixel_values)
        return torch.autograd.grad(values.sum(), self.tensors, allow_unused=True)
