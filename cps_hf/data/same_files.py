"""Find out whether an image is already known, even under another path."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable
from pathlib import Path


class KnownFiles:
    """Files, compared by identity instead of path: `path in known`.

    A path is contained if it leads to one of the files, by any symbolic or hard link, or to a copy with the same name.
    `cps-hf convert` links images into its output, or copies them if the disk does not support links.

    Args:
        paths: of existing files.
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
            OSError: a file is missing or cannot be read.
        """
        path = Path(path)
        if _place(path) in self._places:
            return True
        return any(filecmp.cmp(path, other, shallow=False) for other in self._by_name.get(path.name, ()))


def _place(path: Path) -> tuple[int, int]:
    """The disk and the inode, which all links to a file share."""
    status = path.stat()
    return status.st_dev, status.st_ino
