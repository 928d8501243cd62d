"""The backbone inside a segmentation model, and pretrained weights for it."""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger("cps_hf")


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a segmentation model that pretraining fills: `.backbone`, or the base model (`.segformer`, ...).

    Raises:
        ValueError: the model has neither.
    """
    for name in ("backbone", model.base_model_prefix):
        if name and isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise ValueError(
        f"{type(model).__name__} has no backbone that is known: expected a module `backbone` or "
        f"`{model.base_model_prefix}`, found {', '.join(name for name, _ in model.named_children())}."
    )


def load_backbone_weights(model: PreTrainedModel, source: str | PathLike) -> None:
    """Fills the backbone of `model` with pretrained weights, in place.

    Args:
        model: a segmentation model of transformers or ours.
        source: for a backbone of transformers: a folder or Hub id of a checkpoint of the same kind (a bare model or a
            classifier). For a timm backbone: a file of timm weights (.safetensors, .pth, .bin), or a timm name with
            or without "timm/" ("timm/resnet50s.gluon_in1k", downloaded).

    Raises:
        ValueError: the weights do not fit, or cannot be had.
    """
    backbone = backbone_of(model)
    network = timm_network(backbone)
    if network is not None:
        _load_timm(backbone, network, source)
    else:
        _load_transformers(backbone, source)
    if any(p.device.type != "meta" and not torch.isfinite(p).all() for p in backbone.parameters()):
        raise ValueError(f"The backbone weights of `{source}` hold NaN or infinite values.")


def timm_network(backbone: nn.Module) -> nn.Module | None:
    """The timm network in a TimmBackbone, however deep transformers wraps it."""
    return next((m._backbone for m in backbone.modules() if hasattr(m, "_backbone")), None)


def _load_timm(backbone: nn.Module, network: nn.Module, source: str | PathLike) -> None:
    """timm is asked for the same network with its weights; it knows how its files become feature networks.

    Loading after building matters: building with pretrained=True inside transformers resets batch-norm statistics.
    """
    import timm

    config = next(m for m in backbone.modules() if hasattr(m, "_backbone")).config
    name, how = config.backbone, {}
    if Path(source).is_file():
        how["pretrained_cfg_overlay"] = {"file": str(source)}
    elif Path(source).is_dir():
        raise ValueError(f"`{source}` is a folder; the weights of a timm backbone are one file, or a timm name.")
    else:
        name = str(source).removeprefix("timm/")
        if name.split(".")[0] != config.backbone.split(".")[0]:
            raise ValueError(f"The backbone is timm's {config.backbone!r}, the weights are said to be {name!r}'s.")
    if getattr(network, "incre_modules", True) is None:  # an HRNet that gives its streams, see modeling_hrnet.py
        how["feature_location"] = ""
    try:
        donor = timm.create_model(
            name,
            pretrained=True,
            features_only=True,
            in_chans=config.num_channels,
            out_indices=tuple(config.out_indices),
            **({} if config.output_stride is None else {"output_stride": config.output_stride}),
            **how,
        )
        network.load_state_dict(donor.state_dict())
    except Exception as error:  # timm, the Hub client and torch raise a dozen kinds here
        raise ValueError(
            f"timm cannot give the weights `{source}` for {config.backbone!r}. "
            f"It said: {type(error).__name__}: {error}"
        ) from error
    means = [m.running_mean for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if means and not any(mean.any() for mean in means):
        raise ValueError(
            f"`{source}` has batch-norm statistics that are all zero: these are not the weights of a trained network."
        )


def _load_transformers(backbone: nn.Module, source: str | PathLike) -> None:
    try:
        donor, info = type(backbone).from_pretrained(
            source, config=backbone.config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{source}` cannot be loaded as a {type(backbone).__name__}: a folder or Hub id of a checkpoint of this "
            f"kind and these sizes is needed. transformers said: {type(error).__name__}: {error}"
        ) from error
    names = {name for name, _ in backbone.named_parameters()}
    missing = set(info["missing_keys"]) & names
    if missing == names:
        raise ValueError(f"`{source}` holds no weight that a {type(backbone).__name__} has.")
    if missing:
        logger.warning(
            "%s lacks these weights of the backbone, left as drawn: %s.", source, ", ".join(sorted(missing))
        )
    kept = {name: tensor for name, tensor in donor.state_dict().items() if name not in missing}
    backbone.load_state_dict(kept, strict=False)
