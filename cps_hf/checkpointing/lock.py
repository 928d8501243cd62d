"""One run per folder: `OUT/run.lock` says which process writes into it, and is deleted when that process ends.

The lock is a file that is created exclusively, which is atomic on every file system of a cluster (NFS from version 3
on). `flock` is not: network drives mounted without it grant it to everyone on their own host.

A holder on this machine is looked up by its process number and start time. If it is dead, even if it was killed, its
lock is free at once. A holder that cannot be looked up (on another host, or in another container with the same host
name) touches the file every `BEAT` seconds. A process that wants the folder watches for this, and never compares the
clocks of two hosts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAME = "run.lock"
BEAT = 10.0  # seconds
WATCHED = 60.0  # seconds without a heartbeat after which a holder that cannot be looked up counts as dead

_PROC = Path("/proc")
_HELD: set[str] = set()  # the tokens of this process's locks


class LockedError(ValueError):
    """The folder belongs to another run. The message says which one, and what to do."""


class FolderLock:
    """While it is taken, no other run can take the same folder.

    Args:
        folder: need not exist. It is created with the lock and, if it is otherwise empty, deleted with it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).absolute()
        self.path = self.folder / NAME
        self._token: str | None = None  # while it is taken
        self._made: list[Path] = []
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the folder; free it first if its holder is dead.

        Raises:
            LockedError: another run has it.
            OSError: the folder or the file cannot be created.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = _read(self.path)
                if holder is None:
                    continue  # it ended just now
                if self._is_dead(holder):
                    logger.warning("%s was left by a run that is dead (%s): deleted.", self.path, _name(holder))
                    self._remove(holder)
                elif _read(self.path) == holder:
                    raise LockedError(self._describe(holder))
        except BaseException:
            self._remove_folders()
            raise
        self._ended.clear()
        threading.Thread(target=self._beat, args=(self._token,), name="run.lock", daemon=True).start()

    def release(self) -> None:
        """Free the folder if it still belongs to this run."""
        if self._token is None:
            return
        self._ended.set()
        _HELD.discard(self._token)
        holder = _read(self.path)
        if holder is not None and holder.get("token") == self._token:
            self.path.unlink(missing_ok=True)
        self._token = None
        self._remove_folders()

    def check(self) -> None:
        """Raise a `LockedError` if another run took the folder because this one seemed dead, as happens when a machine
        sleeps for more than `WATCHED` seconds."""
        if self._token is None:
            return
        holder = _read(self.path)
        if holder is None or holder.get("token") != self._token:
            by = "it is gone" if holder is None else f"it belongs to {_name(holder)}"
            raise LockedError(
                f"{self.path} no longer belongs to this run: {by}. This run sent no heartbeat and seemed dead, or "
                "the file was deleted. It stops without writing anything more."
            )

    # -------------------------------------------------------------------------------------------- the file

    def _create(self) -> bool:
        """Whether the lock is ours now."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        self._token = secrets.token_hex(8)
        _HELD.add(self._token)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({**_this_process(), "token": self._token}, file, indent=1)
        except OSError:  # a full disk
            self._token = None
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _remove(self, dead: dict[str, Any]) -> None:
        """Delete a dead holder's file, but no other file that has replaced it. If several processes rename it, one
        succeeds; if it turns out to be a living run's file, it is put back."""
        if _read(self.path) != dead:
            return
        aside = self.path.with_name(f"tmp-{NAME}-{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read(aside) == dead:
            aside.unlink()
        else:
            os.replace(aside, self.path)

    def _beat(self, token: str) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the next one may succeed
                if (_read(self.path) or {}).get("token") != token:
                    return
                os.utime(self.path)

    def _remove_folders(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()

    # -------------------------------------------------------------------------------------------- the holder

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        lives = _lives(holder)
        if lives is not None:
            return not lives
        logger.warning(
            "%s: %s has it and cannot be looked up from here. Waiting up to %g s for a heartbeat.",
            self.path,
            _name(holder),
            WATCHED,
        )
        first, end = self._last_beat(), time.monotonic() + WATCHED
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCHED / 10))
            if self._last_beat() != first:  # a heartbeat, its end, or another lock
                return False
        return True

    def _last_beat(self) -> tuple[int, int] | None:
        try:
            with open(self.path, "rb") as file:  # network drives query their server when a file is opened
                found = os.fstat(file.fileno())
                return found.st_mtime_ns, found.st_size
        except FileNotFoundError:
            return None

    def _describe(self, holder: dict[str, Any]) -> str:
        beat, since = self._last_beat(), holder.get("since", "a moment ago")
        age = "" if beat is None else f" (last heartbeat {max(0, time.time() - beat[0] / 1e9):.0f} s ago)"
        return (
            f"{self.folder} belongs to another run: {_name(holder)} has trained into it since {since}{age}. Wait "
            f"until it ends, stop it, or choose another `output_dir`. If you know that no such run is active, delete "
            f"{self.path}."
        )


def _read(path: Path) -> dict[str, Any] | None:
    """A lock's content. Empty if nothing has been written completely yet; `None` if there is no such file."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": _machine(),
        "process_start": _start(os.getpid()),
    }


def _machine() -> list[str]:
    """The scope in which process numbers are unique: a host since its start, and a container on it."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        found.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        found.append(os.readlink(_PROC / "self/ns/pid"))
    return found


def _start(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since boot; 0 if it is dead but not yet waited for; `None` if the
    system does not say."""
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return 0 if state in "ZX" else int(fields[18])


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process is alive; `None` if it cannot be looked up."""
    pid = holder.get("pid")
    if pid == os.getpid() and holder.get("machine") == _machine():  # the next checks may have been interrupted
        return holder.get("token") in _HELD
    if os.name == "nt" or not isinstance(pid, int) or holder.get("machine") != _machine():
        return None  # (on Windows, os.kill(pid, 0) ends the process)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    start = _start(pid)
    if start is None:  # another user's, if those are hidden, or not Linux
        return None
    return start == holder.get("process_start")
