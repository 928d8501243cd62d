"""FSDP2: weights, gradients and optimizer states spread over the processes; and what is refused beside DDP.

The training module is one unit. Its weights come together for a forward and backward pass, and by `whole` for an
evaluation; between steps each process holds its share alone.
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

from ..config import CPSConfig

logger = logging.getLogger(__name__)

FILE = "examples/configs/accelerate/fsdp2.yaml"
_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


# ------------------------------------------------------------------------------------------------ what is refused


def refuse_engines() -> None:
    """Before Accelerate looks for an engine that would take the loop over.

    Raises:
        ValueError: the launch asks for DeepSpeed or Megatron-LM.
    """
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(f"This launch asks for {engine} ({variable}=true). {_advice(engine)}")


def refuse(accelerator: Accelerator, args: CPSConfig) -> None:
    """What Accelerate is set up for and cannot be trained with.

    Raises:
        ValueError: says what was found and what to do.
    """
    kind = accelerator.distributed_type
    engines = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}
    if kind in engines:
        raise ValueError(f"Accelerate is set up for {engines[kind]}. {_advice(engines[kind])}")
    if kind != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"This launch asks for FSDP1, CPSTrainer knows FSDP2: set `fsdp_version: 2`, as {FILE} does.")
    wraps = getattr(plugin.auto_wrap_policy, "__name__", None)
    wrong = {  # what the launch asks for -> (whether it does, what to do)
        "`fsdp_auto_wrap_policy` other than NO_WRAP": (
            wraps is not None,
            "branches are called several times a step and by themselves in an evaluation, as one unit: set NO_WRAP",
        ),
        "`fsdp_cpu_ram_efficient_loading: true`": (
            plugin.cpu_ram_efficient_loading,
            "every process draws the same weights from the seed: set it to false",
        ),
        "`fsdp_offload_params: true`": (bool(getattr(plugin.cpu_offload, "pin_memory", False)), "set it to false"),
        "`fsdp_activation_checkpointing: true`": (
            plugin.activation_checkpointing,
            "set it to false and take the setting `gradient_checkpointing` instead",
        ),
        "`mixed_precision` fp16": (accelerator.mixed_precision == "fp16", 'take "bf16" or "no"'),
        "`channels_last`": (args.channels_last, "FSDP2 shards contiguous weights only: leave it out"),
        "`torch_compile`": (args.torch_compile, "it was not tried there: leave it out, or launch with DDP"),
        "`auto_find_batch_size`": (
            args.auto_find_batch_size,
            "a process that runs out of memory would leave the others waiting: choose the batch yourself",
        ),
    }
    for what, (asked, advice) in wrong.items():
        if asked:
            raise ValueError(f"FSDP2 does not go with {what}: {advice}.")


def _advice(engine: str) -> str:
    return (
        f"CPSTrainer does not run under {engine}, whose engine would take over its loop, clipping and checkpoints. "
        "Launch with DDP (`accelerate launch --multi_gpu --num_processes N SCRIPT`) or, where weights and optimizer "
        f"states do not fit into a GPU's memory, with FSDP2 (`accelerate launch --config_file {FILE} SCRIPT`)."
    )


# ------------------------------------------------------------------------------------------------ sharding


def use_on_cpus(accelerator: Accelerator) -> None:
    """Accelerate knows FSDP on GPUs only and would train with DDP on CPUs without a word; by gloo, it works there."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # In both places, as Accelerate itself does: its states are copied from the second.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Accelerate's `prepare`. A sharded module has the precision that DDP would give it: its weights stay in float32
    and autocast chooses operation by operation, where Accelerate would have cast weights, counts and statistics."""
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        forward = module.forward

        def with_autocast(*arguments):
            with accelerator.autocast():
                return forward(*arguments)

        module.forward = with_autocast
        _unfuse_sgd(optimizer, "torch has no fused ones for sharded weights")
    if accelerator.scaler is not None:
        _unfuse_sgd(optimizer, "torch's fused ones change the momentum in a step that fp16's scaler leaves out")
    return accelerator.prepare(module, optimizer)


def _unfuse_sgd(optimizer: torch.optim.Optimizer, why: str) -> None:
    if isinstance(optimizer, torch.optim.SGD) and any(group.get("fused") for group in optimizer.param_groups):
        for group in optimizer.param_groups:
            group["fused"] = False
        optimizer._step_supports_amp_scaling = False  # the scaler leaves steps out by itself, not the kernel
        logger.info("SGD takes its plain steps: %s.", why)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """All weights on each process, so that its networks can be called one by one, as often as each process likes.

    To be entered by all processes; may be nested. Without sharding nothing happens.
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
    """The whole of a sharded tensor, on every process; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's state dict, whole and on the CPU; none where nothing is sharded. Called by all processes."""
    state = model.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return None
    return {name: gathered(value).cpu() for name, value in state.items()}
