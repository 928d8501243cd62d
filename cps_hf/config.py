"""Settings, in groups, with Hugging Face's spellings: what the loop needs is `CPSConfig`; augmentation, the models'
build, evaluation, the Hub and provenance are groups of their own. What a method needs stands in its objective.

A field says by its kind whether it may differ when a run is resumed:

- a plain one decides what a step does: another value is another run, and resuming is an error;
- `free`: it may differ;
- `rounding`: it may differ, but sums are rounded otherwise, or each process sees another part of a step's samples;
- `choice`: it decides which branch and step is best, which is then found anew.
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
    """A dataclass of keyword arguments, whose errors for unknown ones name the nearest, or the group that has it."""
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
    """A number is a number and not its text: "1e-3" and "false" would be compared, or be true.

    Args:
        name: the field's, for errors. expected: its annotation. A list may be given as its only item.

    Raises:
        TypeError: the value is of another kind.
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
        hint = " Leave out the quotes." if re.fullmatch(r"[-+.\deE_ ]+", value) else ""
    raise TypeError(f"`{name}` must be {wanted}, got {value!r} of the type {type(value).__name__}.{hint}")


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
    """The settings of `CPSTrainer`'s loop. Every field is honoured; none is read from the environment.

    Defaults are those of the CPS release for VOC in terms of a mean gradient (its nominal learning rate 0.01 is
    divided by four processes, and its weight decay 1e-4 multiplied by them). NOTE where they differ: gradients are not
    accumulated.

    Output and resuming
        output_dir: where everything is written.
        overwrite_output_dir: start anew in a folder that holds a run, which is removed.
        resume_from_checkpoint: a checkpoint's folder, true for the newest whole one in `output_dir`, or "auto" for
            that one or, where there is none, a new run.
        resume_force: go on although settings, data or models are not those of the checkpoint.

    Length and batches
        max_steps: optimizer steps, of both stages where there are two.
        pretrain_steps: the first so many steps train each branch on the labels alone, with a schedule of their own;
            then the method starts from these branches, with a fresh optimizer and schedule. Both stages are scored,
            and the supervised branches are exported as `supervised_<i>`. None: one stage.
        per_device_train_batch_size: labeled images a process and micro-batch.
        per_device_unlabeled_batch_size: unlabeled ones; none: as many as labeled ones.
        gradient_accumulation_steps: micro-batches an optimizer step.
        auto_find_batch_size: where a batch does not fit into memory, halve it and double the accumulation until it
            does, before the first step; the global batch stays.
        num_processes: how many processes there must be; any other count is an error. None: any.
        ddp_timeout: seconds that a process waits for the others before it ends with an error.

    Optimizer and schedule
        optim: "sgd" or "adamw".
        optim_fused: torch's fused kernel of it: the same numbers to rounding in less time (benchmarks/LOG.md).
        learning_rate: of the backbone and, times its factor, the head.
        head_learning_rate_factor: the decode head's learning rate over `learning_rate`.
        backbone_learning_rate_factor: the backbone's learning rate over `learning_rate`.
        layer_decay: each layer of the backbone learns at this share of the next one's rate; none: all alike.
        weight_decay: none on biases and norms.
        momentum: of "sgd". Only with `optim` "sgd".
        adam_beta1: of "adamw". Only with `optim` "adamw".
        adam_beta2: of "adamw". Only with `optim` "adamw".
        adam_epsilon: of "adamw". Only with `optim` "adamw".
        max_grad_norm: clip the gradient of each branch to this norm; none, or as in transformers 0: no clipping.
        lr_scheduler_type: any of transformers' schedules; "polynomial" is (1 - step / max_steps) ** power.
        lr_scheduler_kwargs: the schedule's own arguments, as JSON on the command line.
        warmup_steps: steps of linear warm-up, of each stage.
        second_stage_learning_rate_factor: the learning rates of the second stage over those of the first; 0.5 is a
            good start. Only with `pretrain_steps`.
        max_skipped_steps: leave out so many steps whose loss or gradient is not finite; one more is an error.
        ema_decay: keep an average of each branch over the steps, this much of the old one a step (0.996, say) and at
            the start less, 1 - 1 / (step + 1); scored and exported as `branch_<i>_average`. None: no averages.

    Unlabeled images
        unlabeled_weight: a factor on the method's unlabeled term, beside the method's own weight. 1: as the method has
            it. "auto": 1 at first, and lowered where evaluations show that unlabeled images do harm
            (docs/unlabeled_weight.md); needs `eval_steps`.

    Logging and saving
        logging_steps: log the first step, and every so many.
        report_to: trackers of Accelerate, e.g. tensorboard wandb trackio.
        run_name: the trackers' name of this run; none: the output folder's.
        disable_tqdm: no progress bar; each log is a line, as it is where the output is no terminal.
        save_steps: a checkpoint every so many steps and at the last one; none: at the last one only.
        save_total_limit: keep only the newest so many checkpoints, and that of the best step; none: all.
        eval_steps: evaluate every so many steps; none: at the last step only, where it always runs.
        early_stopping_patience: stop after so many evaluations in a row without a better score; with `pretrain_steps`
            those of the second stage count. Only with `eval_steps`. None: train to `max_steps`.
        metric_for_best_model: what the best branch and the best step are chosen by.
        agreement_images: how many fixed unlabeled images the branches' agreement is measured on; 0: none.

    Machine
        seed: of everything random.
        full_determinism: deterministic algorithms on GPUs too, at a cost in speed (docs/determinism.md).
        mixed_precision: "no", "bf16" or "fp16"; none: what `accelerate launch` was told.
        gradient_checkpointing: less memory for a second forward pass.
        channels_last: keep weights, and so feature maps, with the channels innermost, which convolutions in half
            precision on GPUs want.
        torch_compile: compile each network for training; evaluation runs as it is, since its images differ in size.
        torch_compile_backend: of torch.compile. Only with `torch_compile`.
        torch_compile_mode: of torch.compile, e.g. "max-autotune". Only with `torch_compile`.
        sync_batchnorm: batch norm over all processes, on GPUs with more than one process.
        dataloader_num_workers: worker processes a stream.
        dataloader_prefetch_factor: batches each worker prepares ahead.
        reshuffle_unlabeled: a fresh order of the unlabeled images each pass. The CPS release never changes it.
        shuffle_buffer_size: rows that a streamed data set is shuffled among.

    Bad samples
        skip_bad_samples: replace a training sample that cannot be read, and list it in `output_dir/bad_samples.jsonl`;
            an evaluation image that cannot be read stays an error.
        max_bad_sample_share: a run with a larger share of bad samples stops.
        check_labels_seconds: how long the labels of `train_dataset` and `eval_dataset` are looked at before step 1, at
            most; of a stream its first ones; 0: not at all, and classes that never occur are not named.
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
                f"`early_stopping_patience` {self.early_stopping_patience} counts evaluations, and without "
                "`eval_steps` there is one, at the last step. Set `eval_steps`, or leave it out."
            )
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}; none: no averages.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be in (0, 1], got {self.layer_decay}; none: all layers alike.")
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
                f"`pretrain_steps` {self.pretrain_steps} are the first ones of `max_steps` {self.max_steps}, and none "
                "is left for the method. Give more `max_steps`, or train the supervised objective."
            )
        if factor <= 0:
            raise ValueError(f"`second_stage_learning_rate_factor` must be above 0, got {factor}.")
        if factor != 1 and not self.pretrain_steps:
            raise ValueError(
                f"`second_stage_learning_rate_factor` {factor} would be ignored: there is a second stage with "
                "`pretrain_steps` alone. Set `pretrain_steps`, or leave it out."
            )

    def _check_unlabeled_weight(self) -> None:
        weight = self.unlabeled_weight
        if weight == "auto":
            if self.eval_steps is None:
                raise ValueError(
                    '`unlabeled_weight="auto"` goes by evaluations during training, and `eval_steps` is None. Set '
                    "`eval_steps`, to a tenth of `max_steps`, say."
                )
        elif isinstance(weight, str) or not 0 <= weight < math.inf:
            raise ValueError(f'`unlabeled_weight` must be a number of at least 0 or "auto", got {weight!r}.')

    # What transformers' callbacks (DefaultFlowCallback, EarlyStoppingCallback, a user's own) read from their `args`.

    logging_strategy = eval_strategy = save_strategy = "steps"
    logging_first_step = True
    eval_delay = 0
    greater_is_better = True
    load_best_model_at_end = False

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as transformers' arguments give them to a tracker's callback."""
        return asdict(self)

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """`to_dict` for what shows plain values only: others as text."""
        return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self.to_dict().items()}

    @property
    def unlabeled_batch_size(self) -> int:
        """Unlabeled images per process and micro-batch."""
        return self.per_device_unlabeled_batch_size or self.per_device_train_batch_size


