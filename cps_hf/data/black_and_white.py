"""Masks of two classes drawn in black and white: 0 and 255, where 255 would be ignored."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from datasets import Dataset, Image

from .labels import BLACK_AND_WHITE, IGNORE_INDEX, LabelEncoding
from .reading import read_label
from .table import as_typed

logger = logging.getLogger(__name__)

MASKS = 100  # sampled, evenly spaced; sampling stops at the first other value


def settled(dataset: Dataset, what: str) -> Dataset:
    """The data set, with labels coded as `{0: 0, 255: 1}` if there are two named classes, no coding is given, and the
    masks contain only 0 and 255. This is logged.

    Only some masks of a large set are sampled. If another mask contains a 1, reading it is an error, so that nothing
    is silently misread.

    Args:
        what: the set's name in the log.
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
            continue  # reported when the mask is used
        if found - {0, IGNORE_INDEX}:
            return dataset
    if found != {0, IGNORE_INDEX}:
        return dataset
    logger.warning(
        "%s: the masks contain only 0 and 255, so 255 is %r and nothing is ignored. If 255 means ignored: %s.",
        *(what, encoding.names[1], as_typed(values={0: 0, 1: 1, IGNORE_INDEX: IGNORE_INDEX})),
    )
    return dataset.cast_column("label", replace(encoding, values=dict(BLACK_AND_WHITE)).to_feature())
