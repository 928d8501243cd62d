"""Kill a training repeatedly with SIGKILL: does it end bit for bit like the run that was never stopped?

    python benchmarks/kill_test.py [--kills 20] [--seed 0] [--output benchmarks/results/kill_test.md]

A training of two toy networks (tests/support/resume_cases.py: batch norm, dropout, augmentation, AdamW, accumulation,
a loader worker) saves every 8 steps and is always started with `resume_from_checkpoint="auto"`. Half of the kills come
at a random time after a random number of steps, half at a random time after writing of a checkpoint has begun. Each
training runs in a process forked from this one, so the libraries are imported only once. After each kill, the newest
whole checkpoint and the number of logged steps after it are recorded. At the end, weights, optimizer, schedule, random
state, every logged number, scores, exported branches and the ids of the next 20 samples are compared. Runs on a CPU
for some minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from support.resume_cases import (  # noqa: E402
    Case,
    Watch,
    make_trainer,
    outcome,
    same,
    without_cards_and_pictures,
    write_resume_world,
)

from cps_hf.checkpointing.checkpoints import newest_checkpoint  # noqa: E402

SAVE_STEPS = 8
CASE = Case("cps", "map", workers=1, processes=1)
fork = multiprocessing.get_context("fork")


class Starts(Watch):
    """Record the step from which each start of the training resumed."""

    def on_train_begin(self, args, state, control, **kwargs):
        with open(Path(args.output_dir).with_suffix(".starts"), "a") as file:
            file.write(f"{state.global_step}\n")


def train(world: Path, out: Path, max_steps: int) -> None:
    """Train to the end, and write what is compared to `OUT.end`."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(filename=out.with_suffix(".log"), level=logging.INFO, format="%(message)s")
    fields = {"save_steps": SAVE_STEPS, "save_total_limit": 2, "logging_steps": 1, "eval_steps": 3 * SAVE_STEPS}
    starts = Starts()
    fields |= {"max_steps": max_steps, "resume_from_checkpoint": "auto", "agreement_images": 0}
    starts.trainer = trainer = make_trainer(world, CASE, out, [starts], **fields)
    with without_cards_and_pictures():
        summary = trainer.train()
    starts.next_ids = trainer.next_ids(20)
    end = outcome(trainer, summary, {}, starts)
    torch.save(end, out.with_suffix(".tmp"))
    os.replace(out.with_suffix(".tmp"), out.with_suffix(".end"))


def last_logged(out: Path) -> int:
    """The newest step in metrics.jsonl; 0 when there is none."""
    if not (out / "metrics.jsonl").exists():
        return 0
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]  # text after the last newline is half a line
    return max((json.loads(line)["step"] for line in lines), default=0)


def half_written(out: Path) -> bool:
    return any(out.glob("tmp-checkpoint-*"))


@dataclass
class Kill:
    aimed_at: str
    saving: bool  # a half-written checkpoint was left
    begun: int  # the step that this start resumed from
    logged: int  # the last step that it logged
    whole: int  # the step of the newest whole checkpoint afterwards

    @property
    def repeated(self) -> int:
        return max(self.logged, self.begun) - self.whole


def run_until(process: Any, condition: Callable[[], bool]) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.002)


def start_and_kill(world: Path, out: Path, max_steps: int, aim: str, rng: random.Random) -> Kill | None:
    """Start and kill once; None if the training ended before."""
    before = newest_checkpoint(out)
    begun = step_of(before)
    process = fork.Process(target=train, args=(world, out, max_steps))
    process.start()
    if aim == "steps":
        target = begun + rng.randint(1, 2 * SAVE_STEPS)
        # Later lines of the killed run remain until the new one removes them when it starts.
        starts = count_starts(out)
        run_until(process, lambda: count_starts(out) > starts)
        run_until(process, lambda: last_logged(out) >= target)
        time.sleep(rng.uniform(0, 0.1))
    else:
        starts = count_starts(out)
        run_until(process, lambda: count_starts(out) > starts)
        for _ in range(rng.randint(0, 1)):  # the first or the second checkpoint of this start
            run_until(process, lambda: half_written(out))
            run_until(process, lambda: not half_written(out))
        run_until(process, lambda: half_written(out))
        time.sleep(rng.uniform(0, 0.06))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode == 0:
        return None
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"The training failed by itself: {out.with_suffix('.log').read_text()[-3000:]}")
    return Kill(aim, half_written(out), begun, last_logged(out), step_of(newest_checkpoint(out)))


