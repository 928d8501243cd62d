"""What decides how a run goes on, written into each checkpoint; and how two runs differ in it.

Cheap on purpose: ids are hashed, images are not; models are told apart by their configuration and parameter names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..config import CPSConfig
from ..data.streams import id_of, undecoded
from ..training import setup as assembly

IDS_OF_A_STREAM = 8  # a streamed set is told by its first rows: reading all of it may take hours
STREAM_ORDER = "by seed, stream and pass"  # a checkpoint that says nothing of it went by seed and pass alone

# Settings that may change while the run stays the same run. All others decide which samples come, what is done with
# them or what a step does, so that a change is an error; a new setting is such a one until it is listed here.
MAY_CHANGE = {
    *(
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "resume_force",
        "max_steps",
        "trust_remote_code",
    ),
    *("trust_remote_code", "logging_steps", "logging_first_step", "report_to", "run_name", "disable_tqdm"),
    *("save_steps", "save_total_limit", "num_pictures", "eval_steps", "per_device_eval_batch_size"),
    *("agreement_images", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("skip_bad_samples", "max_bad_sample_share", "dataset_name", "partition_name"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_token", "hub_revision", "hub_license"),
    *("hub_timeout", "push_pictures", "auto_find_batch_size", "ddp_timeout", "max_skipped_steps"),
}
# May change too, but then numbers are rounded otherwise, or each process sees another part of a step's samples.
CHANGES_ROUNDING = {
    *("num_processes", "per_device_train_batch_size", "per_device_unlabeled_batch_size"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "attn_implementation", "sync_batchnorm"),
    *(
        "full_determinism",
        "optim_fused",
        "channels_last",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
    ),
}
# What the best branch is chosen by: with another choice the best is found anew.
DECIDES_THE_BEST = {"eval_mode", "eval_crop_size", "eval_stride", "metric_for_best_model"}


def fingerprint(trainer: Any) -> dict[str, Any]:
    """All that decides how the `CPSTrainer`'s run goes on, by groups; JSON values only."""
    args, accelerator, objective = trainer.args, trainer.accelerator, trainer.objective
    settings = {field.name: getattr(args, field.name) for field in fields(CPSConfig)}
    micro_batches = args.gradient_accumulation_steps * accelerator.num_processes
    unlabeled = trainer.unlabeled_dataset if objective.views else None
    found = {
        "run": {k: v for k, v in settings.items() if k not in MAY_CHANGE | CHANGES_ROUNDING | DECIDES_THE_BEST}
        | {
            "mixed_precision": accelerator.mixed_precision,  # what `accelerate launch` said, where the setting is none
            "labeled images a step": args.per_device_train_batch_size * micro_batches,
            "unlabeled images a step": args.unlabeled_batch_size * micro_batches if objective.views else 0,
            "objective": type(objective).__name__,
            **{f"objective.{name}": value for name, value in asdict(objective).items()},
            **_dataset("train_dataset", trainer.train_dataset, with_label=True),
            **_dataset("unlabeled_dataset", unlabeled, with_label=False),
            "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
            "scheduler": type(trainer.lr_scheduler).__name__,
            "models": len(trainer.models),
            **({"sharding": "FSDP2"} if accelerator.is_fsdp2 else {}),  # its checkpoints are other files
            **{k: v for i, model in enumerate(trainer.models) for k, v in _model(f"model {i}", model)},
        },
        "rounding": {k: settings[k] for k in CHANGES_ROUNDING - {"num_processes"}}
        | {"processes": accelerator.num_processes, "device": accelerator.device.type}
        | {f"version of {name}": value for name, value in assembly.versions().items()},
        "best": {k: settings[k] for k in DECIDES_THE_BEST}
        | _dataset("eval_dataset", trainer.eval_dataset, with_label=True),
    }
    return json.loads(json.dumps(found, default=str))  # as a checkpoint gives it back: lists, no tuples


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "name: before -> now" of each value of a group that is not the same."""
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
    """Its rows, a hash of its ids (streamed: of its first ones), and how its labels are coded."""
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
        if key not in ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype"):
            yield f"{name}, {key}", _without_sources(value)
    shapes = [f"{key} {tuple(value.shape)} {value.dtype}" for key, value in model.state_dict().items()]
    yield f"{name}, hash of the parameters' names and shapes", _sha256(shapes)


def _without_sources(value: Any) -> Any:
    """A configuration within, without what only says where it came from."""
    if isinstance(value, dict):
        return {k: _without_sources(v) for k, v in value.items() if k not in ("_name_or_path", "transformers_version")}
    return value
