"""Keeps a run's numbers sound: values that are not finite never reach a weight, and collapsed branches are
detected."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpointing.checkpoints import newest_checkpoint
from ..config import CPSConfig
from ..files import share_weights
from ..functional import IGNORE_INDEX, Logits, StridedLogits, class_counts, pseudo_label
from ..objectives import Branch, LabeledBatch, Objective, ObjectiveOutput
from .batches import MicroBatch
from .sharding import gathered
from .state import RunState

logger = logging.getLogger(__name__)

ONE_CLASS = "one_class_branch_"
PIXELS = "class_pixels_"
"""The prefix of "labels" and "pseudo_labels": a vector with the pixels of each class in a step."""
MAX_OVERFLOWS = 25
"""After this many steps in a row with non-finite gradients, fp16's loss scale, which starts at 65536 and is halved
each time, is 0.002, so they are not caused by overflow."""


class Verdict(NamedTuple):
    """What the host learns about a step. It is the same on all processes."""

    finite: bool
    norms: list[float]  # of each branch's gradient
    stop: bool  # whether some process received a stop signal


class Guard:
    """Runs between the backward pass and the optimizer step: clips gradients and stops values that are not finite.

    `args.max_skipped_steps` steps with such values are skipped; the next one is an error.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, args: CPSConfig, state: RunState):
        self.accelerator, self.module, self.args, self.state = accelerator, module, args, state
        self._overflows = 0  # steps in a row that fp16's scaler skipped
        self._parameters = [[*branch.parameters()] for branch in module.branches]  # traversing them takes a GPU a ms
        self._buffers: list[Tensor] = []

    def before_step(self) -> None:
        """Keep batch norm's statistics, which a forward pass changes, if the step may have to be undone."""
        if self.args.max_skipped_steps:
            self._buffers = [buffer.clone() for buffer in self.module.buffers()]

    def judge(self, optimizer, *, told_to_stop: bool) -> Verdict:
        """Clip each branch's gradient and check the step's numbers, which are only counted if they are finite.

        This is the step's only host read. With fp16, the scaler skips non-finite gradients, up to `MAX_OVERFLOWS`
        times in a row; a non-finite loss is never skipped by it. The state's averages contain the step's "loss" and
        its parts.
        """
        averages = self.state.averages
        self.accelerator.unscale_gradients(optimizer)
        names = [f"grad_norm_branch_{index}" for index in range(len(self.module.branches))]
        for name, of_branch in zip(names, self._parameters, strict=True):
            parameters = [p for p in of_branch if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            if self.args.max_grad_norm:
                nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
            averages.add({name: gathered(norm)})
        averages.add({"told_to_stop": torch.full((), float(told_to_stop), device=self.accelerator.device)})
        seen = averages.end_step(self.accelerator)
        stop = seen.pop("told_to_stop") > 0
        norms = [seen[name] for name in names]
        sound = all(map(math.isfinite, norms))
        if self.accelerator.scaler is not None:
            self._overflows = 0 if sound else self._overflows + 1
            sound = self._overflows < MAX_OVERFLOWS
        finite = sound and math.isfinite(seen["loss"])
        if finite:
            averages.keep(seen)
        return Verdict(finite, norms, stop)

    def reject(
        self, step: int, verdict: Verdict, micro_batches: Sequence[MicroBatch], outputs: Sequence[ObjectiveOutput]
    ) -> None:
        """Save the batch, then undo the step or end the run. All processes must call it.

        Raises:
            FloatingPointError: on all processes; names the loss parts, branches and samples.
        """
        folder = Path(self.args.output_dir) / f"bad_batch-{step}"
        reports = [report(batch, output) for batch, output in zip(micro_batches, outputs, strict=True)]
        process = self.accelerator.process_index
        try:
            save_bad_batch(folder, process, micro_batches, {"step": step, "norms": verdict.norms, "batches": reports})
        except Exception as error:  # report the numbers even if saving fails (safetensors has its own error type)
            logger.warning("The bad batch cannot be saved in %s: %s.", folder, error)
        everywhere = gather_object([{"process": process, **entry} for entry in reports])
        found = _describe(everywhere, verdict.norms)
        if self._overflows >= MAX_OVERFLOWS:
            found += f"; so it was in {self._overflows} steps in a row, at every loss scale"
        if self.state.skipped_steps < self.args.max_skipped_steps:
            self._undo()
            count = f"{self.state.skipped_steps} of at most {self.args.max_skipped_steps} (`max_skipped_steps`)"
            logger.warning("Step %d: %s. It is skipped, %s; its batch is in %s.", step, found, count, folder)
            return
        skipped = f" {self.state.skipped_steps} steps were skipped before." if self.state.skipped_steps else ""
        raise FloatingPointError(
            f"Step {step}: {found}. Nothing was updated.{skipped} The batch is saved in {folder}. Lower "
            "`learning_rate`, set `max_grad_norm`, or use bf16 instead of fp16. If the sample is bad, fix it, or "
            "skip a few such steps with `max_skipped_steps`. The newest checkpoint is complete: "
            f"{newest_checkpoint(self.args.output_dir) or 'there is none yet'}."
        )

    def _undo(self) -> None:
        self.state.skipped_steps += 1
        for buffer, kept in zip(self.module.buffers(), self._buffers, strict=True):
            buffer.copy_(kept)
        if self.accelerator.scaler is not None:  # the gradients were unscaled, and no step will reset that
            self.accelerator.scaler.update()


def report(batch: MicroBatch, output: ObjectiveOutput) -> dict[str, Any]:
    """The samples of a micro-batch and its results, as JSON values (NaN and infinity as text)."""
    values = {"loss": output.loss.detach(), **output.logs}
    return {
        "ids": batch.ids,
        "values": {
            name: _as_json(float(value)) for name, value in values.items() if not name.startswith((ONE_CLASS, PIXELS))
        },
    }


def save_bad_batch(folder: Path, process: int, micro_batches: Sequence[MicroBatch], facts: Mapping[str, Any]) -> None:
    """Write `process_<rank>.safetensors`, every tensor as the objective received it, named
    `<micro-batch>.labeled.pixel_values` etc., and `process_<rank>.json`, the facts."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{index}.{kind}.{name}": tensor.detach().cpu().contiguous().clone()  # counts are views of one tensor
        for index, batch in enumerate(micro_batches)
        for kind, part in (("labeled", batch.labeled), ("unlabeled", batch.unlabeled))
        if part is not None
        for name, tensor in part.tensors().items()
    }
    save_file(tensors, folder / f"process_{process}.safetensors")
    facts = {**facts, "norms": [_as_json(norm) for norm in facts["norms"]]}
    readable = folder / f"process_{process}.json"
    readable.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    share_weights(folder, like=readable)


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _describe(reports: Sequence[Mapping[str, Any]], norms: Sequence[float]) -> str:
    """What is not finite: parts of the loss, with their samples; gradients by branch."""
    found = []
    branches = [f"branch {index}" for index, norm in enumerate(norms) if not math.isfinite(norm)]
    if branches:
        found.append(f"the gradient of {' and '.join(branches)} is not finite")
    for entry in reports:
        bad = [name for name, value in entry["values"].items() if isinstance(value, str)]
        if bad:
            found.append(f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} not finite {_where(entry)}")
    if not any(isinstance(value, str) for entry in reports for value in entry["values"].values()):
        found += [f"the loss is finite {_where(entry)}" for entry in reports]
    return "; ".join(found)


def _where(entry: Mapping[str, Any]) -> str:
    ids = ", ".join(f"{kind} {', '.join(names)}" for kind, names in entry["ids"].items())
    values = ", ".join(f"{name} {float(value):.4g}" for name, value in entry["values"].items())
    return f"on process {entry['process']} ({values}; samples: {ids})"


# ------------------------------------------------------------------------------------------------ predicted classes


class Watched:
    """A network wrapper that records which classes are predicted for unlabeled images, and how large the share of one
    class is.

    It looks at every fourth logit of every fourth row. If a pass also contains labeled images, they count too.

    Args:
        least_confidence: predictions with a lower probability are not pseudo labels.

    Attributes:
        sure: the confident predictions, 255 elsewhere and on padding, of passes with gradient (true) and without.
        num_labels: the number of classes, after the first pass.
    """

    def __init__(self, network: Branch, labeled_images: Tensor, *, least_confidence: float = 0.0):
        self.network, self.labeled_images, self.least_confidence = network, labeled_images, least_confidence
        self.sure: dict[bool, list[Tensor]] = {True: [], False: []}
        self.num_labels = 0
        self._labels: list[Tensor] = []

    def __call__(self, pixel_values: Tensor, **options) -> Logits:
        logits = self.network(pixel_values, **options)
        self.num_labels = (logits.values if isinstance(logits, StridedLogits) else logits).shape[1]
        if pixel_values is not self.labeled_images:
            values = (logits.coarse() if isinstance(logits, StridedLogits) else logits).detach()
            sample = values[..., ::4, ::4]
            self._labels.append(sample.argmax(1).flatten())
            sure = pseudo_label(sample, confidence_threshold=self.least_confidence)
            padding = (F.interpolate(pixel_values, size=values.shape[-2:])[..., ::4, ::4] == 0).all(1)
            self.sure[torch.is_grad_enabled()].append(sure.masked_fill(padding, IGNORE_INDEX).flatten())
        return logits

    def one_class(self) -> Tensor | None:
        """1.0 or 0.0, a scalar; `None` if the branch saw no unlabeled image."""
        share = self.commonest_class()
        return None if share is None else (share == 1).float()

    def commonest_class(self) -> Tensor | None:
        """The share of the most common class among all predictions, a scalar; `None` as in `one_class`."""
        if not self._labels:
            return None
        labels = torch.cat(self._labels)
        # Not with bincount, which would make the host wait for a GPU.
        counts = (labels[:, None] == torch.arange(self.num_labels, device=labels.device)).sum(0)
        return counts.max() / labels.numel()


def watch(networks: Sequence[Branch], labeled: LabeledBatch, objective: Objective | None = None) -> list[Watched]:
    """Wrap the networks of one call of the training module."""
    least = 0.0 if objective is None else objective.least_confidence
    return [Watched(network, labeled.pixel_values, least_confidence=least) for network in networks]


def with_class_pixels(
    output: ObjectiveOutput, watched: Sequence[Watched], labels: Tensor, given: Tensor | None = None
) -> ObjectiveOutput:
    """Add to the output how many pixels each class has in the pseudo labels and in the labels (B, H, W), both sampled.

    Pseudo labels are the given ones (B, H, W) that were made before training; otherwise the networks' predictions for
    unlabeled images without gradient; or, if the method has no such pass, all their predictions for these images.
    """
    found = [] if given is None else [given[:, ::4, ::4].flatten()]
    found = found or [one for network in watched for one in network.sure[False]]
    found = found or [one for network in watched for one in network.sure[True]]
    if not found:
        return output
    num_labels = max(network.num_labels for network in watched)
    counts = {"pseudo_labels": torch.cat(found), "labels": labels[:, ::4, ::4]}
    noted = {f"{PIXELS}{what}": class_counts(one, num_labels) for what, one in counts.items()}
    return output._replace(logs={**output.logs, **noted})


def with_one_class(output: ObjectiveOutput, watched: Sequence[Watched]) -> ObjectiveOutput:
    """Add what the branches recorded to the output's logs, with which it is averaged and read at no extra cost.

    "commonest_class" is that of the branch with the largest share.
    """
    noted = {f"{ONE_CLASS}{index}": branch.one_class() for index, branch in enumerate(watched)}
    shares = [share for branch in watched if (share := branch.commonest_class()) is not None]
    if shares:
        noted["commonest_class"] = torch.stack(shares).max()
    return output._replace(logs={**output.logs, **{k: v for k, v in noted.items() if v is not None}})
