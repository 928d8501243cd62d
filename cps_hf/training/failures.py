"""Failures of the machine, told in terms of the run: too little memory, processes that are gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from ..checkpointing.checkpoints import newest_checkpoint
from ..config import CPSConfig
from . import memory
from .evaluation import EvaluationError
from .state import RunState


@contextmanager
def explained(
    args: CPSConfig, crop_size: Sequence[int], accelerator: Accelerator, state: RunState, *, unlabeled: bool
) -> Iterator[None]:
    """Raise what goes wrong in a run's loop with what to do about it.

    Raises:
        torch.OutOfMemoryError: a batch or crop is too large for the GPU or the host.
        ConnectionError: another process ended or does not answer. (NCCL may end this process first, and say why.)
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        step = state.global_step + 1
        if memory.is_out_of_memory(error):
            text = memory.advice(args, crop_size, accelerator.device, step, unlabeled=unlabeled)
            raise torch.OutOfMemoryError(f"{text} (torch said: {error})") from error
        if accelerator.num_processes > 1 and is_of_the_connection(error):
            newest = newest_checkpoint(args.output_dir)
            raise ConnectionError(
                f"Process {accelerator.process_index} of {accelerator.num_processes} lost another one in step {step}: "
                f"it ended, or did not answer for {args.ddp_timeout} s (`ddp_timeout`). Its own output says why. The "
                f"newest checkpoint is whole: {newest or 'there is none yet'}. (torch said: {error})"
            ) from error
        raise


def of_the_last_evaluation(output_dir: str, names: Sequence[str], state: RunState) -> EvaluationError:
    """What a finished run raises whose last evaluation failed.

    Args:
        names: of the exported branches.
    """
    error = state.evaluation_error
    why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    if memory.is_out_of_memory(error):
        why = f"out of memory ({why}) Take a smaller `per_device_eval_batch_size`, or `eval_mode=sliding`"
    return EvaluationError(
        f"Training is done and nothing of it is lost, but the evaluation of step {state.global_step} failed: "
        f"{why.rstrip('.')}. The checkpoint and {', '.join(names)} are in {output_dir}. Mend what is wrong and start "
        "the same command with `--resume_from_checkpoint auto`, which evaluates and trains no further, or score a "
        f"branch with `cps-hf evaluate --branches {output_dir}/{names[0]}`."
    )


def is_of_the_connection(error: BaseException) -> bool:
    """Between processes: another one ended, or does not answer."""
    if isinstance(error, torch.distributed.DistError):  # NCCL's
        return True
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "Connection reset by peer" in text
