"""Count the pixels of each class in a labeled set, once before training, for class weights."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..functional import IGNORE_INDEX
from .labels import LabelEncoding
from .streams import check_label_range, id_of, label_name, undecoded
from .windowed import label_bands

logger = logging.getLogger(__name__)

ROWS_OF_A_STREAM = 1000
"""Only this many rows of a stream are counted: reading all of it may take hours."""


def count_class_pixels(
    dataset: Any,
    num_labels: int,
    *,
    rank: int = 0,
    num_processes: int = 1,
    num_threads: int = 2,
    skip_bad_samples: bool = False,
) -> Tensor:
    """The pixels per class, int64 (num_labels,), in this process's share of the rows. No image is opened.

    The shares of all processes together are the whole set, or the first `ROWS_OF_A_STREAM` rows of a stream.

    Args:
        dataset: with "image" and "label".
        num_threads: number of labels decoded in parallel.
        skip_bad_samples: skip unreadable labels with a warning.

    Raises:
        ValueError: a label cannot be read or contains an invalid class; the message names the sample.
    """
    dataset = undecoded(dataset, with_label=True, what="train_dataset")
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    if isinstance(dataset, Dataset):
        dataset = dataset.select_columns(["label", "id"])
        rows: Iterable[dict[str, Any]] = (dataset[i] for i in range(rank, len(dataset), num_processes))
    else:
        rows = islice(iter(dataset), rank, ROWS_OF_A_STREAM, num_processes)

    def count(row: dict[str, Any]) -> Tensor | None:
        try:
            counts = torch.zeros(num_labels, dtype=torch.int64)
            for ids in label_bands(row["label"], encoding, name=repr(id_of(row))):
                label = torch.from_numpy(ids)
                check_label_range(label, num_labels, label_name(row))
                counts += torch.bincount(label[label != IGNORE_INDEX].long(), minlength=num_labels)
            return counts
        except ValueError as error:
            if not skip_bad_samples:
                raise
            logger.warning("Class weights are counted without an unreadable label: %s", error)
            return None

    total = torch.zeros(num_labels, dtype=torch.int64)
    for counts in _in_threads(count, rows, num_threads):
        total += 0 if counts is None else counts
    return total


def _in_threads(call: Callable[[Any], Any], items: Iterable[Any], count: int) -> Iterator[Any]:
    """`map`, only a few items ahead, so that not all rows are in memory at once."""
    with ThreadPoolExecutor(count) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
