"""`cps-hf compare`: did the unlabeled images help, or would the labels alone do as well in the same time?

Two runs. `OUT/semi_supervised` is the usual one: its first stage trains a pair of networks on the labels alone, its
second stage adds the unlabeled images. `OUT/supervised_equal_time` trains a single network on the labels alone for as
long as the first run took. From each run, the exported branch 0 of the last step is scored once, at the end: nothing
is selected on the images used for scoring. Run the same command again to resume an interrupted comparison.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from ..checkpointing.resume import on_main_process
from ..data import LabelEncoding
from ..data.layout import find_layout
from ..data.table import build as build_table
from ..files import write_atomically
from ..inference.windows import default_stride
from ..metrics.bootstrap import MINIMUM_IMAGES
from ..objectives import OBJECTIVES, Supervised
from ..planning import Timings
from ..report.page import write_report
from ..training import setup
from ..training.console import duration
from . import main as command_line
from . import parser, planned
from .comparison_report import CONTROL, EQUAL_TIME, METHOD, REPORT, RESULT, Part, count_by_image, plain, write
from .console import print_any_text, terminal_width
from .datasets import TrainingSets, load_data, warn_of_shared_images
from .errors import user_errors
from .main import COMMANDS
from .settings import Settings
from .timing import TimeLimit, time_steps
from .train import (
    PLAN_TITLE,
    USER_ERRORS,
    build,
    check_unlabeled,
    folder_as_options,
    join_processes,
    parse,
)

logger = logging.getLogger(__name__)

COMMAND = "command.json"
"""The command line that the comparison was started with."""
PLAN = "plan.yaml"
"""All settings of the two-stage run, so that a restart does not make a new plan."""
TIMING = "timing.json"
"""How long a step of the single network takes, and so how many steps it gets."""
TIMED_STEPS = 20
SHARE = 0.48
"""Share of the remaining `--time` for the two-stage run. The other run takes as long; scoring gets the rest."""
AFTER_TRAINING, AFTER_SHARE = 10.0, 0.06
"""Approximate seconds of a run after its last step, or this share of `--time` if larger: longer runs take longer. Used
if no step was timed, as when an interrupted comparison is resumed."""
LAYOUT_OPTIONS = ("images", "masks", "image_suffix", "mask_suffix")
SAVES = 8
"""Checkpoints per run unless the command line says otherwise: a killed run loses at most an eighth."""
FIRST = (
    *("time", "dataset", "unlabeled_root", "validation", "class_names", "backbone"),
    *("output_dir", "eval_dir", "seed", "max_steps"),
)


@dataclass(kw_only=True)
class ComparisonConfig:
    """What the networks are scored on.

    Comparison
        eval_dir: a folder of images and masks, read once at the end. Its masks use the same codes as those of the
            labeled images. If None, the validation images are used.
    """

    eval_dir: str | None = None


@dataclass(kw_only=True)
class ComparisonSettings(Settings):
    """The settings of a run and of the comparison."""

    comparison: ComparisonConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the comparison of a command line. Returns the content of comparison.json."""
    began = command_line.STARTED or time.monotonic()
    print_any_text()
    options = {"command": "compare", "description": COMMANDS["compare"], "first": FIRST}
    settings = parse(argv, ComparisonSettings, **options)
    out = Path(settings.args.output_dir)
    with user_errors(out, USER_ERRORS):
        is_main = join_processes(settings.args.ddp_timeout)
        check(settings)
        found, timings = on_main_process(PartialState(), lambda: begin(out, folder_as_options(argv))), None
        if found is None:
            if on_main_process(PartialState(), (out / PLAN).is_file):
                settings = parse(["--config", str(out / PLAN)], ComparisonSettings, **options)
                settings = settings.with_values(output_dir=str(out))
                sets = load_data(settings.data)
            else:
                with nothing_left(out):
                    sets = load_data(settings.data)
                    settings, timings = plan(settings, sets, typed_names(argv), began)
                on_main_process(PartialState(), lambda: write_atomically(out / PLAN, settings.to_yaml()))
            clock = Clock(settings, began, given="max_steps" in typed_names(argv))
            found = compare(settings, sets, out, clock, timings)
    if is_main:
        print(f"\n{plain((out / REPORT).read_text(encoding='utf-8'), terminal_width())}\n\nWritten to {out}:")
        for path in sorted(out.iterdir()):
            print(f"  {path.name}{'/' if path.is_dir() else ''}")
        with user_errors(out):  # add the answer, unknown when that run ended
            write_report(out / METHOD)
    PartialState().destroy_process_group()
    return found


