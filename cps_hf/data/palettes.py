"""The display colours of a data set's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..visualization.colors import Color, palette
from . import cityscapes, voc
from .labels import LabelEncoding

_BACKGROUND = {"background", "bg", "void", "unlabeled", "unlabelled", "none", "other", "class0", "label0", "0"}
"""Names of a class 0 that stands for everything else, without spaces, hyphens and underscores. Unnamed classes count
as such: in masks without names, 0 is usually the background."""


def palette_of(feature: Any, names: Sequence[str]) -> Sequence[Color]:
    """The data set's own colours, or those of Cityscapes or VOC if the names are theirs, or colour-blind-safe colours.

    Of the last kind, class 0 is black only if its name is a background's. Overlays do not tint black classes, so a
    prediction of a black "sky" would look like no prediction.

    Args:
        feature: of the label column, or none.
    """
    encoding = LabelEncoding.from_feature(feature) if feature is not None else None
    own = encoding.palette if encoding is not None else None
    official = {cityscapes.NAMES: cityscapes.PALETTE, voc.NAMES: voc.PALETTE}
    return own or official.get(tuple(names)) or _safe_palette(names)


def _safe_palette(names: Sequence[str]) -> tuple[Color, ...]:
    first = str(names[0]).lower().replace(" ", "").replace("-", "").replace("_", "")
    try:
        return palette(len(names)) if first in _BACKGROUND else palette(len(names) + 1)[1:]
    except ValueError:  # 255 classes: there is no further colour
        return palette(len(names))
