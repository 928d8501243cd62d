"""Scoring branches on whole images while training: every branch, and the mean of their probabilities.

Each image is normalised and predicted once a branch; what is kept is one confusion matrix a row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data.transforms import normalize
from .inference import predict_logits
from .metrics.mean_iou import MeanIoU


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How an image becomes logits: its normalisation, its device, and `predict_logits`' own arguments.

    Args:
        image_mean, image_std: (3,) each, on `device`.
        options: `mode`, `crop_size`, `stride`, `window_batch_size` of `cps_hf.inference.predict_logits`.
    """

    image_mean: Tensor
    image_std: Tensor
    device: torch.device
    options: dict[str, Any]

    @torch.no_grad()
    def logits(self, branch: nn.Module, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) on the device -> (B, C, H, W)."""
        pixel_values = normalize(images, self.image_mean, self.image_std)
        return predict_logits(branch, pixel_values, **self.options)

    def batches(self, samples: Iterable[list[dict[str, Any]]]) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
        """Lists of samples -> (samples of one size, their images as uint8 (B, 3, H, W) on the device)."""
        for batch in samples:
            by_size: dict[torch.Size, list[dict[str, Any]]] = {}
            for sample in batch:
                by_size.setdefault(sample["image"].shape, []).append(sample)
            for group in by_size.values():
                yield group, torch.stack([s["image"] for s in group]).to(self.device)


def evaluate_branches(
    branches: Sequence[nn.Module],
    samples: Iterable[list[dict[str, Any]]],
    predictor: Predictor,
    *,
    num_labels: int,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda matrix: matrix,
    extra: dict[str, nn.Module] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores by row: "branch_0", "branch_1", ..., "mean" (of the branches' probabilities, with two or more), `extra`.

    Args:
        samples: lists of {"image": uint8 (3, H, W), "label": uint8 (H, W), ...}: this process's share.
        extra: further networks to score, by name; they are no part of the mean.

    Returns:
        For each row what `MeanIoU.compute` gives, as plain Python floats and lists of floats.
    """
    rows = {f"branch_{i}": branch for i, branch in enumerate(branches)} | (extra or {})
    names = [*rows, "mean"] if len(branches) > 1 else list(rows)
    metrics = {name: MeanIoU(num_labels=num_labels) for name in names}
    with evaluating([*rows.values()]):
        for group, images in predictor.batches(samples):
            labels = torch.stack([s["label"] for s in group]).to(images.device)
            mean_probs = 0
            for name, branch in rows.items():
                logits = predictor.logits(branch, images)
                metrics[name].add_batch(predictions=logits.argmax(1), references=labels)
                if "mean" in metrics and name.startswith("branch_"):
                    mean_probs = mean_probs + logits.softmax(1)
            if "mean" in metrics:
                metrics["mean"].add_batch(predictions=mean_probs.argmax(1), references=labels)
    scores = {}
    for name, metric in metrics.items():
        metric.confusion_matrix = sum_over_processes(metric.confusion_matrix)
        scores[name] = plain(metric.compute())
    return scores


def branch_agreement(
    branches: Sequence[nn.Module],
    samples: Iterable[list[dict[str, Any]]],
    predictor: Predictor,
    *,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> float:
    """The share of pixels for which all branches predict one class.

    On whole unlabeled images, in evaluation mode, without CutMix. It is what the overlap figure of the paper shows.
    Collapse agrees too, so read it beside the scores.
    """
    counts = torch.zeros(2, dtype=torch.float64)
    with evaluating(branches):
        for _, images in predictor.batches(samples):
            first, *others = (predictor.logits(branch, images).argmax(1) for branch in branches)
            same = torch.ones_like(first, dtype=torch.bool)
            for other in others:
                same &= first == other
            counts += torch.tensor([same.sum().item(), same.numel()], dtype=torch.float64)
    agreed, total = sum_over_processes(counts).tolist()
    return agreed / total


@contextmanager
def evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """The networks in evaluation mode; afterwards each is as it was."""
    were_training = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, training in zip(networks, were_training, strict=True):
            network.train(training)


def plain(scores: dict[str, Any]) -> dict[str, Any]:
    """Python floats and lists in place of numpy's, so that JSON and YAML can hold them."""
    return {
        key: [float(v) for v in value] if hasattr(value, "__len__") else float(value) for key, value in scores.items()
    }