def check(settings: ComparisonSettings) -> None:
    """Check what can be checked before the data is loaded.

    Raises:
        ValueError: an option is invalid.
    """
    planned.check(settings, plans=True)
    setup.check_trackers(settings.args)
    for name, given in (("smoke", settings.data.smoke), ("push_to_hub", settings.hub.push_to_hub)):
        if given:
            raise ValueError(f"`compare` has no option `--{name}`. Remove it.")
    folder = settings.comparison.eval_dir
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"`--eval_dir {folder}`: no such folder. Give a folder of images and masks.")


def begin(out: Path, argv: Sequence[str]) -> dict[str, Any] | None:
    """Claim the folder for this comparison. Returns the content of comparison.json if the comparison is done.

    Raises:
        ValueError: the folder contains something else, or a comparison with other options.
    """
    words = {name: value for name, value in parser.read_words(argv).items() if name != "output_dir"}
    if not (out / COMMAND).is_file() and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"`--output_dir {out}` is not empty and contains no comparison. Choose another folder.")
    if not (out / PLAN).is_file():  # nothing was trained, so nothing is lost
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / COMMAND, json.dumps(words, indent=1))
    before = json.loads((out / COMMAND).read_text(encoding="utf-8"))
    changed = [name for name in {**before, **words} if before.get(name) != words.get(name)]
    if changed:
        old, new = (f"{found[changed[0]]!r}" if changed[0] in found else "not given" for found in (before, words))
        raise ValueError(
            f"`--output_dir {out}` contains a comparison with other options: `--{changed[0]}` was {old}, and is {new} "
            "now. Give the same options to resume it, or choose another folder."
        )
    done = out / RESULT
    return json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """A context before the first file of a comparison. If it fails, the claimed folder is removed."""
    try:
        yield
    except BaseException:
        if PartialState().is_main_process and [path.name for path in out.iterdir()] == [COMMAND]:
            (out / COMMAND).unlink()
            out.rmdir()
        raise


def typed_names(argv: Sequence[str]) -> set[str]:
    """The options given by a command line and its file; includes "config" if there is a file."""
    words = folder_as_options(argv)
    return parser.given_names(words) | (parser.read_words(words).keys() & {"config"})


def plan(
    settings: ComparisonSettings, sets: TrainingSets, typed: Collection[str], began: float
) -> tuple[ComparisonSettings, Timings | None]:
    """The settings of the two-stage run, and the trial that its length was fitted by, if any. Options that were not
    given are chosen as for `train DIR`, except with a recipe or drawn scenes, whose settings are complete.

    Raises:
        ValueError: there are no unlabeled images, the method does not use them, or the supervised stage is disabled.
    """
    is_main = PartialState().is_main_process
    if sets.found is not None and is_main:
        print(f"\n{sets.found.table(terminal_width())}\n", flush=True)
    if not settings.objective.views:
        method = type(settings.objective).__name__
        raise ValueError(f"`compare` needs an objective that learns from unlabeled images, got {method}.")
    check_unlabeled(settings, sets)
    settings, timings = settings.with_values(baseline=True), None
    if "config" not in typed and not settings.data.dataset.endswith("_scenes") and _names_of(sets) is not None:
        settings, found = planned.complete(settings, sets, typed, began=began, share=SHARE)
        timings = found.timings
        if is_main and found.choices:
            print(f"{PLAN_TITLE}\n\n{found.table(terminal_width())}\n", flush=True)
    elif settings.plan.time is not None:
        raise ValueError(
            "`time` needs a plan, and no plan is made with `--config`, drawn scenes or labels without class names. "
            "Set the length with `max_steps`."
        )
    return restartable(planned.with_baseline(settings)), timings


def _names_of(sets: TrainingSets) -> Sequence[str] | None:
    encoding = LabelEncoding.from_feature(sets.labeled.features["label"])
    return encoding.names if encoding else None


