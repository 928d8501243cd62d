"""The settings, in groups, with Hugging Face's names. `CPSConfig` has what the loop needs. Augmentation, model
construction, evaluation, the Hub and provenance are separate groups. A method's own settings are fields of its
objective.

The kind of a field says whether it may differ when a run is resumed:

- plain: it decides what a step computes. A different value means a different run, so resuming is an error;
- `free`: it may differ;
- `rounding`: it may differ, but sums are rounded differently, or each process gets a different part of a step's
  samples;
- `choice`: it decides which branch and step is best, so the best one is chosen again.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

Value = TypeVar("Value")


def _kind(name: str) -> Callable[[Value], Value]:
    def declare(default: Value) -> Value:
        options = {"default_factory": default} if callable(default) else {"default": default}
        return field(**options, metadata={"on_resume": name})

    return declare


free, rounding, choice = _kind("free"), _kind("rounding"), _kind("choice")


def _settings(cls: type[Value]) -> type[Value]:
    """A keyword-only dataclass whose error for an unknown argument names the nearest field or the right group."""
    cls = dataclass(kw_only=True)(cls)
    generated = cls.__init__

    @functools.wraps(generated)
    def init(self, **values):
        known = [f.name for f in fields(self)]
        for name in values:
            if name not in known:
                group = next((g.__name__ for g in GROUPS if name in g.__dataclass_fields__), None)
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" It belongs to {group}." if group else f" Did you mean `{close[0]}`?" if close else ""
                raise TypeError(f"{type(self).__name__} has no field `{name}`.{hint}")
            check_type(name, values[name], _types_of(type(self))[name])
        generated(self, **values)

    cls.__init__ = init
    return cls


@functools.cache
def _types_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_type(name: str, value: Any, expected: Any) -> None:
    """Check a field's type. Quoted values are rejected: "1e-3" would be compared as text, and "false" would be true.

    Args:
        name: the field's name, for the error message. expected: its annotation. A list may be given as a single item.

    Raises:
        TypeError: the value has another type.
    """
    kinds = (
        [*typing.get_args(expected)] if typing.get_origin(expected) in (types.UnionType, typing.Union) else [expected]
    )
    if any(_is_of(value, kind) for kind in kinds):
        return
    words = [_WORDS[typing.get_origin(kind) or kind] for kind in kinds if kind is not type(None)]
    wanted = " or ".join(words) + (" or None" if type(None) in kinds else "")
    hint = ""
    if isinstance(value, str) and not any(kind in (str, bool) for kind in kinds):
        hint = " Remove the quotes." if re.fullmatch(r"[-+.\deE_ ]+", value) else ""
    raise TypeError(f"`{name}` must be {wanted}, got {value!r} of type {type(value).__name__}.{hint}")


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}


def _is_of(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    plain = typing.get_origin(kind) or kind
    if plain is list:
        (item,) = typing.get_args(kind) or (Any,)
        items = [value] if isinstance(value, str | numbers.Number) else value
        return isinstance(items, Sequence) and all(
            item is Any or entry is None or _is_of(entry, item) for entry in items
        )
    if plain is bool or isinstance(value, bool):
        return plain is bool and isinstance(value, bool)
    accepted = {int: numbers.Integral, float: numbers.Real, str: str | os.PathLike, dict: Mapping}
    return isinstance(value, accepted[plain])


@_settings
class CPSConfig:
    """The settings of `CPSTrainer`'s training loop. Every field is used, and none is read from the environment.

    The defaults are those of the CPS release for VOC, converted to an averaged gradient: its nominal learning rate of
    0.01 is divided by its four processes, and its weight decay of 1e-4 is multiplied by four. NOTE: there is one
    difference: gradients are not accumulated.

    Output and resuming
        output_dir: the folder that everything is written to.
        overwrite_output_dir: start from scratch in a folder that contains a run. The old run is deleted.
        resume_from_checkpoint: a checkpoint folder; true for the newest complete checkpoint in `output_dir`; or "auto"
            for that one if it exists and a new run otherwise.
        resume_force: resume even if settings, data or models differ from the checkpoint's.

    Length and batches
        max_steps: total number of optimizer steps, over both stages if there are two.
        pretrain_steps: train each branch on the labels alone for this many steps first, with a separate schedule. The
            method then starts from these branches with a new optimizer and schedule. Both stages are evaluated, and
            the supervised branches are exported as `supervised_<i>`. If `None`, there is one stage.
        per_device_train_batch_size: labeled images per process and micro-batch.
        per_device_unlabeled_batch_size: unlabeled images per process and micro-batch. If `None`, the same as labeled.
        gradient_accumulation_steps: micro-batches per optimizer step.
        auto_find_batch_size: if a batch does not fit into memory, halve it and double the accumulation until it does,
            before the first step. The global batch size stays the same.
        num_processes: the expected number of processes; any other number is an error. If `None`, any number is
            accepted.
        ddp_timeout: seconds that a process waits for the others before it stops with an error.

    Optimizer and schedule
        optim: "sgd" or "adamw".
        optim_fused: use torch's fused kernel: faster, with the same results up to rounding (benchmarks/LOG.md).
        learning_rate: the learning rate of the backbone and, multiplied by its factor, of the decode head.
        head_learning_rate_factor: the decode head's learning rate divided by `learning_rate`.
        backbone_learning_rate_factor: the backbone's learning rate divided by `learning_rate`.
        layer_decay: each backbone layer's learning rate divided by that of the next layer. If `None`, all are equal.
        weight_decay: applied to weights, but not to biases and normalisation layers.
        momentum: the momentum of SGD. Only with `optim` "sgd".
        adam_beta1: AdamW's first beta. Only with `optim` "adamw".
        adam_beta2: AdamW's second beta. Only with `optim` "adamw".
        adam_epsilon: AdamW's epsilon. Only with `optim` "adamw".
        max_grad_norm: clip each branch's gradient to this norm. If `None` or, as in transformers, 0: no clipping.
        lr_scheduler_type: any of transformers' schedules. "polynomial" is (1 - step / max_steps) ** power.
        lr_scheduler_kwargs: the schedule's own arguments; JSON on the command line.
        warmup_steps: steps of linear warm-up, per stage.
        second_stage_learning_rate_factor: multiplies the learning rates of the second stage; 0.5 is a good start. Only
            with `pretrain_steps`.
        max_skipped_steps: skip up to this many steps whose loss or gradient is not finite. One more is an error.
        ema_decay: keep an exponential moving average (EMA) of each branch, with this decay per step (0.996, say).
            Early in training the decay is at most 1 - 1 / (step + 1). Averages are evaluated, and exported as
            `branch_<i>_average`. If `None`, no averages are kept.

    Unlabeled images
        unlabeled_weight: multiplies the method's unlabeled term, in addition to the method's own `weight`. "auto"
            starts at 1 and lowers it when evaluations show that unlabeled images do harm (docs/unlabeled_weight.md);
            it needs `eval_steps`.

    Logging and saving
        logging_steps: log the first step, and then every this many steps.
        report_to: Accelerate's experiment trackers, e.g. tensorboard wandb trackio.
        run_name: the run's name in the trackers. If `None`, the name of the output folder.
        disable_tqdm: print a line per log instead of a progress bar, as is done when the output is not a terminal.
        save_steps: save a checkpoint every this many steps and at the last step. If `None`, at the last step only.
        save_total_limit: keep only this many of the newest checkpoints, and that of the best step. If `None`, keep
            all.
        eval_steps: evaluate every this many steps, and always at the last step. If `None`, at the last step only.
        early_stopping_patience: stop after this many evaluations in a row without a better score. With
            `pretrain_steps`, only those of the second stage count. Only with `eval_steps`. If `None`, train to
            `max_steps`.
        metric_for_best_model: the score that the best branch and the best step are chosen by.
        agreement_images: how many fixed unlabeled images to measure the branches' agreement on. 0: do not measure it.

    Machine
        seed: the seed of everything random.
        full_determinism: use deterministic algorithms on GPUs too, which is slower (docs/determinism.md).
        mixed_precision: "no", "bf16" or "fp16". If `None`, what `accelerate launch` is configured with.
        gradient_checkpointing: use less memory at the cost of a second forward pass.
        channels_last: store weights, and so feature maps, in channels-last order, which half-precision convolutions on
            GPUs prefer.
        torch_compile: compile each network for training. Evaluation is not compiled, since image sizes vary.
        torch_compile_backend: torch.compile's backend. Only with `torch_compile`.
        torch_compile_mode: torch.compile's mode, e.g. "max-autotune". Only with `torch_compile`.
        sync_batchnorm: compute batch-norm statistics over all processes, on GPUs with more than one process.
        dataloader_num_workers: worker processes per stream.
        dataloader_prefetch_factor: batches that each worker prepares ahead.
        reshuffle_unlabeled: shuffle the unlabeled images again in each pass. The CPS release keeps one order.
        shuffle_buffer_size: the number of rows that a streamed data set is shuffled among.
    Bad samples
        skip_bad_samples: replace training samples that cannot be read, and list them in
            `output_dir/bad_samples.jsonl`. An evaluation image that cannot be read is still an error.
        max_bad_sample_share: stop the run if a larger share of the samples is bad.
        check_labels_seconds: check the labels of `train_dataset` and `eval_dataset` before step 1, for at most this
            long; of a stream, only the first ones. 0: no check, and classes that never occur are not reported.
    """

    output_dir: str = free("outputs/cps")
    overwrite_output_dir: bool = free(False)
    resume_from_checkpoint: bool | str | None = free(None)
    resume_force: bool = free(False)

    max_steps: int = free(40_000)
    pretrain_steps: int | None = None
    per_device_train_batch_size: int = rounding(8)
    per_device_unlabeled_batch_size: int | None = rounding(None)
    gradient_accumulation_steps: int = rounding(1)
    auto_find_batch_size: bool = free(False)
    num_processes: int | None = free(None)
    ddp_timeout: int = free(1800)

    optim: str = "sgd"
    optim_fused: bool = rounding(True)
    learning_rate: float = 0.0025
    head_learning_rate_factor: float = 1.0
    backbone_learning_rate_factor: float = 1.0
    layer_decay: float | None = None
    weight_decay: float = 4e-4
    momentum: float = 0.9
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = None
    lr_scheduler_type: str = "polynomial"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    second_stage_learning_rate_factor: float = 1.0
    max_skipped_steps: int = free(0)
    ema_decay: float | None = None

    unlabeled_weight: float | str = 1.0

    logging_steps: int = free(50)
    report_to: list[str] = free(list)
    run_name: str | None = free(None)
    disable_tqdm: bool = free(False)
    save_steps: int | None = free(None)
    save_total_limit: int | None = free(None)
    eval_steps: int | None = free(None)
    early_stopping_patience: int | None = free(None)
    metric_for_best_model: str = choice("mean_iou")
    agreement_images: int = free(16)

    seed: int = 42
    full_determinism: bool = rounding(False)
    mixed_precision: str | None = None
    gradient_checkpointing: bool = rounding(False)
    channels_last: bool = rounding(False)
    torch_compile: bool = rounding(False)
    torch_compile_backend: str = rounding("inductor")
    torch_compile_mode: str | None = rounding(None)
    sync_batchnorm: bool = rounding(True)
    dataloader_num_workers: int = free(2)
    dataloader_prefetch_factor: int = free(2)
    reshuffle_unlabeled: bool = True
    shuffle_buffer_size: int = 1000

    skip_bad_samples: bool = free(False)
    max_bad_sample_share: float = free(0.05)
    check_labels_seconds: float = free(120.0)

    def __post_init__(self):
        _check_numbers(
            self,
            at_least={
                "max_steps": 1,
                "pretrain_steps": 0,
                "per_device_train_batch_size": 1,
                "per_device_unlabeled_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "num_processes": 1,
                "ddp_timeout": 1,
                "learning_rate": 0,
                "head_learning_rate_factor": 0,
                "backbone_learning_rate_factor": 0,
                "weight_decay": 0,
                "adam_epsilon": 0,
                "max_grad_norm": 0,
                "warmup_steps": 0,
                "max_skipped_steps": 0,
                "eval_steps": 1,
                "early_stopping_patience": 1,
                "agreement_images": 0,
                "logging_steps": 1,
                "save_steps": 1,
                "save_total_limit": 1,
                "seed": 0,
                "dataloader_num_workers": 0,
                "dataloader_prefetch_factor": 1,
                "check_labels_seconds": 0,
                "shuffle_buffer_size": 1,
            },
            shares=["max_bad_sample_share"],
        )
        for name in ("head_learning_rate_factor", "backbone_learning_rate_factor"):
            if getattr(self, name) == 0:
                raise ValueError(f"`{name}` must be above 0, got 0. To freeze the backbone: `freeze_backbone`.")
        self._check_stages()
        self._check_unlabeled_weight()
        if self.early_stopping_patience and self.eval_steps is None:
            raise ValueError(
                f"`early_stopping_patience` {self.early_stopping_patience} counts evaluations, but without "
                "`eval_steps` there is only one, at the last step. Set `eval_steps`, or remove the patience."
            )
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 0 or more and less than 1, got {getattr(self, name)}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be 0 or more and less than 1, or none, got {self.ema_decay}.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1, or none, got {self.layer_decay}.")
        _check_one_of(self, "optim", "sgd", "adamw")
        _check_one_of(self, "metric_for_best_model", "mean_iou", "mean_accuracy", "overall_accuracy")
        _check_one_of(self, "mixed_precision", None, "no", "bf16", "fp16")
        _check_used(self, "optim", "sgd", "momentum")
        _check_used(self, "optim", "adamw", "adam_beta1", "adam_beta2", "adam_epsilon")
        _check_used(self, "torch_compile", True, "torch_compile_backend", "torch_compile_mode")

    def _check_stages(self) -> None:
        factor = self.second_stage_learning_rate_factor
        if self.pretrain_steps and self.pretrain_steps >= self.max_steps:
            raise ValueError(
                f"`pretrain_steps` {self.pretrain_steps} is part of `max_steps` {self.max_steps} and leaves no steps "
                "for the method. Increase `max_steps`, or train with the supervised objective."
            )
        if factor <= 0:
            raise ValueError(f"`second_stage_learning_rate_factor` must be above 0, got {factor}.")
        if factor != 1 and not self.pretrain_steps:
            raise ValueError(
                f"`second_stage_learning_rate_factor` {factor} would be ignored: there is no second stage without "
                "`pretrain_steps`. Set `pretrain_steps`, or remove the factor."
            )

    def _check_unlabeled_weight(self) -> None:
        weight = self.unlabeled_weight
        if weight == "auto":
            if self.eval_steps is None:
                raise ValueError(
                    '`unlabeled_weight="auto"` needs evaluations during training, but `eval_steps` is None. Set '
                    "`eval_steps`, for example to a tenth of `max_steps`."
                )
        elif isinstance(weight, str) or not 0 <= weight < math.inf:
            raise ValueError(f'`unlabeled_weight` must be 0 or more, or "auto", got {weight!r}.')

    # What transformers' callbacks (DefaultFlowCallback, EarlyStoppingCallback, users' own) read from their `args`.

    logging_strategy = eval_strategy = save_strategy = "steps"
    logging_first_step = True
    eval_delay = 0
    greater_is_better = True
    load_best_model_at_end = False

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as transformers' arguments pass them to tracker callbacks."""
        return asdict(self)

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """`to_dict` for trackers that accept plain values only: all other values as text."""
        return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self.to_dict().items()}

    @property
    def unlabeled_batch_size(self) -> int:
        """Unlabeled images per process and micro-batch."""
        return self.per_device_unlabeled_batch_size or self.per_device_train_batch_size


