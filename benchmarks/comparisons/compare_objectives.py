"""Compare all methods on equal terms: the same data, labels, models, steps, seeds and learning rate.

    python benchmarks/comparisons/compare_objectives.py
        street scenes, 12 of 400 images labeled, every method, one seed: about two hours on two CPU cores.

    python benchmarks/comparisons/compare_objectives.py --methods supervised cps cps_cutmix all_labels --seeds 1 2 3
        only some methods, with a spread over seeds. Other methods and seeds can be added to the same folder later.

    python benchmarks/comparisons/compare_objectives.py --dataset object_scenes --partitions 1-25 1-12 1-6
        further options are those of `cps-hf train`; several partitions are plotted against the labeled ratio.

    python benchmarks/comparisons/compare_objectives.py --config examples/configs/voc_cps_cutmix_r50.yaml \\
        --data_root DIR --partitions cps/voc/1-16 cps/voc/1-8 \\
        --launch "accelerate launch --multi_gpu --num_processes 4"

The protocol is written to OUT/protocol.md before the first run. Each run is a separate process in OUT/runs; finished
runs are not repeated, and stopped ones resume. OUT/table.md contains the results so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report  # files next to this one
from cells import TRAIN, Cell, run_all, table_parser
from transformers.utils import logging as transformers_logging

from cps_hf import OBJECTIVES, Objective
from cps_hf.commands import train
from cps_hf.commands.parser import read_words
from cps_hf.commands.settings import Settings
from cps_hf.files import write_atomically


@dataclass(frozen=True)
class Method:
    """A run of the comparison: an objective, with changes to its defaults, which are its paper's.

    Args:
        needs: the methods whose runs, with the same labels and seed, it starts from.
    """

    objective: str
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


METHODS = {
    "supervised": Method("supervised"),
    "cps_cutmix": Method("cps", {"cutmix": True}),
    "cps": Method("cps", {"cutmix": False}),
    "all_labels": Method("supervised"),
    "supervised_equal_time": Method("supervised", needs=("supervised", "cps_cutmix")),
    "mean_teacher": Method("mean_teacher"),
    "cpc": Method("cpc"),
    "pseudoseg": Method("pseudoseg"),
    "fixmatch": Method("fixmatch"),
    "unimatch": Method("unimatch"),
    "unimatch_v2": Method("unimatch_v2"),
    "cps_averaged": Method("cps_averaged"),
    "fixed_teacher": Method("fixed_teacher", needs=("supervised",)),
    "self_training": Method("supervised", needs=("supervised",)),
}
SELF_TRAINING = Path(__file__).parents[2] / "examples" / "self_training.py"
EMA_DECAY = 0.996  # of the averages that a method needs, as in UniMatch V2
ALL = "1-1"  # the partition that labels every image
Key = tuple[str, str, int]  # method, partition, seed

PROTOCOL = """# The protocol, written before the first run

- **Data.** {dataset}. The labeled images of a count or ratio are drawn by {drawn}, the same for
  each method. Scores are mean IoU on the whole images of `{eval_split}`.
- **Models.** {models}; initialised by the run's seed, so equal for every method.
  Each run trains two networks, except those of Mean Teacher and UniMatch V2, which train one. Any other method for a
  single network trains the two independently.
