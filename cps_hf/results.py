"""What a run leaves for people: results.json's content, the facts of the model card, pictures.

`trainer` is a `CPSTrainer`, which nothing imports but the package's front door.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import assembly, hub, visualization
from .card import render_card
from .checkpoints import write_atomically
from .data.labels import LabelEncoding
from .data.scenes import is_drawn
from .data.streams import undecoded
from .evaluation import evaluating
from .objectives import Objective
from .reporting import peak_memory, without_nan

PREDICTIONS = "predictions.png"
# What a reader of a card wants to know of the settings; the rest is in the run's config.yaml.
_SETTINGS_IN_CARD = (
    *("max_steps", "per_device_train_batch_size", "per_device_unlabeled_batch_size", "gradient_accumulation_steps"),
    *("optim", "learning_rate", "head_learning_rate_factor", "backbone_learning_rate_factor", "weight_decay"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "crop_size", "random_scale"),
    *("random_scale_mode", "horizontal_flip", "mixed_precision", "seed"),
)


def finish(trainer: Any) -> dict[str, Any]:
    """Export every branch as it is at the last step, draw the pictures, write results.json; returns its content."""
    output_dir = Path(trainer.args.output_dir)
    for branch in [*range(len(trainer.models)), *(["teacher"] if trainer.module.teacher is not None else [])]:
        trainer.save_model(branch=branch)
    if trainer.best:  # the card of the best branch knows the final scores only now
        rewrite_card(trainer, output_dir / "best")
    content = summary(trainer)
    if trainer.accelerator.is_main_process:
        log = trainer.run_log.read()
        draw_pictures(trainer, output_dir / "pictures", log)
        text = json.dumps(without_nan(content), indent=1)
        write_atomically(output_dir / "results.json", text)
    trainer.accelerator.wait_for_everyone()
    return content


def summary(trainer: Any) -> dict[str, Any]:
    """The content of results.json; the schema stands in the README."""
    args = trainer.args
    return {
        "final": trainer.scores,
        "best": trainer.best,
        "agreement": trainer.agreement,
        "steps": trainer.state.global_step,
        "training": {  # without evaluating and saving
            **trainer.stopwatch.summary(),
            "peak_memory": peak_memory(trainer.device),
            "device": str(trainer.device.type),
            "num_processes": trainer.accelerator.num_processes,
            "num_networks": len(trainer.models),
        },
        "seed": args.seed,
        "objective": {"name": type(trainer.objective).__name__, **asdict(trainer.objective)},
        "dataset": args.dataset_name,
        "partition": {"name": args.partition_name, "sha256": args.partition_sha256},
        "num_labeled": _length(trainer.train_dataset),
        "num_unlabeled": _length(trainer.unlabeled_dataset),
        "versions": assembly.versions(),
    }


def card_facts(trainer: Any, branch: str, directory: str) -> dict[str, Any]:
    """What `card.render_card` makes a page of.

    Args:
        branch: "branch_0", ..., or "teacher".
        directory: the name of the folder that the card will lie in.
    """
    args, model = trainer.args, trainer.network(branch.removeprefix("branch_")).model
    index = int(branch.removeprefix("branch_")) if branch != "teacher" else 0
    source = getattr(model.config, "_name_or_path", "") or args.backbone_source(index)
    settings = {name: getattr(args, name) for name in _SETTINGS_IN_CARD if getattr(args, name) not in (None, {}, [])}
    return {
        "model_name": directory if directory != "best" else f"{Path(args.output_dir).name}-best",
        "branch": branch,
        "architecture": type(model).__name__,
        "base_model": source if source and not Path(source).exists() else None,
        "license": args.hub_license,
        "id2label": dict(trainer.id2label),
        "trust_remote_code": bool(getattr(model.config, "auto_map", None) or model._auto_class),
        "directory": directory,
        "dataset_name": args.dataset_name,
        "partition_name": args.partition_name,
        "partition_sha256": args.partition_sha256,
        "num_labeled": _length(trainer.train_dataset),
        "num_unlabeled": _length(trainer.unlabeled_dataset) if trainer.objective.views else 0,
        "objective": type(trainer.objective).__name__,
        "objective_fields": _fields_that_act(trainer.objective),
        "citation": trainer.objective.citation,
        "settings": {**settings, "num_processes": trainer.accelerator.num_processes},
        "scores": trainer.scores,
        "best": trainer.best,
        "step": trainer.state.global_step if directory != "best" else trainer.best["step"],
        "eval": {"mode": args.eval_mode, **({} if args.eval_mode == "whole" else trainer.judge.options)},
        "versions": assembly.versions(),
        "picture": None,
        "limits": _LIMITS.get(args.dataset_name or ""),
    }


def _fields_that_act(objective: Objective) -> dict[str, Any]:
    """The method's hyper-parameters, without OHEM's where it is not used."""
    fields = asdict(objective)
    if objective.labeled_loss != "ohem":
        fields = {name: value for name, value in fields.items() if not name.startswith("ohem_")}
    return fields


_SCENES = (
    "It was trained on procedural drawings, not on photographs: it demonstrates the method and the file format, and "
    "is of no use on real images."
)
_LIMITS = {"street_scenes": _SCENES, "object_scenes": _SCENES}


def _length(dataset) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def export_branch(trainer: Any, branch: str, directory: Path) -> None:
    """A branch's folder with its card, by the main process."""
    aside = Path(trainer.args.output_dir) / "tmp-card"
    picture = draw_card_picture(trainer, branch, aside)
    hub.export_branch(
        trainer.network(branch.removeprefix("branch_")).model,
        directory,
        id2label=trainer.id2label,
        image_mean=trainer.args.image_mean,
        image_std=trainer.args.image_std,
        processing_class=trainer.processing_class,
        card={**card_facts(trainer, branch, directory.name), "picture": picture},
    )
    shutil.rmtree(aside, ignore_errors=True)


