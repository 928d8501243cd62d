"""Assembles a run from its settings, with the checks that come before any training time is spent."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import LoggerType
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, SchedulerType, get_scheduler

from .. import modeling
from ..config import AugmentationConfig, CPSConfig, ModelConfig, flat
from ..data.class_counts import ROWS_OF_A_STREAM, count_class_pixels
from ..data.labels import LabelEncoding, reduced_values
from ..data.order import Shard
from ..data.streams import PSEUDO_LABEL, TrainStream, check_columns, label_column_of
from ..functional import frequency_weights
from ..modeling.adapters import share_frozen_weights
from ..modeling.branches import source_per_branch
from ..modeling.channels import check_channels
from ..modeling.classes import classes_of
from ..modeling.initialization import branch_seed
from ..modeling.licences import warn_of_conditions
from ..modeling.twins import reject_twins
from ..objectives import OBJECTIVES, Objective
from . import memory, model_checks, sharding
from .module import TrainingModule
from .processes import together
from .state import RunState

logger = logging.getLogger(__name__)


def check_launch(accelerator: Accelerator, args: CPSConfig, model_config: ModelConfig) -> None:
    """Log the number of processes first, and reject launches that would silently do something else."""
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
    sharding.reject_unsupported(accelerator, args, model_config)
    if accelerator.is_main_process:
        noun = ("process" if count == 1 else "processes") + (", sharded," if accelerator.is_fsdp2 else "")
        precision = accelerator.mixed_precision
        precision = "float32" if precision == "no" else f"mixed precision {precision}"
        logger.info("%d %s on %s, %s.", count, noun, accelerator.device, precision)


def check_trackers(args: CPSConfig) -> None:
    """Check the trackers before Accelerate sees them, since its error does not name the setting.

    Raises:
        ValueError: `report_to` names something that is not a tracker of Accelerate.
    """
    known = [kind.value for kind in LoggerType if kind != LoggerType.ALL]
    for name in args.report_to:
        if name not in known:
            raise ValueError(f"`report_to` must list trackers of Accelerate ({', '.join(known)}), got {name!r}.")


def check_precision(args: CPSConfig) -> None:
    """Check the precision. Accelerate has one precision per process, that of its first trainer; a later trainer would
    silently use it too.

    Raises:
        ValueError: this trainer is configured for another precision.
    """
    if not is_initialized():
        return
    present = AcceleratorState().mixed_precision
    wanted = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if present != wanted:
        none = "" if args.mixed_precision else " (it is None, and the launch says so)"
        raise ValueError(
            f"`mixed_precision` is {wanted!r}{none}, but an earlier trainer or Accelerator of this process has "
            f"{present!r}, and Accelerate has one precision per process. Set `mixed_precision={present!r}`, or start "
            "Python again for each precision."
        )


def set_accumulation(accelerator: Accelerator, args: CPSConfig) -> None:
    """Set the accumulation steps. Accelerate shares those of the newest Accelerator among all in the process, and the
    streams have no end at which gradients should sync."""
    steps = {"num_steps": args.gradient_accumulation_steps, "sync_with_dataloader": False}
    accelerator.gradient_state.plugin_kwargs = steps


def keeps_averages(args: CPSConfig, objective: Objective) -> bool:
    """Whether to keep an average of each branch.

    Raises:
        ValueError: the objective needs averages, and `ema_decay` is `None`.
    """
    if objective.averages and args.ema_decay is None:
        raise ValueError(f"{type(objective).__name__} is taught by averages of the branches: set `ema_decay=0.996`.")
    return args.ema_decay is not None


def check_data(
    args: CPSConfig, train_dataset, unlabeled_dataset, eval_dataset, objective: Objective
) -> dict[int, str] | None:
    """Check that the data sets that the settings and the objective need are there, and agree on the classes.

    Returns:
        The class names, if the training set's label feature has them.

    Raises:
        ValueError: a set or a column is missing, or two sets have different classes.
    """
    name = type(objective).__name__
    sets = {"train_dataset": train_dataset, "unlabeled_dataset": unlabeled_dataset, "eval_dataset": eval_dataset}
    for what, dataset in sets.items():
        if dataset is not None and (objective.views or what != "unlabeled_dataset"):
            check_columns(dataset, with_label=what != "unlabeled_dataset", what=what)
    if args.early_stopping_patience and eval_dataset is None:
        raise ValueError("`early_stopping_patience` needs scores: pass `eval_dataset`, or remove the setting.")
    if objective.views and unlabeled_dataset is None:
        raise ValueError(f"{name} learns from unlabeled images: pass `unlabeled_dataset`, or use `Supervised()`.")
    if not objective.views and unlabeled_dataset is not None:
        logger.warning("%s uses no unlabeled images: `unlabeled_dataset` is only used to measure agreement.", name)
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
    found = known.get("train_dataset", known.get("eval_dataset"))
    if label_column_of(objective.views):
        _check_pseudo_labels(unlabeled_dataset, found, name)
    return found


def _check_pseudo_labels(unlabeled_dataset, id2label: dict[int, str] | None, name: str) -> None:
    if PSEUDO_LABEL not in unlabeled_dataset.features:
        raise ValueError(
            f"{name} needs labels of the unlabeled images. Name the trained networks that are to make them with "
            "`labelers` (`--labelers OUT/branch_0 OUT/branch_1`), or pass an `unlabeled_dataset` with a column "
            f"{PSEUDO_LABEL!r}, as examples/self_training.py makes it."
        )
    check_columns(unlabeled_dataset, with_label=True, what="unlabeled_dataset", label_column=PSEUDO_LABEL)
    encoding = LabelEncoding.from_feature(unlabeled_dataset.features[PSEUDO_LABEL])
    if encoding is not None and id2label is not None and encoding.id2label != id2label:
        raise ValueError(
            f"`train_dataset` and the column {PSEUDO_LABEL!r} of `unlabeled_dataset` have different classes: "
            f"{id2label} and {encoding.id2label}."
        )


def reduces_labels(train_dataset) -> bool:
    """Whether its masks are read with 0 as ignored and k as class k - 1."""
    encoding = LabelEncoding.from_feature(train_dataset.features.get("label"))
    values = encoding.values if encoding is not None else None
    return values is not None and len(encoding.names) < 255 and values == reduced_values(len(encoding.names))


def build_models(
    models,
    model_config: ModelConfig,
    args: CPSConfig,
    crop_size: Sequence[int],
    objective: Objective,
    id2label: dict[int, str] | None,
    accelerator: Accelerator,
) -> list[PreTrainedModel]:
    """Build the branches, or take them as they are; freeze and check them as the settings say.

    Raises:
        ValueError: there are too few for the objective, their classes differ from the data's, branches are identical
            or have nothing to train, or a model cannot process the crop or batch size.
    """
    _warn_of_idle_ohem(crop_size, objective)
    model_checks.check_passed_classes(models, id2label)
    # A teacher belongs to one branch: a single id or configuration is not used twice then.
    alone = objective.teacher and model_config.num_branches is None and not isinstance(models, list | tuple)
    count = 1 if alone else len(source_per_branch(models, model_config.num_branches))
    logger.info("Building %d network%s ...", count, "" if count == 1 else "s")
    built = modeling.build_branches(
        models,
        id2label=id2label,
        num_branches=1 if alone else model_config.num_branches,
        seed=args.seed,
        reinit_heads=model_config.reinit_heads,
        backbone=_backbones(model_config),
        trust_remote_code=model_config.trust_remote_code,
        dtype=getattr(torch, model_config.dtype),
        attn_implementation=model_config.attn_implementation,
        masked_attention=objective.labeled_loss == "set",
    )
    if accelerator.is_main_process:
        warn_of_conditions(_named_weights(models, model_config))
    if len(built) < objective.min_branches:
        raise ValueError(f"{type(objective).__name__} needs {objective.min_branches} models, got {len(built)}.")
    if objective.teacher and len(built) > 1:
        raise ValueError(f"{type(objective).__name__} trains one model and its teacher, got {len(built)} models.")
    if objective.min_branches > 1:
        reject_twins(built)
    if id2label is None and accelerator.is_main_process:
        trust = model_config.trust_remote_code
        model_checks.log_class_source(models, classes_of(built), trust_remote_code=trust)
    tried: list[tuple[Any, list[str]]] = []
    return [
        _prepare_branch(model, index, model_config, args, crop_size, objective, accelerator, tried)
        for index, model in enumerate(built)
    ]


def _prepare_branch(
    model: PreTrainedModel,
    index: int,
    model_config: ModelConfig,
    args: CPSConfig,
    crop_size: Sequence[int],
    objective: Objective,
    accelerator: Accelerator,
    tried: list[tuple[Any, list[str]]],
) -> PreTrainedModel:
    """The branch in training mode, with adapters, freezing and norms as set, after checking that it can be trained.

    Args:
        tried: as in `_try_on_shapes`.
    """
    if model_config.lora_rank is not None:
        _add_adapters(model, index, model_config, args, accelerator)
    if model_config.freeze_backbone or model_config.freeze_norms:
        modeling.freeze(model, backbone=model_config.freeze_backbone, norms=model_config.freeze_norms)
    if model_config.norm_momentum is not None:
        modeling.set_norm_momentum(model, model_config.norm_momentum)
    model_checks.check_trainable(model, index)
    if objective.labeled_loss == "set":
        model_checks.check_set_loss(model, index, compiles=args.torch_compile)
    check_channels(model.config, type(model).__name__)
    if args.gradient_checkpointing:
        modeling.enable_gradient_checkpointing(model)
    if args.sync_batchnorm and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = modeling.convert_sync_batchnorm(model)
    sizes = {args.per_device_train_batch_size} | ({args.unlabeled_batch_size} if objective.views else set())
    unused = _try_on_shapes(model, index, crop_size, sizes, tried)
    if unused and accelerator.is_main_process:
        logger.info("branch %d: frozen, since the logits do not depend on them: %s.", index, ", ".join(unused))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    model.train()
    return model


def _try_on_shapes(
    model: PreTrainedModel,
    index: int,
    crop_size: Sequence[int],
    batch_sizes: set[int],
    tried: list[tuple[Any, list[str]]],
) -> list[str]:
    """Check that a branch accepts the crop and the batches, and freeze what gets no gradient.

    Each pass takes a large share of a second, also without values. A branch that differs from an earlier one only in
    its weights is not tried again.

    Args:
        tried: the structure of each branch that was tried, and the names of what was frozen; extended.

    Returns:
        The names of the parameters that were frozen.
    """
    structure = model_checks.structure_of(model)
    for other, unused in tried:
        if other == structure:
            for name in unused:
                model.get_parameter(name).requires_grad_(False)
            return unused
    _check_crop(model, crop_size)
    for size in batch_sizes:
        modeling.check_train_batch(model, size, *crop_size)
    unused = model_checks.freeze_unused(model, index, tuple(crop_size))
    tried.append((structure, unused))
    return unused


def _named_weights(models, model_config: ModelConfig) -> list[str]:
    sources = [models] if isinstance(models, str | os.PathLike) or not isinstance(models, Sequence) else models
    backbones = model_config.backbone or []
    backbones = backbones if isinstance(backbones, list) else [backbones]
    return [str(name) for name in (*sources, *backbones) if isinstance(name, str | os.PathLike)]


def _add_adapters(
    model: PreTrainedModel, index: int, model_config: ModelConfig, args: CPSConfig, accelerator: Accelerator
) -> None:
    names = modeling.add_adapters(
        model,
        rank=model_config.lora_rank,
        seed=branch_seed(args.seed, index),
        alpha=model_config.lora_alpha,
        dropout=model_config.lora_dropout,
        target_modules=model_config.lora_target_modules,
    )
    if accelerator.is_main_process:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = trained / sum(p.numel() for p in model.parameters())
        logger.info(
            "branch %d: adapters of rank %d in %d layers of its backbone; %.1f %% of its parameters are trained.",
            *(index, model_config.lora_rank, len(names), 100 * share),
        )


def share_backbones(module: TrainingModule, accelerator: Accelerator) -> None:
    """Keep one copy of the frozen backbone weights that are equal in several networks with adapters."""
    saved = share_frozen_weights([network.model for network in module.networks().values()])
    if saved and accelerator.is_main_process:
        logger.info(
            "The networks share the frozen weights that are equal in their backbones: %.1f MiB less.", saved / 2**20
        )


def annealed_masked_attention(
    models: Sequence[PreTrainedModel], objective: Objective
) -> list[tuple[PreTrainedModel, torch.Tensor]]:
    """The EoMTs that are trained with their set loss, each with the probabilities of masked attention at the start: 1
    for a new network, 0 for one whose training was finished before."""
    if objective.labeled_loss != "set":
        return []
    return [(m, m.attn_mask_probs.detach().cpu().clone()) for m in models if hasattr(m, "attn_mask_probs")]


def _check_crop(model: PreTrainedModel, crop_size: Sequence[int]) -> None:
    try:
        modeling.check_input_size(model, *crop_size)
    except ValueError as error:
        raise ValueError(f"{error} Training uses crops: set `crop_size` to a size that the model accepts.") from error


def _warn_of_idle_ohem(crop_size: Sequence[int], objective: Objective) -> None:
    height, width = crop_size
    if objective.labeled_loss == "ohem" and height * width <= objective.ohem_min_kept:
        logger.warning(
            '`labeled_loss="ohem"` is plain cross entropy here: it keeps at least `ohem_min_kept=%d` pixels per '
            "image, and a crop of %d x %d has %d. Reduce `ohem_min_kept`, or use larger crops.",
            objective.ohem_min_kept,
            height,
            width,
            height * width,
        )


def _backbones(model_config: ModelConfig) -> str | list[str | None] | None:
    if isinstance(model_config.backbone, list):
        return [model_config.backbone_source(index) for index in range(len(model_config.backbone))]
    return model_config.backbone_source(0)


def make_optimizer(models: Sequence[PreTrainedModel], args: CPSConfig) -> torch.optim.Optimizer:
    """One optimizer over all branches. Its updates equal those of one per branch, since neither kind mixes
    parameters."""
    groups = []
    for index, model in enumerate(models):
        for group in modeling.parameter_groups(
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
    """The rate of parameters whose factors are 1; for a user's optimizer, that of its first group."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("learning_rate_factor", 1.0)


