"""What is done to a model before it is trained: freezing, size checks, parameter groups, memory."""

from __future__ import annotations

import contextlib
import types

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbones import backbone_of, timm_network

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def freeze_unused_parameters(model: PreTrainedModel, size: int | tuple[int, int]) -> list[str]:
    """Freezes the parameters that the logits do not depend on, and returns their names.

    DDP waits for a gradient of every parameter that requires one; Swin, DINOv2, DPT, MobileNetV2 and others have some
    that never get one. Batch-norm statistics, random numbers and existing gradients stay as they are.

    Args:
        model: in any mode; the mode is kept.
        size: the input's height and width (one number: both) that the model takes.
    """
    height, width = (size, size) if isinstance(size, int) else size
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = _meta_tensors(model)
    dtype = next(model.parameters()).dtype
    with _evaluating(model), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        pixel_values = torch.empty(2, 3, height, width, dtype=dtype, device="meta")
        gradients_of = _LogitGradients(model, [tensors[name] for name in wanted])
        try:
            under_wrapper = {f"model.{name}": tensor for name, tensor in tensors.items()}
            gradients = torch.func.functional_call(gradients_of, under_wrapper, (pixel_values,))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            # a model that needs values, not only shapes (or a size that does not fit: then this raises)
            device = next(model.parameters()).device
            pixel_values = torch.zeros(2, 3, height, width, dtype=dtype, device=device)
            gradients = _LogitGradients(model, list(wanted.values()))(pixel_values)
    unused = [name for name, gradient in zip(wanted, gradients, strict=True) if gradient is None]
    for name in unused:
        wanted[name].requires_grad_(False)
    return unused


class _LogitGradients(nn.Module):
    """Backward inside a forward, so that recomputed activations see the same tensors as the first time."""

    def __init__(self, model: nn.Module, tensors: list[torch.Tensor]):
        super().__init__()
        self.model = model
        self.tensors = tensors

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits = self.model(pixel_values=pixel_values).logits
        return torch.autograd.grad(logits.float().sum(), self.tensors, allow_unused=True)


def _meta_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers as shapes without values; tied ones stay tied."""
    shapes: dict[int, torch.Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for _, tensor in named:
        if id(tensor) not in shapes:
            shapes[id(tensor)] = torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
    return {name: shapes[id(tensor)] for name, tensor in named}


def freeze(model: PreTrainedModel, *, backbone: bool = False, norms: bool = False) -> list[str]:
    """Freezes the backbone, or its norm layers only, and returns the names of the parameters this froze.

    A frozen norm stays in evaluation mode (`.train()` does not wake it), so its statistics do not move either.

    Args:
        model: a segmentation model.
        backbone: all parameters of the backbone, and its norms' statistics. Dropout and stochastic depth stay on.
        norms: the backbone's norm layers: batch, group and layer norms.

    Raises:
        ValueError: `norms` on a backbone without any.
    """
    network = backbone_of(model)
    layers = [module for module in network.modules() if isinstance(module, NORMS)]
    if norms and not layers:
        raise ValueError(f"`norms`: the backbone of {type(model).__name__} has no norm layer of torch's kinds.")
    frozen: set[int] = set()
    if backbone:
        frozen |= {id(parameter) for parameter in network.parameters()}
    if backbone or norms:
        for layer in layers:
            frozen |= {id(parameter) for parameter in layer.parameters()}
            layer.eval()
            layer.train = types.MethodType(_stay_in_eval_mode, layer)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in frozen]
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    return names


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Gives all batch norms of a model this share of a batch's statistics in their running ones.

    Raises:
        ValueError: it has no batch norm.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise ValueError(f"`norm_momentum`: {type(model).__name__} has no batch norm. Leave it out.")
    for layer in layers:
        layer.momentum = momentum


def _stay_in_eval_mode(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


@contextlib.contextmanager
def _evaluating(model: nn.Module, training: bool = False):
    """The whole model in one mode, each module's own mode restored after."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_input_size(model: PreTrainedModel, height: int, width: int) -> None:
    """Raises unless the model takes images of this size; finds out by trying, on shapes without values where it can.

    Args:
        model: a segmentation model.
        height, width: of the crop, in pixels.

    Raises:
        ValueError: it does not; the message names sizes that it does take.
    """
    error = _error_at(model, height, width)
    if error is None:
        return
    step = _size_step(model)
    near_height, near_width = (max(step, round(side / step) * step) for side in (height, width))
    candidates = [(near_height, near_width), (near_height, near_height), (near_width, near_width)]
    image_size = getattr(model.config, "image_size", None)
    if image_size is not None:
        candidates.append((image_size, image_size) if isinstance(image_size, int) else tuple(image_size))
    taken = [size for size in dict.fromkeys(candidates) if _error_at(model, *size) is None]
    if not taken:  # no size works on shapes alone: it may need values
        parameter = next(model.parameters())
        try:
            with torch.no_grad(), _evaluating(model):
                model(pixel_values=torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device))
            return
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as real_error:
            error = real_error
        hint = f"Nor does it take {' or '.join(f'{h} x {w}' for h, w in candidates)}."
    else:
        hint = f"It takes, for instance, {' or '.join(f'{h} x {w}' for h, w in taken)}"
        taller = (taken[0][0] + step, taken[0][1])
        hint += f"; multiples of {step}" if _error_at(model, *taller) is None else ", no oblong image"
        larger = (taken[0][0] + step, taken[0][1] + step)
        hint += "." if _error_at(model, *larger) is None else ", and no other size near it."
    raise ValueError(
        f"{type(model).__name__} cannot take images of {height} x {width} pixels (height x width). {hint} "
        f"It stopped with {type(error).__name__}: {error}"
    )


