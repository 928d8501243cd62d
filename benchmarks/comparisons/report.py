"""The tables, plots and pictures of compare_objectives.py, read from the runs' folders."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures  # files next to this one
from cells import TRAIN, Cell

from cps_hf.files import write_atomically

Key = tuple[str, str, int]  # method, partition, seed
ALL = "1-1"


@dataclass(frozen=True)
class Row:
    """A row of the table: the scores of some networks of a method's run.

    Args:
        networks: the rows of results.json to average; by default, every "branch_<i>".
    """

    title: str
    method: str
    networks: tuple[str, ...] = ()


ROWS = {
    "supervised": Row("supervised", "supervised"),
    "supervised_equal_time": Row("supervised, equal time", "supervised_equal_time"),
    "supervised_mean": Row("mean of two supervised", "supervised", ("mean",)),
    "self_training": Row("self-training", "self_training"),
    "mean_teacher": Row("Mean Teacher", "mean_teacher", ("teacher",)),
    "mean_teacher_student": Row("Mean Teacher, its student", "mean_teacher", ("branch_0",)),
    "cpc": Row("CPC", "cpc"),
    "pseudoseg": Row("PseudoSeg", "pseudoseg"),
    "fixmatch": Row("FixMatch", "fixmatch"),
    "unimatch": Row("UniMatch", "unimatch"),
    "unimatch_v2": Row("UniMatch V2", "unimatch_v2", ("teacher",)),
    "unimatch_v2_student": Row("UniMatch V2, its student", "unimatch_v2", ("branch_0",)),
    "fixed_teacher": Row("fixed teacher, the supervised pair", "fixed_teacher"),
    "cps_averaged": Row("CPS from averages", "cps_averaged"),
    "cps": Row("CPS", "cps"),
    "cps_cutmix": Row("CPS + CutMix", "cps_cutmix"),
    "cps_cutmix_mean": Row("mean of two CPS + CutMix", "cps_cutmix", ("mean",)),
    "all_labels": Row("all labels", "all_labels"),
}


def score(cell: Cell, networks: Sequence[str] = ()) -> float:
    """The headline number of a finished run: mean IoU at the last step, the mean over the networks."""
    final = cell.results()["final"]
    chosen = networks or [row for row in final if row.startswith("branch_")]
    return statistics.mean(final[row]["mean_iou"] for row in chosen)


def curve(cell: Cell, networks: Sequence[str] = ()) -> list[tuple[int, float]]:
    """(step, score) of every evaluation."""
    chosen = networks or [row for row in cell.results()["final"] if row.startswith("branch_")]
    keys = [f"eval_{row}_mean_iou" for row in chosen]
    return [(line["step"], statistics.mean(line[k] for k in keys)) for line in cell.log() if keys[0] in line]


def write(out: Path, cells: Mapping[Key, Cell], *, num_pictures: int) -> None:
    """OUT/table.md, table.csv and comparison.json; with pictures also plots and panels.

    Args:
        cells: every requested cell by key; unfinished ones count as not run.
    """
    records = [*_records(cells)]
    write_atomically(out / "table.md", _markdown(records, cells))
    write_atomically(out / "table.csv", _csv(records))
    runs = {cell.name: _of_run(key, cell) for key, cell in cells.items() if cell.finished}
    write_atomically(out / "comparison.json", json.dumps({"rows": records, "runs": runs}, indent=1))
    if num_pictures and runs:
        figures.draw(out, cells, ROWS, records, curve, num_pictures=num_pictures)


def _records(cells: Mapping[Key, Cell]) -> Iterator[dict[str, Any]]:
    """One record per partition and row, in the order of `ROWS`; fractions, seconds, bytes. None if nothing was run."""
    partitions = [*dict.fromkeys(partition for _, partition, _ in cells if partition != ALL)] or [ALL]
    for partition in partitions:
        for name, row in ROWS.items():
            own = ALL if row.method == "all_labels" else partition
            wanted = {seed: cell for (m, p, seed), cell in cells.items() if (m, p) == (row.method, own)}
            done = {seed: cell for seed, cell in wanted.items() if cell.finished}
            if not wanted:
                continue
            last = {seed: score(cell, row.networks) for seed, cell in done.items()}
            base = {s: score(c) for s in done if (c := cells.get(("supervised", partition, s))) and c.finished}
            results = [cell.results() for cell in done.values()]
            given = [_first(cell, seed, partition, cells).results() for seed, cell in done.items()]  # to learn from
            yield {
                "partition": partition,
                "row": name,
                "title": row.title,
                "seeds": sorted(done),
                "seeds_not_run": sorted(wanted.keys() - done.keys()),
                "num_labeled": _mean(r["num_labeled"] for r in given),
                "num_images": _mean((r["num_labeled"] or 0) + (r["num_unlabeled"] or 0) for r in given),
                "networks": _mean(r["training"]["num_networks"] for r in results),
                "steps": _mean(r["steps"] for r in results),
                "last": _mean(last.values()),
                "last_spread": _spread(last.values()),
                "best": _mean(max(value for _, value in curve(cell, row.networks)) for cell in done.values()),
                "minus_supervised": _mean(last[s] - base[s] for s in base),
                "minus_supervised_spread": _spread([last[s] - base[s] for s in base]),
                "seconds": _mean(_seconds(row.method, cell, seed, partition, cells) for seed, cell in done.items()),
                "images_per_second": _mean(r["training"]["images_per_second"] for r in results),
                "peak_memory": max((r["training"]["peak_memory"] or 0 for r in results), default=None),
            }


def _first(cell: Cell, seed: int, partition: str, cells: Mapping[Key, Cell]) -> Cell:
    """The run itself; for self-training, the run that labeled its images."""
    return cells[("supervised", partition, seed)] if cell.program != TRAIN else cell


def _seconds(method: str, cell: Cell, seed: int, partition: str, cells: Mapping[Key, Cell]) -> float:
    """Training seconds, with those of the run whose networks made the labels, if any."""
    labelers = cells[("supervised", partition, seed)] if method in ("self_training", "fixed_teacher") else cell
    runs = {c.name: c for c in (cell, labelers)}
    return sum(c.results()["training"]["seconds"] for c in runs.values())


def _of_run(key: Key, cell: Cell) -> dict[str, Any]:
    results = cell.results()
    kept = ("steps", "objective", "partition", "num_labeled", "num_unlabeled", "training", "agreement", "versions")
    of_row = ("mean_iou", "mean_accuracy", "overall_accuracy", "per_category_iou")
    scores = {row: {name: s[name] for name in of_row} for row, s in results["final"].items()}
    return {"method": key[0], "seed": key[2], "last": scores, **{name: results[name] for name in kept}}


def _mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else None


def _spread(values) -> float | None:
    values = [*values]
    return statistics.stdev(values) if len(values) > 1 else None


def _markdown(records: list[dict[str, Any]], cells: Mapping[Key, Cell]) -> str:
    lines = ["mIoU in percent, mean over seeds ± standard deviation; the protocol is in protocol.md.", ""]
    for partition in dict.fromkeys(record["partition"] for record in records):
        lines += [f"## Partition {partition}", ""]
        lines += ["| | seeds | labeled | networks | steps | last step | minus supervised | best evaluation | seconds "]
        lines[-1] += "| images/s | peak memory |"
        lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(record) for record in records if record["partition"] == partition] + [""]
    lines += ["Seconds are those of the optimizer steps, measured on this machine, possibly with other jobs running."]
    missing = [cell.name for cell in cells.values() if not cell.finished]
    lines += ["", f"**Not run**: {', '.join(missing)}." if missing else "All requested runs are finished.", ""]
    return "\n".join(lines)


def _line(record: dict[str, Any]) -> str:
    if not record["seeds"]:
        return f"| {record['title']} | not run |" + " |" * 9
    seeds = ", ".join(map(str, record["seeds"]))
    if record["seeds_not_run"]:
        seeds += f" (not run: {', '.join(map(str, record['seeds_not_run']))})"
    difference = _percent(record["minus_supervised"], record["minus_supervised_spread"], sign="+")
    memory = f"{record['peak_memory'] / 2**20:.0f} MiB" if record["peak_memory"] else ""
    cells = [
        *(record["title"], seeds, _number(record["num_labeled"]), _number(record["networks"])),
        *(_number(record["steps"]), f"**{_percent(record['last'], record['last_spread'])}**"),
        *("" if record["row"] == "supervised" else difference, _percent(record["best"])),
        *(_number(record["seconds"]), _number(record["images_per_second"], 1), memory),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, spread: float | None = None, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{100 * value:{sign}.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        for record in records:
            joined = {name: " ".join(map(str, record[name])) for name in ("seeds", "seeds_not_run")}
            writer.writerow({**record, **joined})
    return text.getvalue()