def make_schedule(optimizer: torch.optim.Optimizer, args: CPSConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule; by default the paper's poly: power 0.9, down to zero (transformers' own is 1.0 to 1e-7).

    With `pretrain_steps`, each of the two stages has a full schedule over its own steps.

    Raises:
        ValueError: the schedule is unknown or steps on a score, or an argument is unknown or would be ignored.
    """
    if not args.pretrain_steps:
        return _schedule(optimizer, args, args.max_steps)
    border, second_factor = args.pretrain_steps, args.second_stage_learning_rate_factor

    @functools.cache
    def factor(steps: int) -> Callable[[int], float]:
        return _schedule(torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate), args, steps).lr_lambdas[0]

    first = factor(border)
    factor(args.max_steps - border)  # an error must not wait for the second stage

    def at(step: int) -> float:
        # The length is read at each step, since a callback may change that of the second stage at its beginning.
        return first(step) if step < border else second_factor * factor(args.max_steps - border)(step - border)

    return LambdaLR(optimizer, at)


def _schedule(optimizer: torch.optim.Optimizer, args: CPSConfig, steps: int) -> LambdaLR:
    """One of transformers' schedules over so many steps. Those that are accepted are functions of the step."""
    name, given = args.lr_scheduler_type, args.lr_scheduler_kwargs
    known = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
    if name not in known:  # those two step on a score, which most steps do not have
        raise ValueError(f"`lr_scheduler_type` must be one of {', '.join(known)}, got {name!r}.")
    if name == "constant" and args.warmup_steps:
        raise ValueError(f'"constant" would ignore `warmup_steps={args.warmup_steps}`: use "constant_with_warmup".')
    if name in ("constant", "constant_with_warmup") and given:
        raise ValueError(f"`lr_scheduler_type` {name!r} has no arguments, `lr_scheduler_kwargs` contains {given}.")
    defaults = {"power": 0.9, "lr_end": 0.0} if name == "polynomial" else {}
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs={**defaults, **given},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_kwargs` {given} do not match `lr_scheduler_type` {name!r} with `learning_rate` "
            f"{args.learning_rate}. transformers said: {error}"
        ) from error


def check_schedule(args: CPSConfig) -> None:
    """Raise what `make_schedule` would raise, before there is a model."""
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
    """The labeled stream, and the unlabeled one if the objective has views.

    Args:
        states: by "labeled" and "unlabeled", the "position" and "length" from a checkpoint; empty in a new run.
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


def class_counts(
    args: CPSConfig, accelerator: Accelerator, objective: Objective, train_dataset, *, num_labels: int
) -> torch.Tensor | None:
    """The labeled set's pixels per class, float (C,) on the device and equal on all processes, if the objective
    weights classes by frequency. Called by all processes.

    Raises:
        ValueError: a label cannot be read, or no pixel has a class.
    """
    if not objective.weighs_by_frequency:
        return None
    streamed = not isinstance(train_dataset, Dataset)
    rows = f"the first {ROWS_OF_A_STREAM} rows" if streamed else f"all {len(train_dataset)} rows"
    logger.info("`class_weights`: counting the pixels of each class in %s of `train_dataset`.", rows)
    with together(accelerator):
        counts = count_class_pixels(
            train_dataset,
            num_labels,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_threads=max(2, args.dataloader_num_workers),
            skip_bad_samples=args.skip_bad_samples,
        )
    counts = accelerator.reduce(counts.to(accelerator.device), "sum")
    if not counts.any():
        raise ValueError("`class_weights` by frequency: no label of `train_dataset` has a class, all is ignored.")
    weights = frequency_weights(counts.double(), power=objective.class_weights)
    logger.info("Weights of the labeled loss by class: %s.", ", ".join(f"{weight:.3g}" for weight in weights.tolist()))
    return counts.float()


def evenly_spaced(dataset, count: int):
    """`count` samples spread evenly over a data set (of a stream, the first ones). Always the same ones."""
    if not isinstance(dataset, Dataset):
        return dataset.take(count)
    count = min(count, len(dataset))
    return dataset.select([i * len(dataset) // count for i in range(count)])


def init_trackers(
    accelerator: Accelerator, args: CPSConfig, settings: Mapping[str, Any], objective: Objective, state: RunState
) -> None:
    """Start the trackers on the main process. TensorBoard shows steps that an earlier start already logged only once.

    Args:
        settings: all settings of the run, for trackers that show them.
        state: the state at the run's first step.

    Raises:
        ValueError: a tracker is not installed, which Accelerate would silently drop, or cannot start.
        OtherProcessError: on the other processes, when one cannot start.
    """
    if not args.report_to:
        return
    started = {str(getattr(t, "value", t)) for t in accelerator.log_with}
    missing = [name for name in args.report_to if name not in started]
    if missing:
        raise ValueError(f"`report_to`: {', '.join(missing)} cannot be used; install it: `pip install {missing[0]}`.")
    config = {"objective": type(objective).__name__, **dataclasses.asdict(objective), **settings}
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    # What a checkpoint lists as pending is logged at its own step, perhaps again.
    next_step = state.global_step + (0 if state.pending else 1)
    with together(accelerator):
        try:
            accelerator.init_trackers(
                args.run_name or os.path.basename(os.path.normpath(args.output_dir)),
                config=plain,
                init_kwargs={"tensorboard": {"purge_step": next_step if state.global_step else 0}},
            )
        except Exception as error:  # a missing folder or network, for example
            raise ValueError(
                f"`report_to` {', '.join(args.report_to)}: a tracker cannot start ({type(error).__name__}: {error}). "
                "Fix that, or remove it from `report_to`."
            ) from error


def warn_of_little_space(output_dir: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Warn before training if a checkpoint and the branches may not fit on the disk."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    trained = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    needed = 2 * weights + memory.states_per_parameter(optimizer) * trained
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        logger.warning(
            "`output_dir` %s has %.1f GB free, and a checkpoint with the branches takes about %.1f GB: free some "
            "space, or the run will stop when it saves.",
            output_dir,
            free / 1e9,
            needed / 1e9,
        )


def run_state(args: CPSConfig, accelerator: Accelerator) -> RunState:
    """The state of a new run. An interval of `None` becomes the whole run, as transformers' callbacks expect."""
    return RunState(
        max_steps=args.max_steps,
        logging_steps=args.logging_steps,
        eval_steps=args.eval_steps or args.max_steps,
        save_steps=args.save_steps or args.max_steps,
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
    )


def to_yaml(objective: Objective, *groups: Any) -> str:
    """The objective and the settings as YAML, which `--config` reads back to the same values."""
    name = next((n for n, c in OBJECTIVES.items() if type(objective) is c), type(objective).__name__)
    values = {"objective": name, **dataclasses.asdict(objective), **flat(*groups)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def length(dataset: Any) -> int | None:
    """The number of images in a data set; `None` for a stream or no data set."""
    return len(dataset) if isinstance(dataset, Dataset) else None
