"""Mask-classification networks (Mask2Former, MaskFormer, EoMT) as branches: class scores of pixels from queries.

Such a network returns queries, each with class logits and a mask, instead of pixel logits. A class's score at a pixel
is the sum over queries of class probability times mask probability, as in the networks' papers and in the library's
`post_process_semantic_segmentation`. The scores are resized to the image, and a pixel's logits are the logarithm of
its normalised scores (`StridedLogits.scores`). For the networks' own set loss (set_loss.py), the predictions that the
library's criterion would receive are recorded, from every layer that it trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)

from .set_loss import Layer

WITH_DECODER = ("mask2former", "maskformer")
"""A backbone, a pixel decoder that takes its feature maps, and a transformer decoder."""
OF_ONE_SIZE = ("eomt", "eomt_dinov3")
"""A vision transformer whose last blocks also process the queries. Its positions fit one input size."""
UNIVERSAL = (*WITH_DECODER, *OF_ONE_SIZE)


def is_universal(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a mask-classification network that can be a branch."""
    return getattr(config, "model_type", None) in UNIVERSAL


def auto_class(config: PreTrainedConfig) -> type:
    """The transformers Auto class that builds and loads this kind of network."""
    return AutoModelForUniversalSegmentation if is_universal(config) else AutoModelForSemanticSegmentation


def reject_other_universal(config: PreTrainedConfig, name: str) -> None:
    """Raise a `ValueError` for a universal model that cannot be a branch.

    Args:
        name: the model's name, for the error.
    """
    known = type(config) in AutoModelForUniversalSegmentation._model_mapping
    if known and not is_universal(config):
        why = "needs a task text with each image" if config.model_type == "oneformer" else "has no such scores"
        raise ValueError(
            f"{name} is a {config.model_type!r}, which {why}. Of the models of AutoModelForUniversalSegmentation "
            f"these can be branches: {', '.join(UNIVERSAL)}."
        )


def input_window(config: PreTrainedConfig) -> tuple[int, int] | None:
    """(height, width) of the only images that a network with fixed positions accepts; `None` if it accepts others."""
    if getattr(config, "model_type", None) not in OF_ONE_SIZE:
        return None
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def check_window(config: PreTrainedConfig, height: int, width: int) -> None:
    """Raise a `ValueError` if a network only accepts images of another size. For another size with equally many
    patches, the library would put them in wrong places."""
    window = input_window(config)
    if window is not None and window != (height, width):
        raise ValueError(f"its positions are those of {window[0]} x {window[1]} pixels, got {height} x {width}")


def pixel_outputs(
    model: PreTrainedModel,
    pixel_values: Tensor,
    network: Callable[..., Any] | None = None,
    layers: list[Layer] | None = None,
) -> Tensor:
    """A segmentation model's logits, or a universal model's class scores, for each pixel at the model's own size.

    Args:
        model: a semantic or universal segmentation model.
        pixel_values: (B, 3, H, W).
        network: called instead of the model, e.g. the compiled model.
        layers: a list to which the queries' predictions in each layer that the set loss trains are appended.

    Returns:
        (B, C, h, w) float32.

    Raises:
        ValueError: the model does not accept images of this size.
    """
    network = network or model
    if not is_universal(model.config):
        return network(pixel_values=pixel_values).logits.float()
    check_window(model.config, *pixel_values.shape[-2:])
    if layers is None:
        with _without_masks_of_blocks(model):
            output = network(pixel_values=pixel_values)
    else:
        with _criterion_records(model, layers):
            output = network(pixel_values=pixel_values, mask_labels=[], class_labels=[])
    return class_scores(output.class_queries_logits, output.masks_queries_logits)


def class_scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """The sum over queries of class probability times mask probability, in float32 under autocast too.

    Args:
        class_logits: (B, Q, C + 1), the last for no object.
        mask_logits: (B, Q, h, w).

    Returns:
        (B, C, h, w), in [0, Q].
    """
    device = class_logits.device.type  # "meta" has no autocast
    with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
        classes = class_logits.float().softmax(-1)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", classes, mask_logits.float().sigmoid())


def backbone_module(model: PreTrainedModel) -> nn.Module:
    """The part of a universal model that pretraining fills. EoMT has no such module: its parts are separate
    children."""
    if model.config.model_type in WITH_DECODER:
        return model.model.pixel_level_module.encoder
    return nn.ModuleDict({name: getattr(model, name) for name in ("embeddings", "layers", "layernorm")})