def _size_step(model: PreTrainedModel) -> int:
    """The number of pixels whose multiples are most likely to fit: the patch's side, or 32."""
    for config in (getattr(model.config, "backbone_config", None), model.config):
        patch_size = getattr(config, "patch_size", None)
        if isinstance(patch_size, (list, tuple)):
            patch_size = patch_size[0]
        if isinstance(patch_size, int) and patch_size >= 8:
            return patch_size
    return 32


def _error_at(model: PreTrainedModel, height: int, width: int, batch_size: int = 1, training: bool = False):
    """The error of a forward at this size, or None. On meta tensors: shapes only, no arithmetic, nothing changes."""
    tensors = _meta_tensors(model)
    dtype = next(model.parameters()).dtype
    pixel_values = torch.empty(batch_size, 3, height, width, device="meta", dtype=dtype)
    try:
        with torch.no_grad(), _evaluating(model, training), torch.random.fork_rng(devices=[]):
            torch.func.functional_call(model, tensors, kwargs={"pixel_values": pixel_values})
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return error
    return None


def check_train_batch(
    model: PreTrainedModel, batch_size: int, height: int | None = None, width: int | None = None
) -> None:
    """Raises if a batch norm over an image-pooled map would see one value a channel, which has no deviation.

    ASPP and pyramid pooling average the whole image; with one image a process their batch norm cannot train, unless
    it is synchronised (`convert_sync_batchnorm`) or frozen.

    Args:
        model: a segmentation model.
        batch_size: images a process and forward.
        height, width: of the crop, a size the model takes; None: the model's own, or 256.

    Raises:
        ValueError: it would.
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return
    image_size = getattr(model.config, "image_size", None) or 256
    own = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    error = _error_at(model, height or own[0], width or own[1], batch_size, training=True)
    if error is not None and "more than 1 value per channel" in str(error):
        raise ValueError(
            f"{type(model).__name__} has a batch norm on an image-pooled 1 x 1 map, which cannot be trained with "
            f"{batch_size} image a process: raise per_device_train_batch_size to 2, or train on several GPUs with "
            "synchronised batch norm."
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Trades time for memory: activations of the blocks are computed again in the backward pass.

    The whole model's checkpointing where it has one, else its backbone's. (A batch norm inside a checkpointed block
    sees each batch twice, so its running statistics follow the data twice as fast.)

    Raises:
        ValueError: neither the model nor its backbone supports it.
    """
    backbone = backbone_of(model)
    network = timm_network(backbone)
    for child in network.children() if network is not None else ():
        if getattr(child, "inplace", False):  # timm before 1.0.30 recomputes from what this one overwrites
            child.inplace = False
    for part in (model, backbone):
        if getattr(part, "supports_gradient_checkpointing", False):
            if hasattr(part, "activation_checkpointing_enable"):  # transformers 5.24 renamed it
                part.activation_checkpointing_enable()
            else:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
    if network is not None and hasattr(network, "set_grad_checkpointing"):
        with contextlib.suppress(AssertionError):  # timm's way to say that it cannot
            network.set_grad_checkpointing(True)
            return
    raise ValueError(
        f"Neither {type(model).__name__} nor its backbone {type(network or backbone).__name__} supports gradient "
        "checkpointing: leave `gradient_checkpointing` out, or take a smaller crop or batch."
    )


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Every batch norm becomes a synchronised one (needs GPUs and several processes when it trains); saves as before.

    timm's conversion, because torch's drops the activation of timm's fused norm layers. Frozen norms stay as they are.
    """
    from timm.layers import convert_sync_batchnorm as convert

    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return model if "train" in vars(model) else convert(model)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child))
    return model


NO_DECAY_NAMES = (  # of what is neither a map's weight nor a vector
    "pos_embed",
    "position_embedding",
    "mask_token",
    "cls_token",
    "register_token",
    "relative_position_bias",
    "rel_pos",
    ".rpb",
    "layer_scale",
    "logit_scale",
    ".grn.",
)


def parameter_groups(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    weight_decay: float,
    head_learning_rate_factor: float = 1.0,
    backbone_learning_rate_factor: float = 1.0,
    layer_decay: float | None = None,
) -> list[dict]:
    """The optimizer's groups: every trainable parameter once.

    No weight decay on biases and norms (every parameter of one dimension), position embeddings, tokens and scales.

    Args:
        model: a segmentation model.
        learning_rate: of a parameter whose factors are 1.
        weight_decay: of the weights that decay.
        head_learning_rate_factor, backbone_learning_rate_factor: what the rate is multiplied with in each part.
        layer_decay: in (0, 1]: layer l of the L layers of the backbone learns at layer_decay^(L + 1 - l) of the
            backbone's rate, l = 0 being the embeddings (BEiT, ICLR 2022, appendix). None: all alike.

    Returns:
        Dicts with "params", "lr", "weight_decay" and "name".

    Raises:
        ValueError: a factor out of range, or `layer_decay` on a backbone without layers.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must be in (0, 1], got {layer_decay}.")
    for name, factor in (("head", head_learning_rate_factor), ("backbone", backbone_learning_rate_factor)):
        if factor <= 0:
            raise ValueError(f"`{name}_learning_rate_factor` must be above 0, got {factor}. To freeze, use freeze().")
    depths, last = ({}, 0) if layer_decay is None else _layer_depths(backbone_of(model))
    inside = {id(parameter) for parameter in backbone_of(model).parameters()}
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, rate = "head", learning_rate * head_learning_rate_factor
        if id(parameter) in inside:
            part, rate = "backbone", learning_rate * backbone_learning_rate_factor
            if layer_decay is not None:
                depth = depths[id(parameter)]
                part, rate = f"backbone layer {depth}", rate * layer_decay ** (last + 1 - depth)
        decays = parameter.ndim > 1 and not any(hint in name for hint in NO_DECAY_NAMES)
        key = part if decays else f"{part}, no decay"
        group = {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0, "name": key}
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def _layer_depths(backbone: nn.Module) -> tuple[dict[int, int], int]:
    """id(parameter) -> its layer, 0 (embeddings) to the number of layers L, and L.

    The stages are the list of like modules that holds most parameters; a stage that is itself a list of blocks, or
    holds one, counts a layer for each block. Lists as long as the stages (patch embeddings, norms) go with theirs.
    """
    stages, siblings = _stages(backbone)
    if stages is None:
        raise ValueError(
            f"`layer_decay` needs a backbone of stacked layers; {type(timm_network(backbone) or backbone).__name__} "
            "has none that is known. Leave it out, or lower the whole backbone's rate with "
            "`backbone_learning_rate_factor`."
        )
    depths: dict[int, int] = {}
    starts, ends, depth = [], [], 0
    for stage in stages:
        starts.append(depth + 1)
        blocks = _blocks(stage)
        depth += len(blocks)
        ends.append(depth)
        first_block = next(iter(blocks[0].parameters()), None)
        seen_blocks = False
        for parameter in stage.parameters():  # in order: what comes before the blocks goes with the first of them
            seen_blocks = seen_blocks or parameter is first_block
            depths[id(parameter)] = ends[-1] if seen_blocks else starts[-1] if len(starts) > 1 else 0
        for number, block in enumerate(blocks):
            depths.update({id(parameter): starts[-1] + number for parameter in block.parameters()})
    last, seen = depth, False
    beside = {id(p): index for sibling in siblings for index, item in enumerate(sibling) for p in item.parameters()}
    first_of_stages = id(next(stages[0].parameters()))
    for parameter in backbone.parameters():
        key = id(parameter)
        seen = seen or key == first_of_stages
        if key in depths:
            continue
        if key in beside:
            depths[key] = ends[beside[key]] if seen else starts[beside[key]] if beside[key] else 0
        else:
            depths[key] = last if seen else 0
    return depths, last


