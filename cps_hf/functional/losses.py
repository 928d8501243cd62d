"""Losses on tensors: each is a sum over pixels divided by a count that only depends on the data.

Shapes: B images, C classes, H x W pixels. A term never divides by a count of predictions (such as the pixels above a
threshold). The same global batch therefore gives the same gradient with one process, with several, and with gradient
accumulation: the trainer passes the global count, divided by (processes x accumulation steps), as `count`.
OHEM and Dice are exceptions, as documented there.

Logits are full-size tensors (B, C, H, W), or `StridedLogits`, which are resized piecewise: the same values up to
rounding, with a fraction of the memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .strided import Logits, StridedLogits, add_over_pixels, at_least_float32, map_over_pixels, sum_over_pixels

IGNORE_INDEX = 255
"""The label of pixels that are ignored in all losses and scores."""


def pixel_cross_entropy(
    logits: Logits,
    target: Tensor,
    *,
    valid: Tensor | None = None,
    count: Tensor | float | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Cross entropy summed over pixels, divided by a count.

    Args:
        logits: (B, C, H, W), any float type; the loss is computed in float32 or higher.
        target: long (B, H, W), class ids; pixels equal to `ignore_index` are ignored.
        valid: bool (B, H, W); pixels where it is false are ignored. If `None`, all are valid.
        count: the divisor of the sum. If `None`, the number of valid pixels that are not ignored.
        class_weights: float (C,), the factor on a pixel's loss, by its target.

    Returns:
        A scalar. Zero, with zero gradients, if no pixel counts.
    """
    if valid is not None:
        target = target.masked_fill(~valid, ignore_index)

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        # Summed separately: on a GPU the loss's own sum has no fixed order (docs/determinism.md).
        options = {"weight": class_weights, "ignore_index": ignore_index, "reduction": "none"}
        return F.cross_entropy(at_least_float32(logits), target, **options).sum()

    total = sum_over_pixels(cross_entropy, logits, target)
    if count is None:
        count = (target != ignore_index).sum()
    return total / _at_least_one(count)


def ohem_cross_entropy(
    logits: Logits,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Cross entropy on hard pixels only: online hard example mining, as the CPS release uses it on Cityscapes.

    A pixel is kept if the probability of its true class is at most `max(threshold, p_k)`, where `p_k` is the
    `min_kept`-th smallest such probability among all pixels of this call (ignored pixels count as 1). If fewer than
    `min_kept` pixels are labeled, all are kept. The result is the mean over the kept pixels of *this* call. Unlike the
    other losses, it depends on how the global batch is split over processes and micro-batches.

    Args:
        logits: (B, C, H, W). labels: long (B, H, W). min_kept: pixels of this call, at least 1.
        class_weights: float (C,), the factor on a kept pixel's loss. It has no effect on which pixels are kept.
    """
    if min_kept < 1:
        raise ValueError(f"`min_kept` must be at least 1 pixel, got {min_kept}.")
    labeled = labels != ignore_index

    def true_class_probability(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index, reduction="none")
        return torch.exp(-losses)

    true_class_probs = map_over_pixels(true_class_probability, logits, labels).masked_fill(~labeled, 1.0)
    smallest = true_class_probs.flatten().topk(min(min_kept, labels.numel()), largest=False, sorted=False).values
    p_k = smallest.max()  # like kthvalue, which has no deterministic implementation on a GPU
    # Kept on the device: reading the number of labeled pixels here would make the host wait.
    bound = torch.where(labeled.sum() < min_kept, torch.inf, p_k.clamp(min=threshold))
    kept = labeled & (true_class_probs <= bound)
    return pixel_cross_entropy(logits, labels, valid=kept, class_weights=class_weights, ignore_index=ignore_index)


def focal_loss(
    logits: Logits,
    labels: Tensor,
    *,
    gamma: float = 2.0,
    count: Tensor | float | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The focal loss (Lin et al., ICCV 2017, equation 5) with soft-max: -(1 - p)^gamma log p, p the probability of the
    true class, summed over pixels and divided by a count.

    Args:
        logits: (B, C, H, W). labels: long (B, H, W); pixels equal to `ignore_index` are ignored.
        gamma: 0 is cross entropy; the larger, the less easy pixels count.
        count: the divisor of the sum. If `None`, the number of labeled pixels.
        class_weights: float (C,), the paper's alpha.
    """

    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index, reduction="none")
        # An ignored pixel's loss is 0. The bound keeps the slope of 0^gamma finite where p is 1.
        losses = (-torch.expm1(-losses)).clamp(min=1e-12) ** gamma * losses
        if class_weights is not None:
            losses = losses * class_weights[labels.masked_fill(labels == ignore_index, 0)]
        return losses.sum()

    total = sum_over_pixels(focal, logits, labels)
    return total / _at_least_one((labels != ignore_index).sum() if count is None else count)


