"""Cross Pseudo Supervision (CPS, CVPR 2021) for Hugging Face segmentation models.

Each of two models is trained on the other's predictions for unlabeled images, with few labeled ones; the better model
is exported. `CPSTrainer` is the training loop, `cps_hf.objectives` has the methods, `cps_hf.data` the data sets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AugmentationConfig, CPSConfig, EvaluationConfig, HubConfig, ModelConfig, Provenance
    from .objectives import OBJECTIVES, CrossPseudoSupervision, Objective, ObjectiveOutput, Supervised
    from .training.trainer import CPSTrainer

__version__ = "0.2.0"

# Imported on first access: `cps-hf --help` and a page in a Space need no trainer.
_MODULES = {
    "config": ("AugmentationConfig", "CPSConfig", "EvaluationConfig", "HubConfig", "ModelConfig", "Provenance"),
    "objectives": ("OBJECTIVES", "CrossPseudoSupervision", "Objective", "ObjectiveOutput", "Supervised"),
    "training.trainer": ("CPSTrainer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "OBJECTIVES",
    "AugmentationConfig",
    "CPSConfig",
    "CPSTrainer",
    "CrossPseudoSupervision",
    "EvaluationConfig",
    "HubConfig",
    "ModelConfig",
    "Objective",
    "ObjectiveOutput",
    "Provenance",
    "Supervised",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
