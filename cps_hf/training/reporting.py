"""What a run reports during training and at its end: metrics.jsonl, trackers, the console, tables."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..files import write_atomically
from ..metrics.scored import is_missing, over_classes, scored_classes
from .console import evaluation_line, log_line, place
from .processes import together

logger = logging.getLogger(__name__)


class RunLog:
    """Writes each log record to metrics.jsonl, to every tracker and to the console: the progress bar or, if the output
    is not a terminal, a line.

    None of these stops a run: a failed write is a warning, and lines are written later if possible.

    Args:
        first_step: 0, or the step to resume from. Later lines of both files are removed.
        lines: the number of lines in metrics.jsonl when that step was saved; `None` if unknown.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str,
        *,
        max_steps: int,
        first_step: int,
        show_bar: bool,
        lines: int | None = None,
    ):
        self.accelerator = accelerator
        self.path = Path(output_dir) / "metrics.jsonl"
        self.bad_samples = self.path.with_name("bad_samples.jsonl")
        with together(accelerator):  # before anyone adds a line
            if accelerator.is_main_process and first_step:
                for path, count in ((self.path, lines), (self.bad_samples, None)):
                    if path.exists():
                        kept = [line for line, record in _records(path) if record["step"] <= first_step]
                        write_atomically(path, "".join(f"{line}\n" for line in kept[:count]))
        self._unwritten: dict[Path, list[str]] = {self.path: [], self.bad_samples: []}
        self._silenced: set[str] = set()
        self.bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            disable=_disabled(show_bar and accelerator.is_main_process),
            **_size(sys.stderr),
        )
        self._max_steps, self._stage = max_steps, ""
        self._since, self._last_step = (time.monotonic(), first_step), max_steps  # of the stage

    def write(self, record: Mapping[str, Any], step: int) -> None:
        """Write one line and call each tracker once. Floats only: numbers that trackers can plot."""
        if not self.accelerator.is_main_process:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
        self._append(self.path, [{"step": step, **finite}])
        for tracker in self.accelerator.trackers:
            try:
                tracker.log(dict(record), step=step)
            except Exception as error:
                self._warn_once(f"The tracker {tracker.name} did not accept the record of step {step}", error)

    def read(self) -> list[dict[str, Any]]:
        """All lines written so far."""
        return [record for _, record in _records(self.path)] if self.path.exists() else []

    def write_bad_samples(self, bad_samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write a line per bad sample, from any process. Each is one short append, so lines do not interleave."""
        self._append(self.bad_samples, [{"step": step, **bad} for bad in bad_samples])

    def advance(self) -> None:
        """Count a completed step."""
        with contextlib.suppress(OSError, ValueError):  # a closed terminal is no reason to stop
            self.bar.update()

    def begin_stage(self, stage: str, step: int, last_step: int, max_steps: int) -> None:
        """From here until `last_step`, steps belong to this stage.

        Args:
            stage: what lines and the progress bar call the stage; empty if there is only one.
            max_steps: the run's last step, which may have changed since the previous stage.
        """
        self._stage, self._since, self._last_step = stage, (time.monotonic(), step), last_step
        self._max_steps = self.bar.total = max_steps
        self.bar.set_description(stage or None)

    def end(self, step: int) -> None:
        """Training ends with this step, perhaps before `max_steps`. Nothing is left to wait for."""
        self._last_step = self.bar.total = step

    def show(self, record: Mapping[str, float], step: int) -> None:
        """Show the newest numbers in the progress bar, or in a line. Scores are always a line."""
        since, first = self._since
        done, left = step - first, self._last_step - step
        where = place(step, self._max_steps, self._stage, done and (time.monotonic() - since) / done * left)
        if "loss" not in record:
            self.say(evaluation_line(record, where))
        elif self.bar.disable:
            self.say(log_line(record, where))
        else:
            self.bar.set_postfix_str(self._fitting(record), refresh=False)

    def _fitting(self, record: Mapping[str, float]) -> str:
        """The first numbers of a record, as many as leave the progress bar ten columns."""
        short = {"learning_rate": "lr", "images_per_second": "img/s", "commonest_class": "one class"}
        numbers = [
            f"{short.get(name, name.replace('_loss', ''))}={value:.3g}"
            for name, value in record.items()
            if "norm" not in name and name != "stage"
        ]
        shown = self.bar.format_dict
        if shown["ncols"] is not None:  # it is None in a notebook
            without = tqdm.format_meter(**shown | {"ncols": None, "postfix": None})  # its bar has ten columns
            while numbers and len(without) + len(", ") + len(", ".join(numbers)) > shown["ncols"]:
                numbers.pop()
        return ", ".join(numbers)

    def say(self, line: str) -> None:
        """Print a line on the console, above the progress bar if there is one.

        Nothing is printed if the package only logs errors (`logging.getLogger("cps_hf").setLevel(logging.ERROR)`).
        """
        if line and self.accelerator.is_main_process and logger.isEnabledFor(logging.WARNING):
            with contextlib.suppress(OSError, ValueError):  # the terminal is closed
                tqdm.write(line, file=sys.stderr)
                sys.stderr.flush()

    def beside_bar(self) -> contextlib.AbstractContextManager:
        """A context in which console logs appear above the progress bar, if there is one."""
        streams = [getattr(handler, "stream", None) for handler in logging.root.handlers]
        redirects = not self.bar.disable and any(stream in (sys.stdout, sys.stderr) for stream in streams)
        return logging_redirect_tqdm() if redirects else contextlib.nullcontext()

    def close(self) -> None:
        """Close the trackers and the bar, and try one last time to write pending lines."""
        for path, lines in self._unwritten.items():
            if lines:
                self._append(path, [])
            if lines:
                logger.warning("%d lines are missing in %s.", len(lines), path)
        with contextlib.suppress(OSError, ValueError):
            self.bar.close()
        # Not accelerator.end_training(), which would destroy the process group.
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("The tracker %s failed to close: %s: %s", tracker.name, type(error).__name__, error)

    def _append(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records, after those that could not be written before. One process writes metrics.jsonl, in whole
        lines."""
        lines = self._unwritten[path]
        lines += [json.dumps(record) + "\n" for record in records]
        data = "".join(lines).encode()
        try:
            with open(path, "ab", buffering=0) as file:  # a buffer would be written again when the file is closed
                size = os.fstat(file.fileno()).st_size
                written = file.write(data)
                if written < len(data):
                    if path == self.path:
                        file.truncate(size)  # half a line would corrupt the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._warn_once(f"{path} could not be written; this will be tried again", error)
        else:
            lines.clear()

    def _warn_once(self, what: str, error: Exception) -> None:
        """Warn once per kind of failure, since it may repeat at every step."""
        kind = f"{what.split(' of step')[0]} {type(error).__name__}"
        if kind not in self._silenced:
            self._silenced.add(kind)
            logger.warning("%s (reported once): %s: %s", what, type(error).__name__, error)


def _disabled(show: bool) -> bool | None:
    """Whether to disable the progress bar. `None` lets tqdm decide, which only draws it on a terminal; in a notebook,
    the bar is a widget."""
    if not show:
        return True
    return False if any("notebook" in cls.__module__ for cls in tqdm.__mro__) else None


def _size(stream: TextIO) -> dict[str, Any]:
    """tqdm's options for the size of its bar: the terminal's. Some notebooks and build servers report 0, which means
    unknown; tqdm would draw nothing."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (AttributeError, OSError, ValueError):  # not a terminal
        return {"dynamic_ncols": True}
    return {"dynamic_ncols": True} if columns and lines else {"ncols": columns or 80, "nrows": lines or 24}


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line with its record. Partial lines, from a killed process or a full disk, are skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            found.append((line, record))
        else:
            logger.warning("%s has an incomplete line, which is skipped: %.60r", path, line)
    return found


class Averages:
    """Means over steps of named scalars, and sums over steps of named counts. A step's values stay on the device until
    they are read once.

    A step that has no value of a name, as when the run stops reading unlabeled images, is not part of that mean.

    Attributes:
        counts: the counts of the steps since `take_counts`.
    """

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, list[float]] = {}
        self.steps = 0
        self._steps_of: dict[str, int] = {}  # how many steps had a value of each sum
        self._step: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add a share of this step's values: scalars, or vectors of counts."""
        for name, value in values.items():
            value = value.detach().float() * share
            self._step[name] = self._step[name] + value if name in self._step else value

    def end_step(self, accelerator: Accelerator) -> dict[str, Any]:
        """This step's values, averaged over all processes: one all-reduce and one transfer to the host."""
        means = accelerator.reduce(torch.cat([value.flatten() for value in self._step.values()]), "mean")
        numbers = iter(means.tolist())
        values = {
            name: [*islice(numbers, len(value))] if value.dim() else next(numbers)
            for name, value in self._step.items()
        }
        self._step = {}
        return values

    def keep(self, values: Mapping[str, Any]) -> None:
        """Include a step's values in the means."""
        for name, value in values.items():
            if isinstance(value, list):
                before = self.counts.get(name, [0.0] * len(value))
                self.counts[name] = [a + b for a, b in zip(before, value, strict=True)]
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value
                self._steps_of[name] = self._steps_of.get(name, 0) + 1
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The means over the steps since the last call."""
        means = {name: value / self._steps_of[name] for name, value in self.sums.items()}
        self.sums, self._steps_of, self.steps = {}, {}, 0
        return means

    def take_counts(self) -> dict[str, list[float]]:
        """The counts since the last call."""
        counts, self.counts = self.counts, {}
        return counts

    def state_dict(self) -> dict[str, Any]:
        sums, steps_of, counts = (dict(one) for one in (self.sums, self._steps_of, self.counts))
        return {"steps": self.steps, "sums": sums, "steps_of": steps_of, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.sums = state["steps"], dict(state["sums"])
        self._steps_of = dict(state.get("steps_of", dict.fromkeys(self.sums, self.steps)))  # older checkpoints: all
        self.counts = dict(state.get("counts", {}))  # older checkpoints have none


class Stopwatch:
    """Measures training images per second, and the seconds of the whole run. Evaluating and saving are excluded."""

    def __init__(self):
        self.images, self.seconds, self._since = 0, 0.0, (0.0, 0.0)
        self.total = {"images": 0, "seconds": 0.0, "cpu_seconds": 0.0}

    def start(self) -> None:
        self._since = _clocks()

    def stop(self, images: int) -> None:
        seconds, cpu_seconds = (now - then for now, then in zip(_clocks(), self._since, strict=True))
        self.seconds += seconds
        self.images += images
        for name, value in (("images", images), ("seconds", seconds), ("cpu_seconds", cpu_seconds)):
            self.total[name] += value

    def read(self) -> float:
        rate = self.images / self.seconds if self.seconds else 0.0
        self.images, self.seconds = 0, 0.0
        return rate

    def summary(self) -> dict[str, float]:
        """Over all steps, including those before resuming: "seconds", "cpu_seconds" (of this process with all its
        threads, without its data workers, so other jobs on the machine have no effect) and "images_per_second"."""
        seconds = self.total["seconds"]
        return {
            "seconds": seconds,
            "cpu_seconds": self.total["cpu_seconds"],
            "images_per_second": self.total["images"] / seconds if seconds else 0.0,
        }


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def peak_memory(device: torch.device) -> int | None:
    """The peak memory in bytes: on a GPU of its tensors, otherwise of this process (without its data workers).

    `None` if the system does not provide it: it is read from Linux's /proc.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def scores_table(scores: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Per-class IoU and the means in percent, one column per branch. Classes without pixels have a dash; if there are
    any, a line shows how many classes the means are over. Two branches, their averages and the mean fit in 80 columns.
    """
    narrowest = max(10, len(f"{len(names)} of {len(names)}") + 2)
    columns = {row.replace("_", " "): max(narrowest, len(row) + 2) for row in scores}
    widths = [*columns.values()]
    width = max([len(name) for name in names] + [14])
    lines = [f"{'IoU, %':<{width}}" + "".join(f"{name:>{column}}" for name, column in columns.items())]
    rule = "-" * len(lines[0])
    lines.append(rule)
    for index, name in enumerate(names):
        lines.append(_line(name, [s["per_category_iou"][index] for s in scores.values()], width, widths))
    lines.append(rule)
    for key, title in (
        ("mean_iou", "mIoU"),
        ("mean_accuracy", "mean accuracy"),
        ("overall_accuracy", "pixel accuracy"),
    ):
        lines.append(_line(title, [s[key] for s in scores.values()], width, widths))
        if any(over_classes(s, key) for s in scores.values()):
            counts = [f"{scored_classes(s, key)} of {len(names)}" for s in scores.values()]
            cells = "".join(f"{count:>{column}}" for count, column in zip(counts, widths, strict=True))
            lines.append(f"{'  over classes':<{width}}{cells}")
    return "\n".join(lines)


def mean_iou_in_words(scores: Mapping[str, Any], digits: int = 2) -> str:
    """ "mIoU 53.10 %", followed by the number of classes if it is not over all of them."""
    value = scores["mean_iou"]
    return f"mIoU {'-' if is_missing(value) else f'{100 * value:.{digits}f} %'}{over_classes(scores)}"


def class_table(scores: Mapping[str, Any], names: Sequence[str]) -> str:
    """Every class's IoU, accuracy and boundary IoU in percent, then the means, for one row of scores."""
    columns = {"IoU": "iou", "accuracy": "accuracy", "boundary IoU": "boundary_iou"}
    width = max([len(name) for name in names] + [16])
    lines = [f"{'%':<{width}}" + "".join(f"{title:>14}" for title in columns)]
    rule = "-" * len(lines[0])
    lines.append(rule)
    for index, name in enumerate(names):
        values = [scores[f"per_category_{key}"][index] for key in columns.values()]
        lines.append(_line(name, values, width, [14] * len(values)))
    lines.append(rule)
    lines.append(_line("mean", [scores[f"mean_{key}"] for key in columns.values()], width, [14] * len(columns)))
    if any(over_classes(scores, f"mean_{key}") for key in columns.values()):
        counts = (f"{scored_classes(scores, f'mean_{key}')} of {len(names)}" for key in columns.values())
        lines.append(f"{'  over classes':<{width}}" + "".join(f"{count:>14}" for count in counts))
    lines.append(_line("pixel accuracy", [scores["overall_accuracy"]], width, [28]))
    return "\n".join(lines)


def _line(title: str, values: Sequence[float], width: int, columns: Sequence[int]) -> str:
    shown = ("-" if math.isnan(value) else f"{100 * value:.2f}" for value in values)
    cells = "".join(f"{value:>{column}}" for value, column in zip(shown, columns, strict=True))
    return f"{title:<{width}}{cells}"


def without_nan(value: Any) -> Any:
    """Replace NaN (a class without pixels) by None at any depth: results.json is strict JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return value
