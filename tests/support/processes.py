"""Programs in separate processes, forked from this one, which has imported everything they need.

A new Python takes five seconds to import torch, transformers and datasets, and a launcher with two processes does this
three times. `launch` gives forked processes the environment of `accelerate launch`; tests/commands/test_train.py shows
that the launcher itself works.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env

FIRST_SEED = 67280421310721  # of torch's generator in a fresh process


def launch(
    *words: str,
    processes: int = 1,
    config_file: Path | None = None,
    cwd: Path | None = None,
    timeout: float = 240,
    **env: str,
) -> subprocess.CompletedProcess:
    """Run a script, `words[0]`, in one process or in several that gloo connects. Returns output and first bad status.

    If one of several fails, the others are stopped, as the launcher does.
    """
    shared = {"OMP_NUM_THREADS": "1", **env}
    if processes > 1:
        shared = {**_launchers_environment(processes, config_file), **shared}
    with tempfile.TemporaryDirectory() as folder:
        logs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(processes)]
        children = {}
        for rank, (out, err) in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            children[_fork(words, out, err, cwd, {**shared, **own})] = None
        _wait(children, time.monotonic() + timeout)
        texts = [[path.read_text(errors="replace") for path in kind] for kind in zip(*logs, strict=True)]
    code = next((code for code in children.values() if code), 0)
    return subprocess.CompletedProcess(words, code, *("".join(kind) for kind in texts))


def _launchers_environment(processes: int, config_file: Path | None) -> dict[str, str]:
    """The variables that `accelerate launch` and torch's launcher set for each process."""
    words = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--config_file", str(config_file)] if config_file else ["--multi_gpu"]
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "1"
    try:
        arguments, *_ = _validate_launch_command(
            launch_command_parser().parse_args([*words, "--dynamo_backend", "no", "script.py"])
        )
        found = prepare_multi_gpu_env(arguments)
    finally:
        if before is None:
            del os.environ["ACCELERATE_USE_CPU"]
        else:
            os.environ["ACCELERATE_USE_CPU"] = before
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        **{name: str(value) for name, value in found.items()},
        "ACCELERATE_USE_CPU": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }


def _fork(words: tuple[str, ...], out: Path, err: Path, cwd: Path | None, env: dict[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for number, path in ((1, out), (2, err)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
        os.environ.update(env)
        os.chdir(cwd or os.getcwd())
        sys.argv = [*words]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for shared in (AcceleratorState, PartialState, GradientState):
            shared._shared_state.clear()  # from tests that ran in this process
        torch.set_num_threads(1)
        torch.manual_seed(FIRST_SEED)
        random.seed()
        np.random.seed()
        code = _run(words[0])
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(script: str) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(children: dict[int, int | None], deadline: float) -> None:
    """Fill in each exit status."""
    while running := [pid for pid, code in children.items() if code is None]:
        for pid in running:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children[pid] = os.waitstatus_to_exitcode(status)
                if children[pid]:
                    for other in running:
                        if other != pid:
                            with suppress(ProcessLookupError):
                                os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)
