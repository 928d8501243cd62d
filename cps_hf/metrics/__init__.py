"""Scores: mean IoU as an `evaluate.Metric` over a confusion matrix, and boundary IoU."""

from .boundary_iou import BoundaryIoU
from .mean_iou import MeanIoU

__all__ = ["BoundaryIoU", "MeanIoU"]
