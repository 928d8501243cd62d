"""`cps-hf compare`: did the unlabeled images help, or would the labels alone have done as well in the same time?

Two runs. `OUT/semi_supervised` is the usual one: its first stage trains a pair of networks on the labels alone, its
second stage adds the unlabeled images. `OUT/supervised_equal_time` trains a single network on the labels alone for the
whole time that the first run took. Of each, the exported network of branch 0 at its last step is scored once, at the
end: nothing is chosen on the images that it is scored on. The same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..checkpointing.resume import on_main_process
from ..data.folder import load_folder
from ..files import write_atomically
from ..inference.windows import default_stride
from ..objectives import OBJECTIVES, Supervised
from ..planning import FIRST_STAGE_SHARE, UNLABELED
from . import parser
from .comparison_report import CONTROL, EQUAL_TIME, METHOD, REPORT, RESULT, Part, count_by_image, write
from .console import print_any_text
from .datasets import TrainingSets, load_data
from .errors import mendable
from .main import COMMANDS
from .settings import Settings
from .timing import time_steps
from .train import MENDABLE, build, check_before_loading, check_unlabeled, join_processes, parse

logger = logging.getLogger(__name__)

COMMAND = "command.json"
"""The words that a comparison was started with."""
TIMING = "timing.json"
"""How long a step of the single network takes, and so how many it gets."""
TIMED_STEPS = 20
SAVES = 8
"""Checkpoints of each run, where the command line says nothing of them: what a kill costs at most is an eighth."""
FIRST = ("data_root", "unlabeled_root", "partition", "output_dir", "eval_dir", "max_steps", "pretrain_steps", "seed")


@dataclass(kw_only=True)
class ComparisonConfig:
    """What the networks are scored on.

    Comparison
        eval_dir: a folder of images and masks that is read once, at the end; its masks are coded as the labeled
            images' are. None: the validation images.
    """

    eval_dir: str | None = None


@dataclass(kw_only=True)
class ComparisonSettings(Settings):
    """Those of a run, and of the comparison."""

    comparison: ComparisonConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Compare as a command line says; what comparison.json holds."""
    print_any_text()
    settings = parse(argv, ComparisonSettings, command="compare", description=COMMANDS["compare"], first=FIRST)
    out = Path(settings.args.output_dir)
    with mendable(out, MENDABLE):
        is_main = join_processes(settings.args.ddp_timeout)
        found = on_main_process(PartialState(), lambda: begin(out, argv)) or compare(settings, out)
    if is_main:
        print(f"\n{(out / REPORT).read_text(encoding='utf-8')}\nWritten to {out}:")
        for path in sorted(out.iterdir()):
            print(f"  {path.name}{'/' if path.is_dir() else ''}")
    PartialState().destroy_process_group()
    return found


def begin(out: Path, argv: Sequence[str]) -> dict[str, Any] | None:
    """Make the folder this command's; what comparison.json holds where all is done.

    Raises:
        ValueError: the folder holds something else, or a comparison with other options.
    """
    words = {name: value for name, value in parser.read_words(argv).items() if name != "output_dir"}
    if not (out / COMMAND).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"`--output_dir {out}` is not empty, and holds no comparison. Give another folder.")
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / COMMAND, json.dumps(words, indent=1))
    before = json.loads((out / COMMAND).read_text(encoding="utf-8"))
    changed = [name for name in {**before, **words} if before.get(name) != words.get(name)]
    if changed:
        old, new = (f"{found[changed[0]]!r}" if changed[0] in found else "not given" for found in (before, words))
        raise ValueError(
            f"`--output_dir {out}` holds a comparison with other options: `--{changed[0]}` was {old}, and is {new} "
            "now. Give the same options to go on with it, or another folder."
        )
    done = out / RESULT
    return json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None


def compare(settings: ComparisonSettings, out: Path) -> dict[str, Any]:
    """Both runs and the scores. Called by all processes.

    Raises:
        ValueError: as of a run; or there is nothing to compare, or nothing to score on.
    """
    sets = load_data(settings.data)
    check_unlabeled(settings, sets)
    settings = restartable(two_stages(settings))
    judged = evaluation_set(settings, sets)
    semi, results = run(settings.with_values(output_dir=str(out / METHOD)), sets)
    seconds, steps = results["training"]["supervised_seconds"], settings.args.pretrain_steps
    control = Part(out / METHOD / "supervised_0", seconds, steps)
    equal_time = run_equal_time(settings, sets, out, semi.seconds)
    parts = {CONTROL: control, EQUAL_TIME: equal_time, METHOD: semi}
    return on_main_process(PartialState(), lambda: score(out, parts, settings, judged))


