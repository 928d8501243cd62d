"""Measure what the released code does differently from the paper, one switch at a time.

    python benchmarks/comparisons/ablate_switches.py
        CPS + CutMix and plain CPS on the drawn street scenes: the original's behaviour, then with each switch changed,
        then ours; a table in OUT/table.md. Takes some three hours on two CPU cores.

    python benchmarks/comparisons/ablate_switches.py --config examples/configs/cityscapes_cps_cutmix_r50.yaml \\
        --data_root DIR --partition cps/cityscapes/1-8 --learning_rate 0.02 --weight_decay 1e-4 --world_size 8 \\
        --weights 5 6 --launch "accelerate launch --multi_gpu --num_processes 8"

Further options are those of `cps-hf train`; with a recipe, set the learning rate and weight decay to the release's
nominal values, since the division of the loss is a switch here. Finished runs are not repeated, stopped ones resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell, run_all, table_parser  # files next to this one
from report import score

from cps_hf import CrossPseudoSupervision
from cps_hf.commands import train
from cps_hf.commands.settings import Settings
from cps_hf.files import write_atomically


@dataclass(frozen=True)
class Switch:
    """A choice of the released code and its alternative: a field of the objective or the settings.

    Args:
        methods: the methods to which it applies.
        ours: whether this package changes it by default.
    """

    title: str
    field: str
    original: Any
    turned: Any
    methods: tuple[str, ...] = ("cps_cutmix", "cps")
    ours: bool = True


def switches(world_size: int) -> dict[str, Switch]:
    """The switches by name; the original's loss is divided by the number of its processes."""
    whole = f"loss not divided by the world size {world_size}"
    return {
        "loss_divisor": Switch(whole, "loss_divisor", float(world_size), 1.0),
        "cutmix_partner": Switch(
            "CutMix with another image, not with itself", "cutmix_partner", "itself", "neighbour", ("cps_cutmix",)
        ),
        "unlabeled_order": Switch("a fresh unlabeled order each pass", "reshuffle_unlabeled", False, True),
        "teach_padding": Switch("no pseudo labels on padding", "teach_padding", True, False),
        # Equations 2 and 3 sum over both sets; the release does so without CutMix only, and so do we.
        "on_labeled": Switch("CPS on labeled images too", "on_labeled", False, True, ("cps_cutmix",), ours=False),
        "unlabeled_alone": Switch("CPS on unlabeled images alone", "on_labeled", True, False, ("cps",), ours=False),
    }


# With AdamW the scale of a loss cancels out, so SGD, as the original; its learning rate over a world size of 4 acts
# like 0.02, which networks from random weights bear.
DEFAULTS = {**train.DEFAULTS, "optim": "sgd", "learning_rate": 0.08, "weight_decay": 1e-4, "eval_steps": None}
TITLES = {"original": "nothing: the original", "ours": "all that this package turns"}
WEIGHTS = {"cps_cutmix": 1.0, "cps": 1.5}  # the release's on VOC


