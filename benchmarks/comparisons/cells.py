"""Many runs as the cells of a table: started a few at a time, resumed where they stopped, and read back.

Shared by compare_objectives.py and ablate_switches.py. Each run is a separate process, so a failed or killed run does
not affect others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cps_hf.checkpointing.checkpoints import newest_checkpoint
from cps_hf.commands.settings import Settings
from cps_hf.files import write_atomically

TRAIN = ("-m", "cps_hf", "train")  # the program, after `python` or a launcher's words


def table_parser(description: str, output_dir: str, methods: Collection[str]) -> argparse.ArgumentParser:
    """The options of a table of runs; unknown ones are passed to `cps-hf train`."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Every other option is one of `cps-hf train` (see `cps-hf train --objective supervised --help-all`).",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--methods", nargs="+", choices=methods, default=[*methods], metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--launch", help='the words before `-m cps_hf train`, e.g. "accelerate launch --multi_gpu"')
    parser.add_argument("--report_only", action="store_true", help="run nothing, only write the tables")
    return parser


@dataclass(frozen=True)
class Cell:
    """A run: its name, its settings (whose `output_dir` is its folder), and its program."""

    name: str
    settings: Settings
    program: tuple[str, ...] = TRAIN

    @property
    def folder(self) -> Path:
        return Path(self.settings.args.output_dir)

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").is_file()

    def results(self) -> dict[str, Any]:
        """The contents of its results.json."""
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    def log(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def run_all(
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    launch: str | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """Run the cells that are not finished, `jobs` at a time; return those that failed.

    A cell with a checkpoint resumes from it; one without starts over. Checkpoints of a finished cell are removed; its
    branches are kept.

    Args:
        launch: the words before the program, like "accelerate launch --multi_gpu --num_processes 4"; by default,
            Python.
        after_each: called when a cell is finished.
    """
    waiting = [cell for cell in cells if not cell.finished]
    total, begun, failed = len(waiting), 0, []
    running: dict[subprocess.Popen, tuple[Cell, float]] = {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end too
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell, begun = waiting.pop(0), begun + 1
                print(f"[{begun}/{total}] {cell.name} {'resumes' if _started(cell) else 'starts'}", flush=True)
                running[_start(cell, launch)] = cell, time.monotonic()
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                cell, since = running.pop(process)
                if process.returncode == 0 and cell.finished:
                    for checkpoint in cell.folder.glob("checkpoint-*"):
                        shutil.rmtree(checkpoint)
                    scores = {row: f"{100 * s['mean_iou']:.2f}" for row, s in cell.results()["final"].items()}
                    said = ", ".join(f"{row.replace('_', ' ')} {score}" for row, score in scores.items())
                    print(f"      {cell.name}: mIoU {said} ({time.monotonic() - since:.0f} s)", flush=True)
                    after_each()
                else:
                    failed.append(cell)
                    last = (cell.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
                    print(f"      {cell.name} FAILED, exit status {process.returncode}:", *last, sep="\n        ")
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def _started(cell: Cell) -> bool:
    return newest_checkpoint(cell.folder) is not None


def _start(cell: Cell, launch: str | None) -> subprocess.Popen:
    cell.folder.mkdir(parents=True, exist_ok=True)
    goes_on = _started(cell)
    settings = cell.settings.with_values(resume_from_checkpoint=goes_on or None, overwrite_output_dir=not goes_on)
    config = cell.folder / "cell.yaml"
    write_atomically(config, settings.to_yaml())
    words = [*(shlex.split(launch) if launch else [sys.executable]), *cell.program, "--config", str(config)]
    with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
