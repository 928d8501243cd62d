"""The set loss of mask-classification networks, divided so that it does not depend on how a batch is split.

Such a network's own loss (Mask2Former, MaskFormer, EoMT) makes a target of each class that an image's labels contain,
its mask, and matches queries to targets. The matching and the terms are the network's (`StridedLogits.queries`); this
module only divides. The libraries divide by the masks and queries of one call, which would give other gradients on
several processes and with accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import IGNORE_INDEX
from .strided import Logits, StridedLogits


def count_targets(labels: Tensor) -> Tensor:
    """How many classes the labels (B, H, W) of each image contain, long (B,); ignored pixels aside."""
    found = torch.zeros(len(labels), IGNORE_INDEX + 1, dtype=torch.long, device=labels.device)
    return found.scatter_(1, labels.flatten(1), 1)[:, :IGNORE_INDEX].sum(1)


def labeled_set_loss(logits: Logits, labels: Tensor, *, num_targets: Tensor | float | None = None) -> Tensor:
    """The network's own set loss on label maps: mask terms divided by the number of targets, class terms by the sum of
    the queries' weights, as in the networks' papers.

    Args:
        logits: (B, C, H, W), `StridedLogits` with queries.
        labels: long (B, H, W); pixels equal to 255 have no effect. An image without another pixel adds nothing.
        num_targets: what stands for the number of targets, a share of the whole step's. `None`: that of this call.

    Returns:
        A scalar. Zero, with zero gradients, when no pixel is labeled.

    Raises:
        TypeError: the logits have no queries.
    """
    sums = _queries(logits).set_loss_sums(labels)
    count = sums.targets.sum() if num_targets is None else torch.as_tensor(num_targets)
    weights = _weights_of_queries(sums, count, images=len(labels))
    return sums.masks.sum() / count.clamp(min=1e-9) + sums.classes.sum() / weights.clamp(min=1e-9)


def pseudo_labeled_set_loss(
    logits: Logits, labels: Tensor, *, valid: Tensor | None = None, count: Tensor | float | None = None
) -> Tensor:
    """The network's own set loss on pseudo labels: each image's own loss, times the number of its pixels that teach,
    summed over images and divided by a count.

    How many targets pseudo labels contain is a count of predictions, so `labeled_set_loss` would divide by no count of
    data. Here an image weighs as much as in a loss on pixels.

    Args:
        logits: (B, C, H, W), `StridedLogits` with queries.
        labels: long (B, H, W), class ids; pixels equal to 255 teach nothing.
        valid: bool (B, H, W); pixels where it is false teach nothing. `None`: all are valid.
        count: what the sum is divided by. `None`: the number of pixels that teach.

    Returns:
        A scalar. Zero, with zero gradients, when no pixel teaches.

    Raises:
        TypeError: the logits have no queries.
    """
    if valid is not None:
        labels = labels.masked_fill(~valid, IGNORE_INDEX)
    sums = _queries(logits).set_loss_sums(labels)
    taught = (labels != IGNORE_INDEX).flatten(1).sum(1)
    weights = _weights_of_queries(sums, sums.targets, images=1)
    losses = sums.masks / sums.targets.clamp(min=1) + sums.classes / weights.clamp(min=1e-9)
    count = taught.sum() if count is None else torch.as_tensor(count)
    return (taught * losses).sum() / count.clamp(min=1e-9)


def _weights_of_queries(sums, targets: Tensor, *, images: int) -> Tensor:
    """The sum of the queries' weights: 1 with a target, else `no_object_weight`."""
    return targets + sums.no_object_weight * (images * sums.queries - targets)


def _queries(logits: Logits):
    if not isinstance(logits, StridedLogits) or logits.queries is None:
        raise TypeError(
            "The set loss needs what a network's queries say, and these logits carry none: the network has no set "
            "loss, or it was called without gradient or without `Branch.keep_queries`."
        )
    return logits.queries
