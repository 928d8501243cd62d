"""The processes that read and augment samples: how many there may be, and what they do about signals."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading

logger = logging.getLogger(__name__)


def allowed_workers(wanted: int) -> int:
    """How many worker processes a data loader of this process can have: in a daemonic one, as a pool's are, none."""
    if wanted and multiprocessing.current_process().daemon:
        logger.warning(
            "Images are read without worker processes: Python lets a daemonic process, as one of a "
            "`multiprocessing.Pool` is, have none. Set `dataloader_num_workers=0`, or start the run in a process that "
            "is not daemonic."
        )
        return 0
    return wanted


def outlive_signals(worker_id: int) -> None:
    """A `worker_init_fn`: a signal that is sent to the whole process group is the main process's to obey.

    That one finishes its step, for which it needs its workers, and then ends them. SIGTERM counts when it is the main
    process that sends it; torch's own handler would end the worker, and with it the run, whoever does. Where the
    system does not say who sent a signal (macOS, Windows) that handler stays.
    """
    signal.set_wakeup_fd(-1)  # forked, it would report to the main process what only the worker was sent
    for name in ("SIGINT", "SIGUSR1", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # so the thread gets it, and who sent it
        threading.Thread(target=_obey_the_main_process, daemon=True).start()


def _obey_the_main_process() -> None:
    # Not getppid(), which with the start method "forkserver" (Python 3.14's on Linux) is another process.
    main = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
