"""Coordinates work between processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object


class OtherProcessError(RuntimeError):
    """Another process failed in a joint operation. The message says which process and how."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Raise on all processes if one raises in the block; otherwise the others would wait for it at the next sync.

    Raises:
        OtherProcessError: on the processes whose own part succeeded.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    everywhere = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    for process, text in enumerate(everywhere):
        if text is not None:
            raise OtherProcessError(f"Process {process} of {accelerator.num_processes} failed with {text}")
