"""Pictures: class maps in colour, pages with a legend, learning curves, confusion matrices."""

from .class_maps import (
    AGREEMENT,
    ERRORS,
    Palette,
    agreement_legend,
    agreement_map,
    colorize,
    denormalize,
    enlarged,
    error_map,
    overlay,
)
from .colors import Color, overlay_name, palette
from .figures import confusion_matrix_figure, curves_figure
from .panels import overlay_page, panel

__all__ = [
    "AGREEMENT",
    "ERRORS",
    "Color",
    "Palette",
    "agreement_legend",
    "agreement_map",
    "colorize",
    "confusion_matrix_figure",
    "curves_figure",
    "denormalize",
    "enlarged",
    "error_map",
    "overlay",
    "overlay_name",
    "overlay_page",
    "palette",
    "panel",
]
