"""Scores: mean IoU as an `evaluate.Metric` over a confusion matrix, boundary IoU, and the paired bootstrap."""

from .boundary_iou import BoundaryIoU
from .mean_iou import MeanIoU

__all__ = ["BoundaryIoU", "MeanIoU"]
