"""Putting a run together from its settings, and the checks that come before any training time is spent."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType
from datasets import Dataset
from transformers import PreTrainedModel, SchedulerType, get_scheduler

from ..config import AugmentationConfig, CPSConfig, ModelConfig, flat
from ..data.labels import LabelEncoding
from ..data.order import Shard
from ..data.streams import TrainStream, check_columns
from ..modeling import branches as building
from ..modeling import preparation
from ..modeling.channels import check_channels
from ..objectives import OBJECTIVES, Objective
from . import sharding
from .state import RunState

logger = logging.getLogger(__name__)


def check_launch(accelerator: Accelerator, args: CPSConfig) -> None:
    """The first log line says how many processes there are; a launch that silently does something else is an error."""
    count, world_size = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    working = "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {n} --num_machines 1 SCRIPT"
    if count != world_size:
        raise ValueError(
            f"The launcher started {world_size} processes (WORLD_SIZE), but Accelerate sees {count}: each would train "
            f"by itself and overwrite the others. On CPUs, launch with `{working.format(n=world_size)}`."
        )
    if args.num_processes is not None and args.num_processes != count:
        raise ValueError(
            f"`num_processes={args.num_processes}`, but this run has {count}. Launch with `accelerate launch "
            f"--multi_gpu --num_processes {args.num_processes} SCRIPT` on GPUs, or with "
            f"`{working.format(n=args.num_processes)}` on CPUs "
            "(`accelerate launch --cpu --num_processes N` starts one process)."
        )
    sharding.use_on_cpus(accelerator)
    sharding.refuse(accelerator, args)
    if accelerator.is_main_process:
        noun = ("process" if count == 1 else "processes") + (", sharded," if accelerator.is_fsdp2 else "")
        logger.info("%d %s on %s, precision %s.", count, noun, accelerator.device, accelerator.mixed_precision)


def check_trackers(args: CPSConfig) -> None:
    """Before Accelerate sees them, whose error does not say which setting it is about.

    Raises:
        ValueError: `report_to` names something that is no tracker of Accelerate.
    """
    known = [kind.value for kind in LoggerType if kind != LoggerType.ALL]
    for name in args.report_to:
        if name not in known:
            raise ValueError(f"`report_to` must hold trackers of Accelerate ({', '.join(known)}), got {name!r}.")


def check_data(train_dataset, unlabeled_dataset, eval_dataset, objective: Objective) -> dict[int, str] | None:
    """Which sets the objective needs, and the classes that they agree on.

    Returns:
        The class names, where the training set's label feature carries them.

    Raises:
        ValueError: a set is missing or has no such columns, or two have different classes.
    """
    name = type(objective).__name__
    sets = {"train_dataset": train_dataset, "unlabeled_dataset": unlabeled_dataset, "eval_dataset": eval_dataset}
    for what, dataset in sets.items():
        if dataset is not None and (objective.views or what != "unlabeled_dataset"):
            check_columns(dataset, with_label=what != "unlabeled_dataset", what=what)
    if objective.views and unlabeled_dataset is None:
        raise ValueError(f"{name} learns from unlabeled images: pass `unlabeled_dataset`, or use `Supervised()`.")
    if not objective.views and unlabeled_dataset is not None:
        logger.warning("%s trains on no unlabeled image: `unlabeled_dataset` is only used to measure agreement.", name)
    encodings = {
        what: LabelEncoding.from_feature((dataset.features or {}).get("label"))
        for what, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
        if dataset is not None
    }
    known = {what: e.id2label for what, e in encodings.items() if e is not None}
    if len(known) == 2 and known["train_dataset"] != known["eval_dataset"]:
        raise ValueError(
            f"`train_dataset` and `eval_dataset` have different classes: {known['train_dataset']} and "
            f"{known['eval_dataset']}."
        )
    return known.get("train_dataset", known.get("eval_dataset"))


def build_models(
    models,
    model_config: ModelConfig,
    args: CPSConfig,
    crop_size: Sequence[int],
    objective: Objective,
    id2label: dict[int, str] | None,
    accelerator: Accelerator,
) -> list[PreTrainedModel]:
    """The branches, ready to be wrapped: built or taken as they are, frozen and checked as the settings say.

    Raises:
        ValueError: too few for the objective, another class count than the labels', or a crop or batch that a model
            cannot take.
    """
    _warn_of_idle_ohem(crop_size, objective)
    # A teacher is beside one branch: a single id or configuration is not used twice then.
    alone = objective.teacher and model_config.num_branches is None and not isinstance(models, list | tuple)
    built = building.build_branches(
        models,
        id2label=id2label if not _holds_models(models) else None,
        num_branches=1 if alone else model_config.num_branches,
        seed=args.seed,
        reinit_heads=model_config.reinit_heads,
        backbone=_backbones(model_config),
        trust_remote_code=model_config.trust_remote_code,
        dtype=getattr(torch, model_config.dtype),
        attn_implementation=model_config.attn_implementation,
    )
    if len(built) < objective.min_branches:
        raise ValueError(f"{type(objective).__name__} needs {objective.min_branches} models, got {len(built)}.")
    if objective.teacher and len(built) > 1:
        raise ValueError(f"{type(objective).__name__} trains one model beside its teacher, got {len(built)}.")
    num_labels = built[0].config.num_labels
    if id2label is not None and num_labels != len(id2label):
        raise ValueError(
            f"The models have {num_labels} classes and `train_dataset` has {len(id2label)} "
            f"({', '.join([*id2label.values()][:4])} ...). Build the models with `num_labels={len(id2label)}`."
        )
    for index, model in enumerate(built):
        if model_config.freeze_backbone or model_config.freeze_norms:
            preparation.freeze(model, backbone=model_config.freeze_backbone, norms=model_config.freeze_norms)
        check_channels(model.config, type(model).__name__)
        preparation.check_input_size(model, *crop_size)
        if args.gradient_checkpointing:
            preparation.enable_gradient_checkpointing(model)
        if args.sync_batchnorm and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            model = built[index] = preparation.convert_sync_batchnorm(model)
        for size in {args.per_device_train_batch_size, args.unlabeled_batch_size if objective.views else None} - {
            None
        }:
            preparation.check_train_batch(model, size, *crop_size)
        unused = preparation.freeze_unused_parameters(model, tuple(crop_size))
        if unused and accelerator.is_main_process:
            logger.info("branch %d: frozen, since the logits do not depend on them: %s.", index, ", ".join(unused))
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        model.train()
    return built


def _warn_of_idle_ohem(crop_size: Sequence[int], objective: Objective) -> None:
    height, width = crop_size
    if objective.labeled_loss == "ohem" and height * width <= objective.ohem_min_kept:
        logger.warning(
            '`labeled_loss="ohem"` is plain cross entropy here: it keeps at least `ohem_min_kept=%d` pixels an image, '
            "and a crop of %d x %d has %d. Lower `ohem_min_kept`, or take larger crops.",
            objective.ohem_min_kept,
            height,
            width,
            height * width,
        )


def _backbones(model_config: ModelConfig) -> str | list[str | None] | None:
    if isinstance(model_config.backbone, list):
        return [model_config.backbone_source(index) for index in range(len(model_config.backbone))]
    return model_config.backbone_source(0)


def _holds_models(models) -> bool:
    """Models that are passed bring their own class names."""
    return isinstance(models, PreTrainedModel) or (
        isinstance(models, Sequence) and any(isinstance(m, PreTrainedModel) for m in models)
    )


def make_optimizer(models: Sequence[PreTrainedModel], args: CPSConfig) -> torch.optim.Optimizer:
    """One optimizer over all branches: the same updates as one each, since none of the two mixes parameters."""
    groups = []
    for index, model in enumerate(models):
        for group in preparation.parameter_groups(
            model,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            head_learning_rate_factor=args.head_learning_rate_factor,
            backbone_learning_rate_factor=args.backbone_learning_rate_factor,
            layer_decay=args.layer_decay,
        ):
            factor = group["lr"] / args.learning_rate if args.learning_rate else 1.0
            groups.append({**group, "name": f"branch {index}, {group['name']}", "learning_rate_factor": factor})
    if args.optim == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum, fused=args.optim_fused)
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=args.optim_fused)


def current_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """That of a parameter whose factors are 1; of an optimizer that was given, its first group's."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("learning_rate_factor", 1.0)


