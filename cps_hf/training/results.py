"""What a run leaves for people: results.json's content, the facts of the model card, pictures.

`trainer` is a `CPSTrainer`, which nothing imports but the package's front door.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..hub import export as hub
from ..hub.card import render_card
from ..objectives import Objective
from . import setup as assembly
from . import sharding
from .callbacks.pictures import PREDICTIONS, draw_card_picture
from .reporting import peak_memory, without_nan

# What a reader of a card wants to know of the settings; the rest is in the run's config.yaml.
_SETTINGS_IN_CARD = (
    *("max_steps", "per_device_train_batch_size", "per_device_unlabeled_batch_size", "gradient_accumulation_steps"),
    *("optim", "learning_rate", "head_learning_rate_factor", "backbone_learning_rate_factor", "weight_decay"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "crop_size", "random_scale"),
    *("random_scale_mode", "horizontal_flip", "mixed_precision", "seed"),
)


def finish(trainer: Any) -> dict[str, Any]:
    """Export every branch as it is at the last step, write results.json; returns its content."""
    output_dir = Path(trainer.args.output_dir)
    for branch in [*range(len(trainer.models)), *(["teacher"] if trainer.module.teacher is not None else [])]:
        trainer.save_model(branch=branch)
    if trainer.best:  # the card of the best branch knows the final scores only now
        rewrite_card(trainer, output_dir / "best")
    content = summary(trainer)
    if trainer.accelerator.is_main_process:
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
    """A branch's folder with its card, written by the main process; called by all."""
    aside = Path(trainer.args.output_dir) / "tmp-card"
    model = trainer.network(branch.removeprefix("branch_")).model
    is_main, picture = trainer.accelerator.is_main_process, None
    weights = sharding.weights(model)
    with sharding.whole(trainer.module):
        if is_main:
            picture = draw_card_picture(trainer, branch, aside)
    if not is_main:
        return
    hub.export_branch(
        model,
        directory,
        state_dict=weights,
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
