"""The plots and pictures of compare_objectives.py, from the records and the exported networks of its runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import Cell  # the file next to this one
from datasets import Dataset
from matplotlib.figure import Figure

from cps_hf import visualization
from cps_hf.commands.datasets import DataConfig, find_dataset, load_data
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.streams import EvaluationStream
from cps_hf.files import write_atomically
from cps_hf.functional import IGNORE_INDEX
from cps_hf.inference.ensemble import Ensemble
from cps_hf.training.setup import evenly_spaced

Key = tuple[str, str, int]  # method, partition, seed
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito's
PAIRS = ("cps_cutmix", "cps", "supervised")  # methods whose agreement is shown; pictures show the first that was run
PANEL = ("supervised", "mean_teacher", "cps", "cps_cutmix", "all_labels")


def draw(
    out: Path,
    cells: Mapping[Key, Cell],
    rows: Mapping[str, Any],
    records: Sequence[dict[str, Any]],
    curve: Callable[..., list[tuple[int, float]]],
    *,
    num_pictures: int,
) -> None:
    """scores.png, curves.png, agreement.png, pictures.png, agreement_pictures.png and agreement.md."""
    done = {key: cell for key, cell in cells.items() if cell.finished}
    records = [record for record in records if record["seeds"]]
    scores_figure(records, out / "scores.png")
    curves_figure(done, rows, curve, out / "curves.png")
    seed = min(seed for _, _, seed in done)
    partition = next((p for m, p, s in done if m != "all_labels" and s == seed), None)
    agreement_figure({key: cell for key, cell in done.items() if key[1] == partition}, out / "agreement.png")
    shown = {m: cell for (m, p, s), cell in done.items() if s == seed and (p == partition or m == "all_labels")}
    prediction_panel(shown, rows, num_pictures, out / "pictures.png")
    pairs = {name: shown[name] for name in PAIRS if name in shown}
    if pairs:
        agreement_pictures(pairs, rows, num_pictures, out)


# ------------------------------------------------------------------------------------------------------------ plots


def scores_figure(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The last step's score with its spread: against the labeled share or, with one partition, one line per method."""
    shares = {record["partition"]: _labeled_share(records, record["partition"]) for record in records}
    shares = {partition: share for partition, share in shares.items() if share is not None}
    if len(set(shares.values())) > 1:
        figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(dict.fromkeys(record["row"] for record in records)):
            own = [(shares[r["partition"]], r) for r in records if r["row"] == name and r["partition"] in shares]
            own.sort(key=lambda point: point[0])
            if not own:
                continue
            axes.errorbar(
                [100 * share for share, _ in own],
                [100 * record["last"] for _, record in own],
                [100 * (record["last_spread"] or 0) for _, record in own],
                **_style(i),
                label=own[0][1]["title"],
                capsize=3,
                marker="o",
                markersize=4,
            )
        axes.set_xscale("log")
        ticks = sorted({100 * share for share in shares.values()})
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("labeled images, % of all")
        axes.set_ylabel("mIoU at the last step, %")
        _finish(figure, axes, path)
        return
    figure = Figure(figsize=(8, 1 + 0.36 * len(records)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for i, record in enumerate(reversed(records)):
        spread = 100 * (record["last_spread"] or 0)
        axes.errorbar(100 * record["last"], i, xerr=spread, color="#0072B2", marker="o", capsize=3)
    base = next((100 * record["last"] for record in records if record["row"] == "supervised"), None)
    if base is not None:
        axes.axvline(base, color="0.6", linestyle=":")
    several = any(len(record["seeds"]) > 1 for record in records)
    titles = [f"{r['title']} ({len(r['seeds'])})" if several else r["title"] for r in reversed(records)]
    axes.set_yticks(range(len(records)), titles)
    axes.set_xlabel("mIoU at the last step, %" + (", ± deviation over (n) seeds" if several else ""))
    _finish(figure, axes, path, legend=False)


def _labeled_share(records: Sequence[dict[str, Any]], partition: str) -> float | None:
    """The share of labeled images in a partition, from rows without all labels."""
    own = [r for r in records if r["partition"] == partition and r["row"] != "all_labels" and r["num_images"]]
    return own[0]["num_labeled"] / own[0]["num_images"] if own else None


def curves_figure(done: Mapping[Key, Cell], rows: Mapping[str, Any], curve: Callable, path: Path) -> None:
    """The score of every evaluation over the steps, the mean over seeds; one panel per partition."""
    partitions = [*dict.fromkeys(p for m, p, _ in done if m != "all_labels")] or [*{p for _, p, _ in done}]
    figure = Figure(figsize=(3 + 5.5 * len(partitions), 4.5), dpi=110, layout="constrained")
    every_axes = figure.subplots(1, len(partitions), sharey=True, squeeze=False)[0]
    for axes, partition in zip(every_axes, partitions, strict=True):
        for i, row in enumerate(row for row in rows.values() if not row.title.startswith("mean of")):
            own = [cell for (m, p, _), cell in done.items() if m == row.method and p in (partition, cell_all(m))]
            points = _mean_over_seeds([curve(cell, row.networks) for cell in own])
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, [100 * v for v in values], **_style(i), label=row.title, marker="o", markersize=3)
        axes.set_title(f"partition {partition}", fontsize=10)
        axes.set_xlabel("step")
    every_axes[0].set_ylabel("mIoU, %, mean over seeds")
    _finish(figure, every_axes[-1], path, others=every_axes[:-1])


def cell_all(method: str) -> str | None:
    """The cell with all labels, which is drawn in every partition's panel."""
    return "1-1" if method == "all_labels" else None


def _mean_over_seeds(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over seeds at steps at which every seed was evaluated."""
    values = defaultdict(list)
    for points in curves:
        for step, value in points:
            values[step].append(value)
    return [(step, statistics.mean(v)) for step, v in sorted(values.items()) if len(v) == len(curves)]


def agreement_figure(done: Mapping[Key, Cell], path: Path) -> None:
    """The branches' agreement on fixed unlabeled images over the steps, and the accuracy of both.

    Args:
        done: the finished runs of one partition.
    """
    keys = {
        "agreement of the two branches, unlabeled images, %": lambda line: line.get("eval_agreement"),
        "pixel accuracy, mean of both branches, validation, %": _accuracy,
    }
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    both = figure.subplots(1, 2)
    for axes, (title, read) in zip(both, keys.items(), strict=True):
        for i, method in enumerate(PAIRS):
            own = [cell for (m, p, _), cell in done.items() if m == method]
            logs = [[(line["step"], read(line)) for line in cell.log() if read(line) is not None] for cell in own]
            points = _mean_over_seeds(logs)
            if points:
                steps, values = zip(*points, strict=True)
                label = {"cps_cutmix": "CPS + CutMix", "cps": "CPS", "supervised": "supervised"}[method]
                axes.plot(steps, [100 * v for v in values], **_style(i), label=label, marker="o", markersize=3)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
    if both[0].lines:
        _finish(figure, both[0], path, others=both[1:])


def _accuracy(line: dict[str, Any]) -> float | None:
    names = [f"eval_branch_{i}_overall_accuracy" for i in (0, 1)]
    return statistics.mean(line[name] for name in names) if names[1] in line else None


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--", ":")[i // len(COLORS) % 3], "linewidth": 1.5}


def _finish(figure: Figure, axes, path: Path, *, others: Sequence = (), legend: bool = True) -> None:
    for one in (axes, *others):
        one.grid(color="0.9")
        one.spines[["top", "right"]].set_visible(False)
    if legend:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, format="png")


# --------------------------------------------------------------------------------------------------------- pictures


def prediction_panel(shown: Mapping[str, Cell], rows: Mapping[str, Any], count: int, path: Path) -> None:
    """Image, truth, and the prediction of one network of each method, for validation images spread over the set."""
    methods = [method for method in PANEL if method in shown]
    if not methods:
        return
    data = shown[methods[0]].settings.data
    load, root = find_dataset(data.dataset, data.data_root, data.load_options)
    dataset = load(root, split=data.eval_split)
    names, palette = _classes(dataset)
    networks = {m: _network(shown[m], (rows[m].networks or ("branch_0",))[0]) for m in methods}
    cells = []
    for sample in _samples(evenly_spaced(dataset, count)):
        said = [network.predict(sample["image"]) for network in networks.values()]
        cells.append([sample["image"], sample["label"], *said])
    titles = ["image", "truth", *[rows[method].title for method in methods]]
    visualization.panel(cells, titles, names, palette, path)


def agreement_pictures(pairs: Mapping[str, Cell], rows: Mapping[str, Any], count: int, out: Path) -> None:
    """Where the two branches agree on unlabeled images, and which is right, as pictures and shares.

    The truth of these images is only read here, after training: the runs never opened it.
    """
    settings = next(iter(pairs.values())).settings
    unlabeled = evenly_spaced(_unlabeled_with_truth(settings.data), settings.args.agreement_images or 16)
    names, palette = _classes(unlabeled)
    lines = [
        f"{len(unlabeled)} unlabeled images, the same for all, whole and without CutMix, last step, % of pixels (the "
        "truth was not opened while training):",
        "",
        "| | agree | right: branch 0 | right: branch 1 | right where they agree |",
        "|---|---|---|---|---|",
    ]
    pictures = []
    for method, cell in pairs.items():
        branches = [_network(cell, f"branch_{i}") for i in (0, 1)]
        counts = torch.zeros(5, dtype=torch.int64)  # agree, all; and of labeled pixels: right 0, right 1, both right
        known_pixels = known_agreed = 0
        for i, sample in enumerate(_samples(unlabeled)):
            truth = sample["label"]
            a, b = (branch.predict(sample["image"]) for branch in branches)
            known, same = truth != IGNORE_INDEX, a == b
            counts += torch.stack(
                [
                    same.sum(),
                    torch.tensor(same.numel()),
                    *((p == truth).sum() for p in (a, b)),
                    ((a == truth) & same).sum(),
                ]
            )
            known_pixels, known_agreed = known_pixels + int(known.sum()), known_agreed + int((known & same).sum())
            if method == next(iter(pairs)) and i % max(1, len(unlabeled) // count) == 0 and len(pictures) < count:
                pictures.append([sample["image"], truth, a, b, visualization.agreement_map(a, b, truth)])
        agree, total, right_0, right_1, both = counts.tolist()
        shares = [agree / total, right_0 / known_pixels, right_1 / known_pixels, both / max(known_agreed, 1)]
        lines.append(f"| {rows[method].title} | {' | '.join(f'{100 * share:.2f}' for share in shares)} |")
    titles = ["unlabeled image", "truth, not trained on", "branch 0", "branch 1", "agreement"]
    legend = visualization.agreement_legend("branch 0", "branch 1")
    visualization.panel(pictures, titles, names, palette, out / "agreement_pictures.png", legend=legend)
    write_atomically(out / "agreement.md", "\n".join([*lines, ""]))


def _unlabeled_with_truth(data: DataConfig) -> Dataset:
    """The unlabeled images of a run in its order, with their labels from the data set."""
    unlabeled = load_data(data).unlabeled
    load, root = find_dataset(data.dataset, data.data_root, data.load_options)
    labeled = load(root, split=data.train_split)
    position = {name: i for i, name in enumerate(labeled["id"])}
    return labeled.select([position[name] for name in unlabeled["id"]])


def _samples(dataset):
    for batch in EvaluationStream(dataset, name="dataset"):
        yield from batch


def _classes(dataset) -> tuple[list[str], Sequence]:
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    return [*encoding.names], encoding.palette or visualization.palette(len(encoding.names))


def _network(cell: Cell, name: str) -> Ensemble:
    return Ensemble.from_pretrained([str(cell.folder / name)])
