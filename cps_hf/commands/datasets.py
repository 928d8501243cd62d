"""Data sets by the name that a command line calls them, the drawn scenes among them."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..data.cityscapes import load_cityscapes
from ..data.folder import load_folder
from ..data.hub_dataset import load_hub
from ..data.voc import load_voc
from ..scenes.write import write_object_scenes, write_street_scenes

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


def add_arguments(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """The options of a script that reads one data set; `default`: of `--dataset`."""
    parser.add_argument("--dataset", choices=LOADERS, default=default, help=f"default: {default or 'none'}")
    parser.add_argument("--data_root", help="folder or Hub id; none: the drawn scenes")
    parser.add_argument("--split", help="default: val; for folder, its folder")
    parser.add_argument("--load_options", default="{}", help="further arguments of the loader, as JSON")
    parser.add_argument("--streaming", action="store_true", help="read the data set as a stream")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read images")


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