def two_stages(settings: ComparisonSettings) -> ComparisonSettings:
    """The settings with a supervised stage, two thirds of the steps where the command line does not say how long.

    Raises:
        ValueError: the method learns from no unlabeled images, or there is to be no supervised stage.
    """
    args, method = settings.args, type(settings.objective).__name__
    if not settings.objective.views:
        raise ValueError(
            f"`compare` needs an objective that learns from unlabeled images, got {method}. Leave out `--objective`."
        )
    if args.pretrain_steps == 0:
        raise ValueError("`compare` needs a supervised stage, which is the control. Leave out `--pretrain_steps 0`.")
    if args.pretrain_steps:
        return settings
    first = max(1, round(FIRST_STAGE_SHARE * args.max_steps))
    factor = UNLABELED["second_stage_learning_rate_factor"]
    return settings.with_values(pretrain_steps=first, second_stage_learning_rate_factor=factor)


def restartable(settings: ComparisonSettings) -> ComparisonSettings:
    """With checkpoints to go on from."""
    args = settings.args
    values: dict[str, Any] = {"resume_from_checkpoint": "auto"}
    if args.save_steps is None:
        values |= {"save_steps": max(1, args.max_steps // SAVES), "save_total_limit": args.save_total_limit or 1}
    return settings.with_values(**values)


def evaluation_set(settings: ComparisonSettings, sets: TrainingSets) -> Dataset | IterableDataset:
    """What the networks are scored on.

    Raises:
        ValueError: there is nothing, or an image of `--eval_dir` has no mask.
    """
    if settings.comparison.eval_dir is not None:
        dataset = load_folder(settings.comparison.eval_dir)
        return dataset.cast_column("label", sets.labeled.features["label"])
    if sets.evaluation is None:
        raise ValueError("There are no validation images to score the networks on. Give some with `--eval_dir`.")
    return sets.evaluation


# --------------------------------------------------------------------------------------------------- the two runs


def run(settings: ComparisonSettings, sets: TrainingSets) -> tuple[Part, dict[str, Any]]:
    """A run, which goes on where it was stopped and is not run again where it is done; and its results.json."""
    folder = Path(settings.args.output_dir)
    results = on_main_process(PartialState(), lambda: finished(folder, settings, sets))
    if results is None:
        check_before_loading(settings)
        results = build(settings, sets)[0].train()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Part(folder / "branch_0", results["training"]["seconds"], results["steps"]), results


def finished(folder: Path, settings: ComparisonSettings, sets: TrainingSets) -> dict[str, Any] | None:
    """The results of a run that was trained to its last step and scored there; None: it was not."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    scored = bool(results["final"]) or sets.evaluation is None
    return results if results["steps"] == settings.args.max_steps and scored else None


def run_equal_time(settings: ComparisonSettings, sets: TrainingSets, out: Path, seconds: float) -> Part:
    """A single network on the labels alone. It gets as many steps as take so many seconds, by a timed trial."""
    sets = sets._replace(unlabeled=None)
    settings = single_network(settings).with_values(output_dir=str(out / EQUAL_TIME))

    def make_trainer(clock, **values):
        trainer, _ = build(settings.with_values(**values), sets)
        trainer.add_callback(clock)
        return trainer

    known = out / TIMING
    if not on_main_process(PartialState(), known.is_file):
        a_step = time_steps(make_trainer, two_stages=False, timed=TIMED_STEPS).first_stage
        found = {"seconds_per_step": a_step, "seconds": seconds, "steps": max(1, round(seconds / a_step))}
        on_main_process(PartialState(), lambda: write_atomically(known, json.dumps(found, indent=1)))
    steps = json.loads(known.read_text(encoding="utf-8"))["steps"]
    logger.info("%d steps of a single network on the labels alone take as long, %.0f s.", steps, seconds)
    return run(restartable(settings.with_values(max_steps=steps, save_steps=None)), sets)[0]


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
        model_config=replace(model, num_branches=1, backbone=backbone),
        args=args,
    )


# ----------------------------------------------------------------------------------------------------- the scores


def score(out: Path, parts: dict[str, Part], settings: ComparisonSettings, judged: Any) -> dict[str, Any]:
    """Score all networks and write the answer; what comparison.json holds."""
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
    """How the runs evaluate, as options of `Ensemble.logits`."""
    evaluation = settings.evaluation
    if evaluation.eval_mode == "whole":
        return {"mode": "whole", "own_size": True}
    crop = tuple(evaluation.eval_crop_size or settings.augmentation.crop_size)
    stride = tuple(evaluation.eval_stride or default_stride(crop))
    batch = evaluation.per_device_eval_batch_size
    return {"mode": "sliding", "crop_size": crop, "stride": stride, "window_batch_size": batch}
