"""Evaluates branches on whole images: scores of every branch and of their mean, agreement, predictions.

Each image is normalised once and predicted once per branch. Each row of the table needs one confusion matrix, and the
counts of each image, with which `cps_hf.metrics.bootstrap` tests whether a difference is beyond chance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..config import EvaluationConfig
from ..data.streams import EvaluationStream
from ..data.transforms import normalize
from ..functional import IGNORE_INDEX
from ..inference.windows import add_probabilities, class_ids, default_stride, predict, predict_each, predict_logits
from ..metrics.bootstrap import ImageCounts
from ..metrics.mean_iou import IoUCounter
from .module import TrainingModule
from .processes import together
from .sharding import whole

logger = logging.getLogger(__name__)

Samples = list[dict[str, Any]]

MOST_COUNTS = 2**24
"""The limit of counts per row and process: 128 MiB, e.g. 37 000 images of 150 classes. Above it, none are kept."""


class Agreement(NamedTuple):
    """Two shares of pixels: where all branches predict the same class; and, for the branch where it is largest, the
    share of its most common class."""

    agreement: float
    commonest_class: float


class Evaluator:
    """Evaluates a run's branches with the run's evaluation settings. Every process evaluates its share of the images.

    Args:
        module: each of its branches maps `pixel_values (B, 3, H, W)` to `logits (B, C, H, W)`. Its teacher and its
            branches' averages, if any, are scored too, but are not part of the mean.
        crop_size: height and width of training crops, the default window size of `evaluation`.
        skip_bad_samples: whether agreement skips images that cannot be read.

    Attributes:
        confusion_matrices: of the newest scores, int64 (C, C) by row, over all processes.
        image_counts: the same per image, in the data set's order and equal on every process. Empty if there are more
            than `MOST_COUNTS`.
    """

    def __init__(
        self,
        module: TrainingModule,
        accelerator: Accelerator,
        evaluation: EvaluationConfig,
        *,
        num_labels: int,
        crop_size: Sequence[int],
        image_mean: Sequence[float],
        image_std: Sequence[float],
        num_workers: int = 0,
        skip_bad_samples: bool = False,
    ):
        self.module, self.accelerator = module, accelerator
        self.branches = module.branches
        self.num_labels, self.device = num_labels, accelerator.device
        self.batch_size, self.num_workers = evaluation.per_device_eval_batch_size, num_workers
        self.skip_bad_samples = skip_bad_samples
        self.confusion_matrices: dict[str, Tensor] = {}  # of the newest scores, by row; over all processes
        self.image_counts: dict[str, ImageCounts] = {}
        self.agreed_accuracy: float | None = None  # of the newest scores
        self.mean, self.std = (torch.tensor(v, device=self.device) for v in (image_mean, image_std))
        self.shrink = evaluation.eval_shrink
        self.options: dict[str, Any] = {"mode": evaluation.eval_mode}
        if evaluation.eval_mode == "sliding":
            crop = tuple(evaluation.eval_crop_size or crop_size)
            stride = tuple(evaluation.eval_stride or default_stride(crop))
            self.options |= {"crop_size": crop, "stride": stride, "window_batch_size": self.batch_size}

    def scores(self, dataset) -> dict[str, dict[str, Any]]:
        """The results of `IoUCounter.compute` by row (`TrainingModule.networks`, and "mean" of the branches'
        probabilities), as plain floats and lists. The same on every process.

        Also sets `agreed_accuracy`: among the labeled pixels where all networks that make pseudo labels
        (`TrainingModule.labeling`) predict the same class, the share of correct predictions. NaN if there is no such
        pixel, `None` if there is only one such network.

        Raises:
            ValueError: an image or a label cannot be read.
            OtherProcessError: on the other processes, when one raised.
        """
        self.image_counts = {}
        rows = self.module.networks()
        of_branches = [f"branch_{i}" for i in range(len(self.branches))]
        of_branches += ["mean"] if len(self.branches) > 1 else []
        names = [*rows, *(name for name in of_branches if name not in rows)]
        counted = {name: _Counted(self.num_labels) for name in names}
        right_and_agreed = torch.zeros(2, dtype=torch.int64, device=self.device)
        with together(self.accelerator), whole(self.module), self.accelerator.autocast(), evaluating([*rows.values()]):
            for group, images in self._batches(_numbered(self.stream(dataset))):
                labels = torch.stack([s["label"] for s in group]).to(self.device)
                numbers = [s["number"] for s in group]
                options = {"target_size": tuple(images.shape[-2:]), **self.options}
                images = self._seen(images)
                predicted = predict_each(self.branches, images, num_labels=self.num_labels, **options)
                of_rows = dict(zip(of_branches, predicted, strict=True))
                for name in rows.keys() - of_rows.keys():
                    of_rows[name] = predict(rows[name], images, **options)
                for name, predictions in of_rows.items():
                    counted[name].add(predictions, labels, numbers)
                if self.module.labeling:
                    right_and_agreed += _right_and_agreed([of_rows[name] for name in self.module.labeling], labels)
        for name, row in counted.items():
            self.confusion_matrices[name] = row.metric.confusion_matrix = self._sum(row.metric.confusion_matrix)
        self.image_counts = self._gathered(counted)
        right, agreed = self._sum(right_and_agreed).tolist()
        self.agreed_accuracy = (right / agreed if agreed else math.nan) if len(self.module.labeling) > 1 else None
        with together(self.accelerator):
            return {name: plain(row.metric.compute()) for name, row in counted.items()}

    def agreement(self, dataset) -> Agreement:
        """How far the branches agree, and the share of the most common class in their predictions.

        Measured on whole unlabeled images, in evaluation mode, without CutMix, as in the paper's overlap figure.
        Branches that predict one class everywhere agree too, hence the second number. With `skip_bad_samples`, images
        that cannot be read are skipped with a warning.

        Raises:
            ValueError: an image, or every image, cannot be read.
        """
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        by_class = torch.zeros(len(self.branches), self.num_labels, dtype=torch.int64, device=self.device)
        with together(self.accelerator), whole(self.module), self.accelerator.autocast(), evaluating(self.branches):
            skip = self.skip_bad_samples
            samples = self.stream(dataset, name="unlabeled_dataset", with_label=False, keep_errors=skip)
            for _, images in self._batches(_readable(samples)):
                predicted = [self.logits(branch, images).argmax(1) for branch in self.branches]
                first, *others = predicted
                same = torch.ones_like(first, dtype=torch.bool)
                for other in others:
                    same &= first == other
                counts[0] += same.sum()
                counts[1] += same.numel()
                found = [one.flatten().bincount(minlength=self.num_labels) for one in predicted]
                by_class += torch.stack(found)
        by_class = self._sum(by_class)
        agreed, total = self._sum(counts).tolist()
        if total == 0:
            raise ValueError(
                "None of the unlabeled images that agreement is measured on can be read (see the warnings above). "
                "Fix them, or set `agreement_images=0`."
            )
        return Agreement(agreed / total, by_class.max().item() / total)

    def predictions(self, dataset, networks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """(id, uint8 (H, W) class ids on the CPU) of each image, by the mean of the networks' probabilities."""
        samples = self.stream(dataset, name="dataset", with_label=False)
        with whole(self.module):
            for group, images in self._batches(samples):
                with self.accelerator.autocast(), evaluating(networks):  # left again before the caller runs
                    probs = None
                    for network in networks:
                        probs = add_probabilities(probs, self.logits(network, images))
                for sample, prediction in zip(group, class_ids(probs), strict=True):
                    yield sample["id"], prediction.to(torch.uint8).cpu()

    def check_first_batch(self, dataset) -> None:
        """Find a bad label, or an image that a branch cannot process, before step 1 instead of at the first
        evaluation.

        Raises:
            ValueError: names the image and what is wrong with it.
            OtherProcessError: on the other processes, when one raised.
        """
        mode = self.options["mode"]
        with together(self.accelerator), whole(self.module), self.accelerator.autocast(), evaluating(self.branches):
            first = next(iter(self.stream(dataset)), [])
            for group, images in self._batches([first]):
                for i, branch in enumerate(self.branches):
                    try:
                        self.logits(branch, images)
                    except (RuntimeError, ValueError, AssertionError) as error:
                        raise ValueError(
                            f"Branch {i} cannot predict the evaluation image {group[0]['id']!r} of size "
                            f"{images.shape[-2]} x {images.shape[-1]} with `eval_mode={mode}`: {error} "
                            'With `eval_mode="sliding"` it sees windows of `eval_crop_size` only.'
                        ) from error

    def stream(
        self, dataset, *, name: str = "eval_dataset", with_label: bool = True, keep_errors: bool = False
    ) -> EvaluationStream:
        """This process's share of a data set, in lists of whole images."""
        return EvaluationStream(
            dataset,
            name=name,
            with_label=with_label,
            num_labels=self.num_labels,
            batch_size=self.batch_size,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.num_workers,
            keep_errors=keep_errors,
        )

    @torch.no_grad()
    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) on the device -> (B, C, H, W)."""
        return predict_logits(network, self._seen(images), target_size=tuple(images.shape[-2:]), **self.options)

    def _seen(self, images: Tensor) -> Tensor:
        """The network input for uint8 images (B, 3, H, W): normalised and, with `eval_shrink`, shrunk as an exported
        DeepLabV3+ shrinks them (its `input_shrink`)."""
        images = normalize(images, self.mean, self.std)
        return (
            images if self.shrink == 1 else F.avg_pool2d(images, self.shrink, ceil_mode=True, count_include_pad=False)
        )

    def _batches(self, samples: Iterable[Samples]) -> Iterator[tuple[Samples, Tensor]]:
        """Group lists of samples into (samples of one size, their images as uint8 (B, 3, H, W) on the device)."""
        for batch in samples:
            by_size: dict[torch.Size, Samples] = {}
            for sample in batch:
                by_size.setdefault(sample["image"].shape, []).append(sample)
            for group in by_size.values():
                yield group, torch.stack([s["image"] for s in group]).to(self.device)

    def _gathered(self, counted: dict[str, _Counted]) -> dict[str, ImageCounts]:
        """The counts of every image by row, on every process. Empty if a process has too many."""
        too_many = any(row.too_many for row in counted.values())
        shares = gather_object([None if too_many else {name: row.by_number() for name, row in counted.items()}])
        if any(share is None for share in shares):
            logger.warning("The evaluation set is too large to compare networks image by image.")
            return {}
        return {name: _in_order([share[name] for share in shares], self.accelerator.num_processes) for name in counted}

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on the tensor's device."""
        return self.accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)


