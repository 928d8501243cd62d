"""Finds out, by trying before a run starts, which image and batch sizes a model accepts."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .dry_run import error_at, in_mode


def check_input_size(model: PreTrainedModel, height: int, width: int) -> None:
    """Raise if the model does not accept images of this size. Tries it, on shapes without values if possible.

    Args:
        model: a segmentation model.
        height, width: of the crop, in pixels.

    Raises:
        ValueError: it does not; the message names sizes that it accepts.
    """
    error = error_at(model, height, width)
    if error is None:
        return
    step = _size_step(model)
    near_height, near_width = (max(step, round(side / step) * step) for side in (height, width))
    candidates = [(near_height, near_width), (near_height, near_height), (near_width, near_width)]
    image_size = getattr(model.config, "image_size", None)
    if image_size is not None:
        candidates.append((image_size, image_size) if isinstance(image_size, int) else tuple(image_size))
    taken = [size for size in dict.fromkeys(candidates) if error_at(model, *size) is None]
    if not taken:  # no size works on shapes alone: it may need values
        parameter = next(model.parameters())
        try:
            with torch.no_grad(), in_mode(model, training=False):
                model(pixel_values=torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device))
            return
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as real_error:
            error = real_error
        hint = f"It does not accept {' or '.join(f'{h} x {w}' for h, w in candidates)} either."
    else:
        hint = f"It accepts, for instance, {' or '.join(f'{h} x {w}' for h, w in taken)}"
        taller = (taken[0][0] + step, taken[0][1])
        hint += f"; multiples of {step}" if error_at(model, *taller) is None else ", no oblong image"
        larger = (taken[0][0] + step, taken[0][1] + step)
        hint += "." if error_at(model, *larger) is None else ", and no other size near it."
    raise ValueError(
        f"{type(model).__name__} cannot process images of {height} x {width} pixels (height x width). {hint} "
        f"It stopped with {type(error).__name__}: {error}"
    )


def _size_step(model: PreTrainedModel) -> int:
    """The number whose multiples are the most likely sizes: the patch's side, or 32."""
    for config in (getattr(model.config, "backbone_config", None), model.config):
        patch_size = getattr(config, "patch_size", None)
        if isinstance(patch_size, (list, tuple)):
            patch_size = patch_size[0]
        if isinstance(patch_size, int) and patch_size >= 8:
            return patch_size
    return 32


def check_train_batch(
    model: PreTrainedModel, batch_size: int, height: int | None = None, width: int | None = None
) -> None:
    """Raise if a batch norm over an image-pooled map would see one value per channel, which has no variance.

    ASPP and pyramid pooling average the whole image. With one image per process their batch norm cannot be trained,
    unless it is synchronised (`convert_sync_batchnorm`) or frozen.

    Args:
        model: a segmentation model.
        batch_size: images per process and forward pass.
        height, width: of the crop, a size that the model accepts. If `None`, the model's own, or 256.

    Raises:
        ValueError: a batch norm would.
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return
    image_size = getattr(model.config, "image_size", None) or 256
    own = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    error = error_at(model, height or own[0], width or own[1], batch_size=batch_size, training=True)
    if error is not None and "more than 1 value per channel" in str(error):
        raise ValueError(
            f"{type(model).__name__} has a batch norm on an image-pooled 1 x 1 map, which cannot be trained with "
            f"{batch_size} image per process. Set `per_device_train_batch_size=2` (on a command line "
            "`--per_device_train_batch_size 2`) and, if it is set, `per_device_unlabeled_batch_size` too; or "
            "train on several GPUs with `sync_batchnorm`."
        )
