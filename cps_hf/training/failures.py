"""Failures of the machine, told in terms of the run: too little memory, processes and data workers that are gone."""

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
    """A data worker was ended by the system or could not be started; it says what to change."""


@contextmanager
def explained(
    args: CPSConfig, crop_size: Sequence[int], accelerator: Accelerator, state: RunState, *, unlabeled: bool
) -> Iterator[None]:
    """Raise what goes wrong in a run's loop with what to do about it.

    Raises:
        torch.OutOfMemoryError: a batch or crop is too large for the GPU or the host.
        DataWorkerError: a worker process is gone, or a limit of the system is reached.
        ConnectionError: another process ended or does not answer. (NCCL may end this process first, and say why.)
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, EOFError) as raised:
        error = _settled(raised)
        step = state.global_step + 1
        newest = newest_checkpoint(args.output_dir)
        whole = f"The newest checkpoint is whole: {newest or 'there is none yet'}"
        text = of_the_workers(error, args)
        if text is not None:
            go_on = ": go on with `--resume_from_checkpoint auto`" if newest else ""
            raise DataWorkerError(f"Step {step}: {text} {whole}{go_on}. ({said(error)})") from raised
        if memory.is_out_of_memory(error):
            text = memory.advice(args, crop_size, accelerator.device, step, unlabeled=unlabeled)
            raise torch.OutOfMemoryError(f"{text} (torch said: {error})") from raised
        if accelerator.num_processes > 1 and is_of_the_connection(error):
            raise ConnectionError(
                f"Process {accelerator.process_index} of {accelerator.num_processes} lost another one in step {step}: "
                f"it ended, or did not answer for {args.ddp_timeout} s (`ddp_timeout`). Its own output says why. "
                f"{whole}. (torch said: {error})"
            ) from raised
        raise


def of_the_workers(error: BaseException, args: CPSConfig) -> str | None:
    """What to change when a data worker was ended, or could not be started or heard; none: it is another error.

    torch's own errors are known by their texts alone.
    """
    text, number = str(error), getattr(error, "errno", None)
    if isinstance(error, CheckpointError):
        return None
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancdata" in text:
        found = "there are too many open files: raise the limit in the shell that starts the run (`ulimit -n 65536`)"
    elif "shared memory" in text or "</torch_" in text:  # also what torch says of a bus error
        found = "shared memory is full: give a container more (`docker run --shm-size=8g`, or `--ipc=host`)"
    elif number == errno.EAGAIN or "can't start new thread" in text:
        found = "the system allows no further process or thread: raise the limit (`ulimit -u`, or the container's)"
    elif (
        number == errno.ENOMEM
        or re.search("DataLoader worker .*(signal: Killed|exited unexpectedly)", text)
        or _broke_off_a_batch(error)
    ):
        found = "a data worker was ended, as the system does when memory runs out: give the job more"
    else:
        return None
    if not args.dataloader_num_workers:
        return f"{found}, or take a smaller batch."
    return (
        f"{found}, or take fewer `dataloader_num_workers` (now {args.dataloader_num_workers} for each kind of image), "
        f"a smaller `dataloader_prefetch_factor` (now {args.dataloader_prefetch_factor}) or a smaller batch."
    )


def _settled(error: BaseException) -> BaseException:
    """torch tells of a worker's end from within a signal's handler, wherever this process is: perhaps a moment after
    the worker's connection broke, and in the midst of telling that."""
    try:
        if isinstance(error, _GONE):
            time.sleep(0.5)
        return error
    except RuntimeError as later:
        return later


def _broke_off_a_batch(error: BaseException) -> bool:
    """Whether a connection or file was gone while a tensor was fetched from a worker."""
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, _GONE) else ()
    return any(frame.name.startswith("rebuild_storage") for frame in frames)


def told(error: BaseException, args: CPSConfig) -> str:
    """An error of what comes beside training, with what to change where that is known."""
    workers = of_the_workers(error, args)
    if workers is not None:
        return f"{workers} ({said(error)})"
    if memory.is_out_of_memory(error):
        return f"out of memory ({said(error)}). Take a smaller `per_device_eval_batch_size`, or `eval_mode=sliding`"
    return said(error)


def said(error: BaseException) -> str:
    """An error with its kind, unless its text is made for people."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def is_of_the_connection(error: BaseException) -> bool:
    """Between processes: another one ended, or does not answer. (A tracker's or the Hub's are no RuntimeErrors.)"""
    if isinstance(error, torch.distributed.DistError):  # NCCL's
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "gloo" in text or "Connection closed by peer" in text or "Connection reset by peer" in text
