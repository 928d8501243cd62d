"""Did the unlabeled images help? Compares the supervised stage's networks with the second stage's, image by image.

The comparison uses the counts that `Evaluator.image_counts` keeps of two evaluations of the same images. The result is
a difference with its 95 % interval (`cps_hf.metrics.bootstrap`), and whether it is beyond chance.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics.bootstrap import MINIMUM_IMAGES, ImageCounts, Interval, images_needed, paired_bootstrap
from ..metrics.scored import is_missing

VERDICTS = {1: "better", 0: "within chance", -1: "worse"}
TOO_FEW = "too few images"
NAMED = 6  # how many classes a sentence names


def pack(counts: ImageCounts) -> dict[str, Any]:
    """Convert to JSON values for checkpoints. Most counts are 0 and take little space."""
    values = np.stack([counts.correct, counts.truth, counts.predicted]).astype("<i8")
    return {"shape": list(values.shape), "zlib": base64.b64encode(zlib.compress(values.tobytes())).decode()}


def unpack(packed: Mapping[str, Any]) -> ImageCounts:
    """The inverse of `pack`."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(packed["zlib"])), "<i8")
    return ImageCounts(*values.astype(np.int64).reshape(packed["shape"]))


def compare(before: Mapping[str, ImageCounts], after: Mapping[str, ImageCounts], names: Sequence[str]) -> dict:
    """Compare every row that both have, branch 0 first. Empty if there is none.

    Args:
        before, after: by row, the counts of the supervised networks and of the networks trained from them, on the same
            images.
        names: the class names.

    Returns:
        The value of "comparison" in results.json: "images"; "branches", by row what `describe` returns;
        "images_needed"; "sentence". Scores and differences are fractions.
    """
    rows = {row: describe(before[row], after[row], names) for row in after if row in before}
    if not rows:
        return {}
    first = next(iter(rows.values()))
    return {
        "images": first["images"],
        "branches": rows,
        "images_needed": first["images_needed"],
        "sentence": in_words("The second stage", next(iter(rows)).replace("_", " "), first),
    }


def describe(before: ImageCounts, after: ImageCounts, names: Sequence[str]) -> dict[str, Any]:
    """Compare two networks.

    Returns:
        "before" and "after": the mean IoU of each; "difference": {"mean_iou", "low", "high"}, after minus before;
        "verdict": "better", "worse", "within chance" or "too few images"; "classes": a list of {"name", "difference",
        "low", "high", "images", "verdict"}, where images counts those in which the class occurs or is predicted;
        "images"; "images_needed": how many images would be enough to detect the difference.
    """
    found = paired_bootstrap(before, after)
    return {
        "before": before.mean_iou(),
        "after": after.mean_iou(),
        "difference": {"mean_iou": found.difference, "low": found.low, "high": found.high},
        "verdict": _verdict(found),
        "classes": [
            {"name": name, "difference": one.difference, "low": one.low, "high": one.high, "images": one.images}
            | {"verdict": _verdict(one)}
            for name, one in zip(names, found.by_class, strict=True)
        ],
        "images": found.images,
        "images_needed": images_needed(found),
    }


def _verdict(interval: Interval) -> str:
    return TOO_FEW if interval.images < MINIMUM_IMAGES else VERDICTS[interval.beyond_chance]


def in_words(what: str, whose: str, found: Mapping[str, Any], *, images: str = "validation images") -> str:
    """One sentence, e.g. "The second stage changed branch 0's mean IoU by +2.8 points, from 61.2 % to 64.0 % (95 %
    interval +1.1 to +4.4, 50 validation images), which is beyond chance; by class: car +5.0 (+1.2 to +8.8)."

    Args:
        what: the cause of the difference.
        whose: the network.
        found: the result of `describe`.
        images: what to call the images.
    """
    scores = f"from {_percent(found['before'])} to {_percent(found['after'])}"
    count = found["images"]
    noun = images if count != 1 else images.removesuffix("s")
    if found["verdict"] == TOO_FEW:
        return (
            f"{what} changed {whose}'s mean IoU by {_points(found['difference']['mean_iou'])}, {scores}, but {count} "
            f"{noun} cannot show whether that is beyond chance: about {found['images_needed']} would."
        )
    low, high = (_signed(found["difference"][end]) for end in ("low", "high"))
    interval = f"95 % interval {low} to {high}, {count} {noun}"
    if found["verdict"] == VERDICTS[0]:
        verdict = f"which may be chance: about {found['images_needed']} images would tell"
    else:
        verdict = "which is beyond chance"
    said = f"{what} changed {whose}'s mean IoU by {_points(found['difference']['mean_iou'])}, {scores} ({interval}), "
    return f"{said}{verdict}{_classes_in_words(found['classes'])}."


def _classes_in_words(classes: Sequence[Mapping[str, Any]]) -> str:
    """ "; beyond chance by class: car +5.0 (+1.2 to +8.8)", largest difference first."""
    certain = [one for one in classes if one["verdict"] in (VERDICTS[1], VERDICTS[-1])]
    certain.sort(key=lambda one: -abs(one["difference"]))
    if not certain:
        return "; no single class changed beyond chance"
    shown = [
        f"{one['name']} {_signed(one['difference'])} ({_signed(one['low'])} to {_signed(one['high'])})"
        for one in certain[:NAMED]
    ]
    more = f" and {len(certain) - NAMED} more" if len(certain) > NAMED else ""
    return f"; beyond chance by class: {', '.join(shown)}{more}"


def table(found: Mapping[str, Any]) -> str:
    """A line per class: the difference of its IoU in points, the interval and the verdict.

    Args:
        found: the result of `describe`.
    """
    width = max(16, *(len(one["name"]) for one in found["classes"]))
    lines = [f"{'IoU, points':<{width}}{'difference':>12}{'95 % interval':>20}  "]
    lines.append("-" * len(lines[0]))
    mean = {"name": "mIoU", "difference": found["difference"]["mean_iou"], "verdict": found["verdict"]}
    for one in [*found["classes"], mean | {end: found["difference"][end] for end in ("low", "high")}]:
        interval = "-" if is_missing(one["low"]) else f"{_signed(one['low'])} to {_signed(one['high'])}"
        verdict = "" if is_missing(one["difference"]) else one["verdict"]
        lines.append(f"{one['name']:<{width}}{_signed(one['difference']):>12}{interval:>20}  {verdict}".rstrip())
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if is_missing(value) else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return f"{_signed(value)} points"


def _signed(value: float | None) -> str:
    return "-" if is_missing(value) else f"{100 * value:+.1f}"
