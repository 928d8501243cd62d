"""Files and folders that are written whole or not at all: filled beside under a name of their own, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import uuid
from pathlib import Path


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


def link_tree(source: Path, target: Path) -> None:
    """The files of a folder in another one without a second copy, where the file system can; else copies.

    Safe since nothing here changes a file in place: all is written beside and renamed.
    """

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=link)


def replace_folder(source: Path, target: Path) -> None:
    """Two renames where `target` exists; a crash between them leaves it whole, as `tmp-old-<name>`."""
    old = target.with_name(f"tmp-old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(source, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """The file has the old text or the new one, whatever happens meanwhile; of several writers the last one's."""
    temporary = path.with_name(f"tmp-{uuid.uuid4().hex}-{path.name}")  # several machines may share the folder
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk: no later writer would overwrite it
