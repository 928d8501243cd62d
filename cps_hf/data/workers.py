"""What a data loader's worker does about signals."""

from __future__ import annotations

import os
import signal
import threading


def outlive_signals(worker_id: int) -> None:
    """A `worker_init_fn`: a signal that is sent to the whole process group is the main process's to obey.

    That one finishes its step, for which it needs its workers, and then ends them. SIGTERM counts when it is the main
    process that sends it; torch's own handler would end the worker, and with it the run, whoever does.
    """
    signal.set_wakeup_fd(-1)  # forked, it would report to the main process what only the worker was sent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # so the thread gets it, and who sent it
    threading.Thread(target=_obey_the_main_process, daemon=True).start()


def _obey_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
