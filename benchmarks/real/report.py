"""The tables and figures of the finished cells."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cps_hf.files import write_atomically

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t of n - 1 degrees of freedom, two-sided
AGAINST = {"recommended": ("control_equal_time", "plain_equal_time", "control", "plain")}
OTHERS_AGAINST = ("control", "plain")
COLORS = {"control_equal_time": "#0072b2", "plain_equal_time": "#999999"}

Cells = dict[tuple[str, int, int, str], dict[int, dict[str, Any]]]
"""(set, labels, length, arm) -> seed -> the cell's JSON."""


def write(cells: Path, out: Path) -> str:
    """OUT/test.md, OUT/val.md and, with two lengths, OUT/gain.png; the text of the first."""
    found = {split: read(cells, split) for split in ("test", "val")}
    texts = {split: markdown(of_split) for split, of_split in found.items()}
    for split, text in texts.items():
        write_atomically(out / f"{split}.md", text)
    figure = gain_figure(found["test"])
    if figure is not None:
        figure.savefig(out / "gain.png", dpi=150)
    return texts["test"]


def read(folder: Path, split: str) -> Cells:
    """The cells of a split."""
    found: Cells = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell.get("split") == split:
            found[cell["dataset"], cell["labels"], cell["length"], cell["arm"]][cell["seed"]] = cell
    return found


def single(cell: Mapping[str, Any], part: str = "scores") -> float | None:
    """The compared score: mean IoU of branch 0 at the last step, as exported; for Mean Teacher and UniMatch
    V2, which export an average, that of the teacher. In percent."""
    scores = cell[part]
    row = "teacher" if "teacher" in scores else "branch_0"
    return 100 * scores[row]["mean_iou"] if row in scores else None


def markdown(cells: Cells) -> str:
    """A section per set, number of labels and length."""
    lines = ["Mean IoU in % of one exported network (branch 0, or the method's teacher), last step, per seed.", ""]
    for dataset, labels, length in sorted({key[:3] for key in cells}):
        lines += [f"## {dataset}, {labels} labels, length {length}", ""]
        lines += [
            "| arm | steps | CPU minutes | seeds | mean | its average (EMA) | mean of branches |",
            "|---|---|---|---|---|---|---|",
        ]
        arms = {key[3]: by_seed for key, by_seed in cells.items() if key[:3] == (dataset, labels, length)}
        for arm, by_seed in sorted(arms.items(), key=lambda item: -_mean(item[1])):
            lines.append(_row(arm, by_seed))
        staged = arms.get("recommended", {})
        if staged:
            first = {seed: single(cell, "supervised_scores") for seed, cell in staged.items()}
            steps = next(iter(staged.values()))["pretrain_steps"]
            mean = statistics.mean(first.values())
            lines.append(f"| its supervised first stage | {steps} | | {_listed(first)} | {mean:.1f} | | |")
        lines += ["", *_differences(arms), *_per_class(arms)]
    return "\n".join(lines) + "\n"


def _row(arm: str, by_seed: Mapping[int, Mapping[str, Any]]) -> str:
    cells = by_seed.values()
    steps = " / ".join(sorted({str(cell["steps"]) for cell in cells}))
    minutes = statistics.mean(cell["training"]["cpu_seconds"] for cell in cells) / 60
    averages = [100 * c["scores"]["branch_0_average"]["mean_iou"] for c in cells if "branch_0_average" in c["scores"]]
    ensembles = [100 * c["scores"]["mean"]["mean_iou"] for c in cells if "mean" in c["scores"]]
    scores = {seed: single(cell) for seed, cell in by_seed.items()}
    return (
        f"| {arm} | {steps} | {minutes:.1f} | {_listed(scores)} | {_mean(by_seed):.1f} "
        f"| {_or_nothing(averages)} | {_or_nothing(ensembles)} |"
    )


def _differences(arms: Mapping[str, Mapping[int, Any]]) -> list[str]:
    lines = []
    for arm, by_seed in arms.items():
        for other in AGAINST.get(arm, () if arm in OTHERS_AGAINST or arm.endswith("_time") else OTHERS_AGAINST):
            seeds = sorted(by_seed.keys() & arms.get(other, {}).keys())
            if seeds:
                lines.append(
                    f"- {arm} - {other}: {paired([single(by_seed[s]) - single(arms[other][s]) for s in seeds])}"
                )
    return [*lines, ""] if lines else []


