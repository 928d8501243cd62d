"""The set loss of mask-classification networks, with divisors that make it independent of how a batch is split.

The own loss of Mask2Former, MaskFormer and EoMT turns each class in an image's labels into a target with a mask, and
matches queries to targets. The network supplies the matching and the terms (`StridedLogits.queries`); this module
divides. Dividing by the masks and queries of one call, as the library does, would change the gradient with several
processes and with accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import IGNORE_INDEX
from .strided import Logits, StridedLogits


def present_classes(labels: Tensor) -> Tensor:
    """Which classes occur in each image's labels (B, H, W), bool (B, 255). Each is a target of the set loss."""
    found = torch.zeros(len(labels), IGNORE_INDEX + 1, dtype=torch.bool, device=labels.device)
    return found.scatter_(1, labels.flatten(1), True)[:, :IGNORE_INDEX]


def labeled_set_loss(logits: Logits, labels: Tensor, *, num_targets: Tensor | float | None = None) -> Tensor:
    """The network's own set loss on label maps: mask terms divided by the number of targets, class terms by the sum of
    the queries' weights, as in the networks' papers.

    Args:
        logits: (B, C, H, W), `StridedLogits` with queries.
        labels: long (B, H, W); pixels equal to 255 have no effect. An image without other pixels adds nothing.
        num_targets: the number of targets to divide by, a share of the whole step's. If `None`, this call's.

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
    """The network's own set loss on pseudo labels: each image's loss times its number of taught pixels, summed over
    images and divided by a count.

    The number of targets in pseudo labels is a count of predictions, by which `labeled_set_loss` would divide. Here
    each image has the same weight as in a loss on pixels.

    Args:
        logits: (B, C, H, W), `StridedLogits` with queries.
        labels: long (B, H, W), class ids; pixels equal to 255 are not taught.
        valid: bool (B, H, W); pixels where it is false are not taught. If `None`, all are valid.
        count: the divisor of the sum. If `None`, the number of taught pixels.

    Returns:
        A scalar. Zero, with zero gradients, if no pixel is taught.

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
            "The set loss needs the predictions of a network's queries, but these logits have no queries. The network "
            "has no set loss, or it was called without gradient or without `Branch.keep_queries`."
        )
    return logits.queries
