"""Data sets by their command-line names, including the drawn scenes."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset, IterableDataset, concatenate_datasets

from ..data import cityscapes, folder, hub_dataset, voc
from ..data.cityscapes import load_cityscapes
from ..data.discover import Discovered, discover
from ..data.folder import load_folder
from ..data.hub_dataset import load_hub
from ..data.partitions import Partition, partition
from ..data.voc import load_voc
from ..scenes.write import MANIFEST, write_object_scenes, write_street_scenes

logger = logging.getLogger(__name__)

OWN = "own"
"""`dataset`: a folder in which images, masks and splits are found automatically (data/discover.py)."""

HELD_OUT = "validation.txt"
"""In a run's output folder: the labeled images that were held out, one per line. `validation` reads it too."""

SPLITS = {
    "street_scenes": cityscapes.splits_of,
    "object_scenes": voc.splits_of,
    "cityscapes": cityscapes.splits_of,
    "voc": voc.splits_of,
    "folder": folder.splits_of,
    "hub": hub_dataset.splits_of,
}
LOADERS = {
    "street_scenes": load_cityscapes,
    "object_scenes": load_voc,
    "cityscapes": load_cityscapes,
    "voc": load_voc,
    "folder": load_folder,
    "hub": load_hub,
}


def find_dataset(
    dataset: str, data_root: str | Path | None, load_options: Mapping[str, Any] | None = None
) -> tuple[Callable[..., Any], str | Path]:
    """The loader with its additional arguments, and the root to pass to it. Missing scenes are drawn.

    Args:
        dataset: one of `LOADERS`.
        data_root: the folder or Hub id. If None, scenes are drawn in the Hugging Face cache.
        load_options: additional arguments of the loader.

    Raises:
        ValueError: no such data set, no root, or an argument that the loader does not accept.
    """
    if dataset not in LOADERS:
        raise ValueError(f"`dataset` must be one of {', '.join(LOADERS)}, got {dataset!r}.")
    load = LOADERS[dataset]
    known = inspect.signature(load).parameters
    unknown = [name for name in load_options or {} if name not in known]
    if unknown:
        raise ValueError(f"`load_options`: {load.__name__} has no argument {unknown[0]!r}, only {', '.join(known)}.")
    if dataset == "street_scenes":
        data_root = write_street_scenes(data_root)
    elif dataset == "object_scenes":
        data_root = write_object_scenes(data_root)
    elif data_root is None:
        raise ValueError(f"`dataset={dataset}` needs `data_root`.")
    return partial(load, **load_options or {}), data_root


# ------------------------------------------------------------------------------------------------ reading one set


