"""`cps-hf evaluate`: score a branch, or the mean of several, on a labeled set; or write predictions for a server.

    cps-hf evaluate --branches outputs/train_cps/best
        the drawn street scenes of the demonstration.

    cps-hf evaluate --branches A B --each --dataset cityscapes --data_root DIR \\
        --mode sliding --crop_size 800 800 --scales 0.5 1.0 1.75 --flip
        the mean of two branches and each branch separately, in windows, at several scales and mirrored.

    cps-hf evaluate --branches A --dataset cityscapes --data_root DIR --split test \\
        --export cityscapes
        predictions as labelIds PNGs for the evaluation server, or for the official script on a labeled split.

Works with any AutoModelForSemanticSegmentation model, trained here or not; its own image processor prepares the
images. All scores are at the labels' resolution. Written to `--output_dir`: results.json, confusion_matrix.csv,
pictures/, and predictions/ with `--export`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import visualization
from ..checkpointing.fingerprint import versions
from ..data import LabelEncoding
from ..data.cityscapes import NAMES as CITYSCAPES
from ..data.masks import output_path, write_label_ids, write_mask
from ..data.palettes import palette_of
from ..data.streams import EvaluationStream
from ..data.voc import voc_color
from ..files import write_atomically
from ..inference.ensemble import check_classes
from ..metrics.boundary_iou import BoundaryIoU
from ..metrics.mean_iou import IoUCounter
from ..metrics.scored import scored_classes
from ..training.evaluation import plain
from ..training.reporting import class_table, mean_iou_in_words, scores_table, without_nan
from . import branches as chosen
from . import datasets as named
from .arguments import ArgumentParser
from .console import log_warnings_alone
from .errors import user_errors
from .main import COMMANDS

Palette = visualization.Palette
PANEL_SIDE = 1024  # pixels; the worst images are reduced to this for their picture


class Row:
    """The scores of one table row: a branch or the mean."""

    def __init__(self, num_labels: int):
        self.iou, self.boundary = IoUCounter(num_labels=num_labels), BoundaryIoU(num_labels)

    def add(self, prediction: torch.Tensor, label: torch.Tensor) -> None:
        self.iou.add_batch(predictions=prediction, references=label)
        self.boundary.add_batch(predictions=prediction[None], references=label[None])

    def compute(self) -> tuple[dict[str, Any], torch.Tensor]:
        """(scores as floats and lists, confusion matrix (C, C) with the truth in rows)."""
        matrix = self.iou.confusion_matrix
        return plain(self.iou.compute() | self.boundary.compute()), matrix


class Worst:
    """The images with the lowest mean IoU, reduced to what a picture shows."""

    def __init__(self, count: int):
        self.count, self.kept, self.scores = count, [], []

    def add(self, name: str, scores: dict[str, Any], maps: list[torch.Tensor]) -> None:
        score = float(scores["mean_iou"])
        self.scores.append({"id": name, "mean_iou": score, "classes": scored_classes(scores)})
        if not np.isfinite(score):  # every pixel is ignored
            return
        step = -(-max(maps[0].shape[-2:]) // PANEL_SIDE)
        words = mean_iou_in_words(scores, digits=1)
        self.kept.append((score, name, words, [m[..., ::step, ::step].clone() for m in maps]))
        self.kept = sorted(self.kept, key=lambda entry: entry[0])[: self.count]


def make_parser() -> ArgumentParser:
    first = ("branches", "mode", "crop_size", "dataset", "data_root", "split", "output_dir", "export", "each")
    usage = "RUN [--option value ...]"
    parser = ArgumentParser("evaluate", COMMANDS["evaluate"], first=first, usage=usage)
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's output folder (its better branch) or a branch")
    chosen.add_arguments(parser, required=False)
    named.add_arguments(parser, default="street_scenes")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="outputs/evaluation", help="where everything is written")
    group.add_argument("--each", action="store_true", help="with several branches, also score each separately")
    group.add_argument("--export", choices=("cityscapes", "voc"), help="write predictions as labelIds or palette PNGs")
    group.add_argument("--num_pictures", type=int, default=6, help="how many of the worst images to draw")
    return parser


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Score as the command line says. Returns the content of results.json."""
    options = make_parser().parse_args(argv)
    log_warnings_alone()
    output = Path(options.output_dir)
    with user_errors(output):
        chosen.settle_run(options, what="should be scored")
        results, worst, palette = evaluate(options)
        report(results, options)  # first, so that the scores survive a full disk
        write(results, worst, palette, output)
    print(f"\nWritten to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return results


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], Worst, Palette]:
    """The content of results.json (NaN for absent classes), the worst images, and the class colours."""
    if options.num_pictures < 0:
        raise ValueError(f"`--num_pictures` must be 0 or more, got {options.num_pictures}.")
    output = Path(options.output_dir)
    check_folder(output)
    dataset = named.from_arguments(options)
    branches, how = chosen.from_arguments(options)
    names = [*branches.id2label.values()]
    labeled = "label" in dataset.features
    encoding = LabelEncoding.from_feature(dataset.features["label"]) if labeled else None
    if encoding is not None:
        check_classes(encoding.names, branches.id2label, f"The labels and {branches.sources[0]}")
    if not labeled and not options.export:
        raise ValueError(f"Split {options.split!r} has no labels to score against. Add `--export` to only predict.")
    if options.export == "cityscapes":
        check_classes(CITYSCAPES, branches.id2label, f"`--export cityscapes` and {branches.sources[0]}")

    output.mkdir(parents=True, exist_ok=True)  # fail before the work if this fails
    rows: dict[str, Row] = {}
    worst, count, exported = Worst(options.num_pictures), 0, set()
    for sample in samples(dataset, options, labeled, len(names)):
        predictions = predict(branches, sample["image"], how, each=options.each)
        *_, final = predictions.values()  # the mean, if any
        count += 1
        if options.export:
            if sample["id"] in exported:
                raise ValueError(f"Two images have the id {sample['id']!r}: one prediction would overwrite the other.")
            exported.add(sample["id"])
            export(final.numpy(), sample["id"], output / "predictions", options.export)
        if not labeled:
            continue
        for row, prediction in predictions.items():
            rows.setdefault(row, Row(len(names))).add(prediction, sample["label"])
        own = IoUCounter(num_labels=len(names)).compute(predictions=final, references=sample["label"])
        worst.add(sample["id"], own, [sample["image"], sample["label"], *predictions.values()])

    results = {
        "branches": options.branches,
        "dataset": options.dataset,
        "split": options.split,
        "num_images": count,
        "eval": how,
        "classes": names,
        "versions": versions(),
    }
    if labeled:
        scored = {row: scores.compute() for row, scores in rows.items()}
        results["scores"] = {row: scores for row, (scores, _) in scored.items()}
        results["scored_classes"] = {row: scored_classes(scores) for row, scores in results["scores"].items()}
        *_, (_, matrix) = scored.values()
        results["confusion_matrix"] = matrix.tolist()
        results["images"] = sorted(worst.scores, key=lambda entry: (np.isnan(entry["mean_iou"]), entry["mean_iou"]))
    return results, worst, palette_of(dataset.features["label"] if labeled else None, names)


