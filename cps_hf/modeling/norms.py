"""Norm layers: which modules are norms, and batch norms over all processes' images."""

from __future__ import annotations

from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Convert every batch norm to a synchronised one (which needs GPUs and several processes to train). The state dict
    does not change.

    This is timm's conversion, since torch's drops the activation of timm's fused norm layers. Frozen norms stay
    frozen.
    """
    from timm.layers import convert_sync_batchnorm as convert

    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return model if "train" in vars(model) else convert(model)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child))
    return model


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Set the share of a batch's statistics in the running statistics' update, for all batch norms of a model.

    Raises:
        ValueError: it has no batch norm.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise ValueError(f"`norm_momentum`: {type(model).__name__} has no batch norm. Remove the setting.")
    for layer in layers:
        layer.momentum = momentum
