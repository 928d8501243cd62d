"""The optimizer's parameter groups: weight decay, learning rates of head and backbone, layer-wise rate decay."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from .backbones import backbone_of, timm_network

NO_DECAY_NAMES = (  # for parameters that are neither a weight matrix nor a vector
    "pos_embed",
    "position_embedding",
    "mask_token",
    "cls_token",
    "register_token",
    "relative_position_bias",
    "rel_pos",
    ".rpb",
    "layer_scale",
    "logit_scale",
    ".grn.",
)


def parameter_groups(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    weight_decay: float,
    head_learning_rate_factor: float = 1.0,
    backbone_learning_rate_factor: float = 1.0,
    layer_decay: float | None = None,
) -> list[dict]:
    """The optimizer's groups, with every trainable parameter once.

    No weight decay on biases and norms (all one-dimensional parameters), position embeddings, tokens and scales.

    Args:
        model: a segmentation model.
        learning_rate: the rate of parameters whose factors are 1.
        weight_decay: the weight decay of all others.
        head_learning_rate_factor, backbone_learning_rate_factor: multiply the rate in each part.
        layer_decay: in (0, 1]: layer l of the backbone's L layers has layer_decay^(L + 1 - l) times the backbone's
            rate, where l = 0 is the embeddings (BEiT, ICLR 2022, appendix). If `None`, all rates are equal.

    Returns:
        Dicts with "params", "lr", "weight_decay" and "name".

    Raises:
        ValueError: a factor is out of range, or `layer_decay` is used on a backbone without layers.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {layer_decay}.")
    for name, factor in (("head", head_learning_rate_factor), ("backbone", backbone_learning_rate_factor)):
        if factor <= 0:
            raise ValueError(f"`{name}_learning_rate_factor` must be above 0, got {factor}. To freeze, use freeze().")
    backbone = {id(parameter): name for name, parameter in backbone_of(model).named_parameters()}
    layers, last = ({}, 0) if layer_decay is None else layer_numbers(backbone_of(model))
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, rate = "head", learning_rate * head_learning_rate_factor
        if id(parameter) in backbone:
            part, rate = "backbone", learning_rate * backbone_learning_rate_factor
            if layer_decay is not None:
                layer = layers[backbone[id(parameter)]]
                part, rate = f"backbone layer {layer}", rate * layer_decay ** (last + 1 - layer)
        decays = parameter.ndim > 1 and not any(hint in name for hint in NO_DECAY_NAMES)
        key = part if decays else f"{part}, no decay"
        group = {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0, "name": key}
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


# A block's position, in the names of transformers and timm: `stages.2.blocks.0.`, `layer3.0.`, `layers.7.`.
_BLOCK = re.compile(
    r"(?:^|[._])(?:stages|levels|layers?|blocks?)[._]?(\d+)\.(?:(?:blocks|layers?|stage)\.)?(?:(\d+)\.)?"
)
# Patch embeddings or norms of all stages in a separate list: `patch_embeddings.2.`.
_BESIDE = re.compile(r"(?:^|\.)\w*(?:patch_embed\w*|norms?|pos_block)\.(\d+)\.")


def layer_numbers(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of each parameter by name, from 0 (embeddings) to L; and L, the number of blocks in the stack.

    A parameter outside the blocks belongs to the last block before it in the model; if it comes first in its stage, to
    that stage's first block; if it comes before all blocks, to the embeddings.

    timm's `param_groups_layer_decay` cannot do this: it needs the model's `group_matcher`, which transformers' models
    do not have and timm's own lose when they become feature networks. If timm has one, both agree.

    Raises:
        ValueError: most of the backbone is outside the blocks.
    """
    sizes = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    found = {name: match for name in sizes if (match := _BLOCK.search(name))}
    split = {match[1] for match in found.values() if match[2]}  # stages of several blocks; the others are one block
    places = {name: (int(m[1]), int(m[2] or 0)) for name, m in found.items() if m[2] or m[1] not in split}
    if 2 * sum(sizes[name] for name in places) <= sum(sizes.values()):
        raise ValueError(
            f"`layer_decay` needs a backbone of stacked layers; {type(timm_network(backbone) or backbone).__name__} "
            "has no known ones. Remove it, or lower the whole backbone's rate with "
            "`backbone_learning_rate_factor`."
        )
    order = sorted(set(places.values()))
    layer = {place: number for number, place in enumerate(order, 1)}
    first, last = dict(reversed(order)), dict(order)  # by stage, the number of its first and of its last block
    numbers, passed = {}, set()  # `passed`: stages of which a block was seen
    for name in sizes:
        match = found.get(name) or _BESIDE.search(name)
        stage = int(match[1]) if match else None
        if name in places:
            numbers[name] = layer[places[name]]
            passed.add(stage)
        elif stage in passed:
            numbers[name] = layer[stage, last[stage]]
        elif stage in first:
            numbers[name] = layer[stage, first[stage]] if stage != order[0][0] else 0
        else:
            numbers[name] = len(order) if passed else 0
    return numbers, len(order)