def check_folder(folder: Path) -> None:
    """Raise a `ValueError` if the folder contains files of another command."""
    found = [path.name for pattern in ("config.yaml", "checkpoint-*") for path in sorted(folder.glob(pattern))]
    results = folder / "results.json"
    try:
        if results.is_file() and "branches" not in json.loads(results.read_text(encoding="utf-8")):
            found.append(results.name)
    except (ValueError, TypeError):  # not JSON, or not ours
        found.append(results.name)
    if found:
        raise ValueError(
            f"`--output_dir {folder}` contains a training run or other results ({', '.join(found[:3])}), which would "
            f"be partly replaced. Choose another folder, e.g. {folder / 'evaluation'}."
        )


def samples(dataset, options: argparse.Namespace, labeled: bool, num_labels: int) -> Iterator[dict[str, Any]]:
    stream = EvaluationStream(
        dataset, name="dataset", with_label=labeled, num_labels=num_labels, num_workers=options.num_workers
    )
    total = len(dataset) if hasattr(dataset, "__len__") else None
    for batch in tqdm(stream, desc="evaluating", unit="image", total=total, dynamic_ncols=True, disable=None):
        yield from batch


def predict(branches, image: torch.Tensor, how: dict[str, Any], *, each: bool) -> dict[str, torch.Tensor]:
    """Class maps, uint8 (H, W), by row. The last one is the ensemble's prediction."""
    count = len(branches.networks)
    if count == 1 or not each:
        return {"mean" if count > 1 else "branch_0": branches.predict(image, **how)}
    rows = [*(f"branch_{i}" for i in range(count)), "mean"]
    return dict(zip(rows, branches.predict_each(image, **how), strict=True))


