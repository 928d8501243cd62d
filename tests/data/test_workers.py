"""Data workers on unusual systems or in unusual processes."""

import errno
import multiprocessing
import os
import pickle
import signal
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from support.toy import write_world

from cps_hf.config import AugmentationConfig
from cps_hf.data import streams, workers
from cps_hf.data.order import Shard
from cps_hf.data.workers import allowed_workers, outlive_signals


def in_a_child(work, *, daemon=True):
    """The result of `work()` in a forked process, as text."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def send():
        try:
            theirs.send(repr(work()))
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")

    child = context.Process(target=send, daemon=daemon)
    child.start()
    try:
        assert ours.poll(60)
        return ours.recv()
    finally:
        child.join(60)


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path / "world", [(20, 24)] * 4)


def labeled_stream(world, num_workers):
    augmentation = AugmentationConfig(crop_size=[16, 16])
    shard = Shard(batch_size=2, accumulation_steps=1, rank=0, num_processes=1)
    return streams.TrainStream(
        world, name="train_dataset", shard=shard, augmentation=augmentation, seed=1, num_workers=num_workers
    )


SYSTEMS = {"macOS": ["sigwaitinfo"], "Windows": ["sigwaitinfo", "pthread_sigmask", "SIGUSR1"]}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_worker_survives_ctrl_c_on_every_system(monkeypatch, system):
    for name in SYSTEMS[system]:
        monkeypatch.delattr(signal, name)
    threads = []
    monkeypatch.setattr(workers.threading, "Thread", lambda **options: threads.append(options))

    def work():
        outlive_signals(0)
        os.kill(os.getpid(), signal.SIGINT)
        return threads, signal.getsignal(signal.SIGTERM)

    assert in_a_child(work) == repr(([], signal.SIG_DFL))  # torch's own handler, in a real worker, for SIGTERM


def test_the_main_process_is_found_behind_a_fork_server(monkeypatch):
    """As with the start method "forkserver", where workers are children of the server."""
    monkeypatch.setattr(os, "getppid", lambda: 1)

    def work():
        outlive_signals(0)
        connection.send("ready")
        signal.pause()

    context = multiprocessing.get_context("fork")
    ours, connection = context.Pipe()
    worker = context.Process(target=work, daemon=True)
    worker.start()
    assert ours.recv() == "ready"
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def test_a_daemonic_process_reads_without_workers(world, caplog):
    def work():
        batch = next(iter(labeled_stream(world, 2)))
        images = [s["id"] for group in streams.EvaluationStream(world, num_labels=3, num_workers=2) for s in group]
        return batch["ids"], images, [r.getMessage()[:42] for r in caplog.records]

    expected = next(iter(labeled_stream(world, 0)))["ids"]
    said = ["Images are read without worker processes: "] * 2
    assert in_a_child(work) == repr((expected, world["id"][:], said))
    assert allowed_workers(2) == 2 and allowed_workers(0) == 0


@pytest.mark.parametrize("kind", ["labeled", "evaluation"])
def test_worker_arguments_can_be_pickled(world, kind):
    """There, a worker is a new Python process that receives data set, collate function and `worker_init_fn`."""
    stream = labeled_stream(world, 1) if kind == "labeled" else streams.EvaluationStream(world, num_labels=3)
    loader = stream._loader
    sent = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
    dataset, collate, init = pickle.loads(bytes(ForkingPickler.dumps(sent)))
    assert init is outlive_signals
    plans = iter(loader.sampler)
    plan = next(plans)
    here, there = loader.dataset[plan], dataset[plan]
    assert here.keys() == there.keys()
    for name, value in here.items():
        same = torch.equal(value, there[name]) if isinstance(value, torch.Tensor) else value == there[name]
        assert same, name
    assert collate([here, there])[1] is there if kind == "evaluation" else True


FAULTS = {
    "open files": ("builtins.open", OSError(errno.EMFILE, "Too many open files")),
    "memory": ("PIL.Image.open", MemoryError()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_system_limits_are_not_treated_as_bad_files(world, monkeypatch, fault):
    stream = labeled_stream(world, 0)
    stream._loader.dataset.spares = [0]  # as with `skip_bad_samples`
    where, error = FAULTS[fault]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)) as raised:
        next(iter(stream))
    assert raised.value is error
