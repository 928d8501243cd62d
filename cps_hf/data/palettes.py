"""The colours in which a data set's classes are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..visualization.colors import Color, palette
from . import cityscapes, voc
from .labels import LabelEncoding


def official_palette(names: Sequence[str]) -> tuple[tuple[int, int, int], ...] | None:
    """The colours of Cityscapes or VOC where the class names are theirs, in their order; else `None`."""
    known = {cityscapes.NAMES: cityscapes.PALETTE, voc.NAMES: voc.PALETTE}
    return known.get(tuple(names))


def palette_of(feature: Any, names: Sequence[str]) -> Sequence[Color]:
    """The data set's own colours, else those of the official set that has these classes, else colours for all eyes.

    Args:
        feature: of the label column, or none.
    """
    encoding = LabelEncoding.from_feature(feature) if feature is not None else None
    own = encoding.palette if encoding is not None else None
    return own or official_palette(names) or palette(len(names))
