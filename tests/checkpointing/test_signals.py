"""Stop signals, and processes that die: the step is finished and saved, and no process waits forever."""

import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.toy import PATHS, SUPPORT, settings, toy_models, write_world
from transformers import TrainerCallback

from cps_hf.checkpointing import signals as signals_module
from cps_hf.checkpointing.signals import EXIT_CODE, SIGNALS, Preempted, StopSignals
from cps_hf.data.workers import outlive_signals
from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training.trainer import CPSTrainer

PROGRAM = str(SUPPORT / "run_until_told.py")


def wait_for(condition, seconds=400):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_recorded_and_handlers_are_restored(number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if the tests run in the background
    before = handlers()
    with StopSignals() as signals:
        assert signals.received == 0 and all(a is not b for a, b in zip(handlers(), before, strict=True))
        os.kill(os.getpid(), number)
        wait_for(lambda: signals.received)
        os.kill(os.getpid(), number)  # what a launcher repeats within two seconds is the same signal
        time.sleep(0.05)
    assert signals.received == number and handlers() == before
    with StopSignals() as again:
        assert again.received == 0


def test_the_signals_depend_on_the_system(monkeypatch):
    """Windows has no SIGUSR1, no `os.set_blocking` before Python 3.12, and SIGBREAK."""
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(os, "set_blocking")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR2, raising=False)
    spec = importlib.util.spec_from_file_location("cps_hf.checkpointing.signals_on_windows", signals_module.__file__)
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    assert there.SIGNALS == (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    with there.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_for(lambda: signals.received)
    assert signals.received == signal.SIGUSR2 and signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_handled_and_ignored_signals_are_left_to_the_program():
    seen = []
    old = [signal.signal(signal.SIGUSR1, lambda *_: seen.append(1)), signal.signal(signal.SIGINT, signal.SIG_IGN)]
    try:
        with StopSignals() as signals:
            for number in (signal.SIGUSR1, signal.SIGINT):
                os.kill(os.getpid(), number)
            wait_for(lambda: seen)
            assert signals.received == 0
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGINT), old, strict=True):
            signal.signal(number, handler)


def test_outside_the_main_thread_no_handler_is_touched():
    before, seen = handlers(), []

    def run():
        with StopSignals():
            seen.extend(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before


def test_a_second_signal_exits_even_a_blocking_call():
    """Python runs no handler while the main thread is inside a library call."""
    program = (
        "import hashlib, sys, types\n"
        "sys.modules['cps_hf'] = types.ModuleType('cps_hf')\n"  # not all that the package imports: it takes seconds
        f"sys.modules['cps_hf'].__path__ = [{str(Path(signals_module.__file__).parents[1])!r}]\n"
        "import cps_hf.checkpointing.signals as s\n"
        "s.ECHO_SECONDS = 0.1\n"
        "with s.StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert "SIGUSR1" in process.stderr.readline()
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)  # not SIGINT, which is ignored if the tests run in the background
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_a_worker_only_obeys_its_main_process():
    def work(connection):
        outlive_signals(0)
        connection.send("ready")
        time.sleep(600)

    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True)
    worker.start()
    assert ours.recv() == "ready"
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


# ------------------------------------------------------------------------------------------------ through the trainer


class SignalAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: self.trainer.signals.received)


def trainer_for(tmp_path, *, callback=None, **fields):
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 5, "eval_steps": 3, "agreement_images": 2}
    values |= {"per_device_train_batch_size": 2, "crop_size": [16, 16], "dataloader_num_workers": 0}
    trainer = CPSTrainer(
        toy_models(),
        **settings(**values, logging_steps=1, disable_tqdm=True, num_pictures=0, **fields),
        objective=CrossPseudoSupervision(),
        train_dataset=write_world(tmp_path / "labeled", [(20, 20)] * 4),
        unlabeled_dataset=write_world(tmp_path / "unlabeled", [(20, 20)] * 4, first=9, labels=False),
        eval_dataset=write_world(tmp_path / "eval", [(20, 20)] * 2, first=20),
        callbacks=[callback] if callback else None,
    )
    if callback:
        callback.trainer = trainer
    return trainer


@pytest.mark.parametrize("step", [2, 3])
def test_a_stopped_run_saves_and_resumes_bit_for_bit(tmp_path, step):
    whole = trainer_for(tmp_path / "a")
    expected = whole.train()
    before = handlers()
    with pytest.raises(Preempted) as stop:
        trainer_for(tmp_path / "b", callback=SignalAt(step)).train()
    out = tmp_path / "b" / "out"
    assert handlers() == before
    assert stop.value.code == EXIT_CODE == 85 and stop.value.step == step
    assert stop.value.checkpoint == out / f"checkpoint-{step}" and stop.value.checkpoint.is_dir()
    marker = json.loads((out / "preempted.json").read_text())
    assert marker == {"step": step, "signal": "SIGUSR1", "checkpoint": f"checkpoint-{step}", "exit_code": 85}
    resumed = trainer_for(tmp_path / "b")
    results = resumed.train(resume_from_checkpoint=True)
    assert not (out / "preempted.json").exists()
    assert results["final"] == expected["final"] and results["agreement"] == expected["agreement"]
    for (name, a), b in zip(whole.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b), name


