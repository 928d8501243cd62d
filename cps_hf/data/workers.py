"""The processes that read and augment samples: their number, and their response to signals."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading

logger = logging.getLogger(__name__)


def allowed_workers(wanted: int) -> int:
    """The number of worker processes that this process may have: none in a daemonic process, such as a pool's."""
    if wanted and multiprocessing.current_process().daemon:
        logger.warning(
            "Images are read without worker processes: Python does not allow a daemonic process, such as one of a "
            "`multiprocessing.Pool`, to have any. Set `dataloader_num_workers=0`, or start the run in a process that "
            "is not daemonic."
        )
        return 0
    return wanted


def outlive_signals(worker_id: int) -> None:
    """A `worker_init_fn`: leaves signals sent to the whole process group to the main process.

    The main process finishes its step, for which it needs its workers, and then ends them. SIGTERM only counts if the
    main process sends it; torch's own handler would end the worker, and with it the run, for any sender. If the system
    does not report the sender of a signal (macOS, Windows), torch's handler stays.
    """
    signal.set_wakeup_fd(-1)  # after a fork, it would report the worker's signals to the main process
    for name in ("SIGINT", "SIGUSR1", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # so that the thread gets it, with its sender
        threading.Thread(target=_obey_the_main_process, daemon=True).start()


def _obey_the_main_process() -> None:
    # Not getppid(): with the start method "forkserver" (Python 3.14 on Linux) that is another process.
    main = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
