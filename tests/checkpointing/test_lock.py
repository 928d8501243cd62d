"""A folder belongs to one run: a second run is an error that names the first, and a dead run's lock is free."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.toy import settings, toy_models, write_world
from transformers import TrainerCallback

from cps_hf.checkpointing import lock as module
from cps_hf.checkpointing.lock import FolderLock, LockedError
from cps_hf.checkpointing.signals import Preempted
from cps_hf.objectives import Supervised
from cps_hf.training.trainer import CPSTrainer

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    monkeypatch.setattr(module, "WATCHED", 0.3)


def written(folder, **changes):
    """A lock as this process would write it, with changes."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.lock"
    path.write_text(json.dumps({**module._this_process(), "token": "another's", **changes}))
    return path


def test_the_lock_names_its_holder_and_ends_with_it(tmp_path):
    lock = FolderLock(tmp_path / "new" / "out")
    lock.take()
    held = json.loads(lock.path.read_text())
    assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
    with pytest.raises(LockedError) as rejected:
        FolderLock(tmp_path / "new" / "out").take()
    for said in (f"process {os.getpid()} on {socket.gethostname()}", held["since"], "`output_dir`", str(lock.path)):
        assert said in str(rejected.value)
    lock.check()
    lock.release()
    assert [*tmp_path.iterdir()] == []  # a folder that stayed empty is deleted
    again = FolderLock(tmp_path)
    again.take()
    (tmp_path / "results.json").write_text("{}")
    again.release()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


DEAD = {
    "ended": lambda: {"pid": ended_process()},
    "another process has its number now": lambda: {"pid": os.getppid(), "process_start": 1},
    "this process, which ended that run": lambda: {},
}


@pytest.mark.parametrize("how", DEAD)
def test_a_dead_holders_lock_is_free_at_once(tmp_path, caplog, monkeypatch, how):
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waited"))
    written(tmp_path, **DEAD[how]())
    lock = FolderLock(tmp_path)
    lock.take()
    lock.check()
    lock.release()
    assert "left by a run that is dead" in caplog.text and [*tmp_path.iterdir()] == []


def test_a_zombie_holder_is_dead_and_a_stopped_one_is_not(tmp_path):
    ours, theirs = FORK.Pipe()

    def hold():
        FolderLock(tmp_path).take()
        theirs.send("held")
        signal.pause()

    holder = FORK.Process(target=hold)
    holder.start()
    assert ours.recv() == "held"
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(LockedError, match=f"process {holder.pid} "):
        FolderLock(tmp_path).take()
    os.kill(holder.pid, signal.SIGKILL)
    while module._start(holder.pid):  # until it is a zombie, which still has its number
        time.sleep(0.01)
    os.kill(holder.pid, 0)
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()
    holder.join()


