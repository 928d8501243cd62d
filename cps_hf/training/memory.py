"""Handles batches that do not fit into memory: the error message, and the search for a size that fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..config import CPSConfig
from ..modeling.input_size import check_train_batch

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


def advice(args: CPSConfig, crop_size: Sequence[int], device: torch.device, step: int, *, unlabeled: bool) -> str:
    """The text of an out-of-memory error: the batch, the crop, and the settings that reduce memory."""
    used = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = f" ({torch.cuda.memory_allocated(device) / 2**30:.1f} GiB in use by this process, {free / 2**30:.1f} "
        used += f"of {total / 2**30:.1f} GiB free)"
    images = f"{args.per_device_train_batch_size} labeled"
    images += f" + {args.unlabeled_batch_size} unlabeled" if unlabeled else ""
    height, width = crop_size
    smaller = "; or let `auto_find_batch_size` do that" if not args.auto_find_batch_size else ""
    return (
        f"Out of memory on {device} at step {step}{used}: each process takes {images} images of {height} x {width} "
        "pixels at a time. Options, least change first: `gradient_checkpointing`; `mixed_precision=bf16`; half "
        "the `per_device_train_batch_size` (and `per_device_unlabeled_batch_size`) with twice the "
        f"`gradient_accumulation_steps`, which keeps the global batch{smaller}; a smaller `crop_size`; a smaller "
        "model. If it is in the evaluation: `per_device_eval_batch_size`, or `eval_mode=sliding` with an "
        "`eval_crop_size`."
    )


def fit_batch(
    args: CPSConfig,
    crop_size: Sequence[int],
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    first_micro_batch: Callable[[], tuple[Any, Any]],
    *,
    unlabeled: bool,
) -> None:
    """Halve the per-process batch and double the accumulation until a step fits. The global batch and its images stay
    the same. Called by all processes, which agree on the result; `args` are changed.

    Like Accelerate's `find_executable_batch_size`, this tries sizes. Before the first step, one forward and backward
    pass of the first micro-batch is tried, with memory reserved for the optimizer's states. It leaves no trace: random
    states, gradients and batch norm's statistics are restored.

    Args:
        module: the training module.
        optimizer: the optimizer prepared by Accelerate.
        first_micro_batch: returns the labeled and the unlabeled batch of the sizes in `args`, on the device.
        unlabeled: whether the objective uses unlabeled images.

    Raises:
        ValueError: a batch does not fit and cannot be halved.
    """
    while True:
        fits = torch.tensor(int(_step_fits(accelerator, module, optimizer, first_micro_batch)))
        if accelerator.reduce(fits.to(accelerator.device), "sum").item() == accelerator.num_processes:
            return
        sizes = {"per_device_train_batch_size": args.per_device_train_batch_size}
        if unlabeled:
            sizes["per_device_unlabeled_batch_size"] = args.unlabeled_batch_size
        for name, size in sizes.items():
            if size % 2:
                raise ValueError(
                    f"`auto_find_batch_size`: `{name}={size}` does not fit into memory and cannot be halved. "
                    + advice(args, crop_size, accelerator.device, 1, unlabeled=unlabeled)
                )
            for model in (branch.model for branch in module.branches):
                check_train_batch(model, size // 2, *crop_size)
            setattr(args, name, size // 2)
        args.gradient_accumulation_steps *= 2
        halved = ", ".join(f"`{name}={size // 2}`" for name, size in sizes.items())
        logger.warning(
            "Out of memory: continuing with %s, `gradient_accumulation_steps=%d`; the global batch is the same.",
            halved,
            args.gradient_accumulation_steps,
        )


def _step_fits(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    first_micro_batch: Callable[[], tuple[Any, Any]],
) -> bool:
    device = accelerator.device
    buffers = [buffer.clone() for buffer in module.buffers()]
    was_training = module.training
    module.train()
    try:
        # Not through DDP: a process that runs out of memory would leave the others waiting.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), accelerator.autocast():
            count = states_per_parameter(optimizer)
            held = [torch.empty_like(p) for p in _stateless(optimizer) for _ in range(count)]
            module(*first_micro_batch(), torch.ones((), device=device)).loss.backward()
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


def _stateless(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters whose optimizer states are created at the first step."""
    return [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]


def states_per_parameter(optimizer: torch.optim.Optimizer) -> int:
    """AdamW keeps two, SGD with momentum one; for a user's optimizer, two are assumed."""
    return 1 if isinstance(getattr(optimizer, "optimizer", None), torch.optim.SGD) else 2