@_settings
class AugmentationConfig:
    """How training images become batches: the random geometry that all views of a sample share, and what the strong
    views add to it.

    Defaults are those of the CPS release for VOC (flip, then scale, then a crop that is padded where the image is
    smaller), and of FixMatch and UniMatch for the strong views.

    Augmentation
        crop_size: height and width in pixels; one number: both.
        random_scale: the factors to choose from, or the two ends of a range.
        random_scale_mode: "choice" or "range".
        horizontal_flip: probability.
        resize_antialias: low-pass filter images that are shrunk (the release does not).
        color_jitter: probability in a strong view.
        grayscale: probability in a strong view.
        gaussian_blur: probability in a strong view.
        labeled_color_jitter: the probability with which a labeled image is shown as a strong view: jitter, grey and
            blur with the three probabilities above. 0, as in the published recipes: never.
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
            raise ValueError(f"`random_scale` must hold positive factors, got {factors}.")
        if self.random_scale_mode == "range" and not (len(factors) == 2 and factors[0] <= factors[1]):
            raise ValueError(
                f'`random_scale` must be two factors, low <= high, with `random_scale_mode="range"`, got {factors}.'
            )


@_settings
class ModelConfig:
    """How branches are made of an id, a path or a configuration, and prepared.

    Models
        num_branches: how many, where one id or config is given; none: two.
        reinit_heads: draw the decode heads anew, also when the checkpoint has them.
        backbone: weights for the backbones: a Hub id, a folder of a transformers backbone, a timm name or file; for
            all branches, or one a branch, "none" for a branch that gets none.
        dtype: of the parameters: "float32", "bfloat16" or "float16"; `mixed_precision` is usually what you want.
        attn_implementation: "eager", "sdpa" or "flash_attention_2", or for the backbone inside a model alone
            {"backbone_config": "sdpa"}, as JSON on the command line; none: the library's choice.
        trust_remote_code: run code that comes with a checkpoint.
        freeze_backbone: train the decode heads alone.
        freeze_norms: keep the backbone's norm layers as they are.
        lora_rank: train low-rank adapters (LoRA) of this rank in the backbone, which is frozen itself, and the heads
            in full; an exported branch has them merged into its weights. Needs peft (the extra `lora`). If `None`, no
            adapters.
        lora_alpha: the adapters' scale times `lora_rank`; none: twice `lora_rank`. Only with `lora_rank`.
        lora_dropout: on the adapters' input, while training. Only with `lora_rank`.
        lora_target_modules: the layers of the backbone that are adapted, by the ends of their names; none: all its
            linear layers. Only with `lora_rank`.
        norm_momentum: how much of a batch's statistics the batch norms take into their running ones; less suits few
            images a batch. None: as each layer has it, mostly 0.1.
        image_mean: what images, in [0, 1], are normalised with, three numbers; none: what the pretrained network was
            fed with (its image processor or timm says), else ImageNet's. The exported image processor says the same.
        image_std: as `image_mean`.
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
            raise ValueError(f"`norm_momentum` must be in (0, 1], got {self.norm_momentum}; none: as the layers are.")
        _check_one_of(self, "dtype", "float32", "bfloat16", "float16")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise ValueError(f"`{name}` must be three numbers, one a colour, got {value}.")
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
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        if self.lora_target_modules is not None:
            given = self.lora_target_modules
            self.lora_target_modules = [given] if isinstance(given, str) else [*given]
            if not self.lora_target_modules:
                raise ValueError("`lora_target_modules` is empty: name layers, or leave it out for all linear ones.")

    def backbone_source(self, index: int) -> str | None:
        """The weights that the backbone of branch `index` starts with; None: those that its model has."""
        source = self.backbone[index] if isinstance(self.backbone, list) else self.backbone
        return None if source == "none" else source


