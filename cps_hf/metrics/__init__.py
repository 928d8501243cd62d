"""Scores: mean IoU as an `evaluate.Metric` over a confusion matrix, and boundary IoU."""
