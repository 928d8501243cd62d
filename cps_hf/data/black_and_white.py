"""Masks of two classes that are drawn in black and white: 0 and 255, where 255 would be ignored."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from datasets import Dataset, Image

from .labels import BLACK_AND_WHITE, IGNORE_INDEX, LabelEncoding
from .reading import read_label
from .table import as_typed

logger = logging.getLogger(__name__)

MASKS = 100  # looked at, evenly spaced; the first other value ends it


def settled(dataset: Dataset, what: str) -> Dataset:
    """The data set, its labels coded as `{0: 0, 255: 1}` where two classes are named, nobody said how they are coded,
    and the masks hold 0 and 255 alone. It is said.

    Of a large set some masks are looked at. A 1 in another one is an error when it is read, so that nothing is
    silently taken for what it is not.

    Args:
        what: how the log calls it.
    """
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    if encoding is None or len(encoding.names) != 2 or encoding.has_table:
        return dataset
    feature = Image(decode=False, id=dataset.features["label"].id)
    masks = dataset.select_columns("label").with_format(None).cast_column("label", feature)
    found: set[int] = set()
    for index in range(0, len(masks), max(1, -(-len(masks) // MASKS))):
        try:
            found |= set(np.unique(read_label(masks[index]["label"], encoding, name=f"row {index}")).tolist())
        except ValueError:
            continue  # whoever reads it for good says what is wrong
        if found - {0, IGNORE_INDEX}:
            return dataset
    if found != {0, IGNORE_INDEX}:
        return dataset
    logger.warning(
        "%s: the masks hold 0 and 255 alone, so that 255 is %r and nothing is ignored. If 255 means ignored: %s.",
        *(what, encoding.names[1], as_typed(values={0: 0, 1: 1, IGNORE_INDEX: IGNORE_INDEX})),
    )
    return dataset.cast_column("label", replace(encoding, values=dict(BLACK_AND_WHITE)).to_feature())
