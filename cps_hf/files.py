"""Files and folders that are written whole or not at all: filled beside under a name of their own, then renamed."""

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
    """A path to write a file to, which becomes `path` when the block ends.

    Until then `path` is as it was, and so it stays where the block raises (a full disk, Ctrl-C): what was written is
    removed. A process that is killed leaves a hidden file `.tmp-...`. Of several writers the last one's file stays.

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
    """An empty folder to fill, which becomes `folder` when the block ends; where the block raises, it is removed.

    Args:
        replace: whether a `folder` that is there is replaced as a whole. Otherwise it may be there if it is empty, and
            of several who fill it at once the first one's stays.

    Raises:
        OSError: not `replace`, and the folder holds something (also when the disk cannot be written).
    """
    temporary = _beside(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (replace_folder if replace else os.rename)(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """In the same folder, so that it can be renamed; hidden from who lists it; no other writer's, on any machine.

    The name ends as the path's, since libraries choose a format by it.
    """
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")


def write_atomically(path: Path, text: str) -> None:
    """The file has the old text or the new one, whatever happens meanwhile; of several writers the last one's."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """What `append_record` wrote; a last line that was cut off while it was written is removed from the file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        write_atomically(path, "".join(lines))
    return [json.loads(line) for line in lines]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One more line of JSON at a file's end, such as an image that is done."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def stamp_of(path: str | Path) -> list[int]:
    """A file's size in bytes and its time of change in nanoseconds: others where it has changed."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def replace_folder(source: Path, target: Path) -> None:
    """Two renames where `target` exists; a process killed between them leaves it whole, as `tmp-old-<name>`."""
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
    """`os.replace`, tried for a while on Windows, which refuses it as long as anyone has a file open: a virus scanner
    looks at what is new, a viewer at the last pictures."""
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


def link_tree(source: Path, target: Path) -> None:
    """The files of a folder in another one without a second copy, where the file system can; else copies.

    Safe since nothing here changes a file in place: all is written beside and renamed.
    """
    shutil.copytree(source, target, copy_function=link_file)


def link_file(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the file system gives it none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def share_weights(folder: Path, *, like: Path) -> None:
    """Who may read the file `like` may read the weights in the folder: safetensors gives them to their owner alone,
    whatever the umask says."""
    mode = stat.S_IMODE(like.stat().st_mode)
    for path in folder.rglob("*.safetensors"):
        if stat.S_IMODE(path.stat().st_mode) != mode:  # a file system without modes has one for all
            path.chmod(mode)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's names, onto the disk; a folder's where the system can."""
    if os.name == "nt":  # Windows opens no folder, and brings onto the disk only what is open for writing
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
