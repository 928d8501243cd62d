"""Whether an image is one of those that are known already, though it lies in another folder under another path."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable
from pathlib import Path


class KnownFiles:
    """Files, by what they are and not by their paths: `path in known`.

    A path is in it that leads to one of the files, by whatever symbolic or hard link, or to a copy that has the same
    name. `cps-hf convert` links images into its output, and copies them where the disk has no links.

    Args:
        paths: of files that exist.
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        self._by_name: dict[str, list[Path]] = {}
        self._places: set[tuple[int, int]] = set()
        for path in map(Path, paths):
            self._by_name.setdefault(path.name, []).append(path)
            self._places.add(_place(path))

    def __contains__(self, path: str | os.PathLike) -> bool:
        """
        Raises:
            OSError: a file is gone or cannot be read.
        """
        path = Path(path)
        if _place(path) in self._places:
            return True
        return any(filecmp.cmp(path, other, shallow=False) for other in self._by_name.get(path.name, ()))


def _place(path: Path) -> tuple[int, int]:
    """The disk and the place on it, which all links to a file share."""
    status = path.stat()
    return status.st_dev, status.st_ino
