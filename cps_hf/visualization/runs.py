"""A finished run's figures, for notebooks: each function returns a matplotlib `Figure`, and nothing is written.

`run` is always the run's output folder. pyplot's state is not used; a notebook shows a figure that is the last value
of a cell.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .figures import curve_groups, draw_classes, draw_confusion_matrix, draw_curves
from .lettering import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATION = "evaluation.json"
"""The file of a run's last evaluation, in addition to its scores: see `read_evaluation`."""


def curves_figure(run: str | os.PathLike) -> Figure:
    """Losses, mean IoU, and agreement with the share of the most common predicted class, over steps.

    Raises:
        ValueError: the folder has no metrics.jsonl with such numbers.
    """
    records = read_records(run)
    groups = curve_groups(records)
    if not groups:
        raise ValueError(f"{run} has no metrics.jsonl with a loss or a score in it: pass a run's output folder.")
    return draw_curves(records, groups)


def confusion_figure(run: str | os.PathLike) -> Figure:
    """The confusion matrix of the last evaluation's best network.

    Raises:
        ValueError: the folder has no evaluation.
    """
    found = read_evaluation(run)
    title = f"{found['network'].replace('_', ' ')}, step {found['step']}"
    return draw_confusion_matrix(np.asarray(found["confusion_matrix"]), found["classes"], title=title)


def classes_figure(run: str | os.PathLike) -> Figure:
    """Each class's IoU and its share of the labeled pixels, for the last evaluation's best network.

    Raises:
        ValueError: the folder has no evaluation.
    """
    rows = class_rows(read_evaluation(run))
    iou, shares, names = ([row[key] for row in rows] for key in ("iou", "share", "name"))
    return draw_classes(iou, names, shares)


def images_figure(run: str | os.PathLike) -> Figure:
    """The evaluation images with the lowest and the highest mean IoU: image, truth, prediction.

    Raises:
        ValueError: the folder has no evaluation, or one without pictures.
    """
    from matplotlib.figure import Figure

    found = read_evaluation(run)
    rows = [row for kind in ("worst", "best") for row in found[kind]]
    if not rows:
        raise ValueError(f"{run} has no pictures of its last evaluation: `num_pictures` was 0.")
    figure = Figure(figsize=(9, 2.6 * len(rows)), dpi=110, layout="constrained")
    for line, row in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        for axes, title, name in zip(line, ("image", "truth", "prediction"), row["files"], strict=True):
            axes.imshow(np.asarray(Image.open(Path(run) / name)))
            axes.set_axis_off()
            axes.set_title(title, fontsize=9)
        caption = one_line(image_caption(row)).replace("$", r"\$")
        line[0].set_title(f"{caption}\n", fontsize=9, loc="left")  # on a line above "image"
    return figure


def image_caption(row: Mapping[str, Any]) -> str:
    """ "street-3, mean IoU 41.2 %" of an entry of "worst" or "best"."""
    return row["id"] if row["mean_iou"] is None else f"{row['id']}, mean IoU {100 * row['mean_iou']:.1f} %"


def class_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By class: "name", "color" (r, g, b), "iou", "dice" (which equals F1) and "accuracy" (None if undefined), "share"
    of the labeled pixels and "predicted", its share of the predicted ones. Fractions."""
    matrix = np.asarray(evaluation["confusion_matrix"], np.float64)
    correct, truth, guess = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    total = max(matrix.sum(), 1.0)

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return [
        {
            "name": name,
            "color": tuple(color),
            "iou": ratio(correct[i], truth[i] + guess[i] - correct[i]),
            "dice": ratio(2 * correct[i], truth[i] + guess[i]),
            "accuracy": ratio(correct[i], truth[i]),
            "share": truth[i] / total,
            "predicted": guess[i] / total,
        }
        for i, (name, color) in enumerate(zip(evaluation["classes"], evaluation["palette"], strict=True))
    ]


def read_evaluation(run: str | os.PathLike) -> dict[str, Any]:
    """The content of evaluation.json: "network" (a row of the scores), "step", "images" (how many), "classes" (names),
    "palette" (r, g, b by class), "confusion_matrix" (C, C; rows are the truth), and "worst" and "best": lists of
    {"id", "mean_iou" (a fraction or None), "files" (image, truth and prediction, relative to the run's folder)}.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    found = read_json(Path(run) / EVALUATION)
    if found is None:
        raise ValueError(
            f"{run} has no {EVALUATION}: pass the output folder of a finished run with an evaluation set."
        )
    return found


def read_records(run: str | os.PathLike) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; none if there is no such file."""
    path, records = Path(run) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # a killed process left it incomplete
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def read_json(path: Path) -> Any:
    """A JSON file's content; `None` if there is no such file.

    Raises:
        ValueError: it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is incomplete or not JSON: {error}.") from error


def worst_and_best(scores: Sequence[float | None], count: int) -> tuple[list[int], list[int]]:
    """The positions of the `count` lowest and of the `count` highest scores, each from the end of the list inwards. No
    image is in both."""
    known = [i for i, score in enumerate(scores) if score is not None and not math.isnan(score)]
    ranked = sorted(known, key=lambda i: scores[i])
    worst = ranked[: min(count, (len(ranked) + 1) // 2)]
    best = ranked[len(worst) :][::-1][:count]
    return worst, best