def compare(
    settings: ComparisonSettings, sets: TrainingSets, out: Path, clock: Clock, timings: Timings | None
) -> dict[str, Any]:
    """Run both trainings and score them. Called by all processes.

    Args:
        timings: the trial by which the length of the two-stage run was chosen; `None` if it was given or is resumed.

    Raises:
        ValueError: as raised by a run, or there is nothing to score on.
    """
    judged = evaluation_set(settings, sets)
    if isinstance(judged, Dataset) and len(judged) < MINIMUM_IMAGES:
        where = "validation images" if settings.comparison.eval_dir is None else "images in `--eval_dir`"
        logger.warning(
            "%d %s are too few to tell a difference from chance: at least %d are needed. Hold out more with "
            "`--validation`, or set a folder of images and masks with `--eval_dir`.",
            *(len(judged), where, MINIMUM_IMAGES),
        )
    announce(1, METHOD, "labels and unlabeled images")
    limit = clock.limit(SHARE, timings)
    semi, results = run(settings.with_values(output_dir=str(out / METHOD)), sets, limit)
    control = out / METHOD / "supervised_0"
    if not control.is_dir():
        raise ValueError(
            f"{out / METHOD} ended before its supervised stage did, so there is no control. Increase `--time`."
        )
    seconds, steps = results["training"]["supervised_seconds"], settings.args.pretrain_steps
    announce(2, EQUAL_TIME, f"labels alone, for the same {duration(semi.seconds)} of training")
    equal_time = run_equal_time(settings, sets, out, semi.seconds, clock)
    parts = {CONTROL: Part(control, seconds, steps), EQUAL_TIME: equal_time, METHOD: semi}
    return on_main_process(PartialState(), lambda: score(out, parts, settings, judged))


def announce(number: int, folder: str, what: str) -> None:
    """Print which run begins."""
    if PartialState().is_main_process:
        print(f"Run {number} of 2, {folder}/: {what}.\n", flush=True)


class Clock(NamedTuple):
    """The time of the command.

    Args:
        settings: of the command.
        began: when the command began (`time.monotonic`).
        given: whether `--max_steps` was given.
    """

    settings: ComparisonSettings
    began: float
    given: bool = False

    def limit(self, share: float, timings: Timings | None = None, *, scoring: float = 0.0) -> list[TrainerCallback]:
        """The callback that ends a run at its share of the remaining `--time`. Single process only, as for `train`.

        Args:
            timings: the trial of this run, if any.
            scoring: seconds for scoring the networks afterwards.
        """
        time_given = self.settings.plan.time
        if time_given is None or PartialState().num_processes > 1:
            return []
        now, whole = time.monotonic(), planned.seconds_of(time_given)
        left = whole - (now - self.began)
        after = max(AFTER_TRAINING, AFTER_SHARE * whole) if timings is None else timings.evaluation + timings.end
        return [TimeLimit(time_given, now + share * left, after + scoring, timings, given=self.given)]


