"""Exports a branch as an ONNX file with logits at its input's size, and compares it with PyTorch before keeping it."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import written_whole
from ..modeling.branches import Branch

logger = logging.getLogger(__name__)

OPSET = 18
_AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class OnnxExport:
    """The result of `export_onnx`.

    Attributes:
        path: the file.
        dynamic: whether it accepts any height and width that the model accepts; else only `size`. The batch size is
            free.
        size: (height, width) of the traced image.
        checked: the (batch, height, width) at which onnxruntime and PyTorch were compared.
        max_difference: the largest difference between their logits, relative to the largest logit.
    """

    path: Path
    dynamic: bool
    size: tuple[int, int]
    checked: tuple[tuple[int, int, int], ...]
    max_difference: float


def export_onnx(
    model: PreTrainedModel,
    processor: Any,
    path: str | os.PathLike,
    *,
    size: tuple[int, int] = (256, 320),
    tolerance: float = 1e-3,
) -> OnnxExport:
    """Write `model` as an ONNX file: pixel_values (B, 3, H, W) float32 -> logits (B, C, H, W) float32.

    Logits are resized to the input's size inside the file, as in `Branch`. Batch, height and width are free if the
    model allows it. If onnxruntime then differs from PyTorch, or the model only accepts one size, the file is written
    again for `size` alone, with a warning.

    The file's metadata (strings; JSON for structured values) are id2label, image_mean, image_std, rescale_factor and
    the processor's resizing, so that the file alone is enough to prepare images and name classes.

    Args:
        model: any model of `AutoModelForSemanticSegmentation`; it does not change.
        processor: its image processor.
        size: (height, width) of the traced image, which is the only size if the model accepts no other.
        tolerance: the largest accepted difference between logits, relative to the largest logit.

    Raises:
        ValueError: the model does not accept `size`, cannot be exported, or has different logits in onnxruntime.
        OSError: the file cannot be written.
        ImportError: onnx or onnxruntime is missing: `pip install "cps_hf[onnx]"`.
    """
    import onnxruntime  # noqa: F401  (both are imported before the work, so that a missing one is found first)
    from onnx import load, save
    from onnx.helper import set_model_props

    path, branch = Path(path), Branch(copy.deepcopy(model).cpu().float()).eval()
    inputs = _inputs_that_the_model_takes(branch, size)
    expected = _run(branch, inputs)
    for module in branch.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):  # ONNX has no pooling into a number of bins
            module.forward = partial(_adaptive_pool, bins=module.output_size)

    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        dynamic, difference, count = _dynamic_or_fixed(branch, inputs, expected, temporary, tolerance)
        file = load(temporary)
        set_model_props(file, _metadata(model, processor, dynamic))
        save(file, temporary)
    checked = tuple((len(x), *x.shape[-2:]) for x in inputs[:count])
    return OnnxExport(path, dynamic, tuple(size), checked, difference)


def _dynamic_or_fixed(
    branch: Branch, inputs: list[Tensor], expected: list[Tensor], path: Path, tolerance: float
) -> tuple[bool, float, int]:
    """Write the file. Returns whether its size is free, the largest relative difference, and the number of inputs."""
    name, why = type(branch.model).__name__, None
    of_one_size = 2  # the first two inputs: the traced image, and two of them
    for dynamic in (True, False):
        count = len(inputs) if dynamic else of_one_size
        if dynamic and count == of_one_size:
            why = "PyTorch itself does not accept other sizes"
            continue
        try:
            _trace(branch, inputs[0], path, _AXES if dynamic else {0: "batch"})
            difference = _difference(path, inputs[:count], expected[:count])
        except Exception as error:  # the exporter and onnxruntime raise their own types
            if isinstance(error, OSError) and error.errno is not None:  # caused by the disk, not by the model
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            if difference <= tolerance:
                if not dynamic:
                    size = " x ".join(map(str, inputs[0].shape[-2:]))
                    logger.warning("%s is exported for images of %s pixels only: %s.", name, size, why)
                return dynamic, difference, count
            reason = f"onnxruntime's logits differ from PyTorch's by {difference:.2g} of the largest"
        why = why or reason
    raise ValueError(f"{name} cannot be exported to ONNX: {reason}. Serve it with PyTorch, or choose another model.")


def _inputs_that_the_model_takes(branch: Branch, size: tuple[int, int]) -> list[Tensor]:
    """Random images: of `size`, two of `size`, then odd, non-square and round sizes if PyTorch accepts them."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    odd = [(1, height + 33, width + 1), (2, height // 2 + 21, width - 15)]
    round_ = [(1, height + 64, width + 32), (1, height, 2 * width)]  # for models that only accept multiples of 32
    inputs = []
    for batch, *side in [(1, *size), (2, *size), *odd, *round_]:
        images = torch.randn(batch, 3, *side, generator=generator)
        try:
            _run(branch, [images])
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            if tuple(side) == tuple(size):
                raise ValueError(
                    f"{type(branch.model).__name__} cannot process images of {height} x {width} pixels: {error} Give "
                    "a size that it accepts."
                ) from error
        else:
            inputs.append(images)
    return inputs


