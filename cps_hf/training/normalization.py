"""Chooses how images are normalised: like a pretrained network's input, unless the user says otherwise."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from ..config import ModelConfig
from ..hub.image_processors import check_range, read_processor
from ..modeling.backbones import timm_normalization
from ..modeling.branches import Source, source_per_branch

logger = logging.getLogger(__name__)

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Numbers(NamedTuple):
    """Mean and standard deviation of the three colours, for images in [0, 1], and where they come from."""

    mean: list[float]
    std: list[float]
    whose: str

    def __str__(self) -> str:
        return f"mean {self.mean} and std {self.std} ({self.whose})"


def settle(
    model_config: ModelConfig,
    models: Source | Sequence[Source],
    built: Sequence[PreTrainedModel],
    processing_class: Any = None,
    *,
    say: bool = True,
) -> ModelConfig:
    """Fill in `image_mean` and `image_std` in the settings.

    The first of these that exists is used: the settings; `processing_class`; the input of the first branch with
    pretrained weights, from the image processor of its backbone or checkpoint or from timm; ImageNet. Pretrained
    networks that were trained with other values are reported.

    Args:
        models: the trainer's argument.
        built: the branches built from it.
        say: whether to log the choice and any differences; for the main process.

    Raises:
        ValueError: `processing_class` cannot read images, or its values fit no network.
    """
    sources = source_per_branch(models, len(built))
    found = [_of_branch(*pair, index, model_config) for index, pair in enumerate(zip(sources, built, strict=True))]
    pretrained = [numbers for numbers in found if numbers is not None]
    taken = next(iter(pretrained), Numbers(*IMAGENET, "ImageNet's, since no pretrained network here has its own"))
    if processing_class is not None:
        reading = read_processor(processing_class)
        taken = Numbers(reading.mean, reading.std, "`processing_class`")
    if model_config.image_mean or model_config.image_std:
        mean, std = model_config.image_mean or taken.mean, model_config.image_std or taken.std
        taken = Numbers([*mean], [*std], "from `image_mean` and `image_std`")
    elif processing_class is not None:
        check_range(reading)
    if say:
        logger.info("Images are normalised with %s.", taken)
        for other in {numbers.whose: numbers for numbers in pretrained}.values():
            if not np.allclose([taken.mean, taken.std], [other.mean, other.std], atol=1e-4):
                logger.warning(
                    "Images are normalised with %s, but a pretrained network was trained with others: %s. To use "
                    "these, set `image_mean` and `image_std` to them.",
                    *(taken, other),
                )
    return dataclasses.replace(model_config, image_mean=taken.mean, image_std=taken.std)


def processor_of(source: str | PathLike, *, trust_remote_code: bool = False) -> Any | None:
    """The image processor in a folder or on the Hub; `None` if there is none or it cannot be loaded."""
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def _of_branch(source: Source, model: PreTrainedModel, index: int, model_config: ModelConfig) -> Numbers | None:
    """The normalisation that a branch's pretrained weights were trained with, if known."""
    backbone = model_config.backbone_source(index)
    if backbone is not None:
        by_timm = timm_normalization(model, backbone)
        if by_timm is not None:
            return Numbers(*by_timm, f"timm's for {backbone}")
        source = backbone
    elif isinstance(source, PreTrainedConfig):
        return None  # nothing is pretrained
    elif isinstance(source, PreTrainedModel):
        source = source.config._name_or_path  # where it was loaded from; empty if it was not
    processor = processor_of(source, trust_remote_code=model_config.trust_remote_code) if source else None
    if processor is None:
        by_timm = timm_normalization(model)
        return None if by_timm is None else Numbers(*by_timm, f"timm's for the backbone of branch {index}")
    try:
        reading = read_processor(processor)
    except ValueError as error:
        logger.warning("The image processor of %s has unknown preprocessing: %s", source, error)
        return None
    if reading.swaps_colors:
        logger.warning(
            "The image processor of %s swaps red and blue. Training and the exported branch read images without "
            "swapping: features learned from swapped colours must be learned again.",
            source,
        )
    return Numbers(reading.mean, reading.std, f"the image processor of {source}")
