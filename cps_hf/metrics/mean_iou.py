"""Mean intersection over union, from one confusion matrix that is updated with each batch of predictions.

The interface, the keys and the numbers are those of `evaluate`'s own mean_iou. The differences: only a C x C matrix is
stored (on the batches' device), a value that is not a class is an error instead of being dropped, and processes can
sum their matrices. This file stands alone: `evaluate.load("<path of this file>", num_labels=19)` works without a
network.
"""

from __future__ import annotations

import os
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = 255  # as in cps_hf.functional, which this file cannot import
STRIP = 2**17  # pixels that are counted at a time: they fit into a CPU's cache

_DESCRIPTION = (
    "IoU is the overlap of prediction and truth divided by their union; the mean is over classes that occur."
)
_KWARGS = """
Args:
    predictions: class ids (H, W) or (B, H, W), or a list of maps of different sizes.
    references: the true class ids, of the same shapes.
    num_labels: the number of classes, given at load or at compute.
    ignore_index: pixels whose reference is this are ignored. Default 255.
    label_map: {found: meant} for the references that are passed with it.
    reduce_labels: references contain 0 for "no class" and 1..C for the classes.
    nan_to_num: the value that replaces NaN.
Returns:
    mean_iou, mean_accuracy, overall_accuracy: floats; per_category_iou, per_category_accuracy: float64 (num_labels,),
    NaN for a class that does not occur. Fractions.
"""


class IoUCounter:
    """All of `MeanIoU`, without `evaluate`: it is created at once, without reading the machine's state or disk.

    Args:
        num_labels: C, the number of classes. If `None`, it must be passed to `compute`, with all maps.
        ignore_index: pixels whose reference is this are ignored.
    """

    def __init__(self, num_labels: int | None = None, ignore_index: int = IGNORE_INDEX):
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added."""
        self._matrix: Tensor | None = None

    @property
    def confusion_matrix(self) -> Tensor:
        """int64 (C, C) on the device of the maps: rows are the truth, columns the prediction.

        May be set, e.g. to the sum over processes.
        """
        if self._matrix is None:
            return torch.zeros(self._size, self._size, dtype=torch.int64)
        return self._matrix

    @confusion_matrix.setter
    def confusion_matrix(self, matrix: Tensor) -> None:
        if tuple(matrix.shape) != (self._size, self._size):
            raise ValueError(f"The confusion matrix must be ({self._size}, {self._size}), got {tuple(matrix.shape)}.")
        self._matrix = matrix

    @property
    def _size(self) -> int:
        if self.num_labels is None:
            raise ValueError("`num_labels` is not known: pass it to the constructor or to `compute`.")
        if self.num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {self.num_labels}.")
        return self.num_labels

    # evaluate appends to the docstrings of the next three methods, so each must have one.

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one map (H, W) and its truth."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Add maps and their truths: tensors or arrays (H, W) or (B, H, W), or lists of maps.

        Raises:
            ValueError: shapes differ, values are not integers, or a pixel that counts has no class.
        """
        for guess, truth in _pairs(predictions, references):
            self._count(guess, truth)

    def _count(self, guess: Tensor, truth: Tensor) -> None:
        if guess.shape != truth.shape:
            raise ValueError(
                f"predictions have the shape {tuple(guess.shape)} and references {tuple(truth.shape)}; "
                "resize the predictions to the labels' size."
            )
        truth = truth.to(guess.device)
        guess, truth, added = guess.flatten(), truth.flatten(), None
        if guess.device.type == "cpu":
            added = self._counted_by_values(guess.numpy(), truth.numpy())
        if added is None:
            added = self._counted_by_classes(guess.long(), truth.long())
        self._matrix = added if self._matrix is None else self._matrix.to(added.device) + added

    def _counted_by_values(self, guess: np.ndarray, truth: np.ndarray) -> Tensor | None:
        """The matrix from a table of all pairs of values in [0, 256), a few pixels at a time. `None` if there are
        other values, or some that are not classes.

        Each pixel costs one shift, one "or" of two bytes and one count. Which values are ignored and which are not
        classes is looked up in the table.
        """
        size, table = self._size, np.zeros(256 * 256, np.int64)
        if size > 256:
            return None
        for start in range(0, guess.size, STRIP):
            a, b = truth[start : start + STRIP], guess[start : start + STRIP]
            if any(one.dtype != np.uint8 and (one.min() < 0 or one.max() > 255) for one in (a, b)):
                return None
            pairs = np.left_shift(a, 8, dtype=np.uint16, casting="unsafe")  # in range, even if the type differs
            np.bitwise_or(pairs, b, out=pairs, dtype=np.uint16, casting="unsafe")
            table += np.bincount(pairs, minlength=256 * 256)
        table = table.reshape(256, 256)
        if 0 <= self.ignore_index < 256:
            table[self.ignore_index] = 0
        matrix = table[:size, :size].copy()
        return torch.from_numpy(matrix) if matrix.sum() == table.sum() else None

    def _counted_by_classes(self, guess: Tensor, truth: Tensor) -> Tensor:
        """The matrix from one count over cells; for other devices and any values. Names values that are not
        classes."""
        size = self._size
        counted = truth != self.ignore_index
        known = (truth >= 0) & (truth < size) & (guess >= 0) & (guess < size)
        # Cells: size * truth + prediction; then one for ignored pixels, and one for those without a class.
        cells = torch.where(known, size * truth + guess, size * size + 1)
        cells = torch.where(counted, cells, size * size)
        # On a GPU bincount makes the host wait, so looking at the last cell has no extra cost.
        counts = torch.bincount(cells, minlength=size * size + 2)
        if counts[-1]:
            self._raise_no_class(guess[counted & ~known], truth[counted & ~known])
        return counts[: size * size].view(size, size)

    def _raise_no_class(self, guess: Any, truth: Any) -> None:
        self.reset()  # what was added so far is not a score of anything
        found = []
        for what, values in (("references", truth), ("predictions", guess)):
            strange = [value for value in sorted(set(values.tolist())) if not 0 <= value < self._size]
            if strange:
                found.append(f"{what} contain {strange[:5]}{' and more' if len(strange) > 5 else ''}")
        raise ValueError(
            f"{' and '.join(found)}: expected class ids in [0, {self._size}), or ignore_index {self.ignore_index} in "
            "references. Map the labels to class ids before scoring."
        )

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        num_labels: int | None = None,
        ignore_index: int | None = None,
        label_map: dict[int, int] | None = None,
        reduce_labels: bool = False,
        nan_to_num: float | None = None,
    ) -> dict[str, Any]:
        """The scores of everything that was added since the last call, and of the arguments; then start again.

        Raises:
            ValueError: as in `add_batch`; or an option was needed when maps were added.
        """
        for name, value in (("num_labels", num_labels), ("ignore_index", ignore_index)):
            known = getattr(self, name)
            if value is not None and value != known:
                if self._matrix is not None:
                    raise ValueError(f"`{name}={value}`, but maps were already added with {name}={known}.")
                setattr(self, name, value)
        if (label_map or reduce_labels) and (references is None or self._matrix is not None):
            raise ValueError(
                "`label_map` and `reduce_labels` apply to references passed to the same call of `compute`, but maps "
                "were added before it. Map those labels before adding them."
            )
        if predictions is not None or references is not None:
            for guess, truth in _pairs(predictions, references):
                self._count(guess, _mapped(truth, label_map, reduce_labels))
        return self._compute(nan_to_num=nan_to_num)

    def _compute(self, nan_to_num: float | None = None) -> dict[str, Any]:
        matrix = self.confusion_matrix.cpu().numpy().astype(np.float64)
        self.reset()
        correct, truth, guess = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        with np.errstate(invalid="ignore"):  # 0 / 0: a class that does not occur
            iou = correct / (truth + guess - correct)
            accuracy = correct / truth
            overall = correct.sum() / truth.sum()
        scores = {
            "mean_iou": _nanmean(iou),
            "mean_accuracy": _nanmean(accuracy),
            "overall_accuracy": float(overall),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }
        if nan_to_num is None:
            return scores
        # As in evaluate: the means are over classes that occur; NaN is only replaced in what is returned.
        filled = {key: np.nan_to_num(value, nan=nan_to_num) for key, value in scores.items()}
        return {key: value if value.ndim else float(value) for key, value in filled.items()}


