"""The main job: train two segmentation models on each other's pseudo labels, and keep the better one.

    accelerate launch examples/train_cps.py
        draws street scenes in the Cityscapes layout, takes 12 of 400 images as labeled, and trains two small
        UperNet-ResNets from scratch with CPS + CutMix: a few minutes on two CPU cores.

    accelerate launch examples/train_cps.py --objective supervised --output_dir outputs/supervised
        the same labels and steps without the unlabeled images.

    accelerate launch examples/train_cps.py --dataset cityscapes --data_root DIR --partition cps/cityscapes/1-8 \\
        --models nvidia/mit-b2 --config FILE.yaml
        real data, any model that AutoModelForSemanticSegmentation knows, settings from a file.

    accelerate launch examples/train_cps.py --config examples/configs/voc_cps_cutmix_r50.yaml --smoke
        a recipe at toy size on drawn data, to see in seconds that it runs; without `--smoke` and with `--data_root`
        the recipe itself.

`--help` lists every field. Settings are those of a small demonstration and do not follow the paper's schedule.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import OutOfMemoryError
from transformers import ResNetConfig, UperNetConfig
from transformers.utils import logging as transformers_logging

from cps_hf import CPSConfig, CPSTrainer, Objective
from cps_hf.checkpointing.checkpoints import check_output_dir
from cps_hf.commands import parser as cli
from cps_hf.commands.datasets import LOADERS, find_dataset
from cps_hf.data import partition
from cps_hf.training import setup as assembly
from cps_hf.training.failures import one_line
from cps_hf.training.reporting import scores_table
from cps_hf.training.sharding import refuse_engines

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainArguments(CPSConfig):
    """What this script adds to the trainer's settings.

    Data and models
        dataset: street_scenes, object_scenes (both drawn here), cityscapes, voc, folder or hub.
        data_root: the data set's folder, or its Hub id; for the scenes none: a folder in the Hugging Face cache.
        train_split: the split whose images are divided into labeled and unlabeled ones; for folder, its folder.
        eval_split: the split that scores are computed on.
        load_options: further arguments of the loader, as JSON: {"class_names": "names.json", "reduce_labels": true}.
        partition: which images are labeled: a count (12), a ratio (1-8), a published partition's name, a list file;
            none: 12, or with `unlabeled_root` all.
        partition_seed: which ones, where the partition is a count or a ratio.
        unlabeled_root: for folder and hub: further images, without masks; all of `train_split` is labeled then.
        streaming: read the data set as a stream; then `data_root` is all labeled and needs `unlabeled_root`.
        models: one or more Hub ids, folders or config.json files (a path in a YAML file may be relative to it); none:
            a small UperNet-ResNet, from scratch.
        smoke: the same objective, schedule and model family at toy size on drawn data, for a handful of steps.
    """

    dataset: str = "street_scenes"
    data_root: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    load_options: dict[str, Any] = field(default_factory=dict)
    partition: str | None = None
    partition_seed: int = 0
    unlabeled_root: str | None = None
    streaming: bool = False
    models: list[str] = field(default_factory=list)
    smoke: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.dataset not in LOADERS:
            raise ValueError(f"`dataset` must be one of {', '.join(LOADERS)}, got {self.dataset!r}.")
        if self.data_root is None and not self.smoke and not self.dataset.endswith("_scenes"):
            raise ValueError(f"`dataset={self.dataset}` needs `data_root`.")
        if self.unlabeled_root is not None and self.dataset not in ("folder", "hub"):
            raise ValueError(f"`unlabeled_root` goes with `dataset` folder or hub, got {self.dataset!r}.")
        if self.streaming and self.unlabeled_root is None:
            raise ValueError("`streaming` needs `unlabeled_root`: a stream cannot be divided by ids.")
        if self.unlabeled_root is not None and (self.partition is not None or self.partition_seed != 0):
            raise ValueError(
                "With `unlabeled_root` all of `train_split` is labeled: leave out `partition` and `partition_seed`."
            )
        if self.unlabeled_root is None and self.partition is None:
            self.partition = "12"
        if self.train_split == self.eval_split:
            raise ValueError(
                f"`train_split` and `eval_split` are both {self.eval_split!r}: scores on images that were trained on "
                "say nothing of others."
            )


# Of the demonstration, which draws its data: small enough for two CPU cores and five minutes. The learning rate was
# chosen on supervised training alone (the best of 1e-3, 2e-3, 4e-3, 8e-3); what is CPS's own, on other seeds (7 and 8)
# than those that the README reports.
DEFAULTS = {
    "output_dir": "outputs/train_cps",
    "max_steps": 800,
    "per_device_train_batch_size": 4,
    "optim": "adamw",
    "learning_rate": 4e-3,
    "weight_decay": 0.01,
    "crop_size": [48, 96],
    "random_scale": [0.75, 1.0, 1.25, 1.5],
    "eval_steps": 400,
    "per_device_eval_batch_size": 8,
    "logging_steps": 25,
    "dataloader_num_workers": 1,
    "save_total_limit": 1,
    # The paper has no ramp-up or balance: its networks start from ImageNet, these from nothing.
    "cps": {"weight": 0.5, "ramp_up": 0.3, "class_balance": 0.5},
}

MENDABLE = (ValueError, OSError, FloatingPointError, OutOfMemoryError)
"""What a user can mend is one line, no traceback."""


def load_data(args: TrainArguments):
    """(labeled, unlabeled, evaluation set, partition or None)."""
    with PartialState().main_process_first():  # who may have to draw the scenes
        load, root = find_dataset(args.dataset, args.data_root, args.load_options)
    evaluation = load(root, split=args.eval_split)
    if args.unlabeled_root is not None:
        labeled = load(root, split=args.train_split, streaming=args.streaming)
        split = {} if args.dataset == "folder" else {"split": args.train_split}
        unlabeled = load(args.unlabeled_root, **split, with_labels=False, streaming=args.streaming)
        if args.dataset != "hub":
            warn_of_shared_images(labeled, unlabeled, evaluation)
        return labeled, unlabeled, evaluation, None
    images = load(root, split=args.train_split, with_labels=False)
    if args.partition.startswith("coarse-"):  # all of train is labeled; the unlabeled ones are from train_extra
        images = concatenate_datasets([images, load(root, split="train_extra", with_labels=False)])
    chosen = partition(args.partition, images["id"], seed=args.partition_seed)
    labeled_ids, unlabeled_ids = set(chosen.labeled_ids), set(chosen.unlabeled_ids)
    # On a disk only the labeled images need a label file; the rows of other sets come as they are.
    only = {} if args.dataset == "hub" else {"only_ids": labeled_ids}
    labeled = load(root, split=args.train_split, **only)
    labeled = labeled.select([i for i, name in enumerate(labeled["id"]) if name in labeled_ids])
    unlabeled = images.select([i for i, name in enumerate(images["id"]) if name in unlabeled_ids])
    if args.dataset != "hub":
        warn_of_shared_images(labeled, unlabeled, evaluation)
    return labeled, unlabeled if len(unlabeled) else None, evaluation, chosen


def warn_of_shared_images(labeled, unlabeled, evaluation) -> None:
    """Scores on images that were trained on, and unlabeled images that are no others than the labeled ones.

    Told by the images' files: names may be the same in two folders, and what is stored inside tables has no path.
    """
    trained, more, judged = map(image_files, (labeled, unlabeled, evaluation))
    for name, files in (("labeled", trained), ("unlabeled", more)):
        if shared := sorted(files & judged):
            logger.warning(
                "%d of the %d evaluation images are %s images too, e.g. %s: scores on them say nothing of others.",
                *(len(shared), len(judged), name, shared[0]),
            )
    if trained and trained == more:
        logger.warning("The %d unlabeled images are the labeled ones and no others: they add nothing.", len(more))


def image_files(dataset: Dataset | IterableDataset | None) -> set[str]:
    """The paths of a data set's images, which are files; none of a stream, whose end may be far."""
    if not isinstance(dataset, Dataset):
        return set()
    rows = dataset.select_columns("image").with_format("arrow")[:]["image"].to_pylist()
    paths = [row["path"] for row in rows]
    real = cache(os.path.realpath)
    return {os.path.join(real(os.path.dirname(path)), os.path.basename(path)) for path in paths}