def restartable(settings: ComparisonSettings) -> ComparisonSettings:
    """The settings with checkpoints to resume from."""
    args = settings.args
    values: dict[str, Any] = {"resume_from_checkpoint": "auto"}
    if args.save_steps is None:
        values |= {"save_steps": max(1, args.max_steps // SAVES), "save_total_limit": args.save_total_limit or 1}
    return settings.with_values(**values)


def evaluation_set(settings: ComparisonSettings, sets: TrainingSets) -> Dataset | IterableDataset:
    """The data set that the networks are scored on.

    Raises:
        ValueError: there is none, or an image of `--eval_dir` has no mask.
    """
    folder = settings.comparison.eval_dir
    if folder is not None:
        options = settings.data.load_options
        names = {name: options[name] for name in LAYOUT_OPTIONS if name in options}
        pairs = [pair for pair in find_layout(folder, **names).pairs if pair.mask is not None]
        columns = ([pair.id for pair in pairs], [pair.image for pair in pairs], [pair.mask for pair in pairs])
        dataset = build_table(*columns, sets.labeled.features["label"])
        warn_of_shared_images(sets.labeled, sets.unlabeled, dataset)
        return dataset
    if sets.evaluation is None:
        raise ValueError("There are no validation images to score the networks on. Set `--eval_dir`.")
    return sets.evaluation


# --------------------------------------------------------------------------------------------------- the two runs


def run(
    settings: ComparisonSettings, sets: TrainingSets, callbacks: Sequence[TrainerCallback]
) -> tuple[Part, dict[str, Any]]:
    """A run and its results.json. Resumes an interrupted run; skips a finished one."""
    folder = Path(settings.args.output_dir)
    results = on_main_process(PartialState(), lambda: finished(folder, sets))
    if results is None:
        results = build(settings, sets, callbacks)[0].train()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Part(folder / "branch_0", results["training"]["seconds"], results["steps"]), results


def finished(folder: Path, sets: TrainingSets) -> dict[str, Any] | None:
    """The results of a finished and scored run; None if it has not finished."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return results if results["final"] or sets.evaluation is None else None


def run_equal_time(
    settings: ComparisonSettings,
    sets: TrainingSets,
    out: Path,
    seconds: float,
    clock: Clock,
) -> Part:
    """Train a single network on the labels alone for `seconds`; a timed trial gives the number of steps."""
    sets = sets._replace(unlabeled=None)
    settings = single_network(settings).with_values(output_dir=str(out / EQUAL_TIME))

    def make_trainer(clock, **values):
        trial = settings.with_values(**values)
        return planned.make_trainer(trial, sets, planned.models_of(trial), [clock])

    known, timings = out / TIMING, None
    if not on_main_process(PartialState(), known.is_file):
        if PartialState().is_main_process:
            print(f"Timing {TIMED_STEPS} steps of a single network ...", flush=True)
        timings = time_steps(make_trainer, False, timed=TIMED_STEPS)
        a_step = timings.first_stage
        found = {"seconds_per_step": a_step, "seconds": seconds, "steps": max(1, round(seconds / a_step))}
        on_main_process(PartialState(), lambda: write_atomically(known, json.dumps(found, indent=1)))
    steps = json.loads(known.read_text(encoding="utf-8"))["steps"]
    logger.info("%d steps of a single network take as long.", steps)
    # Three networks are scored; the trial scored one and its average.
    limit = clock.limit(1.0, timings, scoring=0.0 if timings is None else 1.5 * timings.evaluation)
    return run(restartable(settings.with_values(max_steps=steps, save_steps=None)), sets, limit)[0]


def single_network(settings: ComparisonSettings) -> ComparisonSettings:
    """The same settings for one network without unlabeled images."""
    model = settings.model_config
    backbone = model.backbone[0] if isinstance(model.backbone, list) else model.backbone
    args = replace(
        settings.args,
        pretrain_steps=None,
        second_stage_learning_rate_factor=1.0,
        per_device_unlabeled_batch_size=None,
        eval_steps=None,
    )
    return replace(
        settings,
        objective=Supervised.of(settings.objective),
        data=replace(settings.data, models=settings.data.models[:1]),
        plan=replace(settings.plan, baseline=None),
        model_config=replace(model, num_branches=1, backbone=backbone),
        args=args,
    )


# ----------------------------------------------------------------------------------------------------- the scores


def score(out: Path, parts: dict[str, Part], settings: ComparisonSettings, judged: Any) -> dict[str, Any]:
    """Score all networks and write the answer. Returns the content of comparison.json."""
    counts, names = count_by_image(
        [part.folder for part in parts.values()],
        judged,
        num_workers=settings.args.dataloader_num_workers,
        device=PartialState().device,
        trust_remote_code=settings.model_config.trust_remote_code,
        options=prediction_options(settings),
    )
    method = next((name for name, cls in OBJECTIVES.items() if type(settings.objective) is cls), "custom")
    folder = settings.comparison.eval_dir
    images = "validation images" if folder is None else f"images of {folder}"
    return write(out, parts, dict(zip(parts, counts, strict=True)), names, method=method, images=images)


def prediction_options(settings: Settings) -> dict[str, Any]:
    """The runs' evaluation settings as options of `Ensemble.logits`. Exported networks have their image processors."""
    evaluation = settings.evaluation
    if evaluation.eval_mode == "whole":
        return {"mode": "whole"}
    crop = tuple(evaluation.eval_crop_size or settings.augmentation.crop_size)
    stride = tuple(evaluation.eval_stride or default_stride(crop))
    batch = evaluation.per_device_eval_batch_size
    return {"mode": "sliding", "crop_size": crop, "stride": stride, "window_batch_size": batch}
