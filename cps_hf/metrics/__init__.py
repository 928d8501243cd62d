"""Scores: mean IoU as an `evaluate.Metric` from a confusion matrix, boundary IoU, and the paired bootstrap."""

from .boundary_iou import BoundaryIoU
from .mean_iou import MeanIoU

__all__ = ["BoundaryIoU", "MeanIoU"]