def rewrite_card(trainer: Any, folder: Path) -> None:
    """The best branch's card, which was written before the final scores were known."""
    if trainer.accelerator.is_main_process:
        facts = card_facts(trainer, trainer.best["branch"], folder.name)
        facts["picture"] = PREDICTIONS if (folder / PREDICTIONS).is_file() else None
        write_atomically(folder / "README.md", render_card(facts))


def draw_pictures(trainer: Any, folder: Path, log: list[dict[str, Any]]) -> None:
    """A panel of the first evaluation images (image, label, every branch) and the curves of the run.

    Args:
        log: the lines of metrics.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    losses = sorted({k for line in log for k in line if k.endswith("loss")})
    scores = sorted({k for line in log for k in line if k.endswith("_mean_iou") or k.endswith("agreement")})
    for file, keys in (("losses.png", losses), ("scores.png", scores)):
        if any(k in line for line in log for k in keys):
            visualization.curves_figure(log, keys, folder / file)
    if trainer.eval_dataset is not None and trainer.args.num_pictures:
        networks = {f"branch {i}": branch for i, branch in enumerate(trainer.module.branches)}
        _draw_predictions(trainer, networks, folder / PREDICTIONS)


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
    _draw_predictions(trainer, {"prediction": network}, folder / PREDICTIONS)
    return folder / PREDICTIONS


def _draw_predictions(trainer: Any, networks: Mapping[str, torch.nn.Module], path: Path) -> None:
    """A row for each of the first evaluation images: image, label, and what every network says."""
    names, judge, count = [*trainer.id2label.values()], trainer.judge, trainer.args.num_pictures
    encoding = LabelEncoding.from_feature(trainer.eval_dataset.features["label"])
    palette = encoding.palette if encoding is not None and encoding.palette else visualization.palette(len(names))
    rows = []
    samples = [s for batch in islice(judge.stream(trainer.eval_dataset), count) for s in batch]
    with evaluating([*networks.values()]), trainer.accelerator.autocast():
        for sample in samples[:count]:
            images = sample["image"].unsqueeze(0).to(trainer.device)
            predictions = [judge.logits(network, images).argmax(1)[0] for network in networks.values()]
            rows.append([_picture(sample["image"]), _map(sample["label"]), *[_map(p) for p in predictions]])
    visualization.panel(rows, ["image", "label", *networks], names, palette, path)


def _picture(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _map(labels: torch.Tensor) -> np.ndarray:
    return labels.to(torch.uint8).cpu().numpy()
