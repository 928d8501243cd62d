"""Is labeling the images that `cps-hf rank` picks better than labeling as many at random?

    python benchmarks/rank.py --real DIR [--seeds 1 2 3]
        Camvid, from 12 labels to 24, one seed after the other.

    python benchmarks/rank.py --report
        no run: the table of the finished seeds.

Per seed, 12 random training images are labeled, and a pair of networks is trained on them. `cps-hf rank` picks 12 of
the other 355 images by the pair's disagreement; 12 more are drawn at random. One network is then trained on each set
of 24, from ImageNet's weights, with the same steps, seed and settings (the control's of benchmarks/real). Its mean IoU
on test at the last step counts, and the differences are paired by seed. No mask is read before its image is picked.

An interrupted call resumes: each seed's choice and each finished run is a small JSON in `--cells`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "real"), str(HERE / "comparisons")]

import torch  # noqa: E402
import transformers  # noqa: E402
from arms import ARMS, CROP  # noqa: E402
from cells import Cell, run_all  # noqa: E402
from network import add_backbone_option, write_config  # noqa: E402
from report import paired  # noqa: E402
from sets import prepare  # noqa: E402

from cps_hf.commands import rank, train  # noqa: E402
from cps_hf.files import write_atomically  # noqa: E402

CELLS = HERE / "results" / "rank" / "cells"
FIRST, MORE = 12, 12
WAYS = ("ranked", "random")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if not options.report:
        benchmark = Benchmark(options)
        for seed in options.seeds:
            if not benchmark.run(seed):
                return 1
    text = markdown(read(options.cells))
    write_atomically(options.cells.parent / "table.md", text)
    print(text)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--real", type=Path, help="the folder that contains camvid/, or a file of real/pack.py")
    add_backbone_option(parser)
    parser.add_argument("--runs", type=Path, default=Path("outputs/rank"), help="the runs' folders")
    parser.add_argument("--cells", type=Path, default=CELLS, help="where results are kept, as JSON")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of networks and of labeled images")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each training")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    if not options.report and options.real is None:
        parser.error("--real DIR is needed to run; --report needs none.")
    return options


class Benchmark:
    """The runs of all seeds, and what is kept of them."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        options.cells.mkdir(parents=True, exist_ok=True)
        self.root = prepare(options.real, options.runs / "data", "camvid")
        self.classes = json.loads((self.root / "classes.json").read_text(encoding="utf-8"))
        self.model = write_config(options.runs)

    def run(self, seed: int) -> bool:
        """One seed; false where a run fails."""
        path = self.options.cells / f"seed{seed}-chosen.json"
        if not path.is_file():
            chosen = self._choose(seed)
            if chosen is None:
                return False
            write_atomically(path, json.dumps(chosen, indent=1))
        chosen = json.loads(path.read_text(encoding="utf-8"))
        for way in WAYS:
            name = f"seed{seed}-{way}"
            values = self._values(seed, branches=1, split="test")
            labeled = chosen["first"] + chosen[way]
            kept = self.options.cells / f"{name}.json"
            stamp = stamp_of(values | {"labeled": labeled})
            if kept.is_file():
                if json.loads(kept.read_text(encoding="utf-8"))["settings_hash"] != stamp:
                    raise SystemExit(f"{kept} was made with other settings. Remove it, or choose another `--cells`.")
                continue
            cell = self._cell(name, values, labeled)
            if run_all([cell]):
                return False
            results = cell.results()
            content = {
                "seed": seed,
                "way": way,
                "settings_hash": stamp,
                "labeled": labeled,
                "mean_iou": results["final"]["branch_0"]["mean_iou"],
                "per_category_iou": dict(
                    zip(self.classes, results["final"]["branch_0"]["per_category_iou"], strict=True)
                ),
                "training": {key: results["training"][key] for key in ("seconds", "cpu_seconds", "device")},
                "settings": values,
                "date": str(date.today()),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
            write_atomically(kept, json.dumps(content, indent=1))
        return True

    def _choose(self, seed: int) -> dict[str, Any] | None:
        """The first labeled images, and the two ways to add as many; `None` where the pair's run fails."""
        images = {path.stem: path for path in (self.root / "train" / "images").iterdir()}
        first, rest = draw(sorted(images), seed)
        cell = self._cell(f"seed{seed}-first", self._values(seed, branches=2, split="timing"), first)
        if run_all([cell]):
            return None
        files = [str(images[image]) for image in rest]
        output = self.options.runs / f"seed{seed}-ranking.csv"
        ranked = rank.main([str(cell.folder), *files, "--count", str(MORE), "--output", str(output)])
        return {
            "first": first,
            "ranked": [Path(path).stem for path in ranked[:MORE]],
            "random": rest[:MORE],
        }

    def _cell(self, name: str, values: dict[str, Any], labeled: Sequence[str]) -> Cell:
        folder = self.options.runs / name
        folder.mkdir(parents=True, exist_ok=True)
        listed = folder.with_suffix(".txt")
        write_atomically(listed, "".join(f"{image}\n" for image in labeled))
        words = ["--objective=supervised", "--dataset=folder", f"--data_root={self.root}"]
        settings = train.parse(words).with_values(
            **values,
            partition=str(listed),
            models=[str(self.model)],
            backbone=self.options.backbone,
            output_dir=str(folder),
            save_steps=100,
            save_total_limit=1,
            num_pictures=0,
            disable_tqdm=True,
            check_labels_seconds=0,
        )
        return Cell(name, settings)

    def _values(self, seed: int, *, branches: int, split: str) -> dict[str, Any]:
        """What decides a result besides the labeled images, by option name."""
        return ARMS["control"].options | {
            "max_steps": self.options.steps,
            "crop_size": [CROP["camvid"]] * 2,
            "num_branches": branches,
            "seed": seed,
            "eval_split": split,
            "dataloader_num_workers": 0,
            "per_device_eval_batch_size": 8,
        }


def draw(images: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """(the images labeled first, all others), both in random order: the others begin with the random choice."""
    shuffled = random.Random(seed).sample(list(images), len(images))
    return shuffled[:FIRST], shuffled[FIRST:]


def stamp_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ the table


def read(cells: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Seed -> way -> the cell's JSON."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for way in WAYS:
        for path in sorted(cells.glob(f"seed*-{way}.json")):
            cell = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(cell["seed"], {})[way] = cell
    return found


def markdown(cells: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
    """A row per seed with both ways, the paired difference, and both ways by class."""
    seeds = sorted(seed for seed, by_way in cells.items() if len(by_way) == len(WAYS))
    if not seeds:
        return "No seed is finished yet.\n"
    scores = {way: [100 * cells[seed][way]["mean_iou"] for seed in seeds] for way in WAYS}
    differences = [ranked - at_random for ranked, at_random in zip(*scores.values(), strict=True)]
    steps = cells[seeds[0]]["ranked"]["settings"]["max_steps"]
    lines = [
        f"Camvid, {FIRST} + {MORE} labeled images, {steps} steps: mean IoU in % on test, one network, last step.",
        "",
        "| seed | 12 picked by `cps-hf rank` | 12 at random | difference |",
        "|---|---|---|---|",
    ]
    for seed, ranked, at_random, difference in zip(seeds, *scores.values(), differences, strict=True):
        lines.append(f"| {seed} | {ranked:.1f} | {at_random:.1f} | {difference:+.1f} |")
    means = [statistics.mean(values) for values in scores.values()]
    lines += [f"| mean | {means[0]:.1f} | {means[1]:.1f} | {statistics.mean(differences):+.1f} |", ""]
    lines += [f"Paired difference, ranked - random: {paired(differences)}", ""]
    lines += ["IoU in % by class, mean over seeds:", "", "| class | ranked | random |", "|---|---|---|"]
    for name in cells[seeds[0]][WAYS[0]]["per_category_iou"]:
        shown = " | ".join(_mean([cells[seed][way]["per_category_iou"][name] for seed in seeds]) for way in WAYS)
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float | None]) -> str:
    """In %, of the seeds where the class occurs."""
    known = [value for value in values if value is not None]
    return f"{100 * statistics.mean(known):.1f}" if known else "-"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
