"""What a plan needs to know about the images: how many, their sizes, their classes, grey or colour."""

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
        grey: whether all sampled images are grey.
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
    def of(
        cls,
        labeled: Any,
        unlabeled: Any,
        evaluation: Any,
        class_names: Sequence[str],
        *,
        skip_bad_samples: bool = False,
    ) -> DataFacts:
        """Sample the data sets: a few images of each, and the labels.

        Args:
            labeled, unlabeled, evaluation: data sets of `cps_hf.data` or streams; None if there is none.
            skip_bad_samples: omit training images and labels that cannot be read.

        Raises:
            ValueError: an image or a label cannot be read, or no image can; the message names it.
        """
        sizes, grey, unreadable = [], True, None
        for what, dataset in (("labeled", labeled), ("unlabeled", unlabeled), ("evaluation", evaluation)):
            for row in _some_rows(dataset, what):
                try:
                    size, is_grey = _look_at(row)
                except ValueError as error:
                    if not skip_bad_samples or what == "evaluation":
                        raise
                    unreadable = error
                    continue
                sizes.append(size)
                grey = grey and is_grey
        if not sizes:
            raise unreadable
        some = _evenly(labeled, LABELS_COUNTED) if isinstance(labeled, Dataset) else labeled
        counts = count_class_pixels(some, len(class_names), skip_bad_samples=skip_bad_samples).tolist()
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


def _look_at(row: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
    """An image's height and width, and whether it is grey (of a large one that is read in windows, its middle)."""
    windowed = open_windowed(row, None, with_label=False)
    if windowed is None:
        image = read_image(row["image"], name=repr(id_of(row)))
        height, width = image.shape[-2:]
    else:
        height, width = windowed[0].shape[-2:]
        size = [min(side, 512) for side in (height, width)]
        image = windowed[0].window((height - size[0]) // 2, (width - size[1]) // 2, *size)
    return (height, width), bool((image[:1] == image).all())


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
