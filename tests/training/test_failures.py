"""Hardware and system failures are reported with advice."""

import errno
import multiprocessing
import os
import signal

import pytest
from support.toy import settings, toy_models, write_world
from transformers import TrainerCallback

from cps_hf.config import CPSConfig
from cps_hf.objectives import Supervised
from cps_hf.training import failures
from cps_hf.training.trainer import CPSTrainer

ARGS = CPSConfig(dataloader_num_workers=4, dataloader_prefetch_factor=3)
# The messages of torch 2.14 and of the system.
TOLD = {
    "DataLoader worker (pid 71) is killed by signal: Killed. ": "killed, as happens when memory runs out",
    "DataLoader worker (pid(s) 71, 72) exited unexpectedly": "killed, as happens when memory runs out",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.": "docker run --shm-size",
    "unable to write to file </torch_71_3_1>: No space left on device (28)": "docker run --shm-size",
    "Too many open files. Communication with the workers is no longer possible.": "ulimit -n",
    "received 0 items of ancdata": "ulimit -n",
    "can't start new thread": "ulimit -u",
}


@pytest.mark.parametrize("text", TOLD)
def test_torchs_data_worker_errors_become_advice(text):
    told = failures.worker_advice(RuntimeError(text), ARGS)
    assert TOLD[text] in told and "`dataloader_num_workers` (now 4" in told
    assert "`dataloader_prefetch_factor` (now 3)" in told


def test_system_limits_are_recognised_by_error_number():
    for number, advice in (
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.ENOMEM, "memory runs out"),
    ):
        assert advice in failures.worker_advice(OSError(number, os.strerror(number)), ARGS)
    alone = failures.worker_advice(OSError(errno.EMFILE, "Too many open files"), CPSConfig(dataloader_num_workers=0))
    assert "ulimit -n" in alone and "num_workers" not in alone
    others = (
        RuntimeError("DataLoader worker (pid 3) is killed by signal: Segmentation fault. "),
        OSError(errno.ENOSPC, "No space left on device"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    )
    assert [failures.worker_advice(error, ARGS) for error in others] == [None] * 4


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_dying_worker_is_not_taken_for_a_failing_network(kind):
    def rebuild_storage_fd():  # as in torch
        raise kind(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(kind) as raised:
        rebuild_storage_fd()
    assert "a data worker was killed" in failures.worker_advice(raised.value, ARGS)
    assert failures.worker_advice(kind(errno.ECONNRESET, "Connection reset by peer"), ARGS) is None


class KillAWorker(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:  # shortly before a save: torch raises it anywhere in the process
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)


def test_a_killed_worker_ends_the_run_with_advice(tmp_path):
    trainer = CPSTrainer(
        toy_models(1),
        **settings(
            output_dir=str(tmp_path / "out"), max_steps=50, save_steps=2, crop_size=[16, 16], disable_tqdm=True,
            per_device_train_batch_size=2, dataloader_num_workers=1, num_pictures=0, agreement_images=0,
        ),
        objective=Supervised(),
        train_dataset=write_world(tmp_path / "labeled", [(20, 20)] * 4),
        callbacks=[KillAWorker()],
    )  # fmt: skip
    with pytest.raises(failures.DataWorkerError) as raised:
        trainer.train()
    said = str(raised.value)
    assert "`dataloader_num_workers` (now 1" in said and "--resume_from_checkpoint auto" in said
    assert f"The newest checkpoint is complete: {tmp_path / 'out' / 'checkpoint-'}" in said