@_settings
class AugmentationConfig:
    """How training images become batches: random geometry, which all views of a sample share, and the colour changes
    of strong views.

    The defaults are those of the CPS release for VOC (flip, scale, then crop, with padding if the image is smaller),
    and for strong views those of FixMatch and UniMatch.

    Augmentation
        crop_size: height and width in pixels; one number sets both.
        random_scale: the scale factors to choose from, or the two ends of a range.
        random_scale_mode: "choice" or "range".
        horizontal_flip: the probability of a horizontal flip.
        resize_antialias: low-pass filter images before shrinking them (the release does not).
        color_jitter: the probability of colour jitter in a strong view.
        grayscale: the probability of grayscale in a strong view.
        gaussian_blur: the probability of blur in a strong view.
        labeled_color_jitter: the probability of showing a labeled image as a strong view: jitter, grayscale and blur,
            with the three probabilities above. 0, as in the published recipes: never.
    """

    crop_size: list[int] = field(default_factory=lambda: [512, 512])
    random_scale: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0, 1.5, 1.75, 2.0])
    random_scale_mode: str = "choice"
    horizontal_flip: float = 0.5
    resize_antialias: bool = False
    color_jitter: float = 0.8
    grayscale: float = 0.2
    gaussian_blur: float = 0.5
    labeled_color_jitter: float = 0.0

    def __post_init__(self):
        _check_sizes(self, "crop_size")
        _check_numbers(
            self, shares=["horizontal_flip", "color_jitter", "grayscale", "gaussian_blur", "labeled_color_jitter"]
        )
        _check_one_of(self, "random_scale_mode", "choice", "range")
        factors = list(self.random_scale)
        if not factors or not all(0 < factor < math.inf for factor in factors):
            raise ValueError(f"`random_scale` must contain positive factors, got {factors}.")
        if self.random_scale_mode == "range" and not (len(factors) == 2 and factors[0] <= factors[1]):
            raise ValueError(
                f'`random_scale` must be two factors, low <= high, with `random_scale_mode="range"`, got {factors}.'
            )


