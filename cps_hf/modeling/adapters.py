"""Low-rank adapters in the backbone (LoRA, ICLR 2022, arXiv 2106.09685), made by peft and merged for an export.

The backbone's own weights never change, so branches that start from the same backbone share them in memory.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbones import backbone_of, timm_network
from .freezing import freeze

SHOWN = 12


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    seed: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> list[str]:
    """Freezes the backbone, in place, and adds a trainable product of two thin matrices to some of its layers.

    A layer W becomes W + alpha / rank * B A, with A (rank, inputs) drawn and B (outputs, rank) zero, so the network
    starts as it was. The rest of the model is trained as before.

    Args:
        model: a segmentation model.
        rank: of the adapters.
        seed: with which A is drawn; nobody else's random numbers move.
        alpha: their scale times `rank`. If `None`, twice the rank.
        dropout: on an adapter's input, while training.
        target_modules: the layers that get one, by the end of their names ("q_proj", "layers.3.mlp.fc1"): linear ones,
            and convolutions without groups or dilation. If `None`, all linear layers of the backbone.

    Returns:
        The names of the adapted layers in the backbone.

    Raises:
        ValueError: peft is not installed, no layer of the backbone has one of these names, or one of them is a
            convolution that peft cannot adapt and merge.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            '`lora_rank` needs peft, which is not installed: `pip install peft`, or `pip install "cps_hf[lora]"`.'
        )
    import peft

    backbone = backbone_of(model)
    names = _targets(model, backbone, target_modules)
    freeze(model, backbone=True)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, names)),  # whole names; in a list each would match as an end of others
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(config, backbone)
    return names


def share_frozen_weights(models: Sequence[PreTrainedModel]) -> int:
    """Lets networks with adapters use the same parameters, in place, where the frozen weights of their backbones are
    equal: same name, type and values. Adapters, heads and buffers (batch norm's statistics) stay separate.

    Call it before the networks move to their device. An optimizer does not know these weights, since they are frozen.

    Args:
        models: branches, their averages and teachers, in any mix of architectures. Those without adapters are skipped.

    Returns:
        The number of bytes that are no longer used.
    """
    kept: dict[str, list[nn.Parameter]] = {}
    saved = 0
    for model in models:
        if not _adapted(model):
            continue
        backbone = backbone_of(model)
        for name, parameter in [*backbone.named_parameters(remove_duplicate=False)]:
            if ".lora_" in name:
                continue
            known = kept.setdefault(name, [])
            twin = next((p for p in known if _same(p, parameter)), None)
            if twin is None:
                known.append(parameter)
            elif twin is not parameter:
                parent, _, child = name.rpartition(".")
                setattr(backbone.get_submodule(parent), child, twin)
                saved += parameter.nbytes
    return saved


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model as one without adapters: a copy whose layers hold W + alpha / rank * B A. A model that has none is
    returned as it is.

    The copy's outputs are the model's to rounding.
    """
    if not _adapted(model):
        return model
    plain = copy.deepcopy(model)
    for name, layer in _adapted(plain).items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    return plain


def _same(p: torch.Tensor, q: torch.Tensor) -> bool:
    return p.dtype == q.dtype and p.device == q.device and torch.equal(p, q)


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter by name. peft is not imported if there are no adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _targets(model: PreTrainedModel, backbone: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if wanted is None:
        names = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
        if not names:
            raise ValueError(
                f"`lora_rank`: the backbone of {type(model).__name__}, {_kind(backbone)}, has no linear layer. Name "
                f"convolutions with `lora_target_modules`; it has {_ends(layers)}."
            )
        return names
    ends = {end: [name for name in layers if name == end or name.endswith(f".{end}")] for end in wanted}
    absent = [end for end, names in ends.items() if not names]
    if absent:
        raise ValueError(
            f"`lora_target_modules`: the backbone of {type(model).__name__}, {_kind(backbone)}, has no linear layer "
            f"or convolution named {', '.join(map(repr, absent))}. It has {_ends(layers)}."
        )
    chosen = {name for names in ends.values() for name in names}
    special = [name for name in chosen if isinstance(layers[name], nn.Conv2d) and not _is_plain(layers[name])]
    if special:
        raise ValueError(
            f"`lora_target_modules`: {min(special)} of {type(model).__name__}'s backbone is a convolution with groups "
            "or dilation, which peft cannot adapt and merge. Name others."
        )
    return [name for name in layers if name in chosen]


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and set(layer.dilation) == {1}


def _kind(backbone: nn.Module) -> str:
    return f"a {type(timm_network(backbone) or backbone).__name__}"


def _ends(layers: Sequence[str]) -> str:
    """The last parts of the layers' names that are words."""
    parts = [name.split(".") for name in layers]
    found = sorted({next((part for part in reversed(each) if not part.isdigit()), each[-1]) for each in parts})
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more
