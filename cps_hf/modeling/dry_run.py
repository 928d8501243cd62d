"""Forward passes on shapes without values: on meta tensors nothing is computed, and the model does not change."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import PreTrainedModel

from .universal import check_window


def error_at(
    model: PreTrainedModel, height: int, width: int, *, batch_size: int = 1, training: bool = False
) -> Exception | None:
    """The error that a forward pass on images of this size raises, or `None`."""
    tensors = meta_tensors(model)
    dtype = next(model.parameters()).dtype
    pixel_values = torch.empty(batch_size, 3, height, width, device="meta", dtype=dtype)
    try:
        check_window(model.config, height, width)
        with torch.no_grad(), in_mode(model, training=training), torch.random.fork_rng(devices=[]):
            torch.func.functional_call(model, tensors, kwargs={"pixel_values": pixel_values})
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return error
    return None


def meta_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers as shapes without values. Tied ones stay tied."""
    shapes: dict[int, torch.Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) not in shapes:
            if name.endswith("attn_mask_probs"):  # EoMT's code branches on these few numbers
                shapes[id(tensor)] = tensor
                continue
            shapes[id(tensor)] = torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
    return {name: shapes[id(tensor)] for name, tensor in named}


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool):
    """Put the whole model into one mode, and restore each module's own mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
