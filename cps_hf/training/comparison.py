"""Did the unlabeled images help? Compares the supervised stage's networks with the second stage's, image by image.

The comparison uses the counts that `Evaluator.image_counts` keeps of two evaluations of the same images. The result is
a difference with its 95 % interval (`cps_hf.metrics.bootstrap`), and whether it is beyond chance.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
        "sentence": in_words(second_stage(next(iter(rows))), first),
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


class Words(NamedTuple):
    """How a sentence names what is compared.

    Args:
        cause: what changed the score.
        score: the score and, if there are several, the network.
        after: when the second score is obtained.
        before: the first score, after "higher than" or "lower than".
    """

    cause: str
    score: str
    after: str
    before: str


def second_stage(row: str) -> Words:
    """For the second stage of a run against its first, by a branch."""
    return Words("The second stage", f"{row.replace('_', ' ')}'s mean IoU", "After the second stage", "before")


def in_words(words: Words, found: Mapping[str, Any], *, images: str = "validation images") -> str:
    """One or two sentences, e.g. "The unlabeled images raised mean IoU by 2.1 points, from 61.2 % to 63.3 % (95 %
    interval +0.3 to +3.9, 25 validation images): beyond chance. Beyond chance by class: car +5.0 (+1.2 to +8.8)."

    Args:
        words: what is compared.
        found: the result of `describe`.
        images: what to call the images.
    """
    before, after = _percent(found["before"]), _percent(found["after"])
    count, needed = found["images"], found["images_needed"]
    noun = images if count != 1 else images.replace("images", "image", 1)
    difference, low, high = (found["difference"][name] for name in ("mean_iou", "low", "high"))
    if found["verdict"] == TOO_FEW or is_missing(difference):
        cause = words.cause[0].lower() + words.cause[1:]
        return (
            f"Whether {cause} helped cannot be told from {count} {noun} ({words.score}: {after} instead of {before}); "
            f"about {needed} would be enough."
        )
    points = f"{100 * abs(difference):.1f} points"
    interval = f"95 % interval {_signed(low)} to {_signed(high)}, {count} {noun}"
    if found["verdict"] == VERDICTS[0]:
        said = (
            f"{words.after}, {words.score} is {points} {'lower' if difference < 0 else 'higher'} than {words.before}"
        )
        said = f"{said}, {after} instead of {before} ({interval}): within chance. About {needed} images would tell."
    else:
        said = f"{words.cause} {'lowered' if difference < 0 else 'raised'} {words.score} by {points}"
        said = f"{said}, from {before} to {after} ({interval}): beyond chance."
    return f"{said} {_classes_in_words(found['classes'])}"


def _classes_in_words(classes: Sequence[Mapping[str, Any]]) -> str:
    """ "Beyond chance by class: car +5.0 (+1.2 to +8.8).", largest difference first."""
    certain = [one for one in classes if one["verdict"] in (VERDICTS[1], VERDICTS[-1])]
    certain.sort(key=lambda one: -abs(one["difference"]))
    if not certain:
        return "No single class changed beyond chance."
    shown = [
        f"{one['name']} {_signed(one['difference'])} ({_signed(one['low'])} to {_signed(one['high'])})"
        for one in certain[:NAMED]
    ]
    more = f" and {len(certain) - NAMED} more" if len(certain) > NAMED else ""
    return f"Beyond chance by class: {', '.join(shown)}{more}."


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


def _signed(value: float | None) -> str:
    return "-" if is_missing(value) else f"{100 * value:+.1f}"
