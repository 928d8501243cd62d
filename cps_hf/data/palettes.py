"""The display colours of a data set's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..visualization.colors import Color, palette
from . import cityscapes, voc
from .labels import LabelEncoding


def official_palette(names: Sequence[str]) -> tuple[tuple[int, int, int], ...] | None:
    """The colours of Cityscapes or VOC if the class names are theirs, in their order; otherwise `None`."""
    known = {cityscapes.NAMES: cityscapes.PALETTE, voc.NAMES: voc.PALETTE}
    return known.get(tuple(names))


def palette_of(feature: Any, names: Sequence[str]) -> Sequence[Color]:
    """The data set's own colours, or those of the official set with these classes, or colour-blind-safe colours.

    Args:
        feature: of the label column, or none.
    """
    encoding = LabelEncoding.from_feature(feature) if feature is not None else None
    own = encoding.palette if encoding is not None else None
    return own or official_palette(names) or palette(len(names))
