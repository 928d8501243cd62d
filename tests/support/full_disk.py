"""A disk that is full for some of the files that are written completely or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cps_hf import files


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Writing this file meets a full disk: the kernel's /dev/full takes the place of its temporary file."""
    temporary_for = files._beside

    def on_full_disk(target: Path) -> Path:
        temporary = temporary_for(target)
        if target == path:
            temporary.symlink_to("/dev/full")
        return temporary

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_beside", on_full_disk)
        yield
