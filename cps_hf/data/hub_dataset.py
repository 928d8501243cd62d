"""Any data set from the Hub, or local parquet files, with an image column and optionally a label column."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    Image,
    IterableDataset,
    Value,
    get_dataset_split_names,
    load_dataset,
)
from datasets.exceptions import DatasetNotFoundError

from .black_and_white import settled
from .folder import label_feature, read_class_names
from .labels import LabelEncoding
from .table import first_few

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(\w+)-(\d{5})-of-(\d{5})\.parquet")


def load_hub(
    path: str | Path,
    split: str = "train",
    *,
    name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    id_column: str | None = None,
    class_names: Sequence[str] | Mapping[int | str, str] | str | Path | None = None,
    values: Mapping[int, int] | None = None,
    colors: Mapping[tuple[int, int, int], int] | None = None,
    reduce_labels: bool = False,
    resize_masks: bool = False,
    with_labels: bool = True,
    streaming: bool = False,
    revision: str | None = None,
) -> Dataset | IterableDataset:
    """A data set that `datasets.load_dataset` reads: a Hub id, a local folder, or a parquet file.

    Args:
        path: `user/name`; a folder with shards written by `cps-hf prepare` (`<split>-00000-of-00003.parquet`, any
            number of splits) or another layout that `load_dataset` supports; or a single parquet file, which is the
            split.
        split: as for `load_dataset`.
        name: the Hub data set's configuration.
        image_column, label_column, id_column: names of the columns there; they become "image", "label" and "id".
            Without an `id_column`, a column "id" is used; if there is none, rows are numbered (not when streaming).
        class_names, values, colors, reduce_labels, resize_masks: as for `load_folder`. Not needed for shards written
            by `cps-hf prepare`, which contain them. Names are not needed if a column lists each image's classes (a
            list of ClassLabel).
        with_labels: if False, the label column is dropped without reading it.

    A column of encoded files without Hugging Face's metadata ({"bytes", "path"}, or only bytes, as other parquet
    writers store them) is read as images.

    Raises:
        ValueError: there is no such data set, split or column, shards are missing, or two label codings are given.
    """
    dataset = _load(str(path), name, split, streaming, revision)
    if dataset.features is None:
        raise ValueError(f"{path} is streamed without column types. Read it with `streaming=False`.")
    listed = _class_label_names(dataset.features) if with_labels and class_names is None else None
    columns = {image_column: "image"} | ({label_column: "label"} if with_labels else {})
    dataset = _with_our_columns(dataset, columns, id_column, str(path), split)
    if not with_labels:
        return dataset
    coding = {"values": values, "colors": colors, "reduce_labels": reduce_labels}
    carried = LabelEncoding.from_feature(dataset.features["label"])
    if carried is not None:
        _require_untold({"class_names": class_names, **coding}, carried, str(path))
        resized = replace(carried, resize_masks=carried.resize_masks or resize_masks)
        return dataset if resized == carried else dataset.cast_column("label", resized.to_feature())
    names = read_class_names(listed if class_names is None else class_names)
    dataset = dataset.cast_column("label", label_feature(names, **coding, resize_masks=resize_masks))
    return settled(dataset, str(path)) if isinstance(dataset, Dataset) else dataset


def splits_of(path: str | Path, name: str | None = None) -> list[str]:
    """The splits of a folder of shards, a folder that `load_dataset` reads, or a data set on the Hub.

    Raises:
        ValueError: there is no such data set.
    """
    if str(path).endswith(".parquet"):
        return ["train"]
    names = {match[1] for file in Path(path).glob("*.parquet") if (match := _SHARD.fullmatch(file.name))}
    try:
        return sorted(names) or get_dataset_split_names(str(path), name)
    except (ValueError, OSError) as error:
        raise ValueError(f"Cannot find the splits of {str(path)!r}: {type(error).__name__}: {error}") from error


def _load(path: str, name: str | None, split: str, streaming: bool, revision: str | None) -> Any:
    wanted = [part.split("[")[0].strip() for part in split.split("+")]  # of "train[:100]+val", for example
    files = {wanted[0]: [path]} if path.endswith(".parquet") else _shards(Path(path), wanted)
    try:
        if files:
            return load_dataset("parquet", data_files=files, split=split, streaming=streaming)
        return load_dataset(path, name, split=split, streaming=streaming, revision=revision)
    except DatasetNotFoundError as error:
        raise ValueError(
            f"No data set {path!r}: neither a local folder nor a data set that can be read from the Hub. Check the "
            f"spelling; a gated or private one needs HF_TOKEN. The library's error: {error}"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"Cannot load split {split!r} of {path!r}: {type(error).__name__}: {error}") from error


def _shards(folder: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    """The shards of each requested split in a local folder, in order; {} if the folder has no such files.

    `load_dataset` would guess splits from the names and treat `train_extra-*` and `train_aug-*` as "train" too.
    """
    splits: dict[str, list[tuple[int, int, str]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        if match := _SHARD.fullmatch(path.name):
            splits.setdefault(match[1], []).append((int(match[2]), int(match[3]), str(path)))
    if not splits:
        return {}
    for split in wanted:
        if split not in splits:
            raise ValueError(f"No split {split!r} in {folder}; there are: {first_few(sorted(splits))}.")
        counts = sorted({count for _, count, _ in splits[split]})
        if len(counts) > 1:
            raise ValueError(f"{folder} has {split!r} both in {counts[0]} and in {counts[1]} shards. Remove one set.")
        missing = sorted(set(range(counts[0])) - {index for index, _, _ in splits[split]})
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {counts[0]} shards of {split!r}: {first_few(missing)}. Copy them, "
                "or run `cps-hf prepare` again: it resumes."
            )
    return {split: [path for _, _, path in splits[split]] for split in wanted}


def _with_our_columns(dataset, columns: dict[str, str], id_column: str | None, path: str, split: str):
    """The data set with "image", "label" if requested, and "id" as text; other columns are dropped.

    Args:
        columns: their names there -> "image" or "label".
    """
    for column, role in columns.items():
        dataset = _as_images(dataset, column)
        _require_image_column(dataset, column, role, path)
    if id_column is None and "id" in dataset.features:
        id_column = "id"
    if id_column is not None:
        if id_column not in dataset.features:
            raise ValueError(f"{path} has no column {id_column!r} for `id_column`.{_columns(dataset, id_column)}")
        columns = {**columns, id_column: "id"}
    elif isinstance(dataset, Dataset):
        dataset = dataset.add_column("id", [f"{split}-{index}" for index in range(len(dataset))])
        columns = {**columns, "id": "id"}
    dataset = dataset.select_columns([*columns])
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    return _with_text_ids(dataset, path, id_column) if "id" in columns.values() else dataset


def _require_untold(options: Mapping[str, Any], carried: LabelEncoding, path: str) -> None:
    """Reject codings for labels that already carry one."""
    told = [name for name, value in options.items() if value is not None and value is not False]
    if told:
        raise ValueError(
            f"The labels of {path} already contain their coding ({len(carried.names)} classes). Remove `{told[0]}`."
        )


def _as_images(dataset, column: str):
    """The data set, with its column cast to Image if it contains encoded files without that type."""
    feature = (dataset.features or {}).get(column)
    holds_files = isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}
    if not holds_files and not (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")):
        return dataset
    logger.info("Column %r contains encoded files without the type Image: it is read as images.", column)
    return dataset.cast_column(column, Image())


def _require_image_column(dataset, column: str, role: str, path: str) -> None:
    option = f"`{role}_column`"
    if column not in dataset.features:
        extra = ", or read the images alone with `with_labels=False`" if role == "label" else ""
        raise ValueError(
            f"{path} has no column {column!r} for {option}.{_columns(dataset, column)} Give {option}{extra}."
        )
    if not isinstance(dataset.features[column], Image):
        found = type(dataset.features[column]).__name__
        raise ValueError(
            f"Column {column!r} of {path} is of type {found}, expected Image.{_columns(dataset, column)} "
            f"Give another {option}. Parquet files without Hugging Face's metadata are supported if that column "
            "contains the bytes of image files (PNG, JPEG, ...). If it contains paths, use in Python "
            f'`datasets.load_dataset(...).cast_column("{column}", datasets.Image())`.'
        )


def _with_text_ids(dataset, path: str, column: str | None):
    """Numbers become text: partitions and error messages use text ids."""
    feature = dataset.features["id"]
    if feature == Value("string"):
        return dataset
    if not isinstance(feature, Value) or not ("int" in feature.dtype or "string" in feature.dtype):
        found = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(
            f"Column {column!r} of {path} is of type {found}, expected text or integers for `id_column`. Choose "
            "another one."
        )
    if isinstance(dataset, IterableDataset):
        return dataset.cast_column("id", Value("string"))
    ids = [str(value) for value in dataset["id"]]  # a cast would write all images to the cache again
    return dataset.remove_columns("id").add_column("id", ids)


def _columns(dataset, wanted: str) -> str:
    known = [*dataset.features]
    close = difflib.get_close_matches(wanted, known, n=1) if wanted not in known else []
    return f" There are: {first_few(known, 12)}." + (f" Did you mean {close[0]!r}?" if close else "")


def _class_label_names(features) -> tuple[str, ...] | None:
    """Class names from a column that lists the classes of an image; `None` unless there is exactly one.

    A single ClassLabel does not count: it describes the whole image (a scene, the weather), not its pixels.
    """
    found = {
        column: tuple(feature.feature.names)
        for column, feature in features.items()
        if isinstance(getattr(feature, "feature", None), ClassLabel) and feature.feature.names
    }
    if len(found) != 1:
        return None
    ((column, names),) = found.items()
    logger.info("Class names are from the column %r: %s.", column, first_few(names))
    return names