def export(prediction: np.ndarray, name: str, folder: Path, kind: str) -> None:
    if kind == "cityscapes":
        write_label_ids(output_path(folder, name, "_labelIds.png"), prediction)
    else:
        write_mask(output_path(folder, name, ".png"), prediction, [voc_color(i) for i in range(256)])


def write(results: dict[str, Any], worst: Worst, palette: Palette, folder: Path) -> None:
    """Write the scores, then the pictures."""
    write_atomically(folder / "results.json", json.dumps(without_nan(results), indent=1, ensure_ascii=False))
    if "scores" in results:
        matrix, names = torch.tensor(results["confusion_matrix"]), results["classes"]
        write_csv(folder / "confusion_matrix.csv", matrix, names)
        draw(folder / "pictures", matrix, worst, names, [*results["scores"]], palette)


def draw(folder: Path, matrix: torch.Tensor, worst: Worst, names, rows: list[str], palette) -> None:
    """Draw the confusion matrix and the worst images: image, label, predictions, errors."""
    visualization.write_confusion_matrix(matrix, names, folder / "confusion_matrix.png")
    if not worst.kept:
        return
    titles = ["image", "label", *(row.replace("_", " ") for row in rows), "errors"]
    legend = dict(visualization.ERRORS)
    cells = []
    for *_, (image, label, *predictions) in worst.kept:
        cells.append([image, label, *predictions, visualization.error_map(predictions[-1], label)])
        if len(rows) == 3:  # two branches and their mean
            cells[-1].append(visualization.agreement_map(*predictions[:2], label))
    if len(rows) == 3:
        titles.append("agreement")
        agreement = visualization.agreement_legend("branch 0", "branch 1")
        both = {text: color for text, color in agreement.items() if color not in legend.values()}
        legend = {"right; agree": legend["right"], "wrong; disagree, both wrong": legend["wrong"], **both}
    captions = [f"{name}: {words}" for _, name, words, _ in worst.kept]
    visualization.panel(cells, titles, names, palette, folder / "worst.png", legend=legend, captions=captions)


def write_csv(path: Path, matrix: torch.Tensor, names: list[str]) -> None:
    """Pixels by true class (rows) and predicted class (columns)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables."""
    what = f"{results['dataset']}, {results['split'] or 'all'}, {results['num_images']} images, {options.mode}"
    print(f"\n{', '.join(options.branches)}\n{what}:\n")
    if "scores" in results:
        *_, final = results["scores"]
        if len(results["scores"]) > 1:
            print(scores_table(results["scores"], results["classes"]), end=f"\n\n{final}:\n\n")
        print(class_table(results["scores"][final], results["classes"]))
        lowest = [
            f"{i['id']} ({100 * i['mean_iou']:.1f} % over {i['classes']} classes)" for i in results["images"][:3]
        ]
        print(f"\nLowest mIoU: {', '.join(lowest)}")