def make_schedule(optimizer: torch.optim.Optimizer, args: CPSConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The paper's poly schedule unless told otherwise: power 0.9, down to zero (transformers' own is 1.0 to 1e-7).

    Raises:
        ValueError: no such schedule, one that steps on a score, or an argument that it does not have or would ignore.
    """
    name, given = args.lr_scheduler_type, args.lr_scheduler_kwargs
    known = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
    if name not in known:  # those two step on a score, and there is none at most steps
        raise ValueError(f"`lr_scheduler_type` must be one of {', '.join(known)}, got {name!r}.")
    if name == "constant" and args.warmup_steps:
        raise ValueError(f'"constant" would ignore `warmup_steps={args.warmup_steps}`: take "constant_with_warmup".')
    if name in ("constant", "constant_with_warmup") and given:
        raise ValueError(f"`lr_scheduler_type` {name!r} has no arguments, `lr_scheduler_kwargs` holds {given}.")
    defaults = {"power": 0.9, "lr_end": 0.0} if name == "polynomial" else {}
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs={**defaults, **given},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_kwargs` {given} do not fit `lr_scheduler_type` {name!r} with `learning_rate` "
            f"{args.learning_rate}. transformers said: {error}"
        ) from error


def check_schedule(args: CPSConfig) -> None:
    """What `make_schedule` raises, before there is a model."""
    make_schedule(torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate), args)


def train_streams(
    args: CPSConfig,
    augmentation: AugmentationConfig,
    accelerator: Accelerator,
    objective: Objective,
    train_dataset,
    unlabeled_dataset,
    states: Mapping[str, Mapping[str, Any]],
    *,
    num_labels: int,
) -> tuple[TrainStream, TrainStream | None]:
    """The labeled stream, and the unlabeled one where the objective asks for views.

    Args:
        states: "labeled" and "unlabeled" to the "position" and "length" that a checkpoint holds; empty in a new run.
    """

    def stream(dataset, kind: str, batch_size: int, views: tuple[str, ...] | None) -> TrainStream:
        begin = states.get(kind, {"position": 0, "length": None})
        return TrainStream(
            dataset,
            name={"labeled": "train_dataset", "unlabeled": "unlabeled_dataset"}[kind],
            shard=Shard(
                batch_size=batch_size,
                accumulation_steps=args.gradient_accumulation_steps,
                rank=accelerator.process_index,
                num_processes=accelerator.num_processes,
            ),
            augmentation=augmentation,
            seed=args.seed,
            views=views,
            cutmix_masks=objective.cutmix_masks,
            reshuffle=kind == "labeled" or args.reshuffle_unlabeled,
            num_labels=num_labels,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=accelerator.device.type == "cuda",
            shuffle_buffer_size=args.shuffle_buffer_size,
            start=begin["position"],
            length=begin["length"],
            skip_bad_samples=args.skip_bad_samples,
            max_bad_sample_share=args.max_bad_sample_share,
        )

    labeled = stream(train_dataset, "labeled", args.per_device_train_batch_size, None)
    if not objective.views:
        return labeled, None
    return labeled, stream(unlabeled_dataset, "unlabeled", args.unlabeled_batch_size, objective.views)


def evenly_spaced(dataset, count: int):
    """`count` samples spread over a data set (a streamed one: its first), the same ones each time."""
    if not isinstance(dataset, Dataset):
        return dataset.take(count)
    count = min(count, len(dataset))
    return dataset.select([i * len(dataset) // count for i in range(count)])


def init_trackers(
    accelerator: Accelerator, args: CPSConfig, settings: Mapping[str, Any], objective: Objective, first_step: int
) -> None:
    """Start the trackers. TensorBoard shows what an earlier start logged after `first_step` only once.

    Args:
        settings: all of the run's, for those that show them.

    Raises:
        ValueError: one that is asked for is not installed; Accelerate would drop it in silence.
    """
    if not args.report_to:
        return
    started = {str(getattr(t, "value", t)) for t in accelerator.log_with}
    missing = [name for name in args.report_to if name not in started]
    if missing:
        raise ValueError(f"`report_to`: {', '.join(missing)} cannot be used; install it: `pip install {missing[0]}`.")
    config = {"objective": type(objective).__name__, **dataclasses.asdict(objective), **settings}
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    accelerator.init_trackers(
        args.run_name or os.path.basename(os.path.normpath(args.output_dir)),
        config=plain,
        init_kwargs={"tensorboard": {"purge_step": first_step + 1 if first_step else 0}},
    )


def run_state(args: CPSConfig, accelerator: Accelerator) -> RunState:
    """A new run's; no interval is the whole run, as transformers' callbacks read it."""
    return RunState(
        max_steps=args.max_steps,
        logging_steps=args.logging_steps,
        eval_steps=args.eval_steps or args.max_steps,
        save_steps=args.save_steps or args.max_steps,
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
    )


def to_yaml(objective: Objective, *groups: Any) -> str:
    """The objective and the settings as a YAML file that `--config` reads back to the same."""
    name = next((n for n, c in OBJECTIVES.items() if type(objective) is c), type(objective).__name__)
    values = {"objective": name, **dataclasses.asdict(objective), **flat(*groups)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def length(dataset: Any) -> int | None:
    """The images of a data set; none: a stream, or no data set."""
    return len(dataset) if isinstance(dataset, Dataset) else None
