"""The only walk over a folder of images: which files are used, and which are skipped and why.

Subfolders that are links are followed, unless they lead back to a parent folder. Hidden files and folders, files of
the system or of programs (thumbnails, `__MACOSX`), and unsupported file types are skipped. Callers report what was
skipped.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .table import first_few

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".gif", ".jfif", ".jpe", ".apng", ".dib"),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
MASK_SUFFIXES = (".png", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".pgm", ".pbm", ".pnm")
"""Lossless file types. A mask of another type that a list or a table names is read if it is lossless."""

_UNREAD_IMAGES = {
    *(".heic", ".heif", ".jxl", ".psd", ".svg", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf"),
    *(".rw2", ".raw", ".dcm", ".nii", ".npy", ".npz", ".mat", ".h5", ".ico", ".pdf", ".img", ".ecw", ".sid"),
    *IMAGE_SUFFIXES,  # among masks
}
_OF_SYSTEMS = {
    *("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}

_TRIVIAL = {".ds_store", ".directory", ".gitkeep", ".gitignore", "thumbs.db", "ehthumbs.db", "desktop.ini"}

HIDDEN = "hidden or system files"
CIRCLE = "links to a parent folder"
NOWHERE = "broken links"
OTHER_KIND = "unsupported file types"
NO_FILE = "folders or devices, not files"


@dataclass
class Walk:
    """The content of a folder.

    Attributes:
        files: by path below it (posix), in order.
        passed_over: skipped paths below it, by reason; a folder stands for its whole content.
    """

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, reason: str, name: str) -> None:
        self.passed_over.setdefault(reason, []).append(name)

    def say(self) -> None:
        """Log what was skipped: as a warning if it may include images."""
        for reason, names in self.passed_over.items():
            logger.log(logging.WARNING if self._matters(reason) else logging.INFO, "%s", self._line(reason, names))

    def lines(self) -> list[str]:
        """What was skipped, one line per reason."""
        return [self._line(reason, names) for reason, names in self.passed_over.items()]

    def _line(self, reason: str, names: Sequence[str]) -> str:
        kinds = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
        common = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:6]
        told = f" ({', '.join(f'{kind}: {n}' for kind, n in common)})" if reason == OTHER_KIND else ""
        return f"{self.folder}: {len(names)} skipped, {reason}{told}: {first_few(names, 3)}"

    def _matters(self, reason: str) -> bool:
        names = self.passed_over[reason]
        if reason == OTHER_KIND:
            return any(PurePosixPath(name).suffix.lower() in _UNREAD_IMAGES for name in names)
        if reason == HIDDEN:
            return any(name.rpartition("/")[2].lower() not in _TRIVIAL for name in names)
        return reason != NO_FILE


def walk(folder: str | Path, suffixes: Sequence[str]) -> Walk:
    """All files with these suffixes (in any case) below a folder, including subfolders.

    Raises:
        ValueError: a folder in it cannot be read.
    """
    found = Walk(Path(folder))
    _into(Path(folder), "", (os.path.realpath(folder),), suffixes, found)
    found.files = dict(sorted(found.files.items(), key=lambda item: PurePosixPath(item[0]).parts))
    return found


def _into(folder: Path, below: str, above: tuple[str, ...], suffixes: Sequence[str], found: Walk) -> None:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    for entry in entries:
        name = below + entry.name
        if is_hidden(entry.name):
            found.pass_over(HIDDEN, name)
        elif _is_folder(entry):
            real = os.path.realpath(entry.path)
            if real in above:
                found.pass_over(CIRCLE, name)
            else:
                _into(Path(entry.path), f"{name}/", (*above, real), suffixes, found)
        elif reason := _reason(Path(entry.path), suffixes):
            found.pass_over(reason, name)
        else:
            found.files[name] = Path(entry.path)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself is broken
            return False
        raise _unreadable(entry.path, error) from error


def _unreadable(folder: str | Path, error: OSError) -> ValueError:
    return ValueError(f"Cannot read the folder {folder}: {error.strerror}. Make it readable, or move it away.")


def no_folder(path: Path) -> str:
    """The sentence for a path that should be a folder and is not."""
    return f"{path} is a file, and a folder is expected." if path.exists() else f"No folder {path}."


def is_hidden(name: str) -> bool:
    """Whether a file or folder with this name is skipped everywhere."""
    return name.startswith(".") or name.casefold() in _OF_SYSTEMS


def _reason(path: Path, suffixes: Sequence[str]) -> str | None:
    """Why a file is skipped; none if it is used."""
    if path.suffix.lower() not in suffixes:
        return OTHER_KIND
    if not path.exists():
        return NOWHERE
    return None if path.is_file() else NO_FILE


# ------------------------------------------------------------------------------------------------ given paths


def find_images(inputs: Sequence[str], *, keep_suffix: bool = False, leave_out: Path | None = None) -> dict[str, Path]:
    """Image files by the name of their outputs. Files below a folder, or below a glob's fixed part, keep their
    subfolders; a file that is given itself keeps only its name. Skipped files are logged.

    Args:
        inputs: files (with any suffix), folders, globs.
        leave_out: a folder to exclude: that of the outputs.

    Raises:
        ValueError: there are no images, or two images would have the same output name.
    """
    found: dict[str, Path] = {}
    for given in inputs:
        for name, path in _given(given, leave_out):
            name = name if keep_suffix else str(Path(name).with_suffix(""))
            if found.setdefault(name, path) != path:
                raise ValueError(
                    f"Two images would be written to the same name, {name!r}: {found[name]} and {path}. Give a folder "
                    "above both or a quoted glob, which keep subfolders, or `--keep_suffix` if only suffixes differ."
                )
    return found


def _given(given: str, leave_out: Path | None) -> Iterator[tuple[str, Path]]:
    """(name below the fixed part of `given`, absolute path), in order."""
    path = Path(given)
    if path.is_file():
        yield path.name, path.resolve()
        return
    if path.is_dir():
        found = walk(path, IMAGE_SUFFIXES)
    elif glob.has_magic(given):
        found = _matching(path)
    else:
        raise ValueError(f"No such file or folder: {given}.")
    found.say()
    images = [(name, file.resolve()) for name, file in found.files.items()]
    out = leave_out.resolve() if leave_out is not None else None
    inputs = [(name, file) for name, file in images if out is None or not file.is_relative_to(out)]
    if images and not inputs:  # an earlier run's masks
        raise ValueError(
            f"All {len(images)} images in {given} are in `--output_dir`, whose files count as this command's outputs. "
            "Choose another `--output_dir`."
        )
    if not images:
        passed = f" Skipped: {'; '.join(found.lines())}." if found.passed_over else ""
        raise ValueError(f"No image in {given}: looked for {', '.join(IMAGE_SUFFIXES)}.{passed}")
    yield from inputs


def _matching(pattern: Path) -> Walk:
    """The files that a glob matches, by the rules of `walk`."""
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root, pattern = Path(*parts[:fixed]), parts[fixed:]
    if "**" not in pattern:
        return _of_one_depth(root, "/".join(pattern))
    # glob itself would follow circular links, and might never end with two nested circles.
    everything = walk(root, IMAGE_SUFFIXES)
    found = Walk(root)
    found.files = {name: path for name, path in everything.files.items() if _matches(name.split("/"), pattern)}
    for reason, names in everything.passed_over.items():
        matching = [name for name in names if reason in (HIDDEN, CIRCLE) or _matches(name.split("/"), pattern)]
        found.passed_over |= {reason: matching} if matching else {}
    return found


def _of_one_depth(root: Path, pattern: str) -> Walk:
    found = Walk(root)
    for name in sorted(glob.glob(pattern, root_dir=root, include_hidden=True), key=lambda n: PurePosixPath(n).parts):
        if any(is_hidden(part) for part in PurePosixPath(name).parts):
            found.pass_over(HIDDEN, name)
        elif (root / name).is_dir():
            found.pass_over(NO_FILE, name)
        elif reason := _reason(root / name, IMAGE_SUFFIXES):
            found.pass_over(reason, name)
        else:
            found.files[name] = root / name
    return found


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob in which "**" is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