def decoder_module(model: PreTrainedModel) -> nn.Module | None:
    """The module that takes the backbone's feature maps; `None` for EoMT, which has no such module."""
    return model.model.pixel_level_module.decoder if model.config.model_type in WITH_DECODER else None


def switch_masked_attention_off(model: PreTrainedModel) -> None:
    """Start a new EoMT where its published training ends: its queries see every patch.

    Earlier in that training, the masks that a block predicts hide patches from the next one, and the set loss trains
    these masks. A loss on pixels only trains the last masks, so the hidden patches would be arbitrary.
    """
    if model.config.model_type in OF_ONE_SIZE:
        model.attn_mask_probs.zero_()


def anneal_masked_attention(model: PreTrainedModel, beginning: Tensor, done: float) -> None:
    """Switch an EoMT's masked attention off during training, one block after another.

    With n such blocks, training has n + 2 equal parts. In the first, all masks are on; in part i + 1 (i = 1, ..., n),
    the probability of block i falls from 1 to 0 as (1 - t)^0.9, where t in [0, 1] is the position in that part; in the
    last, all masks are off. (EoMT, CVPR 2025, arXiv 2503.19108; parts and power as in its release.)

    Args:
        beginning: the probabilities (n,) at the start of training; the schedule's probabilities are multiplied by
            them.
        done: the share of training that is done, in [0, 1].
    """
    blocks = torch.arange(1, len(beginning) + 1)
    share = (done * (len(beginning) + 2) - blocks).clamp(0, 1)
    model.attn_mask_probs.copy_(beginning * (1 - share) ** 0.9)


@contextlib.contextmanager
def with_settled_masked_attention(model: PreTrainedModel) -> Iterator[None]:
    """Round the probabilities of an EoMT's masked attention: in evaluation too, the library draws at random which
    queries a probability between 0 and 1 masks."""
    if model.config.model_type not in OF_ONE_SIZE:
        yield
        return
    probabilities = model.attn_mask_probs
    model.attn_mask_probs = probabilities.round()
    try:
        yield
    finally:
        model.attn_mask_probs = probabilities


@contextlib.contextmanager
def _without_masks_of_blocks(model: PreTrainedModel) -> Iterator[None]:
    """In training mode, EoMT predicts masks in every block for its set loss, even if they hide nothing
    (`attn_mask_probs` 0). Only the outermost module's mode decides that; dropout is in the inner modules."""
    training, model.training = model.training, model.training and model.config.model_type not in OF_ONE_SIZE
    try:
        with contextlib.nullcontext() if training else with_settled_masked_attention(model):
            yield
    finally:
        model.training = training


@contextlib.contextmanager
def _criterion_records(model: PreTrainedModel, layers: list[Layer]) -> Iterator[None]:
    """Append the predictions that the library passes to the criterion, once or per layer. EoMT returns those of its
    earlier layers in no other way."""

    def record(masks_queries_logits, class_queries_logits, mask_labels, class_labels, auxiliary_predictions=None):
        earlier = [(one["class_queries_logits"], one["masks_queries_logits"]) for one in auxiliary_predictions or []]
        layers.extend(Layer(*one) for one in [*earlier, (class_queries_logits, masks_queries_logits)])
        return {}

    model.criterion.forward = record
    try:
        yield
    finally:
        del model.criterion.forward


@torch.no_grad()
def initialize_by_own_rule(model: PreTrainedModel, names: set[str], backbone: nn.Module) -> None:
    """Draw the named parameters again in place, as the library draws them.

    Its rules apply to whole layers (a decoder layer draws its attentions), and torch's attention is drawn even if it
    is marked as initialised. So every module outside the backbone is drawn, and the other parameters are restored.
    """
    if not names:
        return
    inside, backbones = set(backbone.modules()), {id(tensor) for tensor in backbone.parameters()}
    tensors = {name: p for name, p in [*model.named_parameters(), *model.named_buffers()] if id(p) not in backbones}
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name not in names}
    marks = {name: getattr(tensor, "_is_hf_initialized", False) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor._is_hf_initialized = False  # transformers skips tensors with this flag

    def draw(module: nn.Module) -> None:
        for child in module.children():
            draw(child)
        if module not in inside:
            model._init_weights(module)

    draw(model)
    for name, tensor in tensors.items():
        tensor._is_hf_initialized = marks[name]
        if name in kept:
            tensor.copy_(kept[name])
