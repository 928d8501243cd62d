"""What of a run is saved, whole or not at all, and how a run goes on from it."""

from .checkpoints import CheckpointError, checkpoints_in, newest_checkpoint
from .signals import EXIT_CODE, Preempted

__all__ = ["EXIT_CODE", "CheckpointError", "Preempted", "checkpoints_in", "newest_checkpoint"]