class InterruptAtStart(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.handlers = handlers()
        signal.raise_signal(signal.SIGINT)


def test_before_the_first_step_a_signal_stops_the_run_at_once(tmp_path, monkeypatch, caplog):
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if the tests run in the background
    try:
        before, callback = handlers(), InterruptAtStart()
        trainer = trainer_for(tmp_path, callback=callback)
        monkeypatch.setattr(trainer, "_forward_backward", None)  # no step is made
        with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert handlers() == before == callback.handlers
        said = caplog.messages.index("Training: 5 steps on cpu ...")
        assert "Stopped before step 1. No step is lost." in caplog.messages[said:]
        assert not [*(tmp_path / "out").glob("checkpoint-*")]
        assert trainer_for(tmp_path, overwrite_output_dir=True).train()["steps"] == 5
    finally:
        signal.signal(signal.SIGINT, old)


class InterruptLater(TrainerCallback):
    """As from a program's own handler of SIGINT."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_an_interrupt_in_a_later_step_does_not_claim_that_none_is_lost(tmp_path, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, callback=InterruptLater()).train()
    assert "No step is lost" not in caplog.text


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path):
    results = trainer_for(tmp_path, callback=SignalAt(5)).train()
    assert results["steps"] == 5 and not (tmp_path / "out" / "preempted.json").exists()


# ------------------------------------------------------------------------------------------------ as programs


def start(out, *words, processes=1):
    """Run the program, each process in its own process group; several connect without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
        log = open(out.with_suffix(f".{rank}.log"), "w")  # noqa: SIM115
        command = [sys.executable, PROGRAM, str(out), *words]
        started.append(subprocess.Popen(command, stderr=log, stdout=log, env=environment, start_new_session=True))
    return started


def step_of(out, rank=0):
    path = out / f"step-{rank}"
    return int(path.read_text().split()[0]) if path.exists() else 0


def ended(out, processes, seconds):
    """The exit codes, and what was printed."""
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return codes, [out.with_suffix(f".{rank}.log").read_text() for rank in range(len(processes))]


@pytest.mark.slow
def test_workers_survive_a_group_signal_until_the_save(tmp_path):
    processes = start(tmp_path / "o", "--workers", "2")
    wait_for(lambda: step_of(tmp_path / "o") >= 3)
    os.killpg(processes[0].pid, signal.SIGTERM)
    codes, (log,) = ended(tmp_path / "o", processes, 200)
    assert codes == [EXIT_CODE], log
    assert "Traceback" not in log and "SIGTERM: the run stops after this step" in log
    marker = json.loads((tmp_path / "o" / "run" / "preempted.json").read_text())
    assert marker["step"] == step_of(tmp_path / "o") and marker["signal"] == "SIGTERM"
    assert (tmp_path / "o" / "run" / marker["checkpoint"] / "trainer_state.json").is_file()


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step(tmp_path):
    out = tmp_path / "o"
    processes = start(out, processes=2)
    wait_for(lambda: step_of(out, 0) >= 3 and step_of(out, 1) >= 3)
    processes[1].send_signal(signal.SIGUSR1)
    codes, logs = ended(out, processes, 200)
    assert codes == [EXIT_CODE] * 2, logs
    marker = json.loads((out / "run" / "preempted.json").read_text())
    assert step_of(out, 0) == step_of(out, 1) == marker["step"] and marker["signal"] is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_process_ends_the_others_with_a_message(tmp_path, number):
    out = tmp_path / "o"
    processes = start(out, "--ddp_timeout", "10", processes=2)
    wait_for(lambda: step_of(out, 0) >= 3 and step_of(out, 1) >= 3)
    processes[1].send_signal(number)
    began = time.monotonic()
    codes, logs = ended(out, processes[:1], 200)
    os.killpg(processes[1].pid, signal.SIGKILL)
    processes[1].wait()
    assert codes == [1] and time.monotonic() - began < 150
    assert "ConnectionError: Process 0 of 2 lost another process in step" in logs[0] and "`ddp_timeout`" in logs[0]


@pytest.mark.slow
def test_a_bad_number_on_one_process_stops_both_and_names_it(tmp_path):
    out = tmp_path / "o"
    codes, logs = ended(out, start(out, "--nan_at", "3", processes=2), 400)
    assert codes == [1, 1]
    for log in logs:
        assert "FloatingPointError: Step 3: the gradient of branch 0 and branch 1 is not finite" in log
        assert "loss is not finite on process 1" in log and "samples: labeled labeled-" in log
    assert sorted(p.name for p in (out / "run" / "bad_batch-3").iterdir()) == [
        *("process_0.json", "process_0.safetensors", "process_1.json", "process_1.safetensors")
    ]
    skipping = start(tmp_path / "s", "--nan_at", "3", "--max_skipped_steps", "1", "--max_steps", "5", processes=2)
    codes, logs = ended(tmp_path / "s", skipping, 400)
    assert codes == [0, 0], logs
    last = json.loads((tmp_path / "s" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 5 and last["skipped_steps"] == 1
