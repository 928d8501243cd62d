"""One run a folder: `OUT/run.lock` says which process writes into it, and is gone when that ends.

A file that is created exclusively is the lock, since that is atomic on every file system a cluster has (NFS from
version 3 on). `flock` is not: network drives that are mounted without it grant it to everyone on their own host.

A holder on this machine is looked up by its process number and start time: when it is dead, killed too, its lock is
free at once. One that cannot be looked up (on another host, or in another container that shares the host's name) shows
that it lives by touching the file every `BEAT` seconds; whoever wants the folder watches that, and never compares two
hosts' clocks.
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
WATCHED = 60.0  # seconds without a sign of life after which a holder that cannot be looked up counts as dead

_PROC = Path("/proc")
_HELD: set[str] = set()  # the tokens of this process's locks


class LockedError(ValueError):
    """The folder is another run's; it says whose, and what to do."""


class FolderLock:
    """While taken, no other run takes the same folder.

    Args:
        folder: need not be there; it is made with the lock and, if nothing else came into it, removed with it.
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
            OSError: the folder or the file cannot be made.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = _read(self.path)
                if holder is None:
                    continue  # it ended just now
                if self._is_dead(holder):
                    logger.warning("%s was left by a run that is dead (%s): removed.", self.path, _name(holder))
                    self._remove(holder)
                elif _read(self.path) == holder:
                    raise LockedError(self._describe(holder))
        except BaseException:
            self._remove_folders()
            raise
        self._ended.clear()
        threading.Thread(target=self._beat, args=(self._token,), name="run.lock", daemon=True).start()

    def release(self) -> None:
        """Free the folder, if it is still this run's."""
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
        """Raise a `LockedError` where another run took the folder: this one was taken for dead, as a machine that
        slept for longer than `WATCHED` seconds is."""
        if self._token is None:
            return
        holder = _read(self.path)
        if holder is None or holder.get("token") != self._token:
            by = "it is gone" if holder is None else f"it is that of {_name(holder)}"
            raise LockedError(
                f"{self.path} is no longer this run's: {by}. This run gave no sign of life and was taken for dead, or "
                "the file was removed. It stops and writes no more."
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
        """Remove a dead holder's file, and no other one that came in its place: of several who rename it one succeeds,
        and who finds a living run's under the new name puts it back."""
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
            with contextlib.suppress(OSError):  # the next one may get through
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
            "%s: %s holds it and cannot be looked up from here. Waiting up to %g s for a sign of life.",
            self.path,
            _name(holder),
            WATCHED,
        )
        first, end = self._last_beat(), time.monotonic() + WATCHED
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCHED / 10))
            if self._last_beat() != first:  # a sign of life; or its end, or another one's lock
                return False
        return True

    def _last_beat(self) -> tuple[int, int] | None:
        try:
            with open(self.path, "rb") as file:  # network drives ask their server when a file is opened
                found = os.fstat(file.fileno())
                return found.st_mtime_ns, found.st_size
        except FileNotFoundError:
            return None

    def _describe(self, holder: dict[str, Any]) -> str:
        beat, since = self._last_beat(), holder.get("since", "a moment ago")
        age = "" if beat is None else f" (last sign of life {max(0, time.time() - beat[0] / 1e9):.0f} s ago)"
        return (
            f"{self.folder} is another run's: {_name(holder)} has trained into it since {since}{age}. Wait until it "
            f"ends, end it, or choose another `output_dir`. If you know that no such run is at work, remove "
            f"{self.path}."
        )


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; empty: nothing yet, or nothing that was written whole; none: there is no such file."""
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
    """Within what a process number means one process: a host since it was started, and a container on it."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        found.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        found.append(os.readlink(_PROC / "self/ns/pid"))
    return found


def _start(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since the machine did; 0: it is dead and only not yet waited for;
    none: the system does not say."""
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return 0 if state in "ZX" else int(fields[18])


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process is alive; none: it cannot be looked up."""
    pid = holder.get("pid")
    if pid == os.getpid() and holder.get("machine") == _machine():  # what comes then may have been interrupted
        return holder.get("token") in _HELD
    if os.name == "nt" or not isinstance(pid, int) or holder.get("machine") != _machine():
        return None  # (on Windows os.kill(pid, 0) ends the process)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    start = _start(pid)
    if start is None:  # another user's, where those are hidden, or not Linux
        return None
    return start == holder.get("process_start")
