"""Cases of exact resuming, for tests and for benchmarks/resume_grid.py.

An uninterrupted run is compared with one that is interrupted inside an optimizer step, between saves, and is resumed
from its newest checkpoint. Augmentation, batch norm and dropout are on, and gradients are accumulated.

As a program, in the number of processes it is launched in: `resume_cases.py WORLD CASES.json FOUND.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import load_dataset, load_from_disk
from datasets.table import embed_table_storage
from safetensors.torch import load_file
from transformers import TrainerCallback

from cps_hf.data.streams import TrainStream
from cps_hf.objectives import OBJECTIVES
from cps_hf.training.callbacks import PicturesCallback, ReportCallback
from cps_hf.training.export import BranchExporter
from cps_hf.training.trainer import CPSTrainer
from support.processes import launch
from support.toy import settings, toy_models, write_world

SIZES = [(40, 56), (56, 40), (48, 48), (37, 61), (64, 33), (44, 50), (33, 45), (52, 36), (60, 42)]
SAVED, BROKEN, LAST = 3, 5, 6  # the step of the checkpoint, the one interrupted in its second half, the last
SHARE = {1: 4, 2: 2}  # images per process and micro-batch, by the number of processes, for one global batch


@dataclass(frozen=True)
class Case:
    objective: str
    data: str  # "map" or "stream"
    workers: int
    processes: int

    def __str__(self) -> str:
        return f"{self.objective}, {self.data}, {self.workers} workers, {self.processes} processes"


def write_resume_world(root: Path) -> Path:
    """The sets as files that any process can open: map-style ones and the same rows in shards."""
    for name, first, labels in (("train", 0, True), ("unlabeled", 50, False), ("eval", 90, True)):
        sizes = SIZES[:3] if name == "eval" else SIZES
        dataset = write_world(root / f"{name}_images", sizes, first=first)
        dataset = dataset if labels else dataset.rename_column("label", "pseudo_label")  # few objectives use it
        dataset.save_to_disk(str(root / "map" / name))
        for index in range(3):
            shard = dataset.shard(3, index, contiguous=True).with_format("arrow")
            shard = shard.map(embed_table_storage, batched=True).with_format(None)
            shard.to_parquet(root / "stream" / name / f"{name}-{index:05d}-of-00003.parquet")
    return root


def read_world(root: Path, data: str) -> dict[str, Any]:
    def read(name: str):
        if data == "map" or name == "eval":
            return load_from_disk(str(root / "map" / name))
        files = sorted(str(path) for path in (root / "stream" / name).glob("*.parquet"))
        return load_dataset("parquet", data_files=files, split="train", streaming=True)

    return {f"{name}_dataset": read(name) for name in ("train", "unlabeled", "eval")}


def make_trainer(root: Path, case: Case, out: Path, callbacks=(), **fields) -> CPSTrainer:
    sets = read_world(root, case.data)
    sets |= {name: fields.pop(name) for name in sets if name in fields}
    objective = fields.pop("objective", None) or OBJECTIVES[case.objective]()
    values = {
        "output_dir": str(out),
        "max_steps": LAST,
        "per_device_train_batch_size": SHARE[case.processes],
        "gradient_accumulation_steps": 2,
        "crop_size": [24, 32],
        "optim": "adamw",
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "dataloader_num_workers": case.workers,
        "shuffle_buffer_size": 6,
        "logging_steps": 2,
        "eval_steps": 2,
        "save_steps": SAVED,
        "disable_tqdm": True,
        "num_pictures": 0,
        "agreement_images": 2,
        "per_device_eval_batch_size": 2,
    }
    values |= {"ema_decay": 0.9} if OBJECTIVES[case.objective].averages else {}
    models = toy_models(1 if objective.teacher else 2, dropout=0.2, norm=True)
    args = settings(**(values | fields))
    return CPSTrainer(models, **args, objective=objective, callbacks=[*callbacks], **sets)


class Watch(TrainerCallback):
    """Records which samples come next at the step of the checkpoint."""

    trainer: CPSTrainer
    next_ids: dict[str, list[str]] | None = None  # of a run that starts later

    def on_train_begin(self, args, state, control, **kwargs):
        self._note(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._note(state)

    def _note(self, state):
        if state.global_step == SAVED:
            self.next_ids = self.trainer.next_ids(20)


class BrokenOff(BaseException):
    """Like a kill: not caught by the code that keeps errors from ending a run."""


def break_off(trainer: CPSTrainer, *, step: int, micro_batch: int) -> None:
    """Let the forward pass of that micro-batch (counted from 1) of that step raise `BrokenOff`."""
    calls = []

    def count(*_):
        calls.append(1)
        steps = step - trainer.state.first_step - 1
        if len(calls) == steps * trainer.args.gradient_accumulation_steps + micro_batch:
            raise BrokenOff

    trainer.module.register_forward_pre_hook(count)


def assert_exact_resume(make: Callable[..., CPSTrainer], folder: Path, *, step: int) -> None:
    """A run that is interrupted in the second micro-batch of a step and resumed ends with the weights of a whole one.

    Args:
        make: makes a trainer that writes to a folder and saves at each step, with `resume_from_checkpoint` if given.
    """
    whole = make(folder / "whole")
    whole.train()
    broken = make(folder / "broken")
    break_off(broken, step=step, micro_batch=2)
    with pytest.raises(BrokenOff):
        broken.train()
    resumed = make(folder / "broken", resume_from_checkpoint="auto")
    resumed.train()
    assert resumed.state.first_step > 0
    for key, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[key], tensor), key


@contextmanager
def recorded_ids():
    """The ids of every micro-batch that this process trains on, by stream."""
    seen: dict[str, list[list[str]]] = {}
    original = TrainStream.__iter__

    def recording(self):
        for batch in original(self):
            seen.setdefault(self.name, []).append(batch["ids"])
            yield batch

    TrainStream.__iter__ = recording
    try:
        yield seen
    finally:
        TrainStream.__iter__ = original


def _nothing(*_) -> None:
    pass


@contextmanager
def without_cards_and_pictures():
    """They take most of the time of such short runs."""
    with (
        patch.multiple(BranchExporter, _card=_nothing, rewrite_card=_nothing),
        patch.multiple(PicturesCallback, _draw_predictions=_nothing, _draw_results=_nothing),
        patch.multiple(ReportCallback, _write_evaluation=_nothing, _write_report=_nothing),
    ):
        yield


def run_whole(root: Path, case: Case, out: Path, **fields) -> dict[str, Any]:
    """Train without interruption. Returns what is compared."""
    watch = Watch()
    watch.trainer = trainer = make_trainer(root, case, out, [watch], **fields)
    with recorded_ids() as seen:
        summary = trainer.train()
    return outcome(trainer, summary, seen, watch)


def run_broken(root: Path, case: Case, out: Path, **fields) -> None:
    """Train until inside the step `BROKEN`."""
    trainer = make_trainer(root, case, out, **fields)
    break_off(trainer, step=BROKEN, micro_batch=2)
    try:
        trainer.train()
    except BrokenOff:
        return
    raise AssertionError("was not broken off")


def run_resumed(root: Path, case: Case, out: Path, **fields) -> dict[str, Any]:
    return run_whole(root, case, out, **({"resume_from_checkpoint": "auto"} | fields))


def outcome(trainer: CPSTrainer, summary: dict[str, Any], seen: dict[str, list], watch: Watch) -> dict[str, Any]:
    out = Path(trainer.args.output_dir)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights, teacher, statistics": dict(trainer.module.state_dict()),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "log": [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines],
        "results": {k: v for k, v in summary.items() if k not in ("versions", "training")},
        "ids of the next 20 samples": watch.next_ids,
        "ids of the last steps": {k: v[-2 * (LAST - SAVED) :] for k, v in seen.items()},
        "random state": torch.get_rng_state(),
        "exported": {path.parent.name: load_file(path) for path in sorted(out.glob("[!c]*/model.safetensors"))},
    }


def same(a: Any, b: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def differences(root: Path, case: Case, out: Path, **fields) -> list[str]:
    """What differs between the resumed and the uninterrupted run; empty if nothing."""
    with without_cards_and_pictures():
        whole = run_whole(root, case, out / "whole", **fields)
        run_broken(root, case, out / "broken", **fields)
        resumed = run_resumed(root, case, out / "broken", **fields)
    wrong = [name for name in whole if not same(whole[name], resumed[name])]
    counts = {k: len(v) for k, v in resumed["ids of the last steps"].items()}
    return wrong + [f"trained on {n} micro-batches of {k}" for k, n in counts.items() if n != 2 * (LAST - SAVED)]


def differences_in_processes(root: Path, cases: list[Case], folder: Path) -> dict[str, list[str]]:
    """`differences` of each case, in one launch with the cases' number of processes."""
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    words = (str(Path(__file__)), str(root), str(folder / "cases.json"), str(folder / "found.json"))
    done = launch(*words, processes=cases[0].processes, timeout=4 * 3600)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads((folder / "found.json").read_text())


def main(root: str, cases: str, found: str) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.05  # as in conftest.py
    transformers.utils.logging.disable_progress_bar()
    done = {}
    for index, fields in enumerate(json.loads(Path(cases).read_text())):
        case = Case(**fields)
        out = Path(found).parent / f"case-{index}"
        done[str(case)] = sorted({*gather_object(differences(Path(root), case, out))})  # of any process
        if PartialState().is_main_process:
            Path(found).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
