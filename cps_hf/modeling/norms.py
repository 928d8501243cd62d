"""Norm layers: what counts as one, and batch norms that see all processes' images."""

from __future__ import annotations

from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Every batch norm becomes a synchronised one (needs GPUs and several processes when it trains); saves as before.

    timm's conversion, because torch's drops the activation of timm's fused norm layers. Frozen norms stay as they are.
    """
    from timm.layers import convert_sync_batchnorm as convert

    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return model if "train" in vars(model) else convert(model)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child))
    return model


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Gives all batch norms of a model this share of a batch's statistics in their running ones.

    Raises:
        ValueError: it has no batch norm.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise ValueError(f"`norm_momentum`: {type(model).__name__} has no batch norm. Leave it out.")
    for layer in layers:
        layer.momentum = momentum
