"""Mean intersection over union, from one confusion matrix that is filled as predictions come.

The interface, the keys and the numbers are those of `evaluate`'s own mean_iou; what differs: nothing is stored but a
C x C matrix (on the batches' device), a value that is no class is an error and not dropped, and processes sum their
matrices. The file stands alone: `evaluate.load("<path of this file>", num_labels=19)` works without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

_DESCRIPTION = (
    "IoU is the overlap of prediction and truth divided by their union; the mean is over classes that occur."
)
_KWARGS = """
Args:
    predictions: class ids (H, W) or (B, H, W), or a list of maps of different sizes.
    references: the true class ids, of the same shapes.
    num_labels: the number of classes, given at load or at compute.
    ignore_index: pixels whose reference is this do not count. Default 255.
Returns:
    mean_iou, mean_accuracy, overall_accuracy: floats; per_category_iou, per_category_accuracy: float64 (num_labels,),
    NaN for a class that does not occur. Fractions.
"""


class MeanIoU(evaluate.Metric):
    """Mean IoU over a confusion matrix; memory does not grow with the number of images.

    Args:
        num_labels: C, the number of classes. `None`: it must be given to `compute`, which then takes all maps at once.
        ignore_index: pixels whose reference is this do not count.

    Example:

        >>> metric = MeanIoU(num_labels=2)
        >>> metric.add_batch(predictions=torch.tensor([[0, 1]]), references=torch.tensor([[0, 0]]))
        >>> metric.compute()["mean_iou"]
        0.25
    """

    def __init__(self, *args: Any, num_labels: int | None = None, ignore_index: int = 255, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if num_labels is not None and num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {num_labels}.")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def reset(self) -> None:
        """Forget all that was added."""
        self._counts: Tensor | None = None

    @property
    def confusion_matrix(self) -> Tensor:
        """int64 (C, C): rows are the truth, columns the prediction. May be set, e.g. to the sum over processes.

        Raises:
            ValueError: a label or prediction that is no class was added.
        """
        if self._counts is None:
            return torch.zeros(self._size, self._size, dtype=torch.int64)
        self._raise_if_out_of_range()
        return self._counts[: self._size**2].view(self._size, self._size)

    @confusion_matrix.setter
    def confusion_matrix(self, matrix: Tensor) -> None:
        # One cell more than the matrix has: it counts what belongs nowhere.
        self._counts = torch.cat([matrix.flatten(), matrix.new_zeros(1)])

    @property
    def _size(self) -> int:
        if self.num_labels is None:
            raise ValueError("`num_labels` is not known: give it when the metric is made, or to `compute`.")
        return self.num_labels

    def add(self, *, prediction=None, reference=None, **kwargs: Any) -> None:
        """Add one map (H, W) and its truth."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions=None, references=None, **kwargs: Any) -> None:
        """Add maps and their truths: tensors or arrays (H, W) or (B, H, W), or lists of maps.

        Raises:
            ValueError: the shapes differ. (Values that are no class are found at `compute`, or here on the CPU.)
        """
        if isinstance(predictions, list | tuple) or isinstance(references, list | tuple):
            if len(predictions) != len(references):
                raise ValueError(f"{len(predictions)} predictions were given for {len(references)} references.")
            for prediction, reference in zip(predictions, references, strict=True):
                self._count(_tensor(prediction), _tensor(reference))
        else:
            self._count(_tensor(predictions), _tensor(references))

    def _count(self, predictions: Tensor, references: Tensor) -> None:
        if predictions.shape != references.shape:
            raise ValueError(
                f"predictions have the shape {tuple(predictions.shape)} and references {tuple(references.shape)}; "
                "resize the predictions to the labels' size."
            )
        size = self._size
        truth, guess = references.flatten().long(), predictions.flatten().to(references.device).long()
        counts = truth != self.ignore_index
        known = (truth >= 0) & (truth < size) & (guess >= 0) & (guess < size)
        # Cells: size * truth + prediction; then one for pixels that are no class, and one for those to ignore.
        cells = torch.where(known, size * truth + guess, size * size)
        cells = torch.where(counts, cells, size * size + 1)
        added = torch.bincount(cells, minlength=size * size + 2)[:-1]
        self._counts = added if self._counts is None else self._counts.to(added.device) + added
        if added.device.type == "cpu" and added[-1]:  # elsewhere looking would make the host wait
            self._raise_out_of_range(truth[counts & ~known], guess[counts & ~known])

    def _raise_if_out_of_range(self) -> None:
        if self._counts[-1]:
            raise ValueError(
                f"{int(self._counts[-1])} pixels had a label or prediction outside [0, {self._size}) that is not "
                f"ignore_index {self.ignore_index}. Map the labels to class ids before scoring."
            )

    def _raise_out_of_range(self, truth: Tensor, guess: Tensor) -> None:
        self.reset()  # what was added so far is no score of anything
        values = {
            what: [v for v in t.unique().tolist() if not 0 <= v < self._size]
            for what, t in (("references", truth), ("predictions", guess))
        }
        found = " and ".join(f"{what} hold {v[:5]}" for what, v in values.items() if v)
        raise ValueError(
            f"{found}: expected class ids in [0, {self._size}), or ignore_index {self.ignore_index} in references. "
            "Map the labels to class ids before scoring."
        )

    def compute(
        self,
        *,
        predictions=None,
        references=None,
        num_labels: int | None = None,
        ignore_index: int | None = None,
        nan_to_num: float | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The scores of all that was added since the last time, and of what is given here."""
        if kwargs:
            raise ValueError(
                f"MeanIoU.compute does not know {', '.join(kwargs)}: map the labels when the data set is loaded."
            )
        for name, value in (("num_labels", num_labels), ("ignore_index", ignore_index)):
            known = getattr(self, name)
            if value is not None and value != known:
                if self._counts is not None:
                    raise ValueError(f"`{name}={value}`, but maps were already added with {name}={known}.")
                setattr(self, name, value)
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        return self._compute(nan_to_num=nan_to_num)

    def _compute(self, nan_to_num: float | None = None) -> dict[str, Any]:
        matrix = self.confusion_matrix.cpu().numpy().astype(np.float64)
        self.reset()
        correct, truth, guess = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
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
        return {
            k: type(v)(np.nan_to_num(v, nan=nan_to_num)) if isinstance(v, float) else np.nan_to_num(v, nan=nan_to_num)
            for k, v in scores.items()
        }


def _nanmean(values: Sequence[float]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "iub":
        raise ValueError(f"Class ids must be integers, found an array of {array.dtype}.")
    return torch.from_numpy(array.astype(np.int64) if array.dtype in (np.uint16, np.uint32, np.uint64) else array)