def paired(differences: Sequence[float]) -> str:
    """The mean, each seed's, and the 95 % interval of Student's t."""
    each = ", ".join(f"{difference:+.1f}" for difference in differences)
    mean, n = statistics.mean(differences), len(differences)
    if n not in T_95:
        return f"{mean:+.1f} ({each})"
    half = T_95[n] * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean:+.1f} ({each}; 95 % interval over seeds {mean - half:+.1f} to {mean + half:+.1f})"


def _per_class(arms: Mapping[str, Mapping[int, Any]]) -> list[str]:
    shown = [arm for arm in ("plain_equal_time", "control_equal_time", "recommended") if arm in arms]
    if len(shown) < 2:
        return []
    seeds = sorted(set.intersection(*(set(arms[arm]) for arm in shown)))
    if not seeds:
        return []
    lines = ["IoU in % by class, mean over seeds " + ", ".join(map(str, seeds)) + ":", ""]
    columns = {}
    for arm in shown:
        rows = [arms[arm][seed]["scores"]["branch_0"]["per_category_iou"] for seed in seeds]
        rows = [[*row.values()] if isinstance(row, dict) else row for row in rows]
        columns[arm] = [_mean_of(values) for values in zip(*rows, strict=True)]
    lines += ["| class | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for index in range(len(columns[shown[0]])):
        lines.append(f"| {index} | " + " | ".join(columns[arm][index] for arm in shown) + " |")
    return [*lines, ""]


def gain_figure(cells: Cells) -> Figure | None:
    """The gain of `recommended` over the controls at equal time against training length; a panel per set.

    A thin line per seed, and a thick one for the mean of the seeds that have every length, if there are several.
    Returns None if no set has two lengths: a single point is not a curve.
    """
    gains = {
        panel: by_other
        for panel, by_other in _gains(cells).items()
        if any(len(by_length) > 1 for by_length in by_other.values())
    }
    if not gains:
        return None
    figure = Figure(figsize=(5 * len(gains), 3.4), layout="constrained")
    for axes, ((dataset, labels), by_other) in zip(
        figure.subplots(1, len(gains), squeeze=False)[0], gains.items(), strict=True
    ):
        for other, by_length in by_other.items():
            color, name = COLORS[other], f"over {other.replace('_', ' ')}"
            for index, seed in enumerate(sorted({seed for by_seed in by_length.values() for seed in by_seed})):
                points = [(length, by_seed[seed]) for length, by_seed in by_length.items() if seed in by_seed]
                style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1, "alpha": 0.7}
                axes.plot(*zip(*points, strict=True), **style, label=None if index else f"{name}, each seed")
            complete = sorted(set.intersection(*(set(by_seed) for by_seed in by_length.values())))
            if len(complete) > 1:
                means = [statistics.mean(by_seed[seed] for seed in complete) for by_seed in by_length.values()]
                label = f"{name}, mean of seeds {', '.join(map(str, complete))}"
                axes.plot([*by_length], means, color=color, marker="o", linewidth=2.5, label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        lengths = sorted({length for by_length in by_other.values() for length in by_length})
        axes.set(title=f"{dataset}, {labels} labels", xlabel="optimizer steps", ylabel="gain in mIoU, points")
        axes.set_xticks(lengths)
        axes.legend(fontsize=8)
    return figure


def _gains(cells: Cells) -> dict[tuple[str, int], dict[str, dict[int, dict[int, float]]]]:
    """(set, labels) -> the other arm -> length -> seed -> the gain, for each seed that both arms have."""
    found: dict[tuple[str, int], dict[str, dict[int, dict[int, float]]]] = {}
    for dataset, labels, length in sorted({key[:3] for key in cells if key[3] == "recommended"}):
        mine = cells[dataset, labels, length, "recommended"]
        for other in COLORS:
            theirs = cells.get((dataset, labels, length, other), {})
            if seeds := sorted(mine.keys() & theirs.keys()):
                gains = {seed: single(mine[seed]) - single(theirs[seed]) for seed in seeds}
                found.setdefault((dataset, labels), {}).setdefault(other, {})[length] = gains
    return found


def _mean(by_seed: Mapping[int, Mapping[str, Any]]) -> float:
    return statistics.mean(single(cell) for cell in by_seed.values())


def _mean_of(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return f"{100 * statistics.mean(known):.1f}" if known else "-"


def _listed(scores: Mapping[int, float]) -> str:
    return ", ".join(f"{scores[seed]:.1f}" for seed in sorted(scores))


def _or_nothing(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f}" if values else ""
