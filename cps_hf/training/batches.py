"""Converts a stream's micro-batches of bytes to the batches that an objective is called with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.transforms import normalize
from ..functional import present_classes
from ..objectives import LabeledBatch, UnlabeledBatch


class MicroBatch(NamedTuple):
    """The arguments of one call of the training module, and the ids of their samples."""

    labeled: LabeledBatch
    unlabeled: UnlabeledBatch | None
    ids: dict[str, list[str]]  # "labeled" and "unlabeled"


def to_device(
    batch: dict[str, Any], device: torch.device, image_mean: Tensor, image_std: Tensor
) -> LabeledBatch | UnlabeledBatch:
    """Move a batch's tensors to the device, normalise images and convert labels to long. Ids etc. stay behind.

    Args:
        batch: as `TrainStream` yields it; the labeled stream's has "labels".
    """
    tensors = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
    for name in [name for name, value in tensors.items() if value.dim() == 4]:  # the images, by view
        own_valid = name.split("_")[0] + "_valid"  # of "partner_..." and "second_crop"
        valid = tensors[own_valid if own_valid in tensors else "valid"]
        tensors[name] = normalize(tensors[name], image_mean, image_std, valid)
    tensors |= {name: value.long() for name, value in tensors.items() if name.endswith("labels")}
    return LabeledBatch(**tensors) if "labels" in tensors else UnlabeledBatch(**tensors)


def share_counts(
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    class_counts: Tensor | None = None,
    *,
    with_targets: bool = False,
) -> None:
    """Replace the counts in the batches of one optimizer step by the global counts that losses are divided by.

    A loss is a sum over N pixels of the whole step. Accelerate divides it by the accumulation steps, and DDP averages
    gradients over processes, so each micro-batch divides by N / (processes x accumulation steps).
    The same applies to the targets of the set loss.

    Args:
        class_counts: the labeled set's counts, on the device. If `None`, no class weights are computed from them.
        with_targets: whether the set loss needs the number of targets.
    """
    counts = torch.zeros(4, dtype=torch.int64, device=accelerator.device)
    for labeled, unlabeled, _ in micro_batches:
        counts[0] += labeled.num_labels
        counts[1] += labeled.num_pixels
        if unlabeled is not None:
            counts[2] += unlabeled.num_pixels
        if with_targets:
            counts[3] += present_classes(labeled.labels).sum()
    shares = accelerator.reduce(counts, "sum").float() / (accelerator.num_processes * len(micro_batches))
    for labeled, unlabeled, _ in micro_batches:
        labeled.num_labels, labeled.num_pixels = shares[0], shares[1]
        labeled.num_targets = shares[3] if with_targets else None
        labeled.class_counts, labeled.over_processes = class_counts, partial(accelerator.reduce, reduction="mean")
        if unlabeled is not None:
            unlabeled.num_pixels = shares[2]
