"""FSDP2: weights, gradients and optimizer states sharded over the processes; and checks for unsupported engines.

The training module is one unit. Its weights are gathered for a forward and backward pass, and by `whole` for an
evaluation. Between steps each process only has its own shard.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..config import CPSConfig, ModelConfig

logger = logging.getLogger(__name__)

FILE = "examples/configs/accelerate/fsdp2.yaml"
_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


# ------------------------------------------------------------------------------------------------ unsupported setups


def reject_engines() -> None:
    """Reject launches for an engine that would replace the training loop, before Accelerate looks for it.

    Raises:
        ValueError: the launch is configured for DeepSpeed or Megatron-LM.
    """
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(f"This launch is configured for {engine} ({variable}=true). {_advice(engine)}")


def reject_unsupported(accelerator: Accelerator, args: CPSConfig, model_config: ModelConfig) -> None:
    """Reject configurations of Accelerate that cannot be trained with.

    Raises:
        ValueError: says what was found and what to do.
    """
    kind = accelerator.distributed_type
    engines = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}
    if kind in engines:
        raise ValueError(f"Accelerate is configured for {engines[kind]}. {_advice(engines[kind])}")
    if kind != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"This launch uses FSDP1, but CPSTrainer needs FSDP2: set `fsdp_version: 2`, as in {FILE}.")
    wraps = getattr(plugin.auto_wrap_policy, "__name__", None)
    wrong = {  # setting -> (whether it is set, what to do)
        "`fsdp_auto_wrap_policy` other than NO_WRAP": (
            wraps is not None,
            "branches are called several times per step and separately in evaluations, as one unit; set NO_WRAP",
        ),
        "`fsdp_cpu_ram_efficient_loading: true`": (
            plugin.cpu_ram_efficient_loading,
            "every process draws the same weights from the seed; set it to false",
        ),
        "`fsdp_offload_params: true`": (bool(getattr(plugin.cpu_offload, "pin_memory", False)), "set it to false"),
        "`fsdp_activation_checkpointing: true`": (
            plugin.activation_checkpointing,
            "set it to false and use the setting `gradient_checkpointing` instead",
        ),
        "`mixed_precision` fp16": (accelerator.mixed_precision == "fp16", 'use "bf16" or "no"'),
        "`channels_last`": (args.channels_last, "it only shards contiguous weights; remove the setting"),
        "`torch_compile`": (args.torch_compile, "this is untested; remove the setting, or launch with DDP"),
        "`lora_rank`": (
            model_config.lora_rank is not None,
            "adapters need little memory; launch with DDP, or remove the setting",
        ),
        "`auto_find_batch_size`": (
            args.auto_find_batch_size,
            "a process that runs out of memory would leave the others waiting; choose the batch size yourself",
        ),
    }
    for what, (asked, advice) in wrong.items():
        if asked:
            raise ValueError(f"FSDP2 does not support {what}: {advice}.")


def _advice(engine: str) -> str:
    return (
        f"CPSTrainer does not run under {engine}, whose engine would replace its loop, clipping and checkpoints. "
        "Launch with DDP (`accelerate launch --multi_gpu --num_processes N SCRIPT`) or, if weights and optimizer "
        f"states do not fit into a GPU's memory, with FSDP2 (`accelerate launch --config_file {FILE} SCRIPT`)."
    )


# ------------------------------------------------------------------------------------------------ sharding


def use_on_cpus(accelerator: Accelerator) -> None:
    """Enable FSDP on CPUs. Accelerate supports it on GPUs only and would silently use DDP; with gloo, it works
    there."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # In both places, as in Accelerate itself: its states are copied from the second.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Accelerate's `prepare`. A sharded module gets the precision that DDP would give it: weights stay in float32 and
    autocast decides per operation. Accelerate would cast weights, counts and statistics."""
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        forward = module.forward

        def with_autocast(*arguments):
            with accelerator.autocast():
                return forward(*arguments)

        module.forward = with_autocast
        _unfuse_sgd(optimizer, "torch has no fused ones for sharded weights")
    if accelerator.scaler is not None:
        _unfuse_sgd(optimizer, "torch's fused ones change the momentum in a step that fp16's scaler skips")
    return accelerator.prepare(module, optimizer)


def _unfuse_sgd(optimizer: torch.optim.Optimizer, why: str) -> None:
    if isinstance(optimizer, torch.optim.SGD) and any(group.get("fused") for group in optimizer.param_groups):
        for group in optimizer.param_groups:
            group["fused"] = False
        optimizer._step_supports_amp_scaling = False  # the scaler skips steps itself, not the kernel
        logger.info("SGD uses its plain steps: %s.", why)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather all weights on each process, so that each may call the networks separately, any number of times.

    All processes must enter it; it may be nested. Without sharding it does nothing.
    """
    if not isinstance(module, FSDPModule) or getattr(module, "is_whole", False):
        yield
        return
    module.unshard()
    module.is_whole = True
    try:
        yield
    finally:
        module.is_whole = False
        module.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every process; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's full state dict on the CPU; `None` if nothing is sharded. Called by all processes."""
    state = model.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return None
    return {name: gathered(value).cpu() for name, value in state.items()}
