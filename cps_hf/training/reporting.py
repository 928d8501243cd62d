"""What a run says while it goes on and when it ends: metrics.jsonl, trackers, the progress bar, tables."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..files import write_atomically


class RunLog:
    """Takes a record a log and gives it to metrics.jsonl, to every tracker and to the progress bar.

    Args:
        first_step: 0, or the step that is resumed from: later lines of both files are taken out.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str, *, max_steps: int, first_step: int, show_bar: bool):
        self.accelerator = accelerator
        self.path = Path(output_dir) / "metrics.jsonl"
        self.bad_samples = self.path.with_name("bad_samples.jsonl")
        if accelerator.is_main_process and first_step:
            for path in (self.path, self.bad_samples):
                if path.exists():
                    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
                    write_atomically(path, "".join(kept))
        accelerator.wait_for_everyone()  # before anyone adds a line
        self.bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (show_bar and accelerator.is_main_process),
        )

    def write(self, record: Mapping[str, Any], step: int) -> None:
        """One line, one call a tracker. Floats only: numbers that trackers can draw."""
        if self.accelerator.is_main_process:
            finite = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        self.accelerator.log(dict(record), step=step)

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def write_bad_samples(self, bad_samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """A line a bad sample, by every process: one short append each, so lines do not mix."""
        with open(self.bad_samples, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **bad}) + "\n" for bad in bad_samples)

    def show(self, record: Mapping[str, float]) -> None:
        """The newest numbers behind the progress bar."""
        short = {"learning_rate": "lr", "images_per_second": "img/s"}
        self.bar.set_postfix(
            {short.get(k, k.replace("_loss", "")): f"{v:.3g}" for k, v in record.items() if "norm" not in k},
            refresh=False,
        )


class Averages:
    """Means over steps of named scalars. A step's are kept on the device until its one reading."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.steps = 0
        self._step: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add a share of this step's values."""
        for name, value in values.items():
            value = value.detach().float() * share
            self._step[name] = self._step[name] + value if name in self._step else value

    def end_step(self, accelerator: Accelerator) -> dict[str, float]:
        """This step's values, averaged over all processes: one all-reduce and one transfer to the host."""
        means = accelerator.reduce(torch.stack([*self._step.values()]), "mean")
        values = dict(zip(self._step, means.tolist(), strict=True))
        self._step = {}
        return values

    def keep(self, values: Mapping[str, float]) -> None:
        """Let a step's values count."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The means over the steps since the last reading."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.sums = state["steps"], dict(state["sums"])


class Stopwatch:
    """Images a second while training, and the seconds of the whole run; evaluating and saving do not count."""

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
        """Of all steps, also those before a resumption: "seconds", "cpu_seconds" (of this process, all its threads,
        without its data workers: other jobs on the machine do not count) and "images_per_second"."""
        seconds = self.total["seconds"]
        return {
            "seconds": seconds,
            "cpu_seconds": self.total["cpu_seconds"],
            "images_per_second": self.total["images"] / seconds if seconds else 0.0,
        }


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: on a GPU by tensors there, else by this process (without its data workers).

    None where the system does not say: it is read from Linux's /proc.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def scores_table(scores: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Per-class IoU and the means in percent, a column a branch. Classes without a pixel show a dash, and where there
    are any, a line says over how many the means are."""
    columns = [row.replace("_", " ") for row in scores]
    width = max([len(name) for name in names] + [16])
    lines = [f"{'IoU, %':<{width}}" + "".join(f"{c:>11}" for c in columns)]
    rule = "-" * len(lines[0])
    lines.append(rule)
    for index, name in enumerate(names):
        lines.append(_line(name, [s["per_category_iou"][index] for s in scores.values()], width))
    lines.append(rule)
    for key, title in (
        ("mean_iou", "mIoU"),
        ("mean_accuracy", "mean accuracy"),
        ("overall_accuracy", "pixel accuracy"),
    ):
        lines.append(_line(title, [s[key] for s in scores.values()], width))
        if any(over_classes(s, key) for s in scores.values()):
            counts = (f"{scored_classes(s, key)} of {len(names)}" for s in scores.values())
            lines.append(f"{'  over classes':<{width}}" + "".join(f"{count:>11}" for count in counts))
    return "\n".join(lines)


def scored_classes(scores: Mapping[str, Any], metric: str = "mean_iou") -> int:
    """How many classes a mean is over: an IoU needs a pixel in the labels or the predictions, an accuracy in the
    labels."""
    return sum(not _is_nan(value) for value in _by_class(scores, metric))


def over_classes(scores: Mapping[str, Any], metric: str = "mean_iou") -> str:
    """ " over 17 of 19 classes"; nothing where a mean is over all that are named."""
    scored, named = scored_classes(scores, metric), len(_by_class(scores, metric))
    return "" if scored == named else f" over {scored} of {named} classes"


def _by_class(scores: Mapping[str, Any], metric: str) -> Sequence[float | None]:
    return scores.get(f"per_category_{metric.removeprefix('mean_')}", [])


def mean_iou_in_words(scores: Mapping[str, Any], digits: int = 2) -> str:
    """ "mIoU 53.10 %", and over how many classes where it is not over all."""
    value = scores["mean_iou"]
    return f"mIoU {'-' if _is_nan(value) else f'{100 * value:.{digits}f} %'}{over_classes(scores)}"


def _is_nan(value: float | None) -> bool:
    return value is None or math.isnan(value)  # None: as results.json has it


def class_table(scores: Mapping[str, Any], names: Sequence[str]) -> str:
    """Every class's IoU, accuracy and boundary IoU in percent, then the means, of one row of scores."""
    columns = {"IoU": "iou", "accuracy": "accuracy", "boundary IoU": "boundary_iou"}
    width = max([len(name) for name in names] + [16])
    lines = [f"{'%':<{width}}" + "".join(f"{title:>14}" for title in columns)]
    rule = "-" * len(lines[0])
    lines.append(rule)
    for index, name in enumerate(names):
        values = [scores[f"per_category_{key}"][index] for key in columns.values()]
        lines.append(_line(name, values, width, column=14))
    lines.append(rule)
    lines.append(_line("mean", [scores[f"mean_{key}"] for key in columns.values()], width, column=14))
    if any(over_classes(scores, f"mean_{key}") for key in columns.values()):
        counts = (f"{scored_classes(scores, f'mean_{key}')} of {len(names)}" for key in columns.values())
        lines.append(f"{'  over classes':<{width}}" + "".join(f"{count:>14}" for count in counts))
    lines.append(_line("pixel accuracy", [scores["overall_accuracy"]], width, column=28))
    return "\n".join(lines)


def _line(title: str, values: Sequence[float], width: int, column: int = 11) -> str:
    shown = ("-" if math.isnan(value) else f"{100 * value:.2f}" for value in values)
    return f"{title:<{width}}" + "".join(f"{value:>{column}}" for value in shown)


def without_nan(value: Any) -> Any:
    """NaN (a class without a pixel) as None, at any depth: results.json is strict JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return value
