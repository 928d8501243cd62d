"""What a run draws into `OUT/pictures` and gives to its trackers: predictions, the confusion matrix, curves.

`trainer` is a `CPSTrainer`, which nothing imports but the package's front door. The main process draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ... import visualization
from ...data.palettes import palette_of
from ...data.streams import undecoded
from ...scenes.write import is_drawn
from ..evaluation import evaluating
from ..sharding import whole

PREDICTIONS = "predictions.png"


def after_evaluation(trainer: Any) -> None:
    """What the branches say of the first evaluation images at this step; the last evaluation's stays."""
    with whole(trainer.module):
        if _draws(trainer):
            path = _folder(trainer) / PREDICTIONS
            networks = {f"branch {i}": branch for i, branch in enumerate(trainer.module.branches)}
            draw_predictions(trainer, networks, path)
            give_to_trackers(trainer, [path])


def after_training(trainer: Any) -> None:
    """The curves of the run, and the best single network's confusion matrix at the last evaluation."""
    if not trainer.accelerator.is_main_process:
        return
    paths = [_folder(trainer) / "curves.png"] if draw_curves(trainer.run_log.read(), _folder(trainer)) else []
    matrices = {row: m for row, m in trainer.judge.confusion_matrices.items() if row != "mean"}
    if _draws(trainer) and matrices:
        metric = trainer.args.metric_for_best_model
        row = max(matrices, key=lambda row: trainer.scores[row][metric])
        paths.append(_folder(trainer) / "confusion_matrix.png")
        title = f"{row.replace('_', ' ')}, step {trainer.state.global_step}"
        visualization.confusion_matrix_figure(matrices[row], [*trainer.id2label.values()], paths[-1], title=title)
    give_to_trackers(trainer, paths)


def draw_predictions(trainer: Any, networks: Mapping[str, nn.Module], path: Path) -> None:
    """A row for each of the first `num_pictures` evaluation images: image, label, what every network says, and of
    two networks where they agree and who is right.

    Args:
        networks: by title.
    """
    names, judge, count = [*trainer.id2label.values()], trainer.judge, trainer.args.num_pictures
    rows = []
    samples = [s for batch in islice(judge.stream(trainer.eval_dataset), count) for s in batch]
    with evaluating([*networks.values()]), trainer.accelerator.autocast():
        for sample in samples[:count]:
            images = sample["image"].unsqueeze(0).to(trainer.device)
            predictions = [judge.logits(network, images).argmax(1)[0].cpu() for network in networks.values()]
            rows.append([sample["image"], sample["label"], *predictions])
            if len(networks) == 2:
                rows[-1].append(visualization.agreement_map(*predictions, sample["label"]))
    titles, legend = ["image", "label", *networks], None
    if len(networks) == 2:
        titles, legend = [*titles, "agreement"], visualization.agreement_legend(*networks)
    palette = palette_of(trainer.eval_dataset.features["label"], names)
    visualization.panel(rows, titles, names, palette, path, legend=legend)


def draw_card_picture(trainer: Any, branch: str, folder: Path) -> Path | None:
    """What a card shows of a branch, on evaluation images that may leave this machine; none if there are none.

    These are drawn scenes, and with `push_pictures` any. Called by the main process.
    """
    dataset, count = trainer.eval_dataset, trainer.args.num_pictures
    if dataset is None or not count:
        return None
    if not trainer.args.push_pictures:
        rows = islice(undecoded(dataset, with_label=False, what="eval_dataset"), count)
        if not all(is_drawn(row["image"]["path"] or "") for row in rows):
            return None
    folder.mkdir(parents=True, exist_ok=True)
    network = trainer.network(branch.removeprefix("branch_"))
    draw_predictions(trainer, {"prediction": network}, folder / PREDICTIONS)
    return folder / PREDICTIONS


def draw_curves(records: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """`curves.png` of the lines of metrics.jsonl: losses, mean IoU, agreement; false: there is none."""
    keys = sorted({key for record in records for key in record})
    groups = {
        "loss": [key for key in keys if key == "loss" or key.endswith("_loss")],
        "mean IoU": [
            key for key in keys if key.endswith("_mean_iou") and key != "eval_mean_iou"
        ],  # the best one again
        "agreement": [key for key in keys if key.endswith("agreement")],
    }
    groups = {title: some for title, some in groups.items() if some}
    if groups:
        visualization.curves_figure(records, groups, folder / "curves.png")
    return bool(groups)


def give_to_trackers(trainer: Any, paths: Sequence[Path]) -> None:
    """Each picture to every tracker that takes images, under its file's name (trackio's and some others take none)."""
    step = trainer.state.global_step
    for tracker in trainer.accelerator.trackers:
        for path in paths:
            picture = np.asarray(Image.open(path).convert("RGB"))
            name = f"pictures/{path.stem}"
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "aim":
                tracker.log_images({name: Image.fromarray(picture)}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [picture]}, step=step)


def _draws(trainer: Any) -> bool:
    wanted = trainer.eval_dataset is not None and trainer.args.num_pictures > 0
    return wanted and trainer.accelerator.is_main_process


def _folder(trainer: Any) -> Path:
    return Path(trainer.args.output_dir) / "pictures"
