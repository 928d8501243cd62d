"""Exports one branch as a folder that loads anywhere. `card` writes its page, `push` sends it to the Hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    PreTrainedModel,
    SegformerImageProcessor,
)

from ..files import filled_whole, share_weights
from .card import hub_id, render_card
from .image_processors import SQUARE_MODELS, WINDOW_MODELS, check_processor
from .loading import auto_class_name


def export_branch(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    *,
    state_dict: Mapping[str, Any] | None = None,
    id2label: Mapping[int, str] | None = None,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    do_reduce_labels: bool = False,
    input_shrink: int = 1,
    processing_class: Any | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write what `from_pretrained(directory)` of its Auto class and `pipeline` need, and nothing else.

    The folder is filled under a temporary name and renamed, so it is never half-written. An earlier export of the same
    name is replaced as a whole.

    Args:
        model: one bare branch (`Branch.model`), saved in its own dtype. If its architecture is from this package, its
            code is included.
        state_dict: its full weights, if the model is sharded. If `None`, the model's own.
        id2label: class names for config.json. If `None`, the model's own.
        image_mean, image_std: of the three colours, for images in [0, 1], as in training.
        do_reduce_labels: whether masks were read with 0 as ignored and k as class k - 1.
        input_shrink: the factor by which a DeepLabV3+ must shrink its input, as training did (`eval_shrink`).
        processing_class: an image processor to save, which must do what training did. If `None`, or if its
            post-processing is for the other kind of output (logits, or queries with masks), one is made that
            normalises and does not resize, unless the model only accepts one size.
        card: the facts of `render_card`, to write README.md. If `None`, no README.md. A file under "picture" is
            copied.

    Returns:
        The folder.

    Raises:
        ValueError: `model` is a wrapper, `id2label` has a different number of classes than the model,
            `processing_class` processes images differently from training, or `directory` contains something other than
            an exported model.
    """
    directory = Path(directory)
    _check_export(model, directory, id2label)
    if processing_class is not None:
        check_processor(processing_class, model.config.model_type, image_mean, image_std, reduces=do_reduce_labels)
    if processing_class is None or not _reads_output(processing_class, model):
        processing_class = _image_processor(model, image_mean, image_std, do_reduce_labels)
    with filled_whole(directory, replace=True) as folder:
        # Not model.state_dict(): the names in a file may differ from those in memory.
        model.save_pretrained(folder, state_dict=state_dict)
        config = _rewrite_config(folder / "config.json", id2label, input_shrink)
        processing_class.save_pretrained(folder)
        if card is not None:
            card = {**card, "trust_remote_code": "auto_map" in config}
            if card.get("picture"):
                source = Path(card["picture"])
                card["picture"] = source.name
                shutil.copyfile(source, folder / source.name)
            (folder / "README.md").write_text(render_card(card), encoding="utf-8")
        share_weights(folder, like=folder / "config.json")
    return directory


def _check_export(model: PreTrainedModel, directory: Path, id2label: Mapping[int, str] | None) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`export_branch` needs a bare transformers model, got {type(model).__name__}. Pass `.model` of a Branch, "
            "or `.module` of a model wrapped for several processes."
        )
    if id2label is not None and sorted(id2label) != list(range(model.config.num_labels)):
        raise ValueError(
            f"`id2label` must name the classes 0 to {model.config.num_labels - 1}, as the model has them, "
            f"got {sorted(id2label)}."
        )
    check_target(directory)


def check_target(directory: Path) -> None:
    """Raise a ValueError if a folder contains something other than an exported model."""
    if directory.exists():
        names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        if not directory.is_dir() or (names and "config.json" not in names) or ".git" in names:
            found = ", ".join(names[:4]) or "a file"
            raise ValueError(
                f"{directory} contains files that are not of an exported model ({found}), and exporting would replace "
                "them. Choose a new folder."
            )


def _rewrite_config(path: Path, id2label: Mapping[int, str] | None, input_shrink: int) -> dict[str, Any]:
    """Write class names and the shrink factor to config.json, and remove local paths. The model in memory does not
    change."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if id2label is not None:
        config["id2label"] = {str(index): id2label[index] for index in sorted(id2label)}
        config["label2id"] = {id2label[index]: index for index in sorted(id2label)}
    if input_shrink != 1:
        config["input_shrink"] = input_shrink
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "_name_or_path" in part and (not hub_id(part["_name_or_path"]) or Path(part["_name_or_path"]).exists()):
            del part["_name_or_path"]  # where a backbone's weights came from on this machine
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return config


def _reads_output(processor: Any, model: PreTrainedModel) -> bool:
    """Whether a processor's post-processing matches the model's output: logits, or queries with masks."""
    of_queries = auto_class_name(type(model).__name__) == "AutoModelForUniversalSegmentation"
    processor = getattr(processor, "image_processor", processor)
    return hasattr(processor, "post_process_panoptic_segmentation") == of_queries


def _image_processor(model: PreTrainedModel, image_mean, image_std, do_reduce_labels):
    """The architecture's own processor if its post-processing matches. It does not resize if the model accepts any
    size."""
    kind = model.config.model_type
    numbers = {
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [float(v) for v in image_mean],
        "image_std": [float(v) for v in image_std],
    }
    if kind in WINDOW_MODELS:
        size = {"shortest_edge": _input_size(model)[0], "longest_edge": None}
        return EomtImageProcessor(do_resize=True, size=size, do_split_image=True, do_pad=False, **numbers)
    of_queries = {"mask2former": Mask2FormerImageProcessor, "maskformer": MaskFormerImageProcessor}
    if kind in of_queries:
        return of_queries[kind](do_resize=False, ignore_index=255, do_reduce_labels=do_reduce_labels, **numbers)
    size = None
    if kind in SQUARE_MODELS:
        height, width = _input_size(model)
        size = {"height": height, "width": width}
    return SegformerImageProcessor(
        do_resize=size is not None,  # the default would squash every image to 512 x 512
        **({"size": size} if size else {}),
        do_reduce_labels=do_reduce_labels,
        **numbers,
    )


def _input_size(model: PreTrainedModel) -> tuple[int, int]:
    side = getattr(model.config, "image_size", None) or model.config.backbone_config.image_size
    return (side, side) if isinstance(side, int) else tuple(side)
