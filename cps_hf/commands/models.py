"""The networks of a command line: from `--models`, a backbone, an earlier run, or the small default."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, ResNetConfig, UperNetConfig

from ..modeling.around import architecture_around
from ..objectives import Objective
from ..planning.plan import FEW_LABELED, random_weights_note

logger = logging.getLogger(__name__)


def chosen_models(
    models: list[str], backbone: str | list[str] | None, init_from: str | None, count: int
) -> str | PreTrainedConfig | list[Any]:
    """The `models` argument of `CPSTrainer`.

    Args:
        models: ids, folders or config.json files. backbone: weights. init_from: an earlier run's output folder.
        count: how many branches the method trains if nothing else decides it.

    Raises:
        ValueError: two of them contradict each other, or one of them names nothing usable.
    """
    if init_from is not None:
        if models or backbone:
            other = "models" if models else "backbone"
            raise ValueError(f"`init_from` starts from an earlier run's networks. Remove `{other}`.")
        return branches_of(init_from, count)
    if models:
        return models if len(models) > 1 else models[0]
    if isinstance(backbone, list) and len(set(backbone)) == 1:
        backbone = backbone[0]
    if isinstance(backbone, list):
        found = [small_model() if name == "none" else _around(name) for name in backbone]
        return found
    return small_model() if backbone in (None, "none") else _around(backbone)


def _around(backbone: str) -> PreTrainedConfig:
    around = architecture_around(backbone)
    logger.info("Network: %s.", around.said)
    return around.config


def branches_of(run: str, count: int) -> list[str]:
    """The folders that `count` branches start from: those of an earlier run, or one exported branch.

    One branch starts from the run's `best`. Several start from its branches, or all from `best` if it has fewer.

    Raises:
        ValueError: the folder contains no exported branch.
    """
    folder = Path(run)
    if (folder / "config.json").is_file():
        return [str(folder)] * count
    branches = [folder / f"branch_{index}" for index in range(count)]
    if count > 1 and all((branch / "config.json").is_file() for branch in branches):
        return [str(branch) for branch in branches]
    one = next((folder / n for n in ("best", "branch_0") if (folder / n / "config.json").is_file()), None)
    if one is None:
        found = "no such folder" if not folder.is_dir() else "it contains neither best/ nor branch_0/"
        raise ValueError(
            f"`init_from` {run}: {found}. Give the output folder of an earlier run, or one of the branches in it."
        )
    return [str(one)] * count


def num_branches(objective: Objective, wanted: int | None) -> int:
    """How many branches a run has, counted as `CPSTrainer` does."""
    return wanted or (1 if objective.teacher else 2)


def small_model() -> UperNetConfig:
    """A convolutional network that learns from scratch on few images (a small SegFormer does not).

    It has three stages: in a fourth, at stride 32, the drawn scenes would be two pixels high.
    """
    backbone = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96],
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    return UperNetConfig(backbone_config=backbone, hidden_size=32, pool_scales=[1, 2], use_auxiliary_head=False)


def warn_of_random_weights(models: Any, backbone: Any, num_labeled: int | None) -> None:
    """If every branch is trained from scratch on few labels, log what to do about it."""
    sources = models if isinstance(models, list) else [models]
    random = all(isinstance(source, PreTrainedConfig) or str(source).endswith(".json") for source in sources)
    if random and not backbone and num_labeled is not None and num_labeled < FEW_LABELED:
        logger.warning("%s", random_weights_note(num_labeled))
