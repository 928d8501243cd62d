"""What several processes do together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object


class OtherProcessError(RuntimeError):
    """Another process failed in what all do together; it says which and how."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """What one process raises ends the block on all of them: they would wait for it in the next sum.

    Raises:
        OtherProcessError: on those whose own part went well.
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
