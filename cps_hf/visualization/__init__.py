"""Pictures: coloured class maps, pages with a legend, learning curves, confusion matrices, a run's figures."""

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
from .figures import (
    curve_groups,
    draw_classes,
    draw_confusion_matrix,
    draw_curves,
    write_confusion_matrix,
    write_curves,
)
from .panels import overlay_page, panel
from .runs import classes_figure, confusion_figure, curves_figure, images_figure

__all__ = [
    "AGREEMENT",
    "ERRORS",
    "Color",
    "Palette",
    "agreement_legend",
    "agreement_map",
    "classes_figure",
    "colorize",
    "confusion_figure",
    "curve_groups",
    "curves_figure",
    "denormalize",
    "draw_classes",
    "draw_confusion_matrix",
    "draw_curves",
    "enlarged",
    "error_map",
    "images_figure",
    "overlay",
    "overlay_name",
    "overlay_page",
    "palette",
    "panel",
    "write_confusion_matrix",
    "write_curves",
]