def _right_and_agreed(predictions: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The number of labeled pixels where all predictions (B, H, W) are right, and where all are the same."""
    first, *others = predictions
    agreed = labels != IGNORE_INDEX
    for other in others:
        agreed = agreed & (first == other)
    return torch.stack([(agreed & (first == labels)).sum(), agreed.sum()])


class _Counted:
    """The counts of one row of the table: over all images, and per image."""

    def __init__(self, num_labels: int):
        self.metric = IoUCounter(num_labels)
        self._own: list[tuple[int, Tensor]] = []  # (the image's number, (3, C) where the predictions are)
        self.too_many = False

    def add(self, predictions: Tensor, labels: Tensor, numbers: Sequence[int]) -> None:
        """Add class ids (B, H, W) and the labels of the images with these numbers."""
        size = self.metric.num_labels
        for prediction, label, number in zip(predictions, labels, numbers, strict=True):
            one = IoUCounter(size)
            one.add(prediction=prediction, reference=label)
            matrix = one.confusion_matrix
            self.metric.confusion_matrix = self.metric.confusion_matrix.to(matrix.device) + matrix
            self.too_many |= 3 * size * len(self._own) >= MOST_COUNTS
            if self.too_many:
                self._own.clear()
            else:
                self._own.append((number, torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])))

    def by_number(self) -> np.ndarray:
        """int64 (n, 3, C), in the order of the images' numbers."""
        own = [counts for _, counts in sorted(self._own, key=lambda entry: entry[0])]
        return torch.stack(own).cpu().numpy() if own else np.zeros((0, 3, self.metric.num_labels), np.int64)


def _in_order(shares: Sequence[np.ndarray], num_processes: int) -> ImageCounts:
    """Merge the processes' shares. The processes take turns: image i belongs to process i % num_processes."""
    counts = np.zeros((sum(map(len, shares)), *shares[0].shape[1:]), np.int64)
    for rank, share in enumerate(shares):
        counts[rank::num_processes] = share
    return ImageCounts(*counts.transpose(1, 0, 2))


def _numbered(batches: Iterable[Samples]) -> Iterator[Samples]:
    """Add to each sample its "number" among this process's samples."""
    count = 0
    for batch in batches:
        yield [{**sample, "number": count + i} for i, sample in enumerate(batch)]
        count += len(batch)


def _readable(batches: Iterable[list[dict[str, Any] | Exception]]) -> Iterator[Samples]:
    """The batches without samples that cannot be read. Each of those is a warning."""
    for batch in batches:
        for error in batch:
            if isinstance(error, Exception):
                logger.warning("Agreement is measured without an image: %s", error)
        yield [sample for sample in batch if not isinstance(sample, Exception)]


@contextmanager
def evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put the networks into evaluation mode, and restore their modes at the end."""
    were_training = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, training in zip(networks, were_training, strict=True):
            network.train(training)


def plain(scores: dict[str, Any]) -> dict[str, Any]:
    """Replace numpy values by Python floats and lists, which JSON and YAML support."""
    return {
        key: [float(v) for v in value] if hasattr(value, "__len__") else float(value) for key, value in scores.items()
    }
