"""From a stream's micro-batches of bytes to what an objective is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.transforms import normalize


def to_device(batch: dict[str, Any], device: torch.device, image_mean: Tensor, image_std: Tensor) -> dict[str, Tensor]:
    """The batch's tensors on the device, images normalised, labels long; ids and the like stay behind."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
    for name in [name for name, value in batch.items() if value.dim() == 4]:  # the images, by view
        own_valid = name.split("_")[0] + "_valid"  # of "partner_..." and "second_crop"
        valid = batch[own_valid if own_valid in batch else "valid"]
        batch[name] = normalize(batch[name], image_mean, image_std, valid)
    if "labels" in batch:
        batch["labels"] = batch["labels"].long()
    return batch


def share_counts(micro_batches: Sequence[tuple[dict, dict | None]], accelerator: Accelerator) -> None:
    """Put the global counts that the losses divide by into the batches of one optimizer step.

    A loss is a sum over N pixels of the whole step. Accelerate divides it by the accumulation steps and DDP averages
    gradients over processes, so each micro-batch divides by N / (processes x accumulation steps).
    """
    counts = torch.zeros(3, dtype=torch.int64, device=accelerator.device)
    for labeled, unlabeled in micro_batches:
        counts[0] += (labeled["labels"] != 255).sum()
        counts[1] += labeled["valid"].sum()
        if unlabeled is not None:
            counts[2] += unlabeled["valid"].sum()
    shares = accelerator.reduce(counts, "sum").float() / (accelerator.num_processes * len(micro_batches))
    for labeled, unlabeled in micro_batches:
        labeled["num_labels"], labeled["num_pixels"] = shares[0], shares[1]
        if unlabeled is not None:
            unlabeled["num_pixels"] = shares[2]
