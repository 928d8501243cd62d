"""The result of `cps-hf compare`: three networks scored on the same images, as JSON and as text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset

from ..data import LabelEncoding
from ..data.streams import EvaluationStream
from ..files import write_atomically
from ..inference.ensemble import Ensemble, check_classes
from ..metrics.bootstrap import ImageCounts
from ..metrics.mean_iou import IoUCounter
from ..metrics.scored import is_missing
from ..training import comparison
from ..training.reporting import without_nan

RESULT, REPORT = "comparison.json", "comparison.md"
WORDS = comparison.Words(
    "The unlabeled images",
    "mean IoU",
    "With the unlabeled images",
    "that of the control, which trained on the labels alone for the same time",
)
CONTROL, EQUAL_TIME, METHOD = "supervised", "supervised_equal_time", "semi_supervised"


class Part(NamedTuple):
    """One network of the comparison.

    Args:
        folder: where it was exported.
        seconds: of training, without evaluation and saving; of all networks that were trained with it.
        steps: optimizer steps.
    """

    folder: Path
    seconds: float
    steps: int


def count_by_image(
    folders: Sequence[Path],
    dataset: Dataset | IterableDataset,
    *,
    num_workers: int,
    device: torch.device,
    trust_remote_code: bool,
    options: Mapping[str, Any],
) -> tuple[list[ImageCounts], list[str]]:
    """Each network's counts per image, and the class names. Every image is read once.

    Args:
        folders: exported networks.
        dataset: with "image" and "label".
        options: of `Ensemble.logits`.

    Raises:
        ValueError: an image cannot be read, or the networks and the labels have different classes.
    """
    networks = Ensemble.from_pretrained([*map(str, folders)], device=device, trust_remote_code=trust_remote_code)
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    if encoding is not None:
        check_classes(encoding.names, networks.id2label, f"The labels and {networks.sources[0]}")
    names = [*networks.id2label.values()]
    matrices: list[list[torch.Tensor]] = [[] for _ in folders]
    stream = EvaluationStream(dataset, num_labels=len(names), num_workers=num_workers)
    for sample in (sample for batch in stream for sample in batch):
        predictions = networks.predict_each(sample["image"], **options)
        for own, prediction in zip(matrices, predictions, strict=False):  # the last one is their mean
            one = IoUCounter(len(names))
            one.add(prediction=prediction, reference=sample["label"])
            own.append(one.confusion_matrix)
    return [ImageCounts.of(torch.stack(own).numpy()) for own in matrices], names


def write(
    out: Path,
    parts: Mapping[str, Part],
    counts: Mapping[str, ImageCounts],
    names: Sequence[str],
    *,
    method: str,
    images: str,
) -> dict[str, Any]:
    """Write comparison.md and comparison.json, and return the content of the latter.

    The difference is between the method's network and the one trained on the labels alone for the same time. A
    difference to the control that the method started from would include the effect of more training.

    Args:
        parts, counts: of `CONTROL`, `EQUAL_TIME` and `METHOD`.
        names: of the classes.
        method: the objective's name.
        images: how the text refers to the images.
    """
    entries: dict[str, dict[str, Any]] = {
        name: {"mean_iou": counts[name].mean_iou(), "seconds": part.seconds, "steps": part.steps}
        for name, part in parts.items()
    }
    entries[METHOD]["method"] = method
    found = comparison.describe(counts[EQUAL_TIME], counts[METHOD], names)
    content = without_nan({**entries, "difference": found["difference"], "images": found["images"]})
    write_atomically(out / REPORT, in_words(entries, found, images=images))
    write_atomically(out / RESULT, json.dumps(content, indent=1))  # last: it marks the comparison as done
    return content


def in_words(entries: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any], *, images: str) -> str:
    """The answer, the three networks and, from ten images on, a line per class, as Markdown.

    Args:
        entries: what comparison.json contains for each network.
        found: `comparison.describe` of the two networks that are compared.
    """
    method = entries[METHOD]["method"]
    rows = {
        CONTROL: "labels alone, first stage",
        EQUAL_TIME: "labels alone, for as long",
        METHOD: f"with unlabeled images, {method}",
    }
    head = f"{'network':<22}{'mean IoU':>9}{'steps':>7}{'seconds':>9}"
    lines = [head, "-" * len(head)]
    for name, what in rows.items():
        score = "-" if is_missing(entries[name]["mean_iou"]) else f"{100 * entries[name]['mean_iou']:.1f} %"
        lines.append(f"{name:<22}{score:>9}{entries[name]['steps']:>7}{entries[name]['seconds']:>9.0f}  {what}")
    gained = 100 * (entries[METHOD]["mean_iou"] - entries[CONTROL]["mean_iou"])
    return "\n".join(
        [
            "# Did the unlabeled images help?",
            "",
            comparison.in_words(WORDS, found, images=images),
            "",
            f"The control is {EQUAL_TIME}. Compared with {CONTROL}, which {METHOD} started from, mean IoU is "
            f"{abs(gained):.1f} points {'lower' if gained < 0 else 'higher'}; that includes the effect of more "
            "training. Each score is that of one exported network (branch 0) at its last step.",
            "",
            "```",
            *lines,
            *(["", comparison.table(found)] if found["verdict"] != comparison.TOO_FEW else []),
            "```",
            "",
        ]
    )


def plain(markdown: str, width: int) -> str:
    """The text of `in_words` for a console: without Markdown's marks, paragraphs wrapped to `width` columns."""
    lines: list[str] = []
    verbatim = False
    for line in markdown.splitlines():
        if line == "```":
            verbatim = not verbatim
        elif verbatim or not line:
            lines.append(line)
        else:
            lines += textwrap.wrap(line.removeprefix("# "), width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).rstrip()
