"""Stop signals: a signal ends a run after the current step, with a checkpoint to resume from. Before the first step
there is nothing to save, and a signal ends the process at once.

Clusters announce the end of a job with SIGTERM, or with a signal of the user's choice, usually SIGUSR1; Ctrl-C is
SIGINT. (Windows has no SIGUSR1; Ctrl-Break there is SIGBREAK.) Launchers repeat a signal to the processes that they
started, so signals within `ECHO_SECONDS` count as one.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..files import write_atomically
from .checkpoints import MARKER, newest_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

EXIT_CODE = 85
"""The exit code of a run that was told to stop, and saved: start it again to resume. (As in HTCondor.)"""

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
ECHO_SECONDS = 2.0


class Preempted(SystemExit):
    """`CPSTrainer.train` was told to stop: the step is finished and saved.

    If uncaught, the program exits with `EXIT_CODE` and without a traceback. `step` and `checkpoint` say where it is.
    """

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(EXIT_CODE)
        self.step, self.checkpoint = step, checkpoint


class StopSignals:
    """While it is entered, the first signal sets `received`; a second one exits at once, with 128 + its number.

    Signals that the program handles itself or ignores are left to it. Outside the main thread, where Python does not
    allow handlers, this applies to all signals. The previous handlers are restored at the end.

    A thread watches for signals. Python only runs a handler between two Python instructions, so never while the
    main thread waits for another process that does not respond, which is when a second signal is sent. The thread is
    notified through a pair of sockets, which exists on every system; Windows has no non-blocking pipes.
    """

    def __init__(self):
        self.received = 0  # the first signal's number
        self._since = 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self.received, self._old = 0, {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._old[number] = signal.signal(number, _leave_it_to_the_thread)
        self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._write.send(b"\0")  # not a signal's number: the thread ends
        self._thread.join()
        self._read.close()
        self._write.close()

    def _watch(self) -> None:
        while number := self._read.recv(1)[0]:
            if number not in self._old:  # SIGCHLD of a data loader's worker, for example
                continue
            now = time.monotonic()
            if not self.received:
                self.received, self._since = number, now
                name = signal.Signals(number).name
                _say(f"{name}: the run stops after this step and saves; a second signal exits at once.")
            elif now - self._since > ECHO_SECONDS:
                _say(f"{signal.Signals(number).name} again: exiting without saving.")
                os._exit(128 + number)


def leave(accelerator: Accelerator, output_dir: str, step: int, number: int) -> NoReturn:
    """End a run after its step, whose checkpoint is written; called by every process.

    `OUT/preempted.json` marks the run until it is resumed.

    Args:
        number: the signal that this process received; 0 if only another process did.
    """
    checkpoint = newest_checkpoint(output_dir)
    if accelerator.is_main_process:
        name = signal.Signals(number).name if number else None
        marker = {"step": step, "signal": name, "checkpoint": checkpoint.name, "exit_code": EXIT_CODE}
        try:
            write_atomically(Path(output_dir) / MARKER, json.dumps(marker, indent=1))
        except OSError as error:  # the checkpoint is written, and the other processes wait for this one
            logger.warning("%s could not be written: %s", MARKER, error)
        logger.warning("Stopped by a signal after step %d; resume from %s.", step, checkpoint)
    accelerator.wait_for_everyone()
    raise Preempted(step, checkpoint)


def _leave_it_to_the_thread(number, frame) -> None:
    """A handler must exist for the signal's number to be written to the socket."""


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # unbuffered: the process may end right after
