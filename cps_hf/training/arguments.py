"""Checks of `CPSTrainer`'s arguments, before anything else is done. Each message explains a common mistake."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..config import GROUPS
from ..objectives import OBJECTIVES, CrossPseudoSupervision, Objective

# Arguments of transformers' Trainer that have another place here, or none.
ELSEWHERE = {
    "tokenizer": "give the image processor as `processing_class`",
    "image_processor": "pass it as `processing_class`",
    "data_collator": "batches are made from the data sets' rows: remove it, and see `augmentation`",
    "compute_metrics": "mean IoU, accuracies and per-class IoU are always computed: remove it",
    "compute_loss_func": "the objective computes the loss: derive one from `cps_hf.Objective`",
    "model_init": "pass ids or configurations as `models`: weights are initialised with `args.seed`",
    "labeled_dataset": "it is called `train_dataset`",
}


def models_given(models: Any, model: Any) -> Any:
    """The models, passed under either name.

    Raises:
        TypeError: both or none were passed.
    """
    if models is not None and model is not None:
        raise TypeError("`model` is another name for `models`: pass only one of them.")
    found = model if models is None else models
    if found is None:
        raise TypeError(
            "`models` is missing: pass a Hub id, a folder or a configuration, from which each branch is built; or a "
            "list of them or of models."
        )
    if isinstance(found, type):
        raise TypeError(f"`models` is the class {found.__name__}: pass an instance or its configuration.")
    return found


def objective_given(objective: Any) -> Objective:
    """The method. An object is returned as it is; a name gives that method with its defaults; `None` gives CPS.

    Raises:
        TypeError: it is a class or not an objective. ValueError: no method has that name.
    """
    if objective is None:
        return CrossPseudoSupervision()
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            close = difflib.get_close_matches(objective, OBJECTIVES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.{hint}")
        return OBJECTIVES[objective]()
    if isinstance(objective, type):
        raise TypeError(f"`objective` is the class {objective.__name__}: pass an instance, `{objective.__name__}()`.")
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` must be an object of `cps_hf.objectives` or a name, got {_named(objective)}.")
    return objective


def check_groups(groups: Mapping[str, tuple[Any, type]]) -> None:
    """Check that each group of settings is an object of its class.

    Args:
        groups: by argument, the value that was passed and its expected class. `None` means not passed.

    Raises:
        TypeError: a group has another type. The message says what to do.
    """
    for name, (value, cls) in groups.items():
        if value is None or isinstance(value, cls):
            continue
        if isinstance(value, TrainingArguments):
            same = [
                field for field in ("output_dir", "max_steps", "learning_rate") if field in cls.__dataclass_fields__
            ]
            example = ", ".join(f"{field}=..." for field in same)
            raise TypeError(
                f"`{name}` is transformers' {type(value).__name__}; it must be a {cls.__name__}, whose fields have "
                f"the same names where they mean the same: `{cls.__name__}({example})`."
            )
        if isinstance(value, type):
            raise TypeError(f"`{name}` is the class {value.__name__}: pass an instance, `{cls.__name__}(...)`.")
        if isinstance(value, Mapping):
            raise TypeError(f"`{name}` is a mapping; pass a {cls.__name__}: `{cls.__name__}(**{name})`.")
        raise TypeError(f"`{name}` must be a {cls.__name__}, got {_named(value)}.")


def reject_unknown(trainer: type, unknown: Mapping[str, Any]) -> None:
    """Reject keyword arguments that a trainer does not have.

    Raises:
        TypeError: there is one. The message names the nearest argument, or the group of settings that has it.
    """
    for name in unknown:
        group = next((cls.__name__ for cls in GROUPS if name in cls.__dataclass_fields__), None)
        places = {"CPSConfig": "args", "ModelConfig": "model_config", "AugmentationConfig": "augmentation"}
        places |= {"EvaluationConfig": "evaluation", "HubConfig": "hub", "Provenance": "provenance"}
        known = [*inspect.signature(trainer).parameters]
        close = difflib.get_close_matches(name, known, n=1)
        hint = "."
        if name in ELSEWHERE:
            hint = f": {ELSEWHERE[name]}."
        elif group:
            hint = f": it is a setting, `{places[group]}={group}({name}=...)`."
        elif close:
            hint = f". Did you mean `{close[0]}`?"
        raise TypeError(f"{trainer.__name__} has no argument `{name}`{hint}")


def _named(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str | int | float) else f"an object of {type(value).__name__}"
