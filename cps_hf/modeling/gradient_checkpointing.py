"""Gradient checkpointing for whichever part of a model supports it."""

from __future__ import annotations

import contextlib

from transformers import PreTrainedModel

from .backbones import backbone_of, timm_network


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Trade time for memory: the blocks' activations are computed again in the backward pass.

    Uses the whole model's checkpointing if it has one, else its backbone's. (A batch norm inside a checkpointed block
    sees each batch twice, so its running statistics follow the data twice as fast.)

    Raises:
        ValueError: neither the model nor its backbone supports it.
    """
    backbone = backbone_of(model)
    network = timm_network(backbone)
    for child in network.children() if network is not None else ():
        if getattr(child, "inplace", False):  # timm before 1.0.30 recomputes from what this one overwrites
            child.inplace = False
    for part in (model, backbone):
        if getattr(part, "supports_gradient_checkpointing", False):
            if hasattr(part, "activation_checkpointing_enable"):  # transformers 5.24 renamed it
                part.activation_checkpointing_enable()
            else:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
    if network is not None and hasattr(network, "set_grad_checkpointing"):
        with contextlib.suppress(AssertionError):  # timm raises this if it is not supported
            network.set_grad_checkpointing(True)
            return
    raise ValueError(
        f"Neither {type(model).__name__} nor its backbone {type(network or backbone).__name__} supports gradient "
        "checkpointing: remove `gradient_checkpointing`, or use a smaller crop or batch."
    )
