"""The page that describes a branch on the Hub: metadata for machines, and a card for people."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from numbers import Real
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..metrics.scored import over_classes
from .loading import auto_class_name

_FACTS = (
    *("model_name", "branch", "architecture", "base_model", "license", "id2label", "trust_remote_code", "directory"),
    *("dataset_name", "partition_name", "partition_sha256", "num_labeled", "num_unlabeled", "objective"),
    *("objective_fields", "citation", "settings", "scores", "best", "absent", "step", "eval", "versions"),
    *("picture", "limits"),
)
_CITATION = """@inproceedings{chen2021cps,
  title     = {Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision},
  author    = {Chen, Xiaokang and Yuan, Yuhui and Zeng, Gang and Wang, Jingdong},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2021}
}"""


def render_card(facts: Mapping[str, Any]) -> str:
    """Render the model card: metadata for the Hub, and a page for people. It contains no local paths.

    Args:
        facts: all of
            model_name, branch ("branch_0", ..., "branch_0_average", ..., "teacher"), architecture (the class),
            directory (the folder's name);
            base_model (a name on the Hub or None), license (an identifier or None: `push_branch` then uses the base
            model's); id2label; trust_remote_code (whether code is included);
            dataset_name, partition_name, partition_sha256, num_labeled, num_unlabeled (each may be None);
            objective (its name), objective_fields, citation (BibTeX, may be empty), settings, step, versions: dicts
            of what to print; eval: {"mode": ..., further options};
            scores: network -> {"mean_iou", "per_category_iou", ...}, fractions, at the last step; best: the same at
            the best step, with "step" and "branch", or empty; absent: by "training" and "evaluation", names of
            classes without a pixel there, or empty;
            picture: an image file next to the card, or None; limits: a sentence or None.

    Raises:
        ValueError: a fact is missing or unknown (Jinja would silently leave a gap), the keys of `id2label` are not
            0, 1, ..., or a network's `per_category_iou` has a different number of classes.
    """
    missing, unknown = set(_FACTS) - set(facts), set(facts) - set(_FACTS)
    if missing or unknown:
        raise ValueError(f"Facts of a model card: missing {sorted(missing)}, unknown {sorted(unknown)}.")
    is_best = facts["best"].get("step") == facts["step"]
    own = facts["best"] if is_best else facts["scores"]  # of the step that is exported
    networks = [name for name in own if name not in ("step", "branch")]
    _check_classes(facts["id2label"], {name: own[name] for name in networks})
    citations = [_CITATION, facts["citation"]] if facts["citation"] else [_CITATION]
    card = _template().render(
        card_data=_metadata(facts, own.get(facts["branch"], {})).to_yaml(),
        **{name: _shown(value) for name, value in facts.items() if name not in ("scores", "best", "absent")},
        auto_class=auto_class_name(facts["architecture"]),
        model_id=json.dumps(without_paths(facts["directory"])),
        networks=networks,
        own=own,
        scores=facts["scores"],
        best=facts["best"],
        absent={role: [_shown(name) for name in names] for role, names in facts["absent"].items()},
        citations=[text.strip().replace("```", "'''") for text in dict.fromkeys(citations)],
        percent=_percent,
        over=over_classes,
    )
    return f"{str(ModelCard(card)).rstrip()}\n"


@functools.cache
def _template() -> jinja2.Template:
    """Compiled once. `ModelCard.from_template` compiles it for each card, which takes longer than all the rest."""
    return jinja2.Template((files("cps_hf") / "model_card_template.md").read_text(encoding="utf-8"))


def _check_classes(id2label: Mapping[int, str], scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Otherwise a table would show dashes, as for classes that do not occur."""
    count = len(id2label)
    if set(id2label) != set(range(count)):
        raise ValueError(f"`id2label` of a model card must have the keys 0 to {count - 1}, got {[*id2label]}.")
    for name, score in scores.items():
        found = len(score["per_category_iou"])
        if found != count:
            raise ValueError(f"`per_category_iou` of {name} has {found} values for {count} classes.")


def escape_markdown(text: Any) -> str:
    """Escape a text so that a Markdown page or table cell shows it unchanged."""
    text = re.sub(r"([\\`*_\[\]{}|~$#])", r"\\\1", " ".join(str(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _shown(value: Any) -> Any:
    """Facts as the template prints them: all texts escaped and without paths, at any depth; numbers unchanged."""
    if isinstance(value, Mapping):
        return {_shown(name): _shown(item) for name, item in value.items()}
    if value is None or isinstance(value, int | float):
        return value
    return escape_markdown(without_paths(value))


def without_paths(value: Any) -> str:
    """The text as one line, with paths of this machine reduced to names."""
    path = r"""(^|[\s'",(\[=])((?:/|~/|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)(?=\S)[^'",)\]]+)"""
    return re.sub(path, lambda m: m[1] + re.split(r"[/\\]", m[2].rstrip("/\\"))[-1], " ".join(str(value).split()))


def hub_id(name: str | None) -> str | None:
    """`name` if it is a valid id on the Hub, else `None`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _metadata(facts: Mapping[str, Any], own: Mapping[str, Any]) -> ModelCardData:
    dataset = without_paths(facts["dataset_name"]) if facts["dataset_name"] else None
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic Segmentation",
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
            dataset_name=dataset,
            dataset_split="validation",
            metric_type=metric,
            metric_name=name + over_classes(own, metric),
            metric_value=float(own[metric]),  # a numpy float would break the YAML
        )
        for metric, name in (("mean_iou", "mIoU"), ("mean_accuracy", "mean accuracy"))
        if dataset and _is_number(own.get(metric))
    ]
    return ModelCardData(
        model_name=without_paths(facts["model_name"]),
        license=facts["license"] or "unknown",
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=hub_id(facts["base_model"]),
        datasets=[dataset] if dataset and "/" in dataset and hub_id(dataset) else None,  # an id on the Hub
        metrics=["mean_iou"],
        tags=["semantic-segmentation", "semi-supervised-learning", "cross-pseudo-supervision", "cps_hf"],
        eval_results=results or None,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}" if _is_number(value) else "-"
