"""Saves a run's checkpoints, completely or not at all, and resumes from them."""

from .checkpoints import CheckpointError, checkpoints_in, newest_checkpoint
from .signals import EXIT_CODE, Preempted

__all__ = ["EXIT_CODE", "CheckpointError", "Preempted", "checkpoints_in", "newest_checkpoint"]
