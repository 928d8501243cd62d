"""Compare the methods with a fair control on photographs and steel surfaces, from ImageNet weights.

    python benchmarks/real/compare.py --real DIR --arms recommended control_equal_time plain_equal_time
        both sets, three seeds, each with other labels: the most valuable part.

    python benchmarks/real/compare.py --real DIR --split val --seeds 0 --arms ...
        on the images for choosing settings; kept separate from what is reported.

    python benchmarks/real/compare.py --report
        no run: the tables and figures of all finished cells.

`README.md` in this folder is the protocol. Each run is a separate process and resumes where it stopped. A finished run
is kept as a small JSON in `--cells` with the hash of its settings, and not repeated while that is the same.
The seconds per step are measured first, alternating, and also kept in `--cells`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "comparisons")]

import report  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from arms import ARMS, CROP, LABELS  # noqa: E402
from cells import Cell, run_all  # noqa: E402
from network import add_backbone_option, write_config  # noqa: E402
from sets import prepare  # noqa: E402

from cps_hf.commands import train  # noqa: E402
from cps_hf.commands.settings import Settings  # noqa: E402
from cps_hf.files import write_atomically  # noqa: E402

CELLS = HERE.parent / "results" / "real" / "cells"
PACKED_CELLS = HERE.parent / "results" / "real_packed" / "cells"
TIMED_STEPS = 12


@dataclass(frozen=True)
class Key:
    """The run of a cell."""

    dataset: str
    labels: int
    seed: int
    arm: str
    length: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.labels}-seed{self.seed}-{self.arm}-{self.length}-{self.split}"


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if not options.report:
        benchmark = Benchmark(options)
        failed = benchmark.run()
        if failed:
            print(f"{len(failed)} failed: {', '.join(cell.name for cell in failed)} (log.txt in each run's folder).")
            return 1
    print(report.write(options.cells, options.cells.parent))
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--real", type=Path, help="the folder that contains camvid/ and steel/, or a file of pack.py")
    add_backbone_option(parser)
    parser.add_argument("--runs", type=Path, default=Path("outputs/real"), help="the runs' folders")
    parser.add_argument(
        "--cells",
        type=Path,
        help="where each finished run's JSON is kept; default: benchmarks/results/real/cells, for a packed file "
        "benchmarks/results/real_packed/cells",
    )
    parser.add_argument("--sets", nargs="+", choices=LABELS, default=[*LABELS])
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["recommended", "control_equal_time", "plain_equal_time"]
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the networks and of the labeled set"
    )
    parser.add_argument("--labels", nargs="+", type=int, help="labeled images; default: 23 of camvid, 24 of steel")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1500], help="optimizer steps, both stages together")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="val: for choosing settings")
    parser.add_argument("--override", type=json.loads, default={}, help="further settings, as JSON; with --split val")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    if not options.report and options.real is None:
        parser.error("--real DIR is needed to run; --report needs none.")
    if options.cells is None:
        packed = options.real is not None and options.real.is_file()
        options.cells = PACKED_CELLS if packed else CELLS
    if options.override and options.split == "test":
        parser.error("--override is for choosing settings, on --split val.")
    return options


class Benchmark:
    """The requested cells, and how to run them."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.roots = {name: prepare(options.real, options.runs / "data", name) for name in options.sets}
        self.model = write_config(options.runs)

    def run(self) -> list[Cell]:
        """Run what has no cell yet; return the runs that failed."""
        values = {key: self._values(key) for key in self._keys()}
        wanted = [key for key in values if not self._is_kept(key, values[key])]
        jobs, failed = self.options.jobs, []
        for start in range(0, len(wanted), jobs):  # this many run at a time, and are kept when they are done
            batch = {key: self._cell(key, values[key]) for key in wanted[start : start + jobs]}
            failed += run_all([*batch.values()], jobs=jobs)
            for key, cell in batch.items():
                if cell.finished:
                    self._keep(key, values[key], cell)
        return failed

    def _keys(self) -> Iterator[Key]:
        options = self.options
        for length in options.lengths:
            for seed in options.seeds:
                for name in options.sets:
                    for labels in options.labels or [LABELS[name]]:
                        for arm in options.arms:
                            yield Key(name, labels, seed, arm, length, options.split)

    def _cell(self, key: Key, values: dict[str, Any]) -> Cell:
        return Cell(key.name, self._settings(key, values, self.options.runs / key.name))

    def _settings(self, key: Key, values: dict[str, Any], folder: Path) -> Settings:
        words = [
            f"--objective={ARMS[key.arm].objective}",
            "--dataset=folder",
            f"--data_root={self.roots[key.dataset]}",
        ]
        return train.parse(words).with_values(
            **values,
            **self._labelers(key),
            models=[str(self.model)],
            backbone=self.options.backbone,
            output_dir=str(folder),
            save_steps=250,
            save_total_limit=1,
            num_pictures=0,
            disable_tqdm=True,
            check_labels_seconds=0,
        )

    def _values(self, key: Key) -> dict[str, Any]:
        """The settings that affect the result, by option name; all others have their defaults."""
        arm = ARMS[key.arm]
        steps = arm.max_steps(key.length, self._seconds(key.dataset) if arm.as_long_as else {}, ARMS)
        values = arm.options | self.options.override
        if not arm.pretrain_steps(steps):
            values.pop("second_stage_learning_rate_factor", None)
        return values | {
            "max_steps": steps,
            "pretrain_steps": arm.pretrain_steps(steps),
            "crop_size": [CROP[key.dataset]] * 2,
            "num_branches": arm.branches,
            "seed": key.seed,
            "eval_split": key.split,
            "partition": "1-1" if key.arm == "all_labels" else str(key.labels),
            "partition_seed": key.seed,
            "dataloader_num_workers": 0,  # so that all CPU seconds are the process's
            "per_device_eval_batch_size": 8,
        }

    def _labelers(self, key: Key) -> dict[str, Any]:
        """The option that names the networks that make the labels, if the arm has any."""
        arm = ARMS[key.arm].labelers
        if arm is None:
            return {}
        first = self.options.runs / replace(key, arm=arm).name
        folders = [first / f"supervised_{i}" for i in range(ARMS[arm].branches)]
        if not all(folder.is_dir() for folder in folders):
            raise SystemExit(f"{key.name} needs the networks in {first}, which are not there: run --arms {arm} first.")
        return {"labelers": [*map(str, folders)]}

    # -------------------------------------------------------------------------------------------------- seconds

    def _seconds(self, dataset: str) -> dict[str, float]:
        """CPU seconds per step (wall-clock on a GPU) by kind, measured once per data set: twice each, alternating."""
        path = self.options.cells / f"seconds-{dataset}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": {}}
        arms = {arm: ARMS[arm] for arm in reversed(["control", "recommended", *self.options.arms])}
        kinds = {arm.step_kind: name for name, arm in arms.items()} | {"supervised_2": "control"}
        missing = {kind: arm for kind, arm in kinds.items() if kind not in found["seconds"]}
        if not missing:
            return found["seconds"]
        measured: dict[str, list[float]] = {kind: [] for kind in missing}
        for turn in range(2):
            for kind, arm in missing.items():
                measured[kind].append(self._time(dataset, kind, arm, turn))
        found["seconds"] |= {kind: min(times) for kind, times in measured.items()}
        found |= {"steps": TIMED_STEPS, "date": str(date.today()), "machine": platform.machine()}
        write_atomically(path, json.dumps(found, indent=1))
        return found["seconds"]

    def _time(self, dataset: str, kind: str, arm: str, turn: int) -> float:
        """The seconds of a step of this kind: in one stage, scored on eight images."""
        took = []
        for steps in (2, 2 + TIMED_STEPS):  # the difference excludes the overhead of the first steps
            folder = self.options.runs / "timing" / f"{dataset}-{kind}-{turn}-{steps}"
            shutil.rmtree(folder, ignore_errors=True)
            key = Key(dataset, LABELS[dataset], 0, arm, steps, "timing")
            values = self._values(key) | {"pretrain_steps": None, "second_stage_learning_rate_factor": 1.0}
            if kind == "supervised_2":
                values["num_branches"] = 2
            cell = Cell(folder.name, self._settings(key, values, folder))
            if run_all([cell]):
                raise SystemExit(f"{folder}/log.txt says why a step of {kind} cannot be timed.")
            training = cell.results()["training"]
            took.append(training["cpu_seconds" if training["device"] == "cpu" else "seconds"])
        return (took[1] - took[0]) / TIMED_STEPS

    # -------------------------------------------------------------------------------------------------- what is kept

    def _path(self, key: Key) -> Path:
        return self.options.cells / f"{key.name}.json"

    def _is_kept(self, key: Key, values: dict[str, Any]) -> bool:
        path = self._path(key)
        if not path.is_file():
            return False
        kept = json.loads(path.read_text(encoding="utf-8"))["settings_hash"]
        if kept != _hash(values):
            raise SystemExit(f"{path} was made with other settings ({kept}): remove it, or take another `--cells`.")
        return True

    def _keep(self, key: Key, values: dict[str, Any], cell: Cell) -> None:
        results = cell.results()
        content: dict[str, Any] = {
            **vars(key),
            "settings_hash": _hash(values),
            "steps": results["steps"],
            "pretrain_steps": values["pretrain_steps"],
            "scores": _scores(results["final"]),
            "supervised_scores": _scores(results.get("stages", {}).get("supervised", {})),
            "training": {k: results["training"][k] for k in ("seconds", "cpu_seconds", "device")},
            "settings": values,
            "date": str(date.today()),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_atomically(self._path(key), json.dumps(content, indent=1))
        shutil.rmtree(cell.folder / "pictures", ignore_errors=True)


def _scores(rows: dict[str, Any]) -> dict[str, Any]:
    return {
        row: {"mean_iou": scores["mean_iou"], "per_category_iou": scores["per_category_iou"]}
        for row, scores in rows.items()
    }


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
