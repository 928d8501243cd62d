"""Failures after a run's last optimizer step must not cost any training: each part is tried, and what failed is
collected and reported at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..checkpointing.checkpoints import newest_checkpoint
from ..config import CPSConfig
from . import failures

logger = logging.getLogger(__name__)

EVALUATION = "the evaluation"
CHECKPOINT = "the checkpoint"


class AfterTrainingError(RuntimeError):
    """The run is trained and saved, but something after its last step failed. The message says what, and how to
    complete it."""


class EvaluationError(AfterTrainingError):
    """The last evaluation produced no scores."""


class Late:
    """Collects the parts of a run's end that failed.

    Before the last step is done (`active` is false), errors are raised as usual. Afterwards they are kept, with a
    warning, and the next part is tried. Every process has one instance.
    """

    def __init__(self, args: CPSConfig, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.active = False
        self.failed: dict[str, str] = {}  # part -> why

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Run a part; afterwards `what in self.failed` says whether it failed."""
        try:
            yield
        except Exception as error:
            if not self.active:
                raise
            self.keep(what, error)
        else:
            self.failed.pop(what, None)

    def keep(self, what: str, error: Exception) -> None:
        """Warn about a part that failed and continue, even before the last step. If the part has not been done by
        then, the end of the run reports it.

        Raises:
            Exception: the error itself, if another process is lost, since nothing else can be done then.
        """
        if self.accelerator.num_processes > 1 and failures.is_connection_error(error):
            raise error
        self.failed[what] = failures.told(error, self.args)
        ours = not isinstance(error, OSError | ValueError | MemoryError)
        logger.warning("%s failed: %s", what, self.failed[what], exc_info=ours)

    def tell(self, step: int, exported: Sequence[str]) -> None:
        """Raise an error on all processes if something failed on any of them.

        Args:
            exported: the branches' folders, by name.

        Raises:
            EvaluationError: there are no scores of the last step.
            AfterTrainingError: another part failed.
        """
        everywhere = gather_object([self.failed])
        failed = {what: why for found in reversed(everywhere) for what, why in found.items()}
        if not failed:
            return
        output_dir = self.args.output_dir
        why = "; ".join(f"{what}: {text.rstrip('.')}" for what, text in failed.items())
        kept = [name for name in exported if name not in failed]
        if CHECKPOINT not in failed:
            kept.insert(0, f"checkpoint-{step}")
        if CHECKPOINT in failed:
            newest = newest_checkpoint(output_dir)
            again = f"resumes from {newest.name}" if newest else "starts from scratch, since there is no checkpoint"
        else:
            again = "does what is missing without further training"
        score = ""
        if EVALUATION in failed and any(name in kept for name in exported):
            branch = next(name for name in exported if name in kept)
            score = f"; or score a branch with `cps-hf evaluate --branches {Path(output_dir) / branch}`"
        kind = EvaluationError if EVALUATION in failed else AfterTrainingError
        raise kind(
            f"Training is done, and {', '.join(kept) or 'nothing'} of step {step} {'are' if len(kept) > 1 else 'is'} "
            f"kept in {output_dir}. What failed afterwards: {why}. Fix that and run the same command with "
            f"`--resume_from_checkpoint auto`, which {again}{score}."
        )