def count_starts(out: Path) -> int:
    path = out.with_suffix(".starts")
    return len(path.read_text().splitlines()) if path.exists() else 0


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


def in_a_process(target: Callable, *words: Any) -> None:
    process = fork.Process(target=target, args=words)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{target.__name__} ended with {process.exitcode}")


def test(folder: Path, count: int, seed: int) -> tuple[list[Kill], list[str], int]:
    """Return the kills, what differs at the end, and the length of the run."""
    rng = random.Random(seed)
    max_steps = 12 * (count + 2)  # a start takes at most 16 steps, on average 6 or 7
    world, whole, killed = folder / "world", folder / "whole", folder / "killed"
    in_a_process(write_resume_world, world)
    in_a_process(train, world, whole, max_steps)
    kills: list[Kill] = []
    while len(kills) < count:
        kill = start_and_kill(world, killed, max_steps, "steps" if len(kills) % 2 else "saving", rng)
        if kill is None:
            raise RuntimeError(f"the run ended after {len(kills)} kills: it is too short")
        kills.append(kill)
        print(f"kill {len(kills)}: {kill}", flush=True)
    in_a_process(train, world, killed, max_steps)
    starts = [int(line) for line in killed.with_suffix(".starts").read_text().splitlines()]
    expected = [0, *[kill.whole for kill in kills]]
    ends = [torch.load(out.with_suffix(".end"), weights_only=True) for out in (whole, killed)]
    wrong = [name for name in ends[0] if not same(ends[0][name], ends[1][name])]
    if starts != expected:
        wrong.append(f"the starts resumed from {starts}, not from the newest whole checkpoints {expected}")
    shutil.rmtree(killed)
    return kills, wrong, max_steps


def report(kills: list[Kill], wrong: list[str], max_steps: int, seed: int) -> str:
    lines = [
        "# The kill test",
        "",
        f"`python benchmarks/kill_test.py --kills {len(kills)} --seed {seed}`, {datetime.date.today()}, CPU; torch "
        f"{version('torch')}, accelerate {version('accelerate')}. {max_steps} steps, saved every {SAVE_STEPS}; what "
        "is trained, killed and compared is described in the script.",
        "",
        "| kill | aimed at | resumed from | last step logged | a checkpoint half-written | newest whole | repeated |",
        "|---|---|---|---|---|---|---|",
    ]
    for index, kill in enumerate(kills, 1):
        aim = "a save" if kill.aimed_at == "saving" else "any moment"
        saving = "yes" if kill.saving else ""
        lines.append(f"| {index} | {aim} | {kill.begun} | {kill.logged} | {saving} | {kill.whole} | {kill.repeated} |")
    worst, saving = max(kill.repeated for kill in kills), sum(kill.saving for kill in kills)
    lines += [
        "",
        f"{len(kills)} kills, {saving} of them while a checkpoint was being written; never more than {worst} steps "
        f"repeated (a save interval: {SAVE_STEPS}).",
        f"The end differs from that of the uninterrupted run in: {', '.join(wrong) or 'nothing, bit for bit'}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--output", type=Path, help="a Markdown file; default: print")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, wrong, max_steps = test(Path(folder), args.kills, args.seed)
    text = report(kills, wrong, max_steps, args.seed)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(bool(wrong) or any(kill.repeated > SAVE_STEPS for kill in kills))


if __name__ == "__main__":
    main()