- **Steps.** {max_steps} optimizer steps of {batch} labeled and {unlabeled_batch} unlabeled images per process, for
  every method, with the same crops and schedule. `supervised_equal_time` takes as many steps as fit into the time of
  the CPS + CutMix run with the same labels and seed, by the seconds measured in the two runs (on a CPU the training
  process's CPU seconds, so that other jobs do not count; on a GPU wall-clock seconds; without evaluation and saving).
- **Learning rate.** {learning_rate} No method's own score affects it. The other
  hyper-parameters of the methods are also set before the first run: `protocol.json` lists them.
- **Selection.** The score of a run is that of its last step: the mean over the scores of its networks. For Mean
  Teacher and UniMatch V2 it is the teacher's score; their students have their own rows. No step is selected by the
  validation images; the best evaluation is printed too, but is not a result.
- **Self-training** starts from the supervised run's first network of the same labels and seed, labels all unlabeled
  images, and trains again on both. **Fixed teacher** trains two new networks on the labels of that run's two networks.
  The seconds of both include the supervised run's.
- **Seeds.** The mean over seeds, and the standard deviation (n - 1) if there are several. Differences to supervised
  are taken per seed.
- A cell that was not run, or failed, is printed as such.
"""


def main(argv: list[str] | None = None) -> int:
    options, rest = arguments(argv)
    transformers_logging.disable_progress_bar()  # a bar for each network that is read
    try:
        given = read_words(rest)
        if given.keys() & {"objective", "output_dir", "seed", "partition"}:
            raise ValueError("`--methods`, `--output_dir`, `--seeds` and `--partitions` say what is run.")
        settings = train.parse([*rest, "--objective", "supervised"])
        if not given.keys() & {"config", "eval_steps"}:
            settings.args.eval_steps = None
        comparison = Comparison(options, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [] if options.report_only else comparison.run()
    comparison.report(pictures=True)
    print((comparison.out / "table.md").read_text(encoding="utf-8"))
    print(f"Written to {comparison.out}: {', '.join(sorted(path.name for path in comparison.out.iterdir()))}")
    if failed:
        print(f"{len(failed)} failed: {', '.join(cell.name for cell in failed)} (log.txt in each run's folder).")
    return 1 if failed else 0


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = table_parser(__doc__.split("\n")[0], "outputs/compare", METHODS)
    parser.add_argument(
        "--partitions", nargs="+", default=["12"], help="which images are labeled: values of `--partition`"
    )
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        help="several: each trains supervised first, and the best by the last step is everyone's; "
        "none: `--learning_rate`",
    )
    parser.add_argument("--learning_rate_seed", type=int, default=0, help="the seed and partition of those runs")
    parser.add_argument(
        "--method_options", type=json.loads, default={}, help='as JSON: {"cps_cutmix": {"weight": 1.5}, ...}'
    )
    parser.add_argument("--num_pictures", type=int, default=4, help="validation images in the panel")
    return parser.parse_known_args(argv)


class Comparison:
    """The requested runs, and those that earlier calls requested in the same folder.

    Raises:
        ValueError: the settings are invalid, or differ from those of the folder's runs.
    """

    def __init__(self, options: argparse.Namespace, settings: Settings):
        args = settings.args
        if settings.data.smoke:
            raise ValueError("`--smoke` is of single recipes; give a small `--max_steps` here.")
        if settings.data.unlabeled_root is not None:
            raise ValueError(
                "`--unlabeled_root`: partitions of `train_split` are compared, whose labels are all there."
            )
        self.options, self.out = options, options.output_dir
        self.learning_rates = options.learning_rates or [args.learning_rate]
        self.settings = settings.with_values(
            learning_rate=self.learning_rates[0],
            # Curves need several evaluations; a killed run resumes from the newest one.
            eval_steps=args.eval_steps or max(1, args.max_steps // 8),
            save_steps=args.save_steps or args.eval_steps or max(1, args.max_steps // 8),
            save_total_limit=1,
            num_pictures=0,
            disable_tqdm=True,
        )
        self.objectives = self._objectives(settings.objective)
        self.keys = self._agree_with_folder()

    def _objectives(self, loss: Objective) -> dict[str, Objective]:
        """The objective of every method: its paper's defaults, the shared labeled loss, and `--method_options`."""
        unknown = [name for name in self.options.method_options if name not in METHODS]
        if unknown:
            raise ValueError(f"`--method_options`: no method {unknown[0]!r}; there are {', '.join(METHODS)}.")
        found = {}
        for name, method in METHODS.items():
            cls, own = OBJECTIVES[method.objective], self.options.method_options.get(name, {})
            fields = [f.name for f in dataclasses.fields(cls)]
            wrong = [key for key in own if key not in fields]
            if wrong:
                raise ValueError(f"`--method_options`: {name} has no {wrong[0]!r}; it has {', '.join(fields)}.")
            found[name] = cls(**{**dataclasses.asdict(loss), **method.options, **own})
        return found

    def _agree_with_folder(self) -> list[Key]:
        """Write the protocol, or check that the folder's is the same; return all cells requested so far, sorted."""
        loss = {f.name for f in dataclasses.fields(self.settings.objective)}  # listed with the methods
        own = {"output_dir", "seed", "partition", "overwrite_output_dir", "resume_from_checkpoint"}
        settings = {name: value for name, value in self.settings.flat().items() if name not in loss | own}
        wanted = {
            "settings": settings,
            "learning_rates": self.learning_rates,
            "learning_rate_seed": self.options.learning_rate_seed if len(self.learning_rates) > 1 else None,
            "methods": {name: self._method_of(name) for name in METHODS},
            "cells": [[*key] for key in self._requested()],
        }
        path = self.out / "protocol.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            for part in ("settings", "methods"):
                for name, value in wanted[part].items():
                    if part == "methods" and name not in found[part]:  # newer than the folder
                        continue
                    if found[part].get(name) != value:
                        raise ValueError(
                            f"{self.out} holds runs with other settings: `{name}` is {found[part].get(name)!r} there "
                            f"and {value!r} here. Choose another `--output_dir`."
                        )
            if [found[k] for k in ("learning_rates", "learning_rate_seed")] != [
                wanted[k] for k in ("learning_rates", "learning_rate_seed")
            ]:
                raise ValueError(f"{self.out} holds runs of other learning rates ({found['learning_rates']}).")
            wanted["cells"] += [cell for cell in found["cells"] if cell not in wanted["cells"]]
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / "protocol.md", self._protocol())
        write_atomically(path, json.dumps(wanted, indent=1))
        methods = [*METHODS]
        keys = [(method, partition, seed) for method, partition, seed in wanted["cells"]]
        return sorted(keys, key=lambda key: (key[2], key[1] != ALL, key[1], methods.index(key[0])))

    def _method_of(self, name: str) -> dict[str, Any]:
        return {"objective": METHODS[name].objective, **dataclasses.asdict(self.objectives[name])}

    def _requested(self) -> list[Key]:
        """The cells of the command line, and those they need."""
        asked = []
        for method in self.options.methods:
            for name in (*METHODS[method].needs, method):
                partitions = [ALL] if name == "all_labels" else self.options.partitions
                asked += [(name, partition, seed) for partition in partitions for seed in self.options.seeds]
        return [*dict.fromkeys(asked)]

    def _protocol(self) -> str:
        args, data, rates = self.settings.args, self.settings.data, self.learning_rates
        said = ", ".join(f"{rate:g}" for rate in rates)
        learning_rate = f"{said} ({args.optim}, {args.lr_scheduler_type}), given before any run."
        if len(rates) > 1:
            learning_rate = (
                f"Of {said} ({args.optim}, {args.lr_scheduler_type}) the one whose *supervised* training, with seed "
                f"{self.options.learning_rate_seed} and the first partition, ends highest is used for all."
            )
        return PROTOCOL.format(
            dataset=data.dataset + (f" ({Path(data.data_root).name})" if data.data_root else ""),
            drawn=f"seed {data.partition_seed}" if data.partition_seed else "the run's seed",
            eval_split=data.eval_split,
            models=", ".join(data.models) or "two small UperNet-ResNets from random weights",
            max_steps=args.max_steps,
            batch=args.per_device_train_batch_size,
            unlabeled_batch=args.unlabeled_batch_size,
            learning_rate=learning_rate,
        )

    # -------------------------------------------------------------------------------------------------- running

    def run(self) -> list[Cell]:
        """Run what is not finished; return the cells that failed."""
        self.settings.args.learning_rate, failed = self._learning_rate()
        if failed:
            return failed
        first = [self.cell(key) for key in self.keys if not METHODS[key[0]].needs]
        failed = self._run(first)
        return failed + self._run([*self._ready()])

    def _run(self, cells: list[Cell]) -> list[Cell]:
        return run_all(
            cells, jobs=self.options.jobs, launch=self.options.launch, after_each=lambda: self.report(pictures=False)
        )

    def _ready(self) -> Iterator[Cell]:
        """The cells that start from others, if those are finished."""
        for method, partition, seed in self.keys:
            needs = [self.cell((name, partition, seed)) for name in METHODS[method].needs]
            if needs and all(cell.finished for cell in needs):
                yield self.cell((method, partition, seed))

    def _learning_rate(self) -> tuple[float, list[Cell]]:
        if len(self.learning_rates) == 1:
            return self.learning_rates[0], []
        seed, cells = self.options.learning_rate_seed, []
        for rate in self.learning_rates:
            folder = self.out / "runs" / f"learning_rate-{rate:g}"
            settings = self._settings("supervised", self.options.partitions[0], seed, folder)
            cells.append(Cell(f"learning rate {rate:g}", settings.with_values(learning_rate=rate)))
        failed = run_all(cells, jobs=self.options.jobs, launch=self.options.launch)
        if failed:
            return self.learning_rates[0], failed
        scores = {rate: report.score(cell) for rate, cell in zip(self.learning_rates, cells, strict=True)}
        chosen = max(scores, key=scores.get)
        said = ", ".join(f"{rate:g}: {100 * score:.2f}" for rate, score in scores.items())
        text = f"Supervised training, last step, mIoU in percent: {said}. Chosen for every method: {chosen:g}.\n"
        write_atomically(self.out / "learning_rate.md", text)
        return chosen, []

    def _settings(self, method: str, partition: str, seed: int, folder: Path) -> Settings:
        settings = dataclasses.replace(self.settings, objective=self.objectives[method])
        partition_seed = settings.data.partition_seed or seed
        return settings.with_values(
            partition=partition, seed=seed, partition_seed=partition_seed, output_dir=str(folder)
        )

    def cell(self, key: Key) -> Cell:
        """The run of a cell. The cells that its settings depend on must be finished."""
        method, partition, seed = key
        name = f"{method}-{re.sub(r'[^A-Za-z0-9.-]+', '_', partition)}-seed{seed}"
        settings, program = self._settings(method, partition, seed, self.out / "runs" / name), TRAIN
        needs = [self.cell((name, partition, seed)) for name in METHODS[method].needs]
        if method == "supervised_equal_time" and all(cell.finished for cell in needs):
            settings = settings.with_values(max_steps=equal_time_steps(*needs))
        if self.objectives[method].teacher:  # it trains one network, the first of a pair
            backbone, models = settings.model_config.backbone, settings.data.models[:1]
            backbone = backbone[:1] if isinstance(backbone, list) else backbone
            settings = settings.with_values(models=models, backbone=backbone, num_branches=None)
        if self.objectives[method].averages and settings.args.ema_decay is None:
            settings = settings.with_values(ema_decay=EMA_DECAY)
        if method == "fixed_teacher":
            settings = settings.with_values(labelers=[str(needs[0].folder / f"branch_{i}") for i in (0, 1)])
        if method == "self_training":
            teacher = str(needs[0].folder / "branch_0")
            program = (str(SELF_TRAINING), "--teacher", teacher, "--pseudo_label_flip", "false")  # as in its paper
        return Cell(name, settings, program)

    def report(self, *, pictures: bool) -> None:
        cells = {key: self.cell(key) for key in self.keys}
        report.write(self.out, cells, num_pictures=self.options.num_pictures if pictures else 0)


def equal_time_steps(supervised: Cell, other: Cell) -> int:
    """The number of supervised steps that takes as long as the other run, in measured seconds; at least its steps."""
    mine, theirs = supervised.results(), other.results()
    seconds = "cpu_seconds" if mine["training"]["device"] == "cpu" else "seconds"
    factor = theirs["training"][seconds] / mine["training"][seconds]
    return max(mine["steps"], round(factor * mine["steps"]))


if __name__ == "__main__":
    sys.exit(main())