@_settings
class ModelConfig:
    """How branches are built from an id, a path or a configuration, and prepared for training.

    Models
        num_branches: the number of branches if a single id or configuration is given. If `None`, two.
        reinit_heads: draw new decode heads, even if the checkpoint has them.
        backbone: weights for the backbones: a Hub id, a folder of a transformers backbone, a timm name or a file.
            Either one for all branches or one per branch; "none" for a branch that loads no backbone.
        dtype: the parameters' type: "float32", "bfloat16" or "float16". `mixed_precision` is usually what you want.
        attn_implementation: "eager", "sdpa" or "flash_attention_2"; or, for the backbone inside a model only,
            {"backbone_config": "sdpa"}, as JSON on the command line. If `None`, the library's choice.
        trust_remote_code: run code that comes with a checkpoint.
        freeze_backbone: train the decode heads only.
        freeze_norms: keep the backbone's normalisation layers fixed.
        lora_rank: the rank of low-rank adapters (LoRA) that are trained in the frozen backbone. The heads are trained
            in full, and the adapters are merged into the weights on export. Needs peft (the extra `lora`). If `None`,
            no adapters.
        lora_alpha: the adapters' scale times `lora_rank`. If `None`, twice `lora_rank`. Only with `lora_rank`.
        lora_dropout: on the adapters' input, while training. Only with `lora_rank`.
        lora_target_modules: the adapted layers of the backbone, by the ends of their names. If `None`, all linear
            layers. Only with `lora_rank`.
        norm_momentum: the share of a batch's statistics in the update of batch norm's running statistics. Smaller
            values suit small batches. If `None`, each layer's own value, usually 0.1.
        image_mean: the mean that images in [0, 1] are normalised with, three numbers. If `None`, that of the
            pretrained network, from its image processor or timm, or else ImageNet's. The exported image processor uses
            it too.
        image_std: the standard deviation, like `image_mean`.
    """

    num_branches: int | None = None
    reinit_heads: bool = False
    backbone: str | list[str] | None = None
    dtype: str = "float32"
    attn_implementation: dict[str, str] | str | None = rounding(None)
    trust_remote_code: bool = free(False)
    freeze_backbone: bool = False
    freeze_norms: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    norm_momentum: float | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    def __post_init__(self):
        _check_numbers(self, at_least={"num_branches": 1, "lora_rank": 1})
        self._check_lora()
        if self.norm_momentum is not None and not 0 < self.norm_momentum <= 1:
            raise ValueError(f"`norm_momentum` must be above 0 and at most 1, or none, got {self.norm_momentum}.")
        _check_one_of(self, "dtype", "float32", "bfloat16", "float16")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise ValueError(f"`{name}` must be three numbers, one per colour channel, got {value}.")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"`image_std` must be positive, got {self.image_std}.")
        if isinstance(self.backbone, list | tuple):
            self.backbone = ["none" if entry is None else entry for entry in self.backbone]

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            for name, default in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_target_modules", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"`{name}` goes with `lora_rank`, which is not set: set it, or omit `{name}`.")
            return
        if self.freeze_backbone:
            raise ValueError("`lora_rank` freezes the backbone but for its adapters: leave `freeze_backbone` out.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"`lora_alpha` must be above 0, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be 0 or more and less than 1, got {self.lora_dropout}.")
        if self.lora_target_modules is not None:
            given = self.lora_target_modules
            self.lora_target_modules = [given] if isinstance(given, str) else [*given]
            if not self.lora_target_modules:
                raise ValueError("`lora_target_modules` is empty: name layers, or leave it out for all linear ones.")

    def backbone_source(self, index: int) -> str | None:
        """The backbone weights that branch `index` starts from. If `None`, those that its model has."""
        source = self.backbone[index] if isinstance(self.backbone, list) else self.backbone
        return None if source == "none" else source


@_settings
class EvaluationConfig:
    """How branches predict images that they are not trained on.

    Evaluation
        per_device_eval_batch_size: whole images (of equal size) or windows per forward pass.
        eval_mode: "whole" image, or "sliding" windows.
        eval_shrink: average blocks of this many by this many pixels before a branch sees an image. Use 2 if
            `random_scale` is around one half, 3 if it is around a third; an exported branch then shrinks its input
            itself. For DeepLabV3+ on large photographs. Only with `eval_mode` "whole".
        eval_crop_size: the window's size. If `None`, `crop_size`. Only with `eval_mode` "sliding".
        eval_stride: the window's stride in pixels. If `None`, two thirds of the window. Only with `eval_mode`
            "sliding".
        num_pictures: how many evaluation images to draw into `output_dir/pictures`. 0: none.
    """

    per_device_eval_batch_size: int = free(1)
    eval_mode: str = choice("whole")
    eval_shrink: int = choice(1)
    eval_crop_size: list[int] | None = choice(None)
    eval_stride: list[int] | None = choice(None)
    num_pictures: int = free(4)

    def __post_init__(self):
        _check_sizes(self, "eval_crop_size", "eval_stride")
        _check_numbers(self, at_least={"per_device_eval_batch_size": 1, "eval_shrink": 1, "num_pictures": 0})
        _check_one_of(self, "eval_mode", "whole", "sliding")
        _check_used(self, "eval_mode", "whole", "eval_shrink")
        _check_used(self, "eval_mode", "sliding", "eval_crop_size", "eval_stride")
        if self.eval_crop_size is not None:
            self.check_stride(self.eval_crop_size)

    def check_stride(self, crop_size: list[int]) -> None:
        """Check that windows leave no gaps.

        Args:
            crop_size: the size of training crops, which is the window's size if `eval_crop_size` is `None`.

        Raises:
            ValueError: the stride exceeds the window.
        """
        window, stride = self.eval_crop_size or crop_size, self.eval_stride
        if stride is not None and (stride[0] > window[0] or stride[1] > window[1]):
            raise ValueError(f"`eval_stride` {stride} exceeds the window {window}: pixels would be missed.")


@_settings
class HubConfig:
    """Where a run's branches are pushed to, and when.

    The Hub
        push_to_hub: push the best branch to the Hub. A token with write access is needed from the start.
        hub_model_id: "user/name" or "name". If `None`, the name of the output folder.
        hub_strategy: "end" pushes at the end of the run. "every_save" also pushes at every checkpoint, during
            training. "checkpoint" does the same and also pushes the checkpoint, as `last-checkpoint/` next to the
            branch.
        hub_private_repo: whether a new repository is private. If `None`, the default of the user's account. If true,
            an existing public repository is an error.
        hub_token: if `None`, the token of `hf auth login` or HF_TOKEN. It is never written to a file or log.
        hub_revision: the repository's branch to push to; it is created if missing. If `None`, main.
        hub_license: the Hub's identifier of the licence for the model card. If `None`, the base model's or "unknown".
        hub_timeout: seconds to wait for pushes at the end of the run; unfinished ones are left for `cps-hf push`.
        push_pictures: let the model card show images of `eval_dataset`; otherwise none of them leaves this machine.
            (Drawn scenes are always shown.)
    """

    push_to_hub: bool = free(False)
    hub_model_id: str | None = free(None)
    hub_strategy: str = free("end")
    hub_private_repo: bool | None = free(None)
    hub_token: str | None = field(default=None, repr=False, metadata={"on_resume": "free"})
    hub_revision: str | None = free(None)
    hub_license: str | None = free(None)
    hub_timeout: float = free(1800)
    push_pictures: bool = free(False)

    def __post_init__(self):
        _check_numbers(self, at_least={"hub_timeout": 0})
        _check_one_of(self, "hub_strategy", "end", "every_save", "checkpoint")


@_settings
class Provenance:
    """Names of the data for results.json and the model card. Nothing else reads them.

    Provenance
        dataset_name: the data set's name.
        partition_name: the name of the partition, which says which images are labeled.
        partition_sha256: the partition's hash.
    """

    dataset_name: str | None = free(None)
    partition_name: str | None = free(None)
    partition_sha256: str | None = None


GROUPS = (CPSConfig, AugmentationConfig, ModelConfig, EvaluationConfig, HubConfig, Provenance)
"""No two groups share a field name: a command line and a YAML file contain the fields of all groups together."""


RETIRED = ("logging_first_step",)
"""Fields of earlier versions. Their config.yaml contains these fields, and nothing reads them any more."""


def flat(*groups: Any) -> dict[str, Any]:
    """All settings that may be written to a file, by field name. The token is excluded."""
    values = {name: value for group in groups for name, value in asdict(group).items()}
    values.pop("hub_token", None)
    return values


def names_of_kind(kind: str | None, *groups: Any) -> set[str]:
    """The fields of some groups with this kind: "free", "rounding" or "choice". If `None`, the plain fields."""
    return {f.name for group in groups for f in fields(group) if f.metadata.get("on_resume") == kind}


# ------------------------------------------------------------------------------------------------ checks


def _check_numbers(settings: Any, *, at_least: dict[str, float] | None = None, shares: list[str] | None = None):
    for name, low in (at_least or {}).items():
        value = getattr(settings, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"`{name}` must be {low} or more, got {value}.")
    for name in shares or []:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"`{name}` must be from 0 to 1, got {getattr(settings, name)}.")
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}.")


def _check_sizes(settings: Any, *names: str) -> None:
    """Turn a single number into a square."""
    for name in names:
        value = getattr(settings, name)
        value = [value] if isinstance(value, int) else value
        value = [*value, *value] if value is not None and len(value) == 1 else value
        setattr(settings, name, value)
        if value is not None and (len(value) != 2 or min(value) < 1):
            raise ValueError(f"`{name}` must be height and width in pixels, got {value}.")


def _check_one_of(settings: Any, name: str, *allowed: str | None) -> None:
    value, known = getattr(settings, name), ", ".join(repr(one) for one in allowed if one is not None)
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")


def _check_used(settings: Any, other: str, wanted: Any, *names: str) -> None:
    """Reject a setting that would be ignored. Defaults are accepted: a run's config.yaml contains every field."""
    for name in names:
        value, declared = getattr(settings, name), type(settings).__dataclass_fields__[name]
        default = declared.default if declared.default is not MISSING else declared.default_factory()
        if value != default and getattr(settings, other) != wanted:
            raise ValueError(
                f"`{name}` {value} would be ignored: it goes with `{other}={wanted}`, and `{other}` is "
                f"{getattr(settings, other)}. Remove `{name}`, or change `{other}`."
            )
