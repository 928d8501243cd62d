"""Explains hardware and system failures in terms of the run: out of memory, lost processes and data workers."""

from __future__ import annotations

import errno
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from ..checkpointing.checkpoints import CheckpointError, newest_checkpoint
from ..config import CPSConfig
from . import memory
from .state import RunState

_GONE = (ConnectionError, EOFError, FileNotFoundError)


class DataWorkerError(OSError):
    """The system killed a data worker or could not start it. The message says what to change."""


@contextmanager
def explained(
    args: CPSConfig, crop_size: Sequence[int], accelerator: Accelerator, state: RunState, *, unlabeled: bool
) -> Iterator[None]:
    """Raise errors of a run's loop with advice on what to do.

    Raises:
        torch.OutOfMemoryError: a batch or crop is too large for the GPU or the host.
        DataWorkerError: a worker process died, or a system limit was reached.
        ConnectionError: another process died or does not respond. (NCCL may abort this process first, with a message.)
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, EOFError) as raised:
        error = _settled(raised)
        step = state.global_step + 1
        newest = newest_checkpoint(args.output_dir)
        whole = f"The newest checkpoint is complete: {newest or 'there is none yet'}"
        text = worker_advice(error, args)
        if text is not None:
            go_on = ": resume with `--resume_from_checkpoint auto`" if newest else ""
            raise DataWorkerError(f"Step {step}: {text} {whole}{go_on}. ({said(error)})") from raised
        if memory.is_out_of_memory(error):
            text = memory.advice(args, crop_size, accelerator.device, step, unlabeled=unlabeled)
            raise torch.OutOfMemoryError(f"{text} (torch said: {error})") from raised
        if accelerator.num_processes > 1 and is_connection_error(error):
            raise ConnectionError(
                f"Process {accelerator.process_index} of {accelerator.num_processes} lost another process in step "
                f"{step}: it died, or did not respond for {args.ddp_timeout} s (`ddp_timeout`). Its output says why. "
                f"{whole}. (torch said: {error})"
            ) from raised
        raise


def worker_advice(error: BaseException, args: CPSConfig) -> str | None:
    """What to change when a data worker was killed, or could not be started or reached. `None` for other errors.

    torch's own errors can only be recognised by their text.
    """
    text, number = str(error), getattr(error, "errno", None)
    if isinstance(error, CheckpointError):
        return None
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancdata" in text:
        found = "there are too many open files: raise the limit in the shell that starts the run (`ulimit -n 65536`)"
    elif "shared memory" in text or "</torch_" in text:  # torch also says this for a bus error
        found = "shared memory is full: give the container more (`docker run --shm-size=8g`, or `--ipc=host`)"
    elif number == errno.EAGAIN or "can't start new thread" in text:
        found = "the system allows no more processes or threads: raise the limit (`ulimit -u`, or the container's)"
    elif (
        number == errno.ENOMEM
        or re.search("DataLoader worker .*(signal: Killed|exited unexpectedly)", text)
        or _interrupted_batch(error)
    ):
        found = "a data worker was killed, as happens when memory runs out: give the job more memory"
    else:
        return None
    if not args.dataloader_num_workers:
        return f"{found}, or use a smaller batch."
    return (
        f"{found}, or use fewer `dataloader_num_workers` (now {args.dataloader_num_workers} for each kind of image), "
        f"a smaller `dataloader_prefetch_factor` (now {args.dataloader_prefetch_factor}) or a smaller batch."
    )


def _settled(error: BaseException) -> BaseException:
    """torch reports a worker's death from a signal handler, wherever this process is: perhaps shortly after the
    worker's connection broke, while that is being reported."""
    try:
        if isinstance(error, _GONE):
            time.sleep(0.5)
        return error
    except RuntimeError as later:
        return later


def _interrupted_batch(error: BaseException) -> bool:
    """Whether a connection or file was lost while a tensor was fetched from a worker."""
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, _GONE) else ()
    return any(frame.name.startswith("rebuild_storage") for frame in frames)


def told(error: BaseException, args: CPSConfig) -> str:
    """An error outside the training steps, with what to change if that is known."""
    workers = worker_advice(error, args)
    if workers is not None:
        return f"{workers} ({said(error)})"
    if memory.is_out_of_memory(error):
        return f"out of memory ({said(error)}). Use a smaller `per_device_eval_batch_size`, or `eval_mode=sliding`"
    return said(error)


def said(error: BaseException) -> str:
    """An error's text. The type is added unless the text is written for users."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def is_connection_error(error: BaseException) -> bool:
    """Whether another process died or does not respond. (Errors of trackers or the Hub are not RuntimeErrors.)"""
    if isinstance(error, torch.distributed.DistError):  # NCCL's
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "gloo" in text or "Connection closed by peer" in text or "Connection reset by peer" in text