def small_model() -> UperNetConfig:
    """A convolutional network that learns from scratch on few images (a small SegFormer does not).

    Three stages: at stride 32, the fourth, the drawn scenes are two pixels high.
    """
    backbone = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96],
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    return UperNetConfig(backbone_config=backbone, hidden_size=32, pool_scales=[1, 2], use_auxiliary_head=False)


def main(argv: list[str] | None = None) -> dict:
    args, objective = parse(argv)
    try:
        is_main = join_processes(args.ddp_timeout)
        if args.smoke:
            from smoke import shrink  # the file beside this one

            args, objective = shrink(args, objective)
        check_before_loading(args)
        trainer, args = build(args, objective)
        results = trainer.train()
    except MENDABLE as error:
        print(f"error: {one_line(error, args.output_dir)}", file=sys.stderr)
        sys.exit(2)
    if is_main:
        report(results, args, [*trainer.id2label.values()])
    return results


def check_before_loading(args: TrainArguments) -> None:
    """What needs neither data nor models to be wrong; a checkpoint to resume from is looked at with them."""
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resuming=bool(args.resume_from_checkpoint))
    assembly.check_trackers(args)
    assembly.check_schedule(args)


def join_processes(ddp_timeout: int) -> bool:
    """Find the other processes, quiet what is noisy; whether this one is the main one."""
    refuse_engines()  # Accelerate would look for them here
    timeout = timedelta(seconds=ddp_timeout)
    # Before the trainer makes its Accelerator, and as that will: CPU processes find each other only when told so.
    is_main = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timeout).is_main_process
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    for noisy in ("httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # a bar of its own for each exported branch
    return is_main


def parse(
    argv: list[str] | None, settings_class: type[TrainArguments] = TrainArguments, **options: Any
) -> tuple[TrainArguments, Objective]:
    """The command line, over the demonstration's defaults where it names neither real data nor a recipe.

    Args:
        options: further ones of `cli.parse`.
    """
    options = {"description": __doc__.split("\n")[0], "defaults": DEFAULTS, **options}
    if given(argv, "--data_root", "--data-root") is not None or config_of(argv) is not None:
        options["defaults"] = {}
    args, objective = cli.parse(settings_class, argv, **options)
    args.models = [beside_config(model, argv) for model in args.models]
    return args, objective


def config_of(argv: list[str] | None) -> str | None:
    """The file that `--config` names."""
    return given(argv, "--config")


def given(argv: list[str] | None, *spellings: str) -> str | None:
    """The value of one option, before all are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*spellings, dest="value", nargs="?")
    return parser.parse_known_args(argv)[0].value


def beside_config(model: str, argv: list[str] | None) -> str:
    """`model` itself, or, where it is a file beside the one that `--config` names and not one here, its path."""
    candidate = Path(config_of(argv) or ".").parent / model
    return str(candidate) if not Path(model).exists() and candidate.is_file() else model


def build(args: TrainArguments, objective: Objective, data=None) -> tuple[CPSTrainer, TrainArguments]:
    """The trainer, and the arguments completed by what the data set says.

    Args:
        data: what `load_data` gives, where it is loaded already.
    """
    labeled, unlabeled, evaluation, chosen = load_data(args) if data is None else data
    args = replace(
        args,
        dataset_name=args.dataset_name or args.dataset,
        partition_name=None if chosen is None else chosen.name,
        partition_sha256=None if chosen is None else chosen.sha256,
    )
    trainer = CPSTrainer(
        args.models if len(args.models) > 1 else args.models[0] if args.models else small_model(),
        args,
        objective=objective,
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        eval_dataset=evaluation,
    )
    return trainer, args


def report(results: dict, args: TrainArguments, names: list[str]) -> None:
    """The table, the agreement, where everything is, and how to load it."""
    best = results["best"]
    print(f"\n{args.dataset}, {args.partition_name or 'all of data_root'} labeled, step {results['steps']}:\n")
    print(scores_table(results["final"], names))
    print(f"\nBest: {best['branch'].replace('_', ' ')} at step {best['step']}, ", end="")
    print(f"mIoU {100 * best[best['branch']]['mean_iou']:.2f} %. ", end="")
    if results["agreement"]:
        start, end = (f"{100 * results['agreement'][when]:.1f} %" for when in ("start", "end"))
        print(f"The branches agree on {start} of unlabeled pixels at the start, {end} at the end.")
    print(f"\nWritten to {args.output_dir}:")
    for path in sorted(Path(args.output_dir).iterdir()):
        print(f"  {path.name}{os.sep if path.is_dir() else ''}")
    print("\nLoad the best branch anywhere, without cps_hf:\n")
    print("  from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation")
    print(f'  processor = AutoImageProcessor.from_pretrained("{args.output_dir}/best")')
    print(f'  model = AutoModelForSemanticSegmentation.from_pretrained("{args.output_dir}/best")')


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
