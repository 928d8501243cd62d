"""The backbone inside a segmentation model, and pretrained weights for it."""

from __future__ import annotations

import json
import logging
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from . import offline_backbone
from .universal import OF_ONE_SIZE, backbone_module, is_universal

logger = logging.getLogger("cps_hf")


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a segmentation model that pretraining fills: `.backbone`, or the base model (`.segformer`, ...).

    Raises:
        ValueError: the model has neither.
    """
    if is_universal(model.config):
        return backbone_module(model)
    for name in ("backbone", model.base_model_prefix):
        if name and isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise ValueError(
        f"{type(model).__name__} has no known backbone: expected a module `backbone` or "
        f"`{model.base_model_prefix}`, found {', '.join(name for name, _ in model.named_children())}."
    )


def backbone_parameters(model: PreTrainedModel) -> set[str]:
    """The names of the backbone's parameters in the model."""
    inside = {id(parameter) for parameter in backbone_of(model).parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def head_parameters(model: PreTrainedModel) -> set[str]:
    """The names of all other parameters."""
    return {name for name, _ in model.named_parameters()} - backbone_parameters(model)


def load_backbone_weights(model: PreTrainedModel, source: str | PathLike) -> None:
    """Fill the backbone of `model` with pretrained weights, in place.

    Args:
        model: a segmentation model from transformers or this package.
        source: for a transformers backbone: a folder or Hub id of a checkpoint of the same kind (a bare model or a
            classifier). For a timm backbone: a file of timm weights (.safetensors, .pth, .bin), or a timm name with
            or without "timm/" ("timm/resnet50s.gluon_in1k", downloaded).

    Raises:
        ValueError: the weights do not match, or cannot be loaded.
    """
    if model.config.model_type in OF_ONE_SIZE:
        raise ValueError(
            f"`backbone` {str(source)!r}: a vision transformer's weights cannot be loaded into a "
            f"{type(model).__name__}. Pass a full checkpoint of this kind as the model; its classes may differ."
        )
    backbone = backbone_of(model)
    network = timm_network(backbone)
    if offline_backbone.is_packaged(source):
        _load_packaged(backbone, network, source)
    elif network is not None:
        _load_timm(backbone, network, source)
    else:
        _load_transformers(backbone, source)
    if any(p.device.type != "meta" and not torch.isfinite(p).all() for p in backbone.parameters()):
        raise ValueError(f"The backbone weights of `{source}` contain NaN or infinite values.")


def timm_network(backbone: nn.Module) -> nn.Module | None:
    """The timm network in a TimmBackbone, however deeply transformers wraps it."""
    wrapper = _timm_wrapper(backbone)
    return None if wrapper is None else wrapper._backbone


def _timm_wrapper(backbone: nn.Module) -> nn.Module | None:
    return next((module for module in backbone.modules() if hasattr(module, "_backbone")), None)


def timm_normalization(
    model: PreTrainedModel, source: str | PathLike | None = None
) -> tuple[list[float], list[float]] | None:
    """The mean and standard deviation that timm's weights were trained with; `None` if the backbone is not timm's.

    Args:
        source: the weights, as in `load_backbone_weights`; if `None`, the backbone's own name is used.
    """
    import timm

    wrapper = _timm_wrapper(backbone_of(model))
    if wrapper is None:
        return None
    config_file = Path(source).with_name("config.json") if source is not None and Path(source).is_file() else None
    if config_file is not None and config_file.is_file():  # a file of a timm repository on the Hub
        own = json.loads(config_file.read_text(encoding="utf-8")).get("pretrained_cfg", {})
        if "mean" in own and "std" in own:
            return [*map(float, own["mean"])], [*map(float, own["std"])]
    own_name = source is None or Path(source).is_file() or offline_backbone.is_packaged(source)
    named = wrapper.config.backbone if own_name else str(source).removeprefix("timm/")
    known = timm.get_pretrained_cfg(named, allow_unregistered=True)
    return None if known is None else ([*map(float, known.mean)], [*map(float, known.std)])


def _load_packaged(backbone: nn.Module, network: nn.Module | None, source: str | PathLike) -> None:
    name = type(backbone).__name__ if network is None else _timm_wrapper(backbone).config.backbone
    if name.split(".")[0] != offline_backbone.TIMM_NAME:
        raise ValueError(
            f"The weights `{source}` belong to timm's {offline_backbone.TIMM_NAME!r}, and the backbone is {name!r}. "
            "Remove `models`: the network is then built around these weights."
        )
    weights = offline_backbone.packaged_weights()
    wanted = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    network.load_state_dict({key: weights[key] for key in wanted}, strict=False)


def _load_timm(backbone: nn.Module, network: nn.Module, source: str | PathLike) -> None:
    """Let timm create the same network with its weights, since it can convert its files to feature networks.

    Weights must be loaded after building: building with pretrained=True in transformers resets batch-norm statistics.
    """
    import timm

    config = _timm_wrapper(backbone).config
    name, how = config.backbone, {}
    if Path(source).is_file():
        how["pretrained_cfg_overlay"] = {"file": str(source)}
    elif Path(source).is_dir():
        raise ValueError(f"`{source}` is a folder; a timm backbone's weights are a single file, or a timm name.")
    else:
        name = str(source).removeprefix("timm/")
        if name.split(".")[0] != config.backbone.split(".")[0]:
            raise ValueError(f"The weights `{source}` do not belong to the backbone, timm's {config.backbone!r}.")
    if getattr(network, "incre_modules", True) is None:  # an HRNet that returns its streams, see modeling_hrnet.py
        how["feature_location"] = ""
    if config.output_stride is not None:
        how["output_stride"] = config.output_stride
    how |= {"features_only": True, "in_chans": config.num_channels, "out_indices": tuple(config.out_indices)}
    donors = []
    try:
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                donors.append(timm.create_model(name, pretrained=True, **how).state_dict())
    except Exception as error:  # timm, the Hub client and torch raise many kinds here
        raise ValueError(
            f"timm cannot load the weights `{source}` for {config.backbone!r}. "
            f"It said: {type(error).__name__}: {error}"
        ) from error
    weights, drawn_otherwise = donors
    # timm ignores weights that a file lacks; those were drawn at random, so they differ between the two
    lacking = [key for key, tensor in weights.items() if not torch.equal(tensor, drawn_otherwise[key])]
    if lacking:
        raise ValueError(
            f"`{source}` lacks {len(lacking)} weights of timm's {config.backbone!r}: {', '.join(lacking[:4])}."
        )
    means = [tensor for key, tensor in weights.items() if key.endswith("running_mean")]
    if means and not any(mean.any() for mean in means):
        raise ValueError(
            f"`{source}` has batch-norm statistics that are all zero: these are not the weights of a trained network."
        )
    network.load_state_dict(weights)


def _load_transformers(backbone: nn.Module, source: str | PathLike) -> None:
    try:
        donor, info = type(backbone).from_pretrained(
            source, config=backbone.config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{source}` cannot be loaded as a {type(backbone).__name__}: pass a folder or Hub id of a checkpoint of "
            f"this kind and size. transformers said: {type(error).__name__}: {error}"
        ) from error
    missing = {n: p for n, p in backbone.named_parameters() if n in info["missing_keys"] and p.numel() > 0}
    vital = [name for name, p in missing.items() if p.ndim > 1 and "mask_token" not in name]
    if vital:
        raise ValueError(
            f"`{source}` lacks {len(vital)} weights of a {type(backbone).__name__}: {', '.join(vital[:4])}."
        )
    if missing:  # norms that only the backbone's own maps have, such as Swin's: they start from 1 and 0
        logger.warning("%s lacks these weights of the backbone, left unchanged: %s.", source, ", ".join(missing))
    kept = {name: tensor for name, tensor in donor.state_dict().items() if name not in missing}
    backbone.load_state_dict(kept, strict=False)
