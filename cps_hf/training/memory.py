"""When a batch does not fit into memory: what to say, and how to find one that does."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from ..config import CPSConfig
from ..modeling.input_size import check_train_batch
from . import batches
from . import setup as assembly

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU's memory or the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


def advice(args: CPSConfig, device: torch.device, step: int, *, unlabeled: bool) -> str:
    """What an out-of-memory error says: the batch, the crop, and the settings that reduce memory."""
    used = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = f" ({torch.cuda.memory_allocated(device) / 2**30:.1f} GiB in use by this process, {free / 2**30:.1f} "
        used += f"of {total / 2**30:.1f} GiB free)"
    images = f"{args.per_device_train_batch_size} labeled"
    images += f" + {args.unlabeled_batch_size} unlabeled" if unlabeled else ""
    height, width = args.crop_size
    smaller = "; or let `auto_find_batch_size` do that" if not args.auto_find_batch_size else ""
    return (
        f"Out of memory on {device} at step {step}{used}: each process takes {images} images of {height} x {width} "
        "pixels at a time. In the order of what changes least: `gradient_checkpointing`; `mixed_precision=bf16`; half "
        "the `per_device_train_batch_size` (and `per_device_unlabeled_batch_size`) with twice the "
        f"`gradient_accumulation_steps`, which keeps the global batch{smaller}; a smaller `crop_size`; a smaller "
        "model. If it is in the evaluation: `per_device_eval_batch_size`, or `eval_mode=sliding` with an "
        "`eval_crop_size`."
    )


def fit_batch(trainer: Any) -> None:
    """Halve the batch a process and double the accumulation until a step fits: the global batch, and which images
    are in it, stay the same. Called by all processes, which end with the same numbers; `trainer.args` are changed.

    As with Accelerate's `find_executable_batch_size`, a size is found by trying. One forward and backward pass of
    the first micro-batch is tried before the first step, with place held for the optimizer's states, and leaves no
    trace: random states, gradients and batch norm's statistics are as before.

    Raises:
        ValueError: a batch that does not fit cannot be halved.
    """
    args, accelerator = trainer.args, trainer.accelerator
    while True:
        fits = torch.tensor(int(_step_fits(trainer)), device=accelerator.device)
        if accelerator.reduce(fits, "sum").item() == accelerator.num_processes:
            return
        sizes = {"per_device_train_batch_size": args.per_device_train_batch_size}
        if trainer.objective.views:
            sizes["per_device_unlabeled_batch_size"] = args.unlabeled_batch_size
        for name, size in sizes.items():
            if size % 2:
                raise ValueError(
                    f"`auto_find_batch_size`: `{name}={size}` does not fit into memory and cannot be halved. "
                    + advice(args, accelerator.device, trainer.state.global_step + 1, unlabeled=len(sizes) == 2)
                )
            for model in trainer.models:
                check_train_batch(model, size // 2, *args.crop_size)
            setattr(args, name, size // 2)
        args.gradient_accumulation_steps *= 2
        accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
        halved = ", ".join(f"`{name}={size // 2}`" for name, size in sizes.items())
        logger.warning(
            "Out of memory: going on with %s, `gradient_accumulation_steps=%d`; the global batch is the same.",
            halved,
            args.gradient_accumulation_steps,
        )


def _step_fits(trainer: Any) -> bool:
    module, device = trainer.module, trainer.device
    streams = assembly.train_streams(
        trainer.args,
        trainer.accelerator,
        trainer.objective,
        trainer.train_dataset,
        trainer.unlabeled_dataset,
        {},
        num_labels=len(trainer.id2label),
    )
    buffers = [buffer.clone() for buffer in module.buffers()]
    was_training = module.training
    module.train()
    try:
        # Not through DDP: a process that runs out of memory would leave the others waiting.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), trainer.accelerator.autocast():
            held = [torch.empty_like(p) for p in _stateless(trainer) for _ in range(_states_a_parameter(trainer))]
            batch = [
                None if s is None else batches.to_device(next(iter(s)), device, trainer.image_mean, trainer.image_std)
                for s in streams
            ]
            module(*batch, torch.ones((), device=device)).loss.backward()
            del held
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        module.zero_grad(set_to_none=True)
        module.train(was_training)
        with torch.no_grad():
            for buffer, kept in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(kept)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _stateless(trainer: Any) -> list[torch.Tensor]:
    """The parameters whose optimizer states are made at the first step."""
    state = trainer.optimizer.state
    return [p for group in trainer.optimizer.param_groups for p in group["params"] if p not in state]


def _states_a_parameter(trainer: Any) -> int:
    """AdamW keeps two, SGD with momentum one; an optimizer of the user's own is taken to keep two."""
    return 1 if isinstance(getattr(trainer.optimizer, "optimizer", None), torch.optim.SGD) else 2
