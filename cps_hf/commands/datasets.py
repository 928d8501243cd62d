"""Data sets by the name that a command line calls them, the drawn scenes among them."""

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
from ..scenes.write import write_object_scenes, write_street_scenes

logger = logging.getLogger(__name__)

OWN = "own"
"""`dataset`: a folder as people have it, in which images, masks and splits are found (data/discover.py)."""

HELD_OUT = "validation.txt"
"""In a run's folder: the labeled images that it held out, one per line. `validation` reads it too."""

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
    """(the loader with its further arguments, the root to give to it); scenes that are not there yet are drawn.

    Args:
        dataset: one of `LOADERS`.
        data_root: the folder or Hub id; for the scenes none: a folder in the Hugging Face cache.
        load_options: further arguments of the loader.

    Raises:
        ValueError: no such data set, no root, or an argument that the loader does not know.
    """
    if dataset not in LOADERS:
        raise ValueError(f"`dataset` must be one of {', '.join(LOADERS)}, got {dataset!r}.")
    load = LOADERS[dataset]
    known = inspect.signature(load).parameters
    unknown = [name for name in load_options or {} if name not in known]
    if unknown:
        raise ValueError(f"`load_options`: {load.__name__} does not know {unknown[0]!r}; it has {', '.join(known)}.")
    if dataset == "street_scenes":
        data_root = write_street_scenes(data_root)
    elif dataset == "object_scenes":
        data_root = write_object_scenes(data_root)
    elif data_root is None:
        raise ValueError(f"`dataset={dataset}` needs `data_root`.")
    return partial(load, **load_options or {}), data_root


# ------------------------------------------------------------------------------------------------ to read one