def main(argv: list[str] | None = None) -> int:
    options, rest = arguments(argv)
    try:
        settings = train.parse([*rest, "--objective", "supervised"], defaults=DEFAULTS)
        cells = plan(options, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = []
    if not options.report_only:
        how = {"jobs": options.jobs, "launch": options.launch}
        failed = run_all([*cells.values()], **how, after_each=lambda: write_table(options, cells))
    print(write_table(options, cells))
    return 1 if failed else 0


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = table_parser(__doc__.split("\n")[0], "outputs/ablate_switches", WEIGHTS)
    parser.add_argument(
        "--weights", nargs="+", type=float, help="the CPS weight of each; default: the release's on VOC"
    )
    parser.add_argument("--world_size", type=int, default=4, help="the divisor of the original's loss")
    return parser.parse_known_args(argv)


Key = tuple[str, str, int]  # method, arm, seed


def plan(options: argparse.Namespace, settings: Settings) -> dict[Key, Cell]:
    """The runs: per method, the original, each switch changed, and all of ours changed.

    Raises:
        ValueError: the folder contains runs with other settings, or the numbers of weights and methods differ.
    """
    weights = options.weights or [WEIGHTS[method] for method in options.methods]
    if len(weights) != len(options.methods):
        raise ValueError(f"`--weights` needs {len(options.methods)} numbers, one a method, got {len(weights)}.")
    every = settings.args.eval_steps or max(1, settings.args.max_steps // 4)
    settings = settings.with_values(
        eval_steps=every, save_steps=every, save_total_limit=1, num_pictures=0, disable_tqdm=True
    )
    known, cells = switches(options.world_size), {}
    for seed in options.seeds:
        for method, weight in zip(options.methods, weights, strict=True):
            own = {name: switch for name, switch in known.items() if method in switch.methods}
            for arm in ("original", *own, "ours"):
                values = {
                    s.field: s.turned if arm == name or (arm == "ours" and s.ours) else s.original
                    for name, s in own.items()
                }
                loss = dataclasses.asdict(settings.objective)
                cps = CrossPseudoSupervision(**loss, weight=weight, cutmix=method == "cps_cutmix")
                name = f"{method}-{arm}-seed{seed}"
                own_settings = dataclasses.replace(settings, objective=cps).with_values(
                    **values,
                    seed=seed,
                    partition_seed=settings.data.partition_seed or seed,
                    output_dir=str(options.output_dir / "runs" / name),
                )
                cells[method, arm, seed] = Cell(name, own_settings)
    check_folder(options.output_dir, cells)
    return cells


def check_folder(folder: Path, cells: dict[Key, Cell]) -> None:
    """Check that existing runs have the same settings."""
    path = folder / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for cell in cells.values():
        settings = cell.settings.flat()
        del settings["output_dir"], settings["overwrite_output_dir"], settings["resume_from_checkpoint"]
        before = found.setdefault(cell.name, settings)
        other = [key for key in settings if before.get(key) != settings[key]]
        if other:
            raise ValueError(
                f"{folder} holds {cell.name} with other settings: `{other[0]}` is {before.get(other[0])!r} there and "
                f"{settings[other[0]]!r} here. Choose another `--output_dir`."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found, indent=1))


def write_table(options: argparse.Namespace, cells: dict[Key, Cell]) -> str:
    """OUT/table.md and OUT/table.json; the text of the first."""
    known, records = switches(options.world_size), []
    for method in options.methods:
        arms = [*dict.fromkeys(arm for m, arm, _ in cells if m == method)]
        for arm in arms:
            done = {s: c for (m, a, s), c in cells.items() if (m, a) == (method, arm) and c.finished}
            base = {s: c for s in done if (c := cells[method, "original", s]).finished}
            scores = {seed: score(cell) for seed, cell in done.items()}
            differences = [scores[seed] - score(cell) for seed, cell in base.items()]
            records.append(
                {
                    "method": method,
                    "arm": arm,
                    "title": known[arm].title if arm in known else TITLES[arm],
                    "seeds": sorted(done),
                    "last": [scores[seed] for seed in sorted(done)],
                    "minus_original": differences,
                }
            )
    lines = ["mIoU in percent at the last step, mean over both branches and seeds ± standard deviation.", ""]
    lines += ["| method | turned | seeds | mIoU | minus the original |", "|---|---|---|---|---|"]
    for r in records:
        seeds = ", ".join(map(str, r["seeds"])) or "not run"
        difference = "" if r["arm"] == "original" else _percent(r["minus_original"], sign="+")
        lines.append(f"| {r['method']} | {r['title']} | {seeds} | {_percent(r['last'])} | {difference} |")
    text = "\n".join([*lines, ""])
    write_atomically(options.output_dir / "table.md", text)
    write_atomically(options.output_dir / "table.json", json.dumps(records, indent=1))
    return text


def _percent(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.2f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