@torch.no_grad()
def _run(branch: Branch, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [branch(images) for images in inputs]


class _OfPixels(nn.Module):
    """A branch without options: the exporter passes everything that `forward` names."""

    def __init__(self, branch: Branch):
        super().__init__()
        self.branch = branch

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.branch(pixel_values)


def _trace(branch: Branch, images: Tensor, path: Path, axes: dict[int, str]) -> None:
    """Export by tracing. This takes seconds; torch.export took half a minute for a toy model.

    A trace freezes what Python computes from sizes, which the comparison at other sizes detects.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns for every line of Python that reads a size
        torch.onnx.export(
            _OfPixels(branch),
            (images,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_axes={"pixel_values": axes, "logits": axes},
        )


def _difference(path: Path, inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of onnxruntime's logits from the expected ones; infinite if shapes differ."""
    predict = onnx_predictor(path)
    worst = 0.0
    for images, logits in zip(inputs, expected, strict=True):
        found = predict(images.numpy())
        if found.shape != tuple(logits.shape):
            return float("inf")
        worst = max(worst, float(np.abs(found - logits.numpy()).max() / logits.abs().max().clamp_min(1e-30)))
    return worst


def onnx_predictor(path: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """Load the file in onnxruntime on the CPU: pixel_values (B, 3, H, W) float32 -> logits (B, C, H, W) float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are also raised
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run(["logits"], {"pixel_values": pixel_values})[0]


def _adaptive_pool(images: Tensor, bins: int | tuple[int | None, int | None]) -> Tensor:
    """`F.adaptive_avg_pool2d` as two matrix products: bin i averages [floor(i n / bins), ceil((i + 1) n / bins))."""
    rows, columns = bins if isinstance(bins, tuple) else (bins, bins)
    if rows is not None:
        images = _pooling(images.shape[2], rows, images) @ images
    if columns is not None:
        images = images @ _pooling(images.shape[3], columns, images).T
    return images


def _pooling(side: Any, bins: int, like: Tensor) -> Tensor:
    """(bins, side): each row's weights sum to one."""
    i, pixel = (torch.arange(n, device=like.device) for n in (bins, side))
    first = torch.div(i * side, bins, rounding_mode="floor")[:, None]
    end = torch.div((i + 1) * side + bins - 1, bins, rounding_mode="floor")[:, None]
    inside = ((pixel >= first) & (pixel < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def _metadata(model: PreTrainedModel, processor: Any, dynamic: bool) -> dict[str, str]:
    """What is needed in addition to the network: class names, and how pixels become its input."""
    names = ("do_resize", "size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    settings = processor.to_dict()
    facts = {
        "architecture": type(model).__name__,
        "id2label": {str(index): name for index, name in sorted(model.config.id2label.items())},
        "color_order": "RGB",
        "logits": "at the input's size",
        "height_and_width": "free" if dynamic else "fixed",
        **{name: settings[name] for name in names if settings.get(name) is not None},
    }
    return {key: value if isinstance(value, str) else json.dumps(value, default=float) for key, value in facts.items()}
