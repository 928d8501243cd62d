"""Data sets by the name that a command line calls them, the drawn scenes among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .cityscapes import load_cityscapes
from .folder import load_folder
from .hub_dataset import load_hub
from .scenes import write_object_scenes, write_street_scenes
from .voc import load_voc

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
