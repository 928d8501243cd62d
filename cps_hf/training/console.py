"""The lines that a run prints during training."""

from __future__ import annotations

import math
from collections.abc import Mapping

# The name of a number in a log record, and in the printed line.
_NAMES = {"learning_rate": "lr", "images_per_second": "img/s"}


def log_line(record: Mapping[str, float], where: str) -> str:
    """The numbers of a log record as a line, for outputs without a progress bar.

    Args:
        where: the step, the stage and the time left, from `place`.
    """
    parts = [f"{_NAMES.get(name, name.replace('_', ' '))} {_number(name, value)}" for name, value in _shown(record)]
    if "agreement" in record:
        parts.append(agreement(record["agreement"], record.get("commonest_class")))
    return f"{where}: {', '.join(parts)}"


def evaluation_line(metrics: Mapping[str, float], where: str, prefix: str = "eval") -> str:
    """The mean IoU of every network and, if there are two, their agreement. Empty if there is no score.

    Args:
        metrics: the result of `CPSTrainer.evaluate`.
        where: as in `log_line`.
    """
    start, end = f"{prefix}_", "_mean_iou"
    rows = [name.removeprefix(start).removesuffix(end) for name in metrics if name.endswith(end)]
    scores = {row: metrics[f"{start}{row}{end}"] for row in rows if f"{start}{row}{end}" in metrics}
    said = [f"{row.replace('_', ' ')} {percent(value)}" for row, value in scores.items()]
    parts = [f"mean IoU {', '.join(said)}"] if said else []
    if f"{start}agreement" in metrics:
        parts.append(agreement(metrics[f"{start}agreement"], metrics.get(f"{start}commonest_class")))
    return f"{where}: {'; '.join(parts)}" if said else ""


def agreement(share: float, commonest: float | None) -> str:
    """How far the branches agree, and the share of their predictions in one class: branches that predict the same
    class everywhere agree on everything."""
    suffix = "" if commonest is None else f", with {percent(commonest, 1)} of predictions in one class"
    return f"the branches agree on {percent(share, 1)} of unlabeled pixels{suffix}"


def place(step: int, max_steps: int, stage: str, seconds_left: float | None) -> str:
    """ "step 50 of 800, stage 1/2, 3 min left in this stage".

    Args:
        stage: the stage of the step; empty if there is only one.
        seconds_left: seconds left in the stage; `None` if not known yet.
    """
    parts = [f"step {step} of {max_steps}", *([stage] if stage else [])]
    if seconds_left:
        parts.append(f"{duration(seconds_left)} left{' in this stage' if stage else ''}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """ "45 s", "3 min", "2 h 05 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def _shown(record: Mapping[str, float]) -> list[tuple[str, float]]:
    hidden = ("agreement", "commonest_class", "stage")  # these are described in words
    return [(name, value) for name, value in record.items() if name not in hidden and "norm" not in name]


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name.endswith(("epoch", "second")) else f"{value:.4g}"