def dice_loss(
    logits: Logits,
    labels: Tensor,
    *,
    over_processes: Callable[[Tensor], Tensor] = torch.clone,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The soft Dice loss: the mean over classes of 1 - 2 I / (P + Y). I is the sum of a class's probability over its
    own pixels, P its sum over all labeled pixels, and Y the number of its pixels (Milletari et al. 2016, for one
    class; here without squares, as in Sudre et al. 2017).

    I, P and Y are summed over this call's images and those that other processes see at the same time. A class without
    pixels there is not part of the mean. The loss is not a sum over pixels: with gradient accumulation it is the mean
    of the micro-batches' losses. It therefore depends on how a step is split into micro-batches, but not on how a
    micro-batch is split over processes.

    Args:
        logits: (B, C, H, W). labels: long (B, H, W); pixels equal to `ignore_index` are ignored.
        over_processes: averages a tensor of sums over processes. Sums and their means give the same loss, and the mean
            of the loss's gradient over processes is the gradient of the global loss.
        class_weights: float (C,), the weights of the mean over classes.

    Returns:
        A scalar, the same on all processes. Zero, with zero gradients, if no pixel is labeled.
    """

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        is_class = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=labels.device).view(1, -1, 1, 1)
        probs = at_least_float32(logits).softmax(1).masked_fill((labels == ignore_index).unsqueeze(1), 0)
        return torch.stack([probs.mul(is_class).sum((0, 2, 3)), probs.sum((0, 2, 3)), is_class.sum((0, 2, 3))])

    inside, predicted, there = over_processes(add_over_pixels(own, logits, labels))
    weights = torch.ones_like(inside) if class_weights is None else class_weights.to(inside.dtype)
    weights = weights * (there > 0)
    weights = weights / weights.sum().clamp(min=1e-12)
    union = (predicted + there).clamp(min=1e-12)
    value = (weights * (1 - 2 * inside / union)).sum()
    # The slopes of the value in I and in P: with them, the gradient is that of a sum over pixels.
    of_inside, of_predicted = -2 * weights / union, 2 * weights * inside / union**2

    def slope(logits: Tensor, labels: Tensor) -> Tensor:
        probs = at_least_float32(logits).softmax(1)
        ignored = labels == ignore_index
        true_class = labels.masked_fill(ignored, 0)
        losses = probs.gather(1, true_class.unsqueeze(1)).squeeze(1) * of_inside[true_class]
        return (losses + (probs * of_predicted.view(1, -1, 1, 1)).sum(1)).masked_fill(ignored, 0).sum()

    linear = sum_over_pixels(slope, logits, labels)
    return value + (linear - linear.detach())


def pseudo_label(logits: Logits, *others: Logits, confidence_threshold: float = 0.0) -> Tensor:
    """The most likely class of each pixel (the paper's one-hot labels): long (B, H, W), without gradient.

    255 (ignored) where its soft-max probability is below the threshold. The probabilities of the other classes are
    never computed.

    Args:
        others: more logits of the same images; the probabilities are then the mean over all of them.
    """

    def label(logits: Tensor, *others: Tensor) -> Tensor:
        if others:
            probability, labels = _mean_softmax(logits, *others).max(dim=1)
        elif confidence_threshold == 0:
            return logits.argmax(dim=1)
        else:
            top, labels = at_least_float32(logits).max(dim=1)
            probability = (top - at_least_float32(logits).logsumexp(1)).exp()
        return labels.masked_fill(probability < confidence_threshold, IGNORE_INDEX)

    return map_over_pixels(label, logits, *others)


def probabilities(logits: Logits, *others: Logits) -> Tensor:
    """The soft-max of each pixel's logits at full size, (B, C, H, W), without gradient; of several, the mean."""
    return map_over_pixels(_mean_softmax, logits, *others)


def _mean_softmax(*logits: Tensor) -> Tensor:
    return sum(at_least_float32(one).softmax(1) for one in logits) / len(logits)


def soft_target(logits: Logits, *, temperature: float = 1.0) -> Tensor | StridedLogits:
    """The soft-max of logits / temperature as a target without gradient, for the next two losses.

    For strided logits it is computed piecewise in the loss: they are returned with the temperature.
    """
    if isinstance(logits, StridedLogits):
        return logits._replace(
            values=logits.values.detach(), temperature=logits.temperature * temperature, queries=None
        )
    return (at_least_float32(logits.detach()) / temperature).softmax(1)


def soft_cross_entropy(
    logits: Logits,
    target: Tensor | StridedLogits,
    *,
    valid: Tensor,
    count: Tensor | float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy with soft targets, summed over valid pixels, divided by a count.

    Args:
        logits: (B, C, H, W). target: a `soft_target`, or probabilities (B, C, H, W). valid: bool (B, H, W).
        class_weights: float (C,), the factor on a pixel's loss, by its target's most likely class.
    """

    def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        losses = -(target * at_least_float32(logits).log_softmax(1)).sum(1)
        return _weighted(losses, target, class_weights).masked_fill(~valid, 0).sum()

    return _sum_with_soft_target(cross_entropy, logits, target, valid) / _at_least_one(count)


def squared_difference(
    logits: Logits,
    target: Tensor | StridedLogits,
    *,
    valid: Tensor,
    count: Tensor | float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The squared difference of probabilities, averaged over classes, summed over valid pixels, divided by a count.

    Args:
        logits: (B, C, H, W). target: a `soft_target`, or probabilities (B, C, H, W). valid: bool (B, H, W).
        class_weights: float (C,), the factor on a pixel's loss, by its target's most likely class.
    """

    def difference(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        losses = (at_least_float32(logits).softmax(1) - target).square().mean(1)
        return _weighted(losses, target, class_weights).masked_fill(~valid, 0).sum()

    return _sum_with_soft_target(difference, logits, target, valid) / _at_least_one(count)


def _weighted(losses: Tensor, target: Tensor, class_weights: Tensor | None) -> Tensor:
    """Multiply losses (B, H, W) by the weight of the target's most likely class."""
    return losses if class_weights is None else losses * class_weights[target.argmax(1)]


def _sum_with_soft_target(loss, logits, target, valid) -> Tensor:
    if isinstance(target, Tensor):
        return sum_over_pixels(loss, logits, target, valid)
    return sum_over_pixels(lambda one, other, where: loss(one, other.softmax(1), where), logits, target, valid)


def balanced_class_weights(labels: Tensor, valid: Tensor, num_labels: int, *, power: float) -> Tensor:
    """Class weights that decrease with a class's frequency among the valid pixels of this call: frequency ** -power.

    Their mean over those pixels is 1, so a loss keeps its scale. As with OHEM, they depend on how a batch is split.

    Args:
        labels: long (B, H, W), class ids. valid: bool (B, H, W). power: 0: all pixels equal; 1: all classes equal.

    Returns:
        float (num_labels,). A class without pixels gets the weight of a class with one.
    """
    return frequency_weights(class_counts(labels, num_labels, valid=valid), power=power)


def class_counts(labels: Tensor, num_labels: int, *, valid: Tensor | None = None) -> Tensor:
    """The number of pixels of each class, float (num_labels,).

    Args:
        labels: long (B, H, W). valid: bool (B, H, W), the pixels to count. If `None`, those that are not ignored.
    """
    index = torch.where(labels != IGNORE_INDEX if valid is None else valid, labels, num_labels).flatten()
    counts = torch.zeros(num_labels + 1, device=labels.device).scatter_add_(0, index, torch.ones_like(index).float())
    return counts[:num_labels]


def frequency_weights(counts: Tensor, *, power: float) -> Tensor:
    """A weight per class, count ** -power, scaled so that the mean over the counted pixels is 1.

    Args:
        counts: (C,), pixels by class. power: 0: all pixels equal; 1: all classes equal.

    Returns:
        Like `counts`. A class without pixels gets the weight of a class with one.
    """
    weights = counts.clamp(min=1) ** -power
    return weights * counts.sum() / (counts * weights).sum().clamp(min=1e-12)


def _at_least_one(count: Tensor | float) -> Tensor | float:
    """Make a sum over no pixels zero instead of 0 / 0. Global counts are shares, hence floats below one."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, count, torch.ones_like(count))
    return count if count > 0 else 1.0