ELSEWHERE = {
    "another host": {"machine": ["elsewhere", "boot", "pid:[1]"], "host": "elsewhere"},
    "another container of this host's name": {"machine": [*module._machine()[:-1], "pid:[1]"]},
    "the machine was restarted": {"machine": [socket.gethostname(), "another boot", module._machine()[-1]]},
    "nothing written yet": None,
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_an_unknown_holder_is_watched_by_its_heartbeat(tmp_path, where):
    changes = ELSEWHERE[where]
    path = written(tmp_path, **(changes or {}))
    if changes is None:
        path.write_text("")
    beating = FolderLock(tmp_path)
    if changes is not None:
        thread = module.threading.Thread(target=beating._beat, args=("another's",))
        thread.start()
        with pytest.raises(LockedError, match="last heartbeat 0 s ago"):
            FolderLock(tmp_path).take()
        beating._ended.set()
        thread.join()
    began = time.monotonic()
    lock = FolderLock(tmp_path)
    lock.take()
    assert time.monotonic() - began >= module.WATCHED
    lock.check()
    lock.release()


def test_a_hidden_process_is_watched(tmp_path, monkeypatch):
    """On many clusters /proc hides other users' processes."""
    written(tmp_path, pid=1)
    monkeypatch.setattr(module, "_start", lambda pid: None)
    assert module._lives(json.loads((tmp_path / "run.lock").read_text())) is None


def test_on_windows_no_process_is_probed_by_a_signal(monkeypatch):
    holder = {**module._this_process(), "pid": os.getppid(), "process_start": module._start(os.getppid())}
    assert module._lives(holder) is True
    monkeypatch.setattr(module.os, "name", "nt")
    monkeypatch.setattr(module.os, "kill", lambda *_: pytest.fail("killed"))
    assert module._lives(holder) is None


def test_only_one_process_takes_a_dead_holders_lock(tmp_path):
    written(tmp_path, pid=ended_process())
    ready, found = FORK.Barrier(8), FORK.Queue()

    def contend():
        lock = FolderLock(tmp_path)
        ready.wait()
        try:
            lock.take()
        except LockedError:
            found.put("rejected")
        else:
            found.put("taken")
        ready.wait()  # none exits before all have tried
        try:
            lock.check()
            found.put("kept")
        except LockedError:
            found.put("lost")

    processes = [FORK.Process(target=contend) for _ in range(8)]
    for process in processes:
        process.start()
    said = [found.get(timeout=60) for _ in range(16)]
    for process in processes:
        process.join()
    assert said.count("taken") == 1 and said.count("rejected") == 7 and said.count("lost") == 0


def test_a_new_lock_in_a_dead_ones_place_survives(tmp_path, monkeypatch):
    dead = json.loads(written(tmp_path, token="the dead one's").read_text())
    path, rename = tmp_path / "run.lock", os.rename

    def rename_too_late(source, target):
        written(tmp_path)
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", rename_too_late)
    for _ in range(2):  # it comes after the last look at the file, then before
        FolderLock(tmp_path)._remove(dead)
    assert json.loads(path.read_text())["token"] == "another's" and [*tmp_path.iterdir()] == [path]


def test_a_release_that_is_interrupted_leaves_the_folder_free(tmp_path, monkeypatch):
    """torch raises a data worker's death anywhere in the process, as does Ctrl-C."""
    lock = FolderLock(tmp_path)
    lock.take()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(module, "_read", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lock.release()
    assert lock.path.exists()
    again = FolderLock(tmp_path)
    again.take()
    again.release()
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        FolderLock(tmp_path / "out").take()
    assert [*tmp_path.iterdir()] == []


# ------------------------------------------------------------------------------------------------ through the trainer


def trainer_for(tmp_path, *callbacks, out="out", **fields):
    values = {"output_dir": str(tmp_path / out), "max_steps": 4, "save_steps": 2, "crop_size": [16, 16]}
    values |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0, "agreement_images": 0}
    values |= {"logging_steps": 1, "disable_tqdm": True, "num_pictures": 0, "resume_from_checkpoint": "auto"} | fields
    return CPSTrainer(
        toy_models(1),
        **settings(**values),
        objective=Supervised(),
        train_dataset=write_world(tmp_path / "world", [(20, 20)] * 4),
        callbacks=[*callbacks],
    )


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class At(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def test_the_same_command_started_twice_trains_once(tmp_path):
    out, rejected = tmp_path / "out", []

    def start_again():
        before = content(out)
        for fields in ({}, {"resume_from_checkpoint": None, "overwrite_output_dir": True}, {"max_steps": 9}):
            with pytest.raises(LockedError, match=f"process {os.getpid()} on "):
                trainer_for(tmp_path, **fields).train()
            rejected.append(content(out) == before)

    trainer_for(tmp_path, At(3, start_again)).train()
    assert rejected == [True] * 3
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4] and not (out / "run.lock").exists()
    assert trainer_for(tmp_path, max_steps=5).train()["steps"] == 5


class Killed(BaseException):
    pass


def fail():
    raise Killed


ENDS = {
    "at its end": (lambda: None, None),
    "by an error": (lambda: 1 / 0, ZeroDivisionError),
    "by what is no Exception": (fail, Killed),
    "by a signal": (lambda: os.kill(os.getpid(), signal.SIGUSR1), Preempted),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_folder_is_free_after_any_end_of_a_run(tmp_path, how):
    act, raised = ENDS[how]
    trainer = trainer_for(tmp_path, At(1, act))
    if raised is None:
        trainer.train()
    else:
        with pytest.raises(raised):
            trainer.train()
    assert (tmp_path / "out").is_dir() and not (tmp_path / "out" / "run.lock").exists()


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    trainer = trainer_for(tmp_path, resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="does not exist"):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_a_run_that_lost_its_lock_stops_before_writing(tmp_path):
    """As if its machine slept, and another run has its folder now."""
    out, kept = tmp_path / "out", []

    def lose():
        written(out, host="elsewhere", pid=71)
        kept.append(content(out))

    with pytest.raises(LockedError, match="no longer belongs to this run: it belongs to process 71 on elsewhere"):
        trainer_for(tmp_path, At(3, lose), logging_steps=50).train()
    assert content(out) == kept[0]  # the other's lock too