@_settings
class EvaluationConfig:
    """How branches look at images that are not trained on.

    Evaluation
        per_device_eval_batch_size: whole images (of one size) or windows a forward pass.
        eval_mode: "whole" image, or "sliding" windows.
        eval_shrink: average so many by so many pixels before a branch sees them, as where `random_scale` is around one
            half (2) or a third (3); an exported branch then does it by itself. For DeepLabV3+, on large photographs.
            Only with `eval_mode` "whole".
        eval_crop_size: the window; none: `crop_size`. Only with `eval_mode` "sliding".
        eval_stride: the window's step in pixels; none: two thirds of the window. Only with `eval_mode` "sliding".
        num_pictures: evaluation images drawn into `output_dir/pictures`; 0: none.
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
        """Windows must not leave gaps.

        Args:
            crop_size: of training, which is the window where `eval_crop_size` is none.

        Raises:
            ValueError: they would.
        """
        window, stride = self.eval_crop_size or crop_size, self.eval_stride
        if stride is not None and (stride[0] > window[0] or stride[1] > window[1]):
            raise ValueError(f"`eval_stride` {stride} exceeds the window {window}: pixels would be missed.")


@_settings
class HubConfig:
    """Where a run's branches are pushed to, and when.

    The Hub
        push_to_hub: push the best branch to the Hub. A token that may write is needed from the start.
        hub_model_id: "user/name" or "name"; none: the output folder's name.
        hub_strategy: "end" of the run; "every_save" pushes at every checkpoint too, while training goes on;
            "checkpoint" pushes the checkpoint as well, as `last-checkpoint/` beside the branch.
        hub_private_repo: of a new repository; none: as the user's settings on the Hub say. True refuses a public one.
        hub_token: none: the one of `hf auth login` or HF_TOKEN. It is kept out of every file and log.
        hub_revision: the repository's branch that is pushed to, made if missing; none: main.
        hub_license: an identifier of the Hub for the model card; none: the base model's, else "unknown".
        hub_timeout: seconds that the end of the run waits for pushes before it leaves them for later.
        push_pictures: let the card show images of `eval_dataset`; none of them leaves this machine otherwise. (Drawn
            scenes are always shown.)
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
    """What the data are called, for results.json and the model card; nothing else reads it.

    Provenance
        dataset_name: what the data set is called.
        partition_name: which images are labeled, by name.
        partition_sha256: the partition's hash.
    """

    dataset_name: str | None = free(None)
    partition_name: str | None = free(None)
    partition_sha256: str | None = None


