"""Failures of the machine, told in terms of the run: too little memory, processes that are gone, a full disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..checkpointing.checkpoints import newest_checkpoint
from . import memory


@contextmanager
def explained(trainer: Any) -> Iterator[None]:
    """Raise what goes wrong in the `CPSTrainer`'s loop with what to do about it.

    Raises:
        torch.OutOfMemoryError: a batch or crop is too large for the GPU or the host.
        ConnectionError: another process ended or does not answer. (NCCL may end this process first, and say why.)
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        args, step = trainer.args, trainer.state.global_step + 1
        if memory.is_out_of_memory(error):
            text = memory.advice(args, trainer.device, step, unlabeled=bool(trainer.objective.views))
            raise torch.OutOfMemoryError(f"{text} (torch said: {error})") from error
        if trainer.accelerator.num_processes > 1 and _is_of_the_connection(error):
            rank, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
            newest = newest_checkpoint(args.output_dir)
            raise ConnectionError(
                f"Process {rank} of {count} lost another one in step {step}: it ended, or did not answer for "
                f"{args.ddp_timeout} s (`ddp_timeout`). Its own output says why. The newest checkpoint is whole: "
                f"{newest or 'there is none yet'}. (torch said: {error})"
            ) from error
        raise


def one_line(error: Exception, output: str | os.PathLike) -> str:
    """What a script says, without a traceback, of what its user can mend: bad input, or a disk that fails.

    Args:
        output: what the script writes: the system names no path where a write fails, as on a full disk.
    """
    if not isinstance(error, OSError) or isinstance(error, ConnectionError) or error.strerror is None:
        return str(error)
    path = error.filename or output
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{path}: a folder is expected there, but a file is in the way. Choose another name."
    return f"{path}: {error.strerror}."


def _is_of_the_connection(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):  # NCCL's
        return True
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "Connection reset by peer" in text