def _stages(backbone: nn.Module) -> tuple[list[nn.Module] | None, list[list[nn.Module]]]:
    network = timm_network(backbone)
    if network is not None:
        # timm's feature networks are flat: layer1, layer2, ... or stages_0, stages_1, ...
        flat = [child for name, child in network.named_children() if _is_numbered_stage(name)]
        if 2 * sum(_size(stage) for stage in flat) > _size(network):
            return flat, []
        if not hasattr(network, "model"):  # of the others only its vision transformers, wrapped, are stacks of layers
            return None, []
    lists = [list(m) for m in backbone.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    if not lists:
        return None, []
    stages = max(lists, key=lambda items: sum(_size(item) for item in items))
    siblings = [items for items in lists if items is not stages and len(items) == len(stages)]
    inside = {id(module) for stage in stages for module in stage.modules()}
    return stages, [items for items in siblings if not any(id(item) in inside for item in items)]


def _is_numbered_stage(name: str) -> bool:
    return name.rstrip("0123456789").rstrip("_") in ("layer", "layers", "stages", "blocks") and name[-1].isdigit()


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """The stage's blocks: its own items, or those of the largest list it holds directly; else the stage itself."""
    if isinstance(stage, (nn.ModuleList, nn.Sequential)) and len(stage) > 0:
        return list(stage)
    lists = [child for child in stage.children() if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child)]
    lists = [child for child in lists if len({type(item) for item in child}) == 1]
    if not lists:
        return [stage]
    return list(max(lists, key=_size))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
