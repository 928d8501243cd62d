"""Write files and folders completely or not at all: under a temporary name next to the target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It becomes `path` when the block ends.

    Until then `path` is unchanged. It also stays unchanged if the block raises (a full disk, Ctrl-C); the temporary
    file is then removed. A killed process leaves a hidden file `.tmp-...`. If several processes write, the last one
    wins.

        with written_whole(path) as temporary:
            image.save(temporary, format="PNG")
    """
    temporary = _beside(path)
    try:
        yield temporary
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def filled_whole(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder to fill. It becomes `folder` when the block ends; if the block raises, it is removed.

    Args:
        replace: whether to replace an existing `folder` as a whole. If false, `folder` may exist only if it is empty,
            and if several processes fill it at once, the first one wins.

    Raises:
        OSError: `replace` is false and the folder is not empty, or the disk cannot be written.
    """
    temporary = _beside(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (replace_folder if replace else os.rename)(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A unique name in the same folder, so that the file can be renamed. It is hidden from directory listings.

    The name ends like the path's, since libraries infer the format from it.
    """
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")


def write_atomically(path: Path, text: str) -> None:
    """Write text so that the file always has either the old text or the new one. The last of several writers wins."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records that `append_record` wrote. A last line that was cut off while writing is removed from the file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        write_atomically(path, "".join(lines))
    return [json.loads(line) for line in lines]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a record, such as a finished image, to a file as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def stamp_of(path: str | Path) -> list[int]:
    """A file's size in bytes and modification time in nanoseconds. They change when the file changes."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def replace_folder(source: Path, target: Path) -> None:
    """Replace `target` by `source`. If the process is killed between the two renames, `tmp-old-<name>` is complete."""
    old = target.with_name(f"tmp-old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        rename(target, old)
    try:
        rename(source, target)
    except BaseException:
        if old.exists() and not target.exists():
            rename(old, target)
        raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
    """`os.replace` with retries on Windows, where it fails while another process has a file open: a virus scanner
    reads new files, and an image viewer the last pictures."""
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Link a folder's files into another one without copying them, or copy them if the file system has no links.

    This is safe, since no file is changed in place: all files are written under a temporary name and renamed.
    """
    shutil.copytree(source, target, copy_function=link_file)


def link_file(source: str | Path, target: str | Path) -> None:
    """A hard link to a file, or a copy if the file system does not support links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def share_weights(folder: Path, *, like: Path) -> None:
    """Give the weights in a folder the permissions of the file `like`. safetensors makes its files readable by their
    owner only, whatever the umask is."""
    mode = stat.S_IMODE(like.stat().st_mode)
    for path in folder.rglob("*.safetensors"):
        if stat.S_IMODE(path.stat().st_mode) != mode:  # some file systems have one mode for all files
            path.chmod(mode)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk; a folder's only if the system supports it."""
    if os.name == "nt":  # Windows cannot open folders, and only flushes files opened for writing
        if path.is_dir():
            return
        mode = os.O_RDWR
    else:
        mode = os.O_RDONLY
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some network drives
            raise
    finally:
        os.close(descriptor)