def add_arguments(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Add the options of a command that reads one data set. `default`: the default of `--dataset`."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=LOADERS, default=default, help=f"default: {default or 'none'}")
    group.add_argument("--data_root", help="folder or Hub id; default: the drawn scenes")
    group.add_argument("--split", help="default: val; for folder, its folder")
    group.add_argument("--load_options", default="{}", help="additional loader arguments, as JSON")
    group.add_argument("--streaming", action="store_true", help="read the data set as a stream")
    group.add_argument("--num_workers", type=int, default=1, help="processes that read images")


def from_arguments(arguments: argparse.Namespace, **further: Any) -> Dataset | IterableDataset:
    """The data set chosen by the options of `add_arguments`. Fills in `arguments.split`.

    Args:
        further: arguments of the loader, which override `--load_options`.

    Raises:
        ValueError: as `find_dataset` and the loader, `--load_options` is not a JSON object, or `--data_root` contains
            no drawn scenes although they are what `--dataset` names.
    """
    options = options_from_json(arguments.load_options)
    root = arguments.data_root
    drawn = arguments.dataset.endswith("_scenes")
    if drawn and root and not Path(root).is_dir():
        raise ValueError(
            f"`data_root` {root} is not a folder here. For images and masks, check the path and add `--dataset "
            "folder`; for the drawn scenes, omit it."
        )
    there = {path.name for path in Path(root).iterdir()} if root and drawn else set()
    if there and MANIFEST not in there:
        raise ValueError(
            f"`data_root` {root} contains no drawn scenes, but `dataset` is {arguments.dataset}. For a folder of "
            "images and masks, add `--dataset folder`."
        )
    load, root = find_dataset(arguments.dataset, root, options | further)
    arguments.split = arguments.split or (None if arguments.dataset == "folder" else "val")
    return load(root, split=arguments.split, streaming=arguments.streaming)


def options_from_json(text: str) -> dict[str, Any]:
    """A loader's additional arguments from the text of `--load_options`.

    Raises:
        ValueError: the text is not a JSON object.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`--load_options` must be JSON, found {text!r}: {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(f'`--load_options` must be like {{"argument": value}}, found {text!r}.')
    return options


# ------------------------------------------------------------------------------------------------ training sets


@dataclass(kw_only=True)
class DataConfig:
    """What is trained: which images, which of them labeled, which models.

    Data and models
        dataset: own (a folder whose content is detected), street_scenes, object_scenes (both drawn here), cityscapes,
            voc, folder or hub.
        data_root: the data set's folder or its Hub id. If None, scenes are drawn in the Hugging Face cache.
        train_split: the split that is divided into labeled and unlabeled images; for folder, its folder.
        eval_split: the split that scores are computed on.
        load_options: additional loader arguments, as JSON: {"class_names": "names.json", "reduce_labels": true}.
        partition: which images are labeled: a count (12), a ratio (1-8), a published partition's name, a list file.
            If None, all of `train_split`, or 12 of the drawn scenes.
        partition_seed: seed that draws the labeled images if the partition is a count or a ratio.
        unlabeled_root: for own, folder and hub: additional images without masks. For folder and hub, all of
            `train_split` is labeled then.
        streaming: read the data set as a stream; then `data_root` is all labeled and needs `unlabeled_root`.
        models: one or more Hub ids, folders or config.json files (a path in a YAML file may be relative to it). If
            empty, a small UperNet-ResNet trained from scratch.
        smoke: the same objective, schedule and model family at toy size on drawn data, for a handful of steps.

    Your own folder
        validation: for own, which labeled images are validation images: a share (0.2), a file with one image per line,
            the name of a split (val, test) or none; auto: the validation split if any, otherwise 0.2.
            `partition_seed` draws them.
        group_by: for own, a regular expression. Images whose paths have the same first group (a video, a patient, a
            site) are held out together or not at all.
        class_names: names of the classes in the order of their ids, or a file of them (JSON, or one name per line).
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
    validation: str = "auto"
    group_by: str | None = None
    class_names: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.dataset not in (OWN, *LOADERS):
            raise ValueError(f"`dataset` must be one of {', '.join((OWN, *LOADERS))}, got {self.dataset!r}.")
        if self.data_root is None and not self.smoke and not self.dataset.endswith("_scenes"):
            raise ValueError(f"`dataset={self.dataset}` needs `data_root`.")
        if self.unlabeled_root is not None and self.dataset not in (OWN, "folder", "hub"):
            raise ValueError(f"`unlabeled_root` requires `dataset` own, folder or hub, got {self.dataset!r}.")
        if self.dataset == OWN:
            self._check_own()
            return
        for name, default in (("validation", "auto"), ("group_by", None)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"`{name}` requires a folder of your own (`cps-hf train DIR`), but `dataset` is {self.dataset}."
                )
        if self.class_names and self.dataset not in ("folder", "hub"):
            raise ValueError(f"`class_names` requires `dataset` own, folder or hub: {self.dataset} has its own.")
        if self.streaming and self.unlabeled_root is None:
            raise ValueError("`streaming` needs `unlabeled_root`: a stream cannot be divided by ids.")
        if self.unlabeled_root is not None and (self.partition is not None or self.partition_seed != 0):
            raise ValueError(
                "With `unlabeled_root` all of `train_split` is labeled. Remove `partition` and `partition_seed`."
            )
        if self.partition is None and self.dataset.endswith("_scenes"):
            self.partition = "12"
        if self.train_split == self.eval_split:
            raise ValueError(
                f"`train_split` and `eval_split` are both {self.eval_split!r}: scores on training images do not show "
                "how well a network generalizes."
            )

    def _check_own(self) -> None:
        if self.streaming or self.partition is not None:
            name = "streaming" if self.streaming else "partition"
            raise ValueError(
                f"`{name}` cannot be used with a folder of your own, where images with a mask are labeled and the "
                "others unlabeled. Remove it, or set the type of the folder with `--dataset`."
            )
        if (self.train_split, self.eval_split) != ("train", "val"):
            raise ValueError(
                "In a folder of your own, splits are found automatically. Remove `train_split` and `eval_split`. To "
                "score on another split, set `validation`, e.g. `--validation test`."
            )

    @property
    def named_classes(self) -> list[str] | str | None:
        """The `class_names` argument of a loader. A single word that names a file or has commas is not a class."""
        if len(self.class_names) != 1:
            return self.class_names or None
        (word,) = self.class_names
        if Path(word).is_file() or Path(word).suffix.lower() in (".json", ".txt", ".csv"):
            return word
        return [name.strip() for name in word.split(",")]


class TrainingSets(NamedTuple):
    """The result of `load_data`. `chosen`: the partition, if any; `found`: what was detected in an own folder."""

    labeled: Dataset | IterableDataset
    unlabeled: Dataset | IterableDataset | None
    evaluation: Dataset | IterableDataset | None
    chosen: Partition | None
    found: Discovered | None = None


def load_data(data: DataConfig) -> TrainingSets:
    """The sets that a run is trained and evaluated on.

    Raises:
        ValueError: as `find_dataset`, the loaders, `discover` and `partition`.
    """
    if data.dataset == OWN:
        return _discovered(data)
    named = {} if data.named_classes is None else {"class_names": data.named_classes}
    with PartialState().main_process_first():  # it may have to draw the scenes
        load, root = find_dataset(data.dataset, data.data_root, data.load_options | named)
    evaluation = load(root, split=data.eval_split)
    if data.unlabeled_root is not None:
        labeled = load(root, split=data.train_split, streaming=data.streaming)
        split = {} if data.dataset == "folder" else {"split": data.train_split}
        unlabeled = load(data.unlabeled_root, **split, with_labels=False, streaming=data.streaming)
        chosen = None
    elif data.partition is None:
        labeled, unlabeled, chosen = load(root, split=data.train_split), None, None
    else:
        images = load(root, split=data.train_split, with_labels=False)
        if data.partition.startswith("coarse-"):  # all of train is labeled; unlabeled images are from train_extra
            images = concatenate_datasets([images, load(root, split="train_extra", with_labels=False)])
        chosen = partition(data.partition, images["id"], seed=data.partition_seed)
        labeled_ids, unlabeled_ids = set(chosen.labeled_ids), set(chosen.unlabeled_ids)
        # On disk only the labeled images need a label file; other data sets keep their rows.
        only = {} if data.dataset == "hub" else {"only_ids": labeled_ids}
        labeled = load(root, split=data.train_split, **only)
        labeled = labeled.select([i for i, name in enumerate(labeled["id"]) if name in labeled_ids])
        unlabeled = images.select([i for i, name in enumerate(images["id"]) if name in unlabeled_ids]) or None
    if data.dataset != "hub":
        warn_of_shared_images(labeled, unlabeled, evaluation)
    return TrainingSets(labeled, unlabeled, evaluation, chosen)


def _discovered(data: DataConfig) -> TrainingSets:
    found = discover(
        data.data_root,
        unlabeled_root=data.unlabeled_root,
        validation=data.validation,
        group_by=data.group_by,
        seed=data.partition_seed,
        class_names=data.named_classes,
        load_options=data.load_options,
    )
    warn_of_shared_images(found.labeled, found.unlabeled, found.evaluation)
    return TrainingSets(found.labeled, found.unlabeled, found.evaluation, None, found)


def warn_of_shared_images(
    labeled: Dataset | IterableDataset,
    unlabeled: Dataset | IterableDataset | None,
    evaluation: Dataset | IterableDataset,
) -> None:
    """Warn about evaluation images that are also trained on, and about unlabeled images that are all labeled ones.

    Compares image files: names may repeat between folders, and images stored inside tables have no path.
    """
    trained, more, judged = map(_image_files, (labeled, unlabeled, evaluation))
    for name, files in (("labeled", trained), ("unlabeled", more)):
        if shared := sorted(files & judged):
            logger.warning(
                "%d of the %d evaluation images are also %s images, e.g. %s. Their scores do not show generalization.",
                *(len(shared), len(judged), name, shared[0]),
            )
    if trained and trained == more:
        logger.warning("The %d unlabeled images are all labeled images as well: they add nothing.", len(more))


def warn_of_earlier_training(sets: TrainingSets, earlier: str | Path | None) -> None:
    """Warn about validation images that the earlier run did not hold out: its networks may have trained on them.

    A share is drawn again when there are more labeled images, as in the next round of labeling.

    Args:
        earlier: the run's output folder or a branch in it. If `None`, this run starts from no other.
    """
    if earlier is None or sets.found is None or not sets.found.held_out:
        return
    run = next((path for path in (Path(earlier), Path(earlier).parent) if (path / HELD_OUT).is_file()), None)
    if run is None:
        return
    before = {*(run / HELD_OUT).read_text(encoding="utf-8").splitlines()}
    now = {*sets.found.held_out}
    if new := sorted(now - before) if before & {*now, *sets.labeled["id"]} else []:
        logger.warning(
            "%d of the %d validation images were not held out in %s, from whose networks this run starts, e.g. %s. "
            "If it was trained on them, their scores are too good. `--validation %s` keeps that run's split.",
            *(len(new), len(now), run, new[0], run / HELD_OUT),
        )


def _image_files(dataset: Dataset | IterableDataset | None) -> set[str]:
    """The paths of a data set's images if they are files. Empty for a stream, which may be long."""
    if not isinstance(dataset, Dataset):
        return set()
    rows = dataset.select_columns("image").with_format("arrow")[:]["image"].to_pylist()
    paths = [row["path"] for row in rows]
    real = cache(os.path.realpath)
    return {os.path.join(real(os.path.dirname(path)), os.path.basename(path)) for path in paths}
