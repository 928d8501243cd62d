"""What a plan needs to know about the images: how many, their sizes, their classes, gray or color."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..data.class_counts import count_class_pixels
from ..data.reading import read_image
from ..data.streams import id_of, undecoded
from ..data.windowed import open_windowed

LOOKED_AT = 24
"""How many images of each set are opened: enough to know their sizes, few enough to be quick."""
LABELS_COUNTED = 400


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Counts and sizes of a training data set.

    Args:
        num_labeled, num_unlabeled, num_evaluation: numbers of images; 0 if there is no such set, None for a stream.
        height, width: the median image's, in pixels.
        largest: height and width of the sampled image with the most pixels.
        class_shares: shares of the labeled pixels, by class name.
        grey: whether all sampled images are gray.
    """

    num_labeled: int | None
    num_unlabeled: int | None = 0
    num_evaluation: int | None = 0
    height: int
    width: int
    largest: tuple[int, int]
    class_shares: Mapping[str, float] = field(default_factory=dict)
    grey: bool = False

    @classmethod
    def of(cls, labeled: Any, unlabeled: Any, evaluation: Any, class_names: Sequence[str]) -> DataFacts:
        """Sample the data sets: a few images of each, and the labels.

        Args:
            labeled, unlabeled, evaluation: data sets of `cps_hf.data` or streams; None if there is none.

        Raises:
            ValueError: an image or a label cannot be read; the message names it.
        """
        sizes, grey = [], True
        for what, dataset in (("labeled", labeled), ("unlabeled", unlabeled), ("evaluation", evaluation)):
            for row in _some_rows(dataset, what):
                windowed = open_windowed(row, None, with_label=False)
                if windowed is None:
                    image = read_image(row["image"], name=repr(id_of(row)))
                    size = tuple(image.shape[-2:])
                else:  # its middle tells whether it is grey
                    size = tuple(windowed[0].shape[-2:])
                    middle = [min(side, 512) for side in size]
                    image = windowed[0].window((size[0] - middle[0]) // 2, (size[1] - middle[1]) // 2, *middle)
                sizes.append(size)
                grey = grey and bool((image[:1] == image).all())
        some = _evenly(labeled, LABELS_COUNTED) if isinstance(labeled, Dataset) else labeled
        counts = count_class_pixels(some, len(class_names)).tolist()
        total = sum(counts)
        return cls(
            num_labeled=_length(labeled),
            num_unlabeled=_length(unlabeled),
            num_evaluation=_length(evaluation),
            height=round(statistics.median(height for height, _ in sizes)),
            width=round(statistics.median(width for _, width in sizes)),
            largest=max(sizes, key=lambda size: size[0] * size[1]),
            class_shares={name: n / total for name, n in zip(class_names, counts, strict=True)} if total else {},
            grey=grey,
        )


def _some_rows(dataset: Any, what: str):
    if dataset is None:
        return
    rows = undecoded(dataset, with_label=False, what=what)
    yield from _evenly(rows, LOOKED_AT) if isinstance(rows, Dataset) else rows.take(LOOKED_AT)


def _evenly(dataset: Dataset, count: int) -> Dataset:
    count = min(count, len(dataset))
    return dataset.select([i * len(dataset) // count for i in range(count)])


def _length(dataset: Any) -> int | None:
    return 0 if dataset is None else len(dataset) if isinstance(dataset, Dataset) else None
