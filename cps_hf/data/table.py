"""Build a data set with the standard columns from lists of files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value


def build(
    ids: Sequence[str],
    images: Sequence[Path],
    labels: Sequence[Path] | None = None,
    label_feature: Image | None = None,
    *,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """A data set over files: "image" and "label" (lazily decoded; absent if `labels` is `None`) and "id".

    Args:
        label_feature: contains the label coding (`LabelEncoding.to_feature()`).
        streaming: return an `IterableDataset`, in shards of at most a thousand files.
    """
    columns = {"image": [str(path) for path in images]}
    features = {"image": Image()}
    if labels is not None:
        columns["label"], features["label"] = [str(path) for path in labels], label_feature or Image()
    columns["id"], features["id"] = list(ids), Value("string")
    dataset = Dataset.from_dict(columns, features=Features(features))
    return as_stream(dataset) if streaming else dataset


def as_stream(dataset: Dataset) -> IterableDataset:
    """A stream in shards of at most a thousand files."""
    return dataset.to_iterable_dataset(num_shards=max(1, len(dataset) // 1000))


def first_few(names: Sequence[object], most: int = 5) -> str:
    """For error messages: "a, b, c ... (17 in all)"."""
    listed = ", ".join(str(name) for name in names[:most])
    return listed if len(names) <= most else f"{listed} ... ({len(names)} in all)"


def as_typed(**options: Any) -> str:
    """For error messages: arguments of a loader in Python and on a command line.

    `as_typed(values={0: 0, 255: 1})` is "`values={0: 0, 255: 1}` (on a command line `--load_options '{"values": {"0":
    0, "255": 1}}'`)".
    """
    python = ", ".join(f"{name}={value!r}" for name, value in options.items())
    plain = {
        name: {", ".join(map(str, k)) if isinstance(k, tuple) else k: v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in options.items()
    }
    return f"`{python}` (on a command line `--load_options '{json.dumps(plain)}'`)"
