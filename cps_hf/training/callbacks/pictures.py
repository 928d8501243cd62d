"""What a run draws into `OUT/pictures` and gives to its trackers: predictions, the confusion matrix, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from ... import visualization
from ...data.palettes import palette_of
from ...data.streams import undecoded
from ...scenes.write import is_drawn
from ..evaluation import Evaluator, evaluating
from ..sharding import whole
from .optional import optional

PREDICTIONS = "predictions.png"


class Pictures:
    """Draws evaluation images and networks' predictions for them. Only the main process draws.

    Args:
        count: how many images to draw, from the first on.
        may_leave: whether a model card may show any image. If false, it may only show drawn scenes.
    """

    def __init__(
        self, evaluator: Evaluator, dataset: Any, class_names: Sequence[str], *, count: int, may_leave: bool = False
    ):
        self.evaluator, self.dataset, self.class_names = evaluator, dataset, list(class_names)
        self.count, self.may_leave = count, may_leave

    def draw(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Draw a row per image: the image, its label, each network's prediction and, for two networks, where they
        agree and which of them is right.

        Args:
            networks: by title.
        """
        evaluator, rows = self.evaluator, []
        samples = [s for batch in islice(evaluator.stream(self.dataset), self.count) for s in batch]
        with evaluating([*networks.values()]), evaluator.accelerator.autocast():
            for sample in samples[: self.count]:
                images = sample["image"].unsqueeze(0).to(evaluator.device)
                predictions = [evaluator.logits(network, images).argmax(1)[0].cpu() for network in networks.values()]
                rows.append([sample["image"], sample["label"], *predictions])
                if len(networks) == 2:
                    rows[-1].append(visualization.agreement_map(*predictions, sample["label"]))
        titles, legend = ["image", "label", *networks], None
        if len(networks) == 2:
            titles, legend = [*titles, "agreement"], visualization.agreement_legend(*networks)
        palette = palette_of(self.dataset.features["label"], self.class_names)
        visualization.panel(rows, titles, self.class_names, palette, path, legend=legend)

    def draw_for_card(self, network: nn.Module, folder: Path) -> Path | None:
        """The picture of a network's predictions for its card, on images that may be shown. `None` if there are
        none."""
        if self.dataset is None or not self.count:
            return None
        if not self.may_leave:
            rows = islice(undecoded(self.dataset, with_label=False, what="eval_dataset"), self.count)
            if not all(is_drawn(row["image"]["path"] or "") for row in rows):
                return None
        folder.mkdir(parents=True, exist_ok=True)
        self.draw({"prediction": network}, folder / PREDICTIONS)
        return folder / PREDICTIONS


class PicturesCallback(TrainerCallback):
    """Draws the predictions after each evaluation, and at the end the curves and the best network's confusion matrix.

    A picture that cannot be drawn is a warning. All processes call it.

    Args:
        metric: the score that selects the network of the confusion matrix.
    """

    def __init__(self, pictures: Pictures, accelerator: Accelerator, output_dir: str, *, metric: str):
        self.pictures, self.accelerator, self.metric = pictures, accelerator, metric
        self.folder = Path(output_dir) / "pictures"
        self._training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_evaluate(self, args, state, control, **kwargs):
        if self._training:
            self._draw_predictions(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        self._draw_results(state)

    @optional("the pictures of the predictions")
    def _draw_predictions(self, step: int) -> None:
        evaluator = self.pictures.evaluator
        with whole(evaluator.module):
            if self._draws:
                networks = {f"branch {i}": branch for i, branch in enumerate(evaluator.branches)}
                self.pictures.draw(networks, self.folder / PREDICTIONS)
                give_to_trackers(self.accelerator.trackers, [self.folder / PREDICTIONS], step)

    @optional("the pictures of the run")
    def _draw_results(self, state) -> None:
        if not self.accelerator.is_main_process:
            return
        paths = [self.folder / "curves.png"] if draw_curves(state.log_history, self.folder) else []
        matrices = {row: m for row, m in self.pictures.evaluator.confusion_matrices.items() if row != "mean"}
        matrices = {row: m for row, m in matrices.items() if row in state.scores}
        if self._draws and matrices:
            row = max(matrices, key=lambda row: state.scores[row][self.metric])
            paths.append(self.folder / "confusion_matrix.png")
            title = f"{row.replace('_', ' ')}, step {state.global_step}"
            visualization.write_confusion_matrix(matrices[row], self.pictures.class_names, paths[-1], title=title)
        give_to_trackers(self.accelerator.trackers, paths, state.global_step)

    @property
    def _draws(self) -> bool:
        wanted = self.pictures.dataset is not None and self.pictures.count > 0
        return wanted and self.accelerator.is_main_process


def draw_curves(records: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """Draw `curves.png` from the lines of metrics.jsonl: losses, mean IoU, agreement. Returns whether there are
    any."""
    groups = visualization.curve_groups(records)
    if groups:
        visualization.write_curves(records, groups, folder / "curves.png")
    return bool(groups)


def give_to_trackers(trackers: Sequence[Any], paths: Sequence[Path], step: int) -> None:
    """Log each picture to every tracker that supports images, under its file name (trackio and some others do not)."""
    for tracker in trackers:
        for path in paths:
            picture = np.asarray(Image.open(path).convert("RGB"))
            name = f"pictures/{path.stem}"
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "aim":
                tracker.log_images({name: Image.fromarray(picture)}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [picture]}, step=step)
