"""Writes a run's report: `OUT/evaluation.json`, the worst and best evaluation images, and `OUT/report.html`.

They describe the network in `OUT/best`, which the page says how to load.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from ... import visualization
from ...data.palettes import palette_of
from ...data.streams import EvaluationStream
from ...files import write_atomically, written_whole
from ...report.page import write_report
from ...visualization.runs import EVALUATION, read_json, worst_and_best
from ..evaluation import Evaluator, evaluating
from ..sharding import whole
from .optional import optional
from .pictures import Pictures

SIDE = 480  # pixels: the longer side of an image in the report
FOLDER = Path("pictures", "images")  # inside the run's folder


class ReportCallback(TrainerCallback):
    """Writes the page at the end of a run, and the evaluation of a best network before the step that changes its
    weights. All processes call it.

    If `best` has no such evaluation (it is of the supervised stage, or the run was stopped right after it), the best
    network of the last step is described, and the page says so.

    The images stay in the run's folder: the report, `pictures/` and evaluation.json are never pushed. Images in model
    cards have their own rule (`push_pictures`).

    Args:
        pictures: provides the evaluation images, and how many of the worst and of the best to show.
        metric: the score that selects the network whose predictions are shown.
    """

    def __init__(self, pictures: Pictures, accelerator: Accelerator, output_dir: str, *, metric: str):
        self.pictures, self.accelerator, self.metric = pictures, accelerator, metric
        self.output_dir = Path(output_dir)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.best.get("step") == state.global_step:
            self._write_evaluation(state)

    def on_train_end(self, args, state, control, **kwargs):
        if state.best.get("step") == state.global_step or not self._describes_best(state):
            self._write_evaluation(state)
        if state.is_world_process_zero:
            self._write_report()

    @optional("the report")
    def _write_report(self) -> None:
        write_report(self.output_dir)

    @optional("the worst and best images in the report")
    def _write_evaluation(self, state) -> None:
        evaluator = self.pictures.evaluator
        rows = [row for row in evaluator.confusion_matrices if row in state.scores and row != "mean"]
        if not rows or evaluator.image_counts is not state.image_counts:  # resumed, or scores of another set
            return
        row = max(rows, key=lambda row: state.scores[row][self.metric])
        if state.best.get("step") == state.global_step and state.best.get("branch") in rows:
            row = state.best["branch"]
        with whole(evaluator.module):  # in all processes: a network may be sharded over them
            if self.accelerator.is_main_process:
                self._write(row, state, evaluator.module.networks()[row])

    def _describes_best(self, state) -> bool:
        """Whether evaluation.json is that of `best`. The same on all processes; only the main one reads the file."""
        found = {}
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError, ValueError):
                found = read_json(self.output_dir / EVALUATION) or {}
        (found,) = broadcast_object_list([found])
        return bool(found) and (found["network"], found["step"]) == (state.best.get("branch"), state.best.get("step"))

    def _write(self, row: str, state, network: nn.Module) -> None:
        evaluator, pictures = self.pictures.evaluator, self.pictures
        palette = palette_of(pictures.dataset.features["label"], pictures.class_names)
        counts = evaluator.image_counts.get(row)
        scores = None if counts is None else counts.mean_iou_by_image()
        shutil.rmtree(self.output_dir / FOLDER, ignore_errors=True)
        evaluation = {
            "network": row,
            "step": state.global_step,
            "images": None if scores is None else len(scores),
            "classes": [str(name) for name in pictures.class_names],
            "palette": [[int(channel) for channel in color] for color in palette[: len(pictures.class_names)]],
            "confusion_matrix": evaluator.confusion_matrices[row].tolist(),
            "worst": [],
            "best": [],
        }
        if scores and pictures.count:
            worst, best = worst_and_best(scores, pictures.count)
            samples = dict(zip(sorted(worst + best), _samples(evaluator, pictures.dataset, worst + best), strict=True))
            shown = {"worst": worst, "best": best}
            with evaluating([network]), evaluator.accelerator.autocast():
                for kind, positions in shown.items():
                    for number, position in enumerate(positions):
                        files = self._draw(samples[position], network, palette, f"{kind}_{number}")
                        entry = {"id": str(samples[position]["id"]), "mean_iou": scores[position], "files": files}
                        evaluation[kind].append(entry)
        write_atomically(self.output_dir / EVALUATION, json.dumps(evaluation, ensure_ascii=False))

    def _draw(self, sample: Mapping[str, Any], network: nn.Module, palette: Any, name: str) -> list[str]:
        """Draw the image, and the truth and the prediction over it. Returns file names relative to the run's
        folder."""
        evaluator = self.pictures.evaluator
        image = sample["image"]
        prediction = evaluator.logits(network, image.unsqueeze(0).to(evaluator.device)).argmax(1)[0].cpu()
        cells = {
            "image": np.ascontiguousarray(np.moveaxis(image.cpu().numpy(), 0, -1)),
            "truth": visualization.overlay(image, sample["label"], palette, alpha=0.6),
            "prediction": visualization.overlay(image, prediction, palette, alpha=0.6),
        }
        files = []
        for what, cell in cells.items():
            path = FOLDER / f"{name}_{what}.jpg"
            _save(cell, self.output_dir / path)
            files.append(path.as_posix())
        return files


def _samples(evaluator: Evaluator, dataset: Any, positions: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The samples at these positions of the evaluation set, in its order."""
    wanted = sorted(positions)
    if isinstance(dataset, Dataset):
        dataset = dataset.select(wanted)
        wanted = [*range(len(wanted))]
    stream = EvaluationStream(dataset, name="eval_dataset", num_labels=evaluator.num_labels)
    samples = (sample for batch in stream for sample in batch)
    for position, sample in enumerate(islice(samples, wanted[-1] + 1) if wanted else ()):
        if position in wanted:
            yield sample


def _save(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(visualization.enlarged(picture, SIDE))
    image.thumbnail((SIDE, SIDE))
    with written_whole(path) as temporary:
        image.save(temporary, format="JPEG", quality=88)
