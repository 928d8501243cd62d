"""Everything that determines how a run continues, saved in each checkpoint; and how two runs differ in it.

It is cheap on purpose: ids are hashed, but images are not; models are compared by configuration and parameter names.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel

from ..config import EvaluationConfig, flat, names_of_kind
from ..data.streams import id_of, undecoded

IDS_OF_A_STREAM = 8  # a streamed set is identified by its first rows: reading all of it may take hours
STREAM_ORDER = "by seed, stream and pass"  # in checkpoints without this entry: by seed and pass alone


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that affect results."""
    found = {"python": platform.python_version()}
    for name in ("cps_hf", "torch", "torchvision", "transformers", "datasets", "accelerate", "evaluate", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found


def fingerprint(
    groups: Sequence[Any],
    objective: Any,
    models: Sequence[PreTrainedModel],
    *,
    train_dataset: Any,
    unlabeled_dataset: Any,
    eval_dataset: Any,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    accelerator: Accelerator,
    class_counts: torch.Tensor | None = None,
    labelers: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that determines how a run continues, grouped by the effect of a change; JSON values only.

    "run": a different run; "rounding": the same run, rounded differently; "best": the best branch is chosen again.

    Args:
        groups: the settings, `CPSConfig` first.
        objective: a dataclass of the method's hyper-parameters.
        class_counts: the labeled set's pixels per class, if the run weights classes by them.
        labelers: a hash of each network that makes labels for the method.
    """
    args, settings = groups[0], flat(*groups)
    micro_batches = args.gradient_accumulation_steps * accelerator.num_processes
    free = names_of_kind("free", objective)
    found = {
        "run": {name: settings[name] for name in sorted(names_of_kind(None, *groups))}
        | {
            "mixed_precision": accelerator.mixed_precision,  # from `accelerate launch` if the setting is None
            "labeled images a step": args.per_device_train_batch_size * micro_batches,
            "unlabeled images a step": args.unlabeled_batch_size * micro_batches if objective.views else 0,
            "objective": type(objective).__name__,
            **{f"objective.{name}": value for name, value in asdict(objective).items() if name not in free},
            **_dataset("train_dataset", train_dataset, with_label=True),
            **(_judged_by(settings, eval_dataset) if args.unlabeled_weight == "auto" else {}),
            **({} if class_counts is None else {"train_dataset, pixels by class": class_counts.tolist()}),
            **{f"labeler {i}, hash of its weights": value for i, value in enumerate(labelers)},
            **_dataset("unlabeled_dataset", unlabeled_dataset if objective.views else None, with_label=False),
            "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
            "scheduler": type(lr_scheduler).__name__,
            "models": len(models),
            **({"sharding": "FSDP2"} if accelerator.is_fsdp2 else {}),  # its checkpoints have other files
            **{k: v for i, model in enumerate(models) for k, v in _model(f"model {i}", model)},
        },
        "rounding": {name: settings[name] for name in sorted(names_of_kind("rounding", *groups))}
        | {"processes": accelerator.num_processes, "device": accelerator.device.type}
        | {f"version of {name}": value for name, value in versions().items()},
        "best": {name: settings[name] for name in sorted(names_of_kind("choice", *groups))}
        | _dataset("eval_dataset", eval_dataset, with_label=True),
    }
    return json.loads(json.dumps(found, default=str))  # as it is read from a checkpoint: lists, no tuples


def _judged_by(settings: Mapping[str, Any], eval_dataset: Any) -> dict[str, Any]:
    """With `unlabeled_weight="auto"`, evaluations affect how a run continues."""
    names = ["eval_steps", *sorted(names_of_kind("choice", EvaluationConfig))]
    return {name: settings[name] for name in names} | _dataset("eval_dataset", eval_dataset, with_label=True)


def with_new_fields(saved: dict[str, Any], groups: Sequence[Any], objective: Any) -> dict[str, Any]:
    """Complete the fingerprint of a checkpoint from an earlier version: fields added since then get their defaults,
    which have no effect."""
    values = {name: value for group in groups for name, value in _defaults(group).items()}
    parts = {"run": None, "rounding": "rounding", "best": "choice"}
    added = {
        part: {n: values[n] for n in names_of_kind(kind, *groups) & values.keys()} for part, kind in parts.items()
    }
    free = names_of_kind("free", objective)
    added["run"] |= {f"objective.{name}": value for name, value in _defaults(objective).items() if name not in free}
    added = json.loads(json.dumps(added, default=str))
    return saved | {part: new | saved[part] for part, new in added.items()}


def _defaults(group: Any) -> dict[str, Any]:
    """The fields of a dataclass that have a default, with its value."""
    found = {f.name: f.default for f in fields(group) if f.default is not MISSING}
    return found | {f.name: f.default_factory() for f in fields(group) if f.default_factory is not MISSING}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "name: before -> now" for each value of a group that differs."""
    names = [*now, *(name for name in saved if name not in now)]
    return [
        f"{name}: {_short(saved.get(name))} -> {_short(now.get(name))}"
        for name in names
        if saved.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return "none" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def _dataset(name: str, dataset: Any, *, with_label: bool) -> dict[str, Any]:
    """Its rows, a hash of its ids (streamed: of its first ones), and its label encoding."""
    if dataset is None:
        return {}
    coding = (dataset.features or {}).get("label") if with_label else None
    rows = undecoded(dataset, with_label=with_label, what=name)
    found = {f"{name}, coding of labels": getattr(coding, "id", None)} if with_label else {}
    if isinstance(rows, Dataset):
        return found | {f"{name}, rows": len(rows), f"{name}, hash of the ids": _sha256(rows["id"])}
    first = [id_of(row) for row in islice(iter(rows), IDS_OF_A_STREAM)]
    if name != "eval_dataset":
        found[f"{name}, order"] = STREAM_ORDER
    return found | {f"{name}, files": rows.num_shards, f"{name}, hash of the first ids": _sha256(first)}


def _sha256(ids: Any) -> str:
    digest = hashlib.sha256()
    for name in ids:
        digest.update(f"{len(str(name))}:{name}".encode())
    return digest.hexdigest()[:16]


def _model(name: str, model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Its class, each entry of its configuration, and a hash of its parameters' names and shapes."""
    yield f"{name}, class", type(model).__name__
    for key, value in json.loads(model.config.to_json_string(use_diff=False)).items():
        if key == "input_shrink" and value == 1:
            continue  # it has no effect, and older checkpoints do not have it
        if key not in ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype"):
            yield f"{name}, {key}", _without_sources(value)
    shapes = [f"{key} {tuple(value.shape)} {value.dtype}" for key, value in model.state_dict().items()]
    yield f"{name}, hash of the parameters' names and shapes", _sha256(shapes)


def _without_sources(value: Any) -> Any:
    """A nested configuration without entries that only say where it came from."""
    if isinstance(value, dict):
        return {k: _without_sources(v) for k, v in value.items() if k not in ("_name_or_path", "transformers_version")}
    return value