GROUPS = (CPSConfig, AugmentationConfig, ModelConfig, EvaluationConfig, HubConfig, Provenance)
"""No two of them have a field of the same name: a command line and a YAML file hold all of them side by side."""


RETIRED = ("logging_first_step",)
"""Fields of earlier versions, which their config.yaml holds and which nothing reads any more."""


def flat(*groups: Any) -> dict[str, Any]:
    """All settings that may be written down, by field name: without the token."""
    values = {name: value for group in groups for name, value in asdict(group).items()}
    values.pop("hub_token", None)
    return values


def names_of_kind(kind: str | None, *groups: Any) -> set[str]:
    """The fields of some groups that may differ on resuming in this way: "free", "rounding", "choice"; none: plain."""
    return {f.name for group in groups for f in fields(group) if f.metadata.get("on_resume") == kind}


# ------------------------------------------------------------------------------------------------ checks


def _check_numbers(settings: Any, *, at_least: dict[str, float] | None = None, shares: list[str] | None = None):
    for name, low in (at_least or {}).items():
        value = getattr(settings, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"`{name}` must be a number of at least {low}, got {value}.")
    for name in shares or []:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {getattr(settings, name)}.")
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}.")


def _check_sizes(settings: Any, *names: str) -> None:
    """One number becomes a square."""
    for name in names:
        value = getattr(settings, name)
        value = [value] if isinstance(value, int) else value
        value = [*value, *value] if value is not None and len(value) == 1 else value
        setattr(settings, name, value)
        if value is not None and (len(value) != 2 or min(value) < 1):
            raise ValueError(f"`{name}` must be height and width in pixels, got {value}.")


def _check_one_of(settings: Any, name: str, *allowed: str | None) -> None:
    value = getattr(settings, name)
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {[a for a in allowed if a is not None]}, got {value!r}.")


def _check_used(settings: Any, other: str, wanted: Any, *names: str) -> None:
    """What nothing would read must not be given. (A run's config.yaml holds every field: a default may be.)"""
    for name in names:
        value, declared = getattr(settings, name), type(settings).__dataclass_fields__[name]
        default = declared.default if declared.default is not MISSING else declared.default_factory()
        if value != default and getattr(settings, other) != wanted:
            raise ValueError(
                f"`{name}` {value} would be ignored: it goes with `{other}={wanted}`, and `{other}` is "
                f"{getattr(settings, other)}. Leave out `{name}`, or set `{other}`."
            )
