"""The math on tensors: every loss is a sum over pixels divided by a count of data.

Shapes: B images, C classes, H x W pixels. A term never divides by a count of predictions (how many pixels passed a
threshold, say), so the same global batch gives the same gradient on one process, on several, and with gradient
accumulation: the trainer passes the global count, divided by (processes x accumulation steps), as `count`.
OHEM and Dice are the exceptions and say so.

Logits are full-size tensors (B, C, H, W), or `StridedLogits`, which are resized and forgotten a piece at a time: the
same numbers to rounding, for a fraction of the memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .strided import Logits, StridedLogits, add_over_pixels, at_least_float32, map_over_pixels, sum_over_pixels

IGNORE_INDEX = 255
"""The label of pixels that no loss and no score looks at."""


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
        logits: (B, C, H, W), any float type; the loss is computed in float32 at least.
        target: long (B, H, W), class ids; pixels equal to `ignore_index` add nothing.
        valid: bool (B, H, W); pixels where it is false add nothing. `None`: all are valid.
        count: what the sum is divided by. `None`: the number of pixels that are neither ignored nor invalid.
        class_weights: float (C,), what a pixel's loss is multiplied with, by its target.

    Returns:
        A scalar. Zero, with zero gradients, when no pixel counts.
    """
    if valid is not None:
        target = target.masked_fill(~valid, ignore_index)

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        # Summed apart: on a GPU the loss's own sum adds in no fixed order (docs/determinism.md).
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
    """Cross entropy on the hard pixels only: online hard example mining, as the CPS release uses it on Cityscapes.

    A pixel is kept when the probability of its true class is at most `max(threshold, p_k)`, where `p_k` is the
    `min_kept`-th smallest such probability among all pixels of this call (ignored pixels count as 1). With fewer than
    `min_kept` labeled pixels, all are kept. The result is the mean over the kept pixels of *this* call: unlike the
    other losses it depends on how the global batch is split over processes and micro-batches.

    Args:
        logits: (B, C, H, W). labels: long (B, H, W). min_kept: pixels of this call, at least 1.
        class_weights: float (C,), what a kept pixel's loss is multiplied with; they do not decide which are kept.
    """
    if min_kept < 1:
        raise ValueError(f"`min_kept` must be at least 1 pixel, got {min_kept}.")
    labeled = labels != ignore_index

    def true_class_probability(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index, reduction="none")
        return torch.exp(-losses)

    true_class_probs = map_over_pixels(true_class_probability, logits, labels).masked_fill(~labeled, 1.0)
    smallest = true_class_probs.flatten().topk(min(min_kept, labels.numel()), largest=False, sorted=False).values
    p_k = smallest.max()  # as kthvalue, which has no deterministic form on a GPU
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
    """The focal loss (Lin et al., ICCV 2017, equation 5) of the soft-max: -(1 - p)^gamma log p, p the probability of
    the true class, summed over pixels and divided by a count.

    Args:
        logits: (B, C, H, W). labels: long (B, H, W); pixels equal to `ignore_index` add nothing.
        gamma: 0 is cross entropy; the larger, the less easy pixels count.
        count: what the sum is divided by. `None`: the number of labeled pixels.
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
    """The soft Dice loss: the mean over classes of 1 - 2 I / (P + Y), with I the sum of a class's probability over its
    own pixels, P its sum over all labeled pixels and Y the number of its pixels (Milletari et al. 2016, of one class;
    here without squares, as Sudre et al. 2017 have it).

    I, P and Y are of this call's images together and of those that other processes see at the same time; a class
    without a pixel there is left out of the mean. It is no sum over pixels: with gradient accumulation it is the mean
    of the micro-batches' own losses, and so depends on how a step is split into those, but not on how a micro-batch
    is split over processes.

    Args:
        logits: (B, C, H, W). labels: long (B, H, W); pixels equal to `ignore_index` add nothing.
        over_processes: gives the mean over processes of a tensor of sums. The loss is the same for sums and their
            means, and the mean over processes of its gradient is the gradient of the loss of all.
        class_weights: float (C,), the weights of the mean over classes.

    Returns:
        A scalar, the same on all processes. Zero, with zero gradients, where no pixel is labeled.
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
    # The slopes of the value in I and in P: with them the gradient is that of a sum over pixels.
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
    """The most likely class of each pixel, one-hot in the paper's words: long (B, H, W), without gradient.

    255 (ignored) where its soft-max probability is below the threshold. The probabilities of the other classes are
    never made.

    Args:
        others: further logits of the same images; then the probabilities are the mean over all of them.
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
    """The soft-max of logits / temperature as a target, without gradient: what the next two losses take.

    Of strided logits it is not made here but in the loss, a piece at a time: they come back with the temperature.
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
        class_weights: float (C,), what a pixel's loss is multiplied with, by its target's most likely class.
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
        class_weights: float (C,), what a pixel's loss is multiplied with, by its target's most likely class.
    """

    def difference(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        losses = (at_least_float32(logits).softmax(1) - target).square().mean(1)
        return _weighted(losses, target, class_weights).masked_fill(~valid, 0).sum()

    return _sum_with_soft_target(difference, logits, target, valid) / _at_least_one(count)


def _weighted(losses: Tensor, target: Tensor, class_weights: Tensor | None) -> Tensor:
    """Losses (B, H, W) times the weight of the target's most likely class."""
    return losses if class_weights is None else losses * class_weights[target.argmax(1)]


def _sum_with_soft_target(loss, logits, target, valid) -> Tensor:
    if isinstance(target, Tensor):
        return sum_over_pixels(loss, logits, target, valid)
    return sum_over_pixels(lambda one, other, where: loss(one, other.softmax(1), where), logits, target, valid)


def balanced_class_weights(labels: Tensor, valid: Tensor, num_labels: int, *, power: float) -> Tensor:
    """Weights that fall with a class's frequency among the valid pixels of this call: frequency ** -power.

    Their mean over those pixels is 1, so a loss keeps its size. As with OHEM, they depend on how a batch is split.

    Args:
        labels: long (B, H, W), class ids. valid: bool (B, H, W). power: 0 weighs all alike, 1 each class alike.

    Returns:
        float (num_labels,); a class without a pixel has the weight of one with a single pixel.
    """
    return frequency_weights(class_counts(labels, num_labels, valid=valid), power=power)


def class_counts(labels: Tensor, num_labels: int, *, valid: Tensor | None = None) -> Tensor:
    """How many pixels each class has, float (num_labels,).

    Args:
        labels: long (B, H, W). valid: bool (B, H, W), the pixels that are counted. `None`: those not ignored.
    """
    index = torch.where(labels != IGNORE_INDEX if valid is None else valid, labels, num_labels).flatten()
    counts = torch.zeros(num_labels + 1, device=labels.device).scatter_add_(0, index, torch.ones_like(index).float())
    return counts[:num_labels]


def frequency_weights(counts: Tensor, *, power: float) -> Tensor:
    """A weight a class, count ** -power, scaled so that the mean over the counted pixels is 1.

    Args:
        counts: (C,), pixels by class. power: 0 weighs all pixels alike, 1 each class alike.

    Returns:
        As `counts`; a class without a pixel has the weight of one with a single pixel.
    """
    weights = counts.clamp(min=1) ** -power
    return weights * counts.sum() / (counts * weights).sum().clamp(min=1e-12)


def _at_least_one(count: Tensor | float) -> Tensor | float:
    """A sum over no pixels is zero, not zero divided by zero. Global counts are shares, hence floats below one."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, count, torch.ones_like(count))
    return count if count > 0 else 1.0