def add_arguments(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """The options of a command that reads one data set; `default`: of `--dataset`."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=LOADERS, default=default, help=f"default: {default or 'none'}")
    group.add_argument("--data_root", help="folder or Hub id; none: the drawn scenes")
    group.add_argument("--split", help="default: val; for folder, its folder")
    group.add_argument("--load_options", default="{}", help="further arguments of the loader, as JSON")
    group.add_argument("--streaming", action="store_true", help="read the data set as a stream")
    group.add_argument("--num_workers", type=int, default=1, help="processes that read images")


def from_arguments(arguments: argparse.Namespace, **further: Any) -> Dataset | IterableDataset:
    """The data set that `add_arguments` asked for; `arguments.split` is completed.

    Args:
        further: arguments of the loader, which win over `--load_options`.

    Raises:
        ValueError: as `find_dataset` and the loader, or `--load_options` is no JSON object.
    """
    options = options_from_json(arguments.load_options)
    load, root = find_dataset(arguments.dataset, arguments.data_root, options | further)
    arguments.split = arguments.split or (None if arguments.dataset == "folder" else "val")
    return load(root, split=arguments.split, streaming=arguments.streaming)


def options_from_json(text: str) -> dict[str, Any]:
    """A loader's further arguments, from what a command line's `--load_options` says.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`--load_options` must be JSON, found {text!r}: {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(f'`--load_options` must be like {{"argument": value}}, found {text!r}.')
    return options


# ------------------------------------------------------------------------------------------------ to train on


@dataclass(kw_only=True)
class DataConfig:
    """What is trained: which images, which of them labeled, which models.

    Data and models
        dataset: own (what lies in a folder is found), street_scenes, object_scenes (both drawn here), cityscapes, voc,
            folder or hub.
        data_root: the data set's folder, or its Hub id; for the scenes none: a folder in the Hugging Face cache.
        train_split: the split whose images are divided into labeled and unlabeled ones; for folder, its folder.
        eval_split: the split that scores are computed on.
        load_options: further arguments of the loader, as JSON: {"class_names": "names.json", "reduce_labels": true}.
        partition: which images are labeled: a count (12), a ratio (1-8), a published partition's name, a list file;
            none: all of `train_split`, of the drawn scenes 12.
        partition_seed: which ones, where the partition is a count or a ratio.
        unlabeled_root: for own, folder and hub: further images, without masks; of folder and hub, all of
            `train_split` is labeled then.
        streaming: read the data set as a stream; then `data_root` is all labeled and needs `unlabeled_root`.
        models: one or more Hub ids, folders or config.json files (a path in a YAML file may be relative to it); none:
            a small UperNet-ResNet, from scratch.
        smoke: the same objective, schedule and model family at toy size on drawn data, for a handful of steps.

    A folder of one's own
        validation: for own, which labeled images are validation images: a share (0.2), a file with an image a line,
            the name of a split (val, test) or none; auto: the validation split, or 0.2 where there is none.
            `partition_seed` draws them.
        group_by: for own, a regular expression; images in whose paths its first group finds the same (a video, a
            patient, a site) are all held out or none.
        class_names: names of the classes in the order of their ids, or a file of them (JSON, or a name a line).
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
            raise ValueError(f"`unlabeled_root` goes with `dataset` own, folder or hub, got {self.dataset!r}.")
        if self.dataset == OWN:
            self._check_own()
            return
        for name, default in (("validation", "auto"), ("group_by", None)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"`{name}` goes with a folder of your own (`cps-hf train DIR`), not with `dataset` {self.dataset}."
                )
        if self.class_names and self.dataset not in ("folder", "hub"):
            raise ValueError(f"`class_names` goes with `dataset` own, folder or hub: {self.dataset} has its own.")
        if self.streaming and self.unlabeled_root is None:
            raise ValueError("`streaming` needs `unlabeled_root`: a stream cannot be divided by ids.")
        if self.unlabeled_root is not None and (self.partition is not None or self.partition_seed != 0):
            raise ValueError(
                "With `unlabeled_root` all of `train_split` is labeled: leave out `partition` and `partition_seed`."
            )
        if self.partition is None and self.dataset.endswith("_scenes"):
            self.partition = "12"
        if self.train_split == self.eval_split:
            raise ValueError(
                f"`train_split` and `eval_split` are both {self.eval_split!r}: scores on images that were trained on "
                "say nothing of others."
            )

    def _check_own(self) -> None:
        if self.streaming or self.partition is not None:
            name = "streaming" if self.streaming else "partition"
            raise ValueError(
                f"`{name}` does not go with a folder of your own, in which images with a mask are labeled and those "
                "without are not: leave it out, or say what the folder is with `--dataset`."
            )
        if (self.train_split, self.eval_split) != ("train", "val"):
            raise ValueError(
                "In a folder of your own splits are found: leave out `train_split` and `eval_split`. Another split is "
                "scored on with `validation`, e.g. `--validation test`."
            )

    @property
    def named_classes(self) -> list[str] | str | None:
        """What a loader takes as `class_names`: one word that names a file, or that has commas, is no class."""
        if len(self.class_names) != 1:
            return self.class_names or None
        (word,) = self.class_names
        if Path(word).is_file() or Path(word).suffix.lower() in (".json", ".txt", ".csv"):
            return word
        return [name.strip() for name in word.split(",")]


class TrainingSets(NamedTuple):
    """What `load_data` finds; `chosen`: the partition, where there is one; `found`: what a folder of one's own is."""

    labeled: Dataset | IterableDataset
    unlabeled: Dataset | IterableDataset | None
    evaluation: Dataset | IterableDataset | None
    chosen: Partition | None
    found: Discovered | None = None


def load_data(data: DataConfig) -> TrainingSets:
    """The sets that a run is trained and judged on.

    Raises:
        ValueError: as `find_dataset`, the loaders, `discover` and `partition`.
    """
    if data.dataset == OWN:
        return _discovered(data)
    named = {} if data.named_classes is None else {"class_names": data.named_classes}
    with PartialState().main_process_first():  # who may have to draw the scenes
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
        if data.partition.startswith("coarse-"):  # all of train is labeled; the unlabeled ones are from train_extra
            images = concatenate_datasets([images, load(root, split="train_extra", with_labels=False)])
        chosen = partition(data.partition, images["id"], seed=data.partition_seed)
        labeled_ids, unlabeled_ids = set(chosen.labeled_ids), set(chosen.unlabeled_ids)
        # On a disk only the labeled images need a label file; the rows of other sets come as they are.
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
    """Scores on images that were trained on, and unlabeled images that are no others than the labeled ones.

    Told by the images' files: names may be the same in two folders, and what is stored inside tables has no path.
    """
    trained, more, judged = map(_image_files, (labeled, unlabeled, evaluation))
    for name, files in (("labeled", trained), ("unlabeled", more)):
        if shared := sorted(files & judged):
            logger.warning(
                "%d of the %d evaluation images are %s images too, e.g. %s: scores on them say nothing of others.",
                *(len(shared), len(judged), name, shared[0]),
            )
    if trained and trained == more:
        logger.warning("The %d unlabeled images are the labeled ones and no others: they add nothing.", len(more))


def warn_of_earlier_training(sets: TrainingSets, earlier: str | Path | None) -> None:
    """Validation images that were not held out in the run that this one starts from: it may have been trained on them.

    A share is drawn anew when there are more labeled images, as in the next round of labelling.

    Args:
        earlier: the run's folder, or a branch in it; `None`: this run starts from no other.
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
            "%d of the %d validation images were not held out in %s, from whose networks this run starts, e.g. %s: "
            "where it was trained on them, scores on them are too good. `--validation %s` keeps that run's.",
            *(len(new), len(now), run, new[0], run / HELD_OUT),
        )


def _image_files(dataset: Dataset | IterableDataset | None) -> set[str]:
    """The paths of a data set's images, which are files; none of a stream, whose end may be far."""
    if not isinstance(dataset, Dataset):
        return set()
    rows = dataset.select_columns("image").with_format("arrow")[:]["image"].to_pylist()
    paths = [row["path"] for row in rows]
    real = cache(os.path.realpath)
    return {os.path.join(real(os.path.dirname(path)), os.path.basename(path)) for path in paths}