class MeanIoU(IoUCounter, evaluate.Metric):
    """Mean IoU from a confusion matrix. Memory does not grow with the number of images.

    With several processes, each adds its share, and before `compute` everyone sums:
    `metric.confusion_matrix = accelerator.reduce(metric.confusion_matrix, "sum")`.

    Args:
        num_labels, ignore_index: as in `IoUCounter`. All others are `evaluate.Metric`'s.

    Raises:
        RuntimeError: Python runs without docstrings (`-OO`), to which evaluate appends.

    Example:

        >>> metric = MeanIoU(num_labels=2)
        >>> metric.add_batch(predictions=torch.tensor([[0, 1]]), references=torch.tensor([[0, 0]]))
        >>> metric.compute()["mean_iou"]
        0.25
    """

    def __init__(self, *args: Any, num_labels: int | None = None, ignore_index: int = IGNORE_INDEX, **kwargs: Any):
        if self.compute.__doc__ is None:
            raise RuntimeError(
                "A metric of `evaluate` needs docstrings, which `python -OO` (or PYTHONOPTIMIZE=2) removes. "
                "Start Python with `-O` or without it, or use `IoUCounter`, which has the same methods."
            )
        evaluate.Metric.__init__(self, *args, **kwargs)
        IoUCounter.__init__(self, num_labels, ignore_index)

    def _build_data_dir(self) -> str:
        """Where evaluate would store what is added. Nothing is stored, so no folder is made: the Hugging Face cache
        may be on a read-only disk."""
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )


def _nanmean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _pairs(predictions: Any, references: Any) -> list[tuple[Tensor, Tensor]]:
    """(prediction, truth) by map, or one pair of batches when both are arrays."""
    if not isinstance(predictions, list | tuple) and not isinstance(references, list | tuple):
        return [(_tensor(predictions), _tensor(references))]
    if len(predictions) != len(references):
        raise ValueError(f"Got {len(predictions)} predictions for {len(references)} references.")
    return [(_tensor(guess), _tensor(truth)) for guess, truth in zip(predictions, references, strict=True)]


def _tensor(values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "iub":
            raise ValueError(f"Class ids must be integers, found an array of {array.dtype}.")
        values = torch.from_numpy(np.require(array, requirements="CW"))  # a PIL image's array is read-only
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"Class ids must be integers, found a tensor of {values.dtype}; take the arg max of logits.")
    return values.detach()


def _mapped(truth: Tensor, label_map: dict[int, int] | None, reduce_labels: bool) -> Tensor:
    """References as class ids: first `label_map` (all at once, so that {1: 2, 2: 1} swaps), then one less each."""
    found = truth.long()
    truth = found.clone()
    for value, meant in (label_map or {}).items():
        truth[found == value] = meant
    if reduce_labels:
        truth = torch.where((truth == 0) | (truth == IGNORE_INDEX), IGNORE_INDEX, truth - 1)
    return truth
