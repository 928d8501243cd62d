"""Builds results.json and the facts of a model card from a run's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpointing.fingerprint import versions
from ..metrics.scored import scored_classes
from ..objectives import Objective
from .reporting import peak_memory
from .stages import Stages
from .state import RunState
from .watch import watched

# The settings that are shown in a card; the others are in the run's config.yaml.
_SETTINGS_IN_CARD = (
    *("max_steps", "pretrain_steps", "ema_decay", "per_device_train_batch_size"),
    *("per_device_unlabeled_batch_size", "gradient_accumulation_steps"),
    *("optim", "learning_rate", "head_learning_rate_factor", "backbone_learning_rate_factor", "weight_decay"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "crop_size", "random_scale"),
    *("random_scale_mode", "horizontal_flip", "mixed_precision", "seed"),
)
_SCENES = (
    "It was trained on procedural drawings, not on photographs: it demonstrates the method and the file format, and "
    "is of no use on real images."
)
_LIMITS = {"street_scenes": _SCENES, "object_scenes": _SCENES}


@dataclass(frozen=True)
class Run:
    """The constant facts of a run.

    Args:
        settings: all settings, by field name (`cps_hf.config.flat`).
        models: by branch.
        id2label: the class names.
        num_labeled, num_unlabeled: the numbers of images; `None` for a stream or a missing set.
        eval_options: the options of `predict_logits` for evaluation.
        backbone_sources: by branch, where its backbone's weights came from, or `None`.
        license: the Hub's licence identifier for model cards, or `None`.
        stages: which objective is active at which step.
    """

    settings: Mapping[str, Any]
    objective: Objective
    models: Sequence[PreTrainedModel]
    id2label: Mapping[int, str]
    num_labeled: int | None
    num_unlabeled: int | None
    eval_options: Mapping[str, Any]
    backbone_sources: Sequence[str | None]
    license: str | None
    num_processes: int
    device: torch.device
    stages: Stages


def summary(run: Run, state: RunState) -> dict[str, Any]:
    """The content of results.json."""
    settings = run.settings
    return {
        "final": state.scores,
        "best": state.best,
        **({"stages": {**state.stages, "final": state.scores}} if run.stages.border else {}),
        **({"comparison": state.comparison} if state.comparison else {}),
        "agreement": state.agreement,
        "commonest_class": state.commonest_class,
        **({"pseudo_labels": watched(state)} if state.watch else {}),
        **({"unlabeled_weight": unlabeled_weight(run, state)} if settings["unlabeled_weight"] != 1 else {}),
        "classes": {
            "named": len(run.id2label),
            "scored": {row: scored_classes(scores) for row, scores in state.scores.items()},  # what mean_iou is over
            "absent": state.absent_classes,
        },
        "steps": state.global_step,
        "training": {  # without evaluating and saving
            **state.stopwatch.summary(),
            **({"supervised_seconds": state.supervised_seconds} if run.stages.border else {}),
            "peak_memory": peak_memory(run.device),
            "device": run.device.type,
            "num_processes": run.num_processes,
            "num_networks": len(run.models),
        },
        "seed": settings["seed"],
        "objective": {"name": type(run.objective).__name__, **asdict(run.objective)},
        "dataset": settings["dataset_name"],
        "partition": {"name": settings["partition_name"], "sha256": settings["partition_sha256"]},
        "num_labeled": run.num_labeled,
        "num_unlabeled": run.num_unlabeled,
        "versions": versions(),
    }


def unlabeled_weight(run: Run, state: RunState) -> dict[str, Any]:
    """The setting, the final factor, and the last step that read unlabeled images if the factor became 0."""
    setting = run.settings["unlabeled_weight"]
    last = state.unlabeled_weight if setting == "auto" else setting
    return {"setting": setting, "last": last, "end": run.stages.unlabeled_end}


def card_facts(run: Run, state: RunState, branch: str, directory: str) -> dict[str, Any]:
    """The facts from which `cps_hf.hub.card.render_card` makes a card.

    Args:
        branch: "branch_0", ..., "branch_0_average", ..., or "teacher".
        directory: the name of the card's folder.
    """
    index = int(branch.split("_")[1]) if branch != "teacher" else 0
    model, settings = run.models[index], run.settings
    step = state.global_step if directory != "best" else state.best["step"]
    objective = run.stages.objective_of(step - 1)
    source = getattr(model.config, "_name_or_path", "") or run.backbone_sources[index]
    shown = {name: settings[name] for name in _SETTINGS_IN_CARD if settings[name] not in (None, {}, [])}
    if objective.views and settings["unlabeled_weight"] != 1:
        shown["unlabeled_weight"] = settings["unlabeled_weight"]
    mode = run.eval_options["mode"]
    return {
        "model_name": directory if directory != "best" else f"{Path(settings['output_dir']).name}-best",
        "branch": branch,
        "architecture": type(model).__name__,
        "base_model": source if source and not Path(source).exists() else None,
        "license": run.license,
        "id2label": dict(run.id2label),
        "trust_remote_code": bool(getattr(model.config, "auto_map", None) or model._auto_class),
        "directory": directory,
        "dataset_name": settings["dataset_name"],
        "partition_name": settings["partition_name"],
        "partition_sha256": settings["partition_sha256"],
        "num_labeled": run.num_labeled,
        "num_unlabeled": run.num_unlabeled if objective.views else 0,
        "objective": type(objective).__name__,
        "objective_fields": _fields_that_act(objective),
        "citation": objective.citation,
        "settings": {**shown, "num_processes": run.num_processes},
        "scores": state.scores,
        "best": state.best,
        "absent": state.absent_classes,
        "step": step,
        "eval": {"mode": mode} if mode == "whole" else dict(run.eval_options),
        "versions": versions(),
        "picture": None,
        "limits": _LIMITS.get(settings["dataset_name"] or ""),
    }


def _fields_that_act(objective: Objective) -> dict[str, Any]:
    """The method's hyper-parameters, without those of an unused labeled loss and without local paths."""
    idle = [loss for loss in ("ohem", "focal") if objective.labeled_loss != loss]
    fields = asdict(objective)
    if objective.labelers:
        fields["labelers"] = [Path(one).name if Path(one).exists() else one for one in objective.labelers]
    return {name: value for name, value in fields.items() if not any(name.startswith(f"{loss}_") for loss in idle)}
