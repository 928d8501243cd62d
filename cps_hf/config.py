"""What the loop needs, with Hugging Face's spellings. What a method needs stands in its objective."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class CPSConfig:
    """The settings of `CPSTrainer`. Every field is honoured; none is read from the environment.

    Defaults are those of the CPS release for VOC at 512 x 512 in terms of a mean gradient (its nominal learning rate
    0.01 is divided by four processes, and its weight decay 1e-4 multiplied by them). NOTE where they differ: gradients
    are not accumulated, images are evaluated whole, and nothing is read from ImageNet unless the models bring it.

    Output and resuming
        output_dir: where everything is written.
        overwrite_output_dir: start anew in a folder that holds a run, which is removed.
        resume_from_checkpoint: a checkpoint's folder, true for the newest whole one in `output_dir`, or "auto" for
            that one or, where there is none, a new run.
        resume_force: go on although settings, data or models are not those of the checkpoint.

    Length and batches
        max_steps: optimizer steps.
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
        warmup_steps: steps of linear warm-up.
        max_skipped_steps: leave out so many steps whose loss or gradient is not finite; one more is an error.

    Augmentation
        crop_size: height and width in pixels; one number: both.
        random_scale: the factors to choose from, or the two ends of a range.
        random_scale_mode: "choice" or "range".
        horizontal_flip: probability.
        resize_antialias: low-pass filter images that are shrunk (the release does not).
        color_jitter: probability in a strong view.
        grayscale: probability in a strong view.
        gaussian_blur: probability in a strong view.
        image_mean: what images are normalised with, and what the exported image processor says.
        image_std: as `image_mean`.

    Models (when they are given as an id, a path or a config)
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
        gradient_checkpointing: less memory for a second forward pass.
        channels_last: keep weights, and so feature maps, with the channels innermost, which convolutions in half
            precision on GPUs want.
        torch_compile: compile each network for training; evaluation runs as it is, since its images differ in size.
        torch_compile_backend: of torch.compile. Only with `torch_compile`.
        torch_compile_mode: of torch.compile, e.g. "max-autotune". Only with `torch_compile`.
        sync_batchnorm: batch norm over all processes, on GPUs with more than one process.

    Evaluation
        eval_steps: evaluate every so many steps; none: at the last step only, where it always runs.
        per_device_eval_batch_size: whole images (of one size) or windows a forward pass.
        eval_mode: "whole" image, or "sliding" windows.
        eval_crop_size: the window; none: `crop_size`. Only with `eval_mode` "sliding".
        eval_stride: the window's step in pixels; none: two thirds of the window. Only with `eval_mode` "sliding".
        metric_for_best_model: what the best branch and the best step are chosen by.
        agreement_images: how many fixed unlabeled images the branches' agreement is measured on; 0: none.

    Logging and saving
        logging_steps: log every so many steps.
        logging_first_step: log the first step too.
        report_to: trackers of Accelerate, e.g. tensorboard wandb trackio.
        run_name: the trackers' name of this run; none: the output folder's.
        disable_tqdm: no progress bar.
        save_steps: a checkpoint every so many steps and at the last one; none: at the last one only.
        save_total_limit: keep only the newest so many checkpoints, and that of the best step; none: all.
        num_pictures: evaluation images drawn into `output_dir/pictures`; 0: none.

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

    Machine
        seed: of everything random.
        full_determinism: deterministic algorithms on GPUs too, at a cost in speed (docs/determinism.md).
        mixed_precision: "no", "bf16" or "fp16"; none: what `accelerate launch` was told.
        dataloader_num_workers: worker processes a stream.
        dataloader_prefetch_factor: batches each worker prepares ahead.
        reshuffle_unlabeled: a fresh order of the unlabeled images each pass. The CPS release never changes it.
        shuffle_buffer_size: rows that a streamed data set is shuffled among.

    Bad samples
        skip_bad_samples: replace a training sample that cannot be read, and list it in `output_dir/bad_samples.jsonl`;
            an evaluation image that cannot be read stays an error.
        max_bad_sample_share: a run with a larger share of bad samples stops.

    Provenance, for results.json and the model card; nothing else reads it
        dataset_name: what the data set is called.
        partition_name: which images are labeled, by name.
        partition_sha256: the partition's hash.
    """

    output_dir: str = "outputs/cps"
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str | None = None
    resume_force: bool = False

    max_steps: int = 40_000
    per_device_train_batch_size: int = 8
    per_device_unlabeled_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    auto_find_batch_size: bool = False
    num_processes: int | None = None
    ddp_timeout: int = 1800

    optim: str = "sgd"
    optim_fused: bool = True
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
    max_skipped_steps: int = 0

    crop_size: list[int] = field(default_factory=lambda: [512, 512])
    random_scale: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0, 1.5, 1.75, 2.0])
    random_scale_mode: str = "choice"
    horizontal_flip: float = 0.5
    resize_antialias: bool = False
    color_jitter: float = 0.8
    grayscale: float = 0.2
    gaussian_blur: float = 0.5
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    num_branches: int | None = None
    reinit_heads: bool = False
    backbone: str | list[str] | None = None
    dtype: str = "float32"
    attn_implementation: dict[str, str] | str | None = None
    trust_remote_code: bool = False
    freeze_backbone: bool = False
    freeze_norms: bool = False
    gradient_checkpointing: bool = False
    channels_last: bool = False
    torch_compile: bool = False
    torch_compile_backend: str = "inductor"
    torch_compile_mode: str | None = None
    sync_batchnorm: bool = True

    eval_steps: int | None = None
    per_device_eval_batch_size: int = 1
    eval_mode: str = "whole"
    eval_crop_size: list[int] | None = None
    eval_stride: list[int] | None = None
    metric_for_best_model: str = "mean_iou"
    agreement_images: int = 16

    logging_steps: int = 50
    logging_first_step: bool = True
    report_to: list[str] = field(default_factory=list)
    run_name: str | None = None
    disable_tqdm: bool = False
    save_steps: int | None = None
    save_total_limit: int | None = None
    num_pictures: int = 4

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_strategy: str = "end"
    hub_private_repo: bool | None = None
    hub_token: str | None = field(default=None, repr=False)
    hub_revision: str | None = None
    hub_license: str | None = None
    hub_timeout: float = 1800
    push_pictures: bool = False

    seed: int = 42
    full_determinism: bool = False
    mixed_precision: str | None = None
    dataloader_num_workers: int = 2
    dataloader_prefetch_factor: int = 2
    reshuffle_unlabeled: bool = True
    shuffle_buffer_size: int = 1000

    skip_bad_samples: bool = False
    max_bad_sample_share: float = 0.05

    dataset_name: str | None = None
    partition_name: str | None = None
    partition_sha256: str | None = None

    def __post_init__(self):
        for name in ("crop_size", "eval_crop_size", "eval_stride"):  # one number: a square
            value = getattr(self, name)
            value = [value] if isinstance(value, int) else value
            setattr(self, name, [*value, *value] if value is not None and len(value) == 1 else value)
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                raise ValueError(f"`{name}` must be a number of at least {low}, got {value}.")
        for name in ("head_learning_rate_factor", "backbone_learning_rate_factor"):
            if getattr(self, name) == 0:
                raise ValueError(f"`{name}` must be above 0, got 0. To freeze the backbone: `freeze_backbone`.")
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be in (0, 1], got {self.layer_decay}; none: all layers alike.")
        for name in ("horizontal_flip", "color_jitter", "grayscale", "gaussian_blur", "max_bad_sample_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        for name, allowed in _ONE_OF.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {[a for a in allowed if a is not None]}, got {value!r}.")
        for name in ("crop_size", "eval_crop_size", "eval_stride"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or min(value) < 1):
                raise ValueError(f"`{name}` must be height and width in pixels, got {value}.")
        window = self.eval_crop_size or self.crop_size
        if self.eval_stride is not None and (self.eval_stride[0] > window[0] or self.eval_stride[1] > window[1]):
            raise ValueError(f"`eval_stride` {self.eval_stride} exceeds the window {window}: pixels would be missed.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"`{name}` must be three numbers, one a colour, got {getattr(self, name)}.")
        if min(self.image_std) <= 0:
            raise ValueError(f"`image_std` must be positive, got {self.image_std}.")
        self._refuse_idle()

        if isinstance(self.backbone, list | tuple):
            self.backbone = ["none" if entry is None else entry for entry in self.backbone]

    def _refuse_idle(self) -> None:
        """What would be read by nothing must not be given. (A run's config.yaml holds every field: a default may.)"""
        for name, (other, wanted) in _ONLY_WITH.items():
            value, default = getattr(self, name), CPSConfig.__dataclass_fields__[name].default
            if value != default and getattr(self, other) != wanted:
                raise ValueError(
                    f"`{name}` {value} would be ignored: it goes with `{other}={wanted}`, and `{other}` is "
                    f"{getattr(self, other)}. Leave out `{name}`, or set `{other}`."
                )

    # What transformers' callbacks (DefaultFlowCallback, EarlyStoppingCallback, a user's own) read from their `args`.

    logging_strategy = eval_strategy = save_strategy = "steps"
    eval_delay = 0
    greater_is_better = True
    load_best_model_at_end = False

    def backbone_source(self, index: int) -> str | None:
        """The weights that the backbone of branch `index` starts with; None: those that its model has."""
        source = self.backbone[index] if isinstance(self.backbone, list) else self.backbone
        return None if source == "none" else source

    def to_dict(self) -> dict[str, Any]:
        """All settings that may be written down: without the token."""
        return {name: value for name, value in asdict(self).items() if name != "hub_token"}

    @property
    def unlabeled_batch_size(self) -> int:
        """Unlabeled images a process and micro-batch."""
        return self.per_device_unlabeled_batch_size or self.per_device_train_batch_size


_AT_LEAST = {
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_unlabeled_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_processes": 1,
    "ddp_timeout": 1,
    "num_branches": 1,
    "learning_rate": 0,
    "head_learning_rate_factor": 0,
    "backbone_learning_rate_factor": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "max_skipped_steps": 0,
    "eval_steps": 1,
    "agreement_images": 0,
    "logging_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "num_pictures": 0,
    "hub_timeout": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "shuffle_buffer_size": 1,
}
_ONLY_WITH = {
    "momentum": ("optim", "sgd"),
    "adam_beta1": ("optim", "adamw"),
    "adam_beta2": ("optim", "adamw"),
    "adam_epsilon": ("optim", "adamw"),
    "torch_compile_backend": ("torch_compile", True),
    "torch_compile_mode": ("torch_compile", True),
    "eval_crop_size": ("eval_mode", "sliding"),
    "eval_stride": ("eval_mode", "sliding"),
}
_ONE_OF = {
    "optim": ("sgd", "adamw"),
    "dtype": ("float32", "bfloat16", "float16"),
    "random_scale_mode": ("choice", "range"),
    "eval_mode": ("whole", "sliding"),
    "metric_for_best_model": ("mean_iou", "mean_accuracy", "overall_accuracy"),
    "hub_strategy": ("end", "every_save", "checkpoint"),
    "mixed_precision": (None, "no", "bf16", "fp16"),
}
