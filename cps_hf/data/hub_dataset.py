"""Any data set of the Hub, or local parquet files, with an image column and perhaps a label column."""

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
        path: `user/name`; a folder with shards as `cps-hf prepare` writes them
            (`<split>-00000-of-00003.parquet`, any number of splits) or of another layout that `load_dataset` knows; or
            one parquet file, which then is the split.
        split: as `load_dataset` takes it.
        name: the Hub data set's configuration.
        image_column, label_column, id_column: what columns are called there; they become "image", "label" and "id".
            Without an `id_column` a column "id" is used, or else rows are numbered (not when streaming).
        class_names, values, colors, reduce_labels, resize_masks: as for `load_folder`; not needed for shards that
            `cps-hf prepare` wrote, which carry them, nor names where a column lists each image's classes
            (a list of ClassLabel).
        with_labels: false: the label column is dropped unread.

    A column of encoded files without Hugging Face's metadata ({"bytes", "path"}, or bytes alone, as other writers of
    parquet leave it) is taken for images.

    Raises:
        ValueError: no such data set, split or column, shards are missing, or labels are coded in two ways.
    """
    dataset = _load(str(path), name, split, streaming, revision)
    if dataset.features is None:
        raise ValueError(f"{path} is streamed without saying its columns' types: read it with `streaming=False`.")
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
    """The splits of a folder of shards, a folder that `load_dataset` reads, or a data set of the Hub.

    Raises:
        ValueError: no such data set.
    """
    if str(path).endswith(".parquet"):
        return ["train"]
    names = {match[1] for file in Path(path).glob("*.parquet") if (match := _SHARD.fullmatch(file.name))}
    try:
        return sorted(names) or get_dataset_split_names(str(path), name)
    except (ValueError, OSError) as error:
        raise ValueError(f"Cannot tell the splits of {str(path)!r}: {type(error).__name__}: {error}") from error


def _load(path: str, name: str | None, split: str, streaming: bool, revision: str | None) -> Any:
    wanted = [part.split("[")[0].strip() for part in split.split("+")]  # of "train[:100]+val", say
    files = {wanted[0]: [path]} if path.endswith(".parquet") else _shards(Path(path), wanted)
    try:
        if files:
            return load_dataset("parquet", data_files=files, split=split, streaming=streaming)
        return load_dataset(path, name, split=split, streaming=streaming, revision=revision)
    except DatasetNotFoundError as error:
        raise ValueError(
            f"No data set {path!r}: neither a folder here nor a data set of the Hub that can be read. Check the "
            f"spelling; a gated or private one needs HF_TOKEN. The library said: {error}"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"Cannot load split {split!r} of {path!r}: {type(error).__name__}: {error}") from error


def _shards(folder: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    """The shards of each wanted split in a local folder, in order; {} where the folder holds no such files.

    `load_dataset` would guess splits from the names: to it, `train_extra-*` and `train_aug-*` are "train" as well.
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
            raise ValueError(f"{folder} holds {split!r} cut into {counts[0]} and into {counts[1]} shards: remove one.")
        missing = sorted(set(range(counts[0])) - {index for index, _, _ in splits[split]})
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {counts[0]} shards of {split!r}: {first_few(missing)}. Copy them, "
                "or call `cps-hf prepare` again: it goes on where it stopped."
            )
    return {split: [path for _, _, path in splits[split]] for split in wanted}


def _with_our_columns(dataset, columns: dict[str, str], id_column: str | None, path: str, split: str):
    """The data set with "image", "label" where it is wanted, and "id" as text; all else is dropped.

    Args:
        columns: what they are called there -> "image" or "label".
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
    """Labels that say how they are coded need not be told."""
    told = [name for name, value in options.items() if value is not None and value is not False]
    if told:
        raise ValueError(
            f"The labels of {path} say how they are coded ({len(carried.names)} classes); leave out `{told[0]}`."
        )


def _as_images(dataset, column: str):
    """The data set, its column an Image where it holds encoded files and nobody wrote down that it does."""
    feature = (dataset.features or {}).get(column)
    holds_files = isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}
    if not holds_files and not (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")):
        return dataset
    logger.info("Column %r holds encoded files without saying so: it is taken for images.", column)
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
            f"Give another {option}. Parquet files that were written without Hugging Face's metadata are read where "
            "that column holds the bytes of image files (PNG, JPEG ...); write them so, or in Python "
            f'`datasets.load_dataset(...).cast_column("{column}", datasets.Image())` where it holds paths.'
        )


def _with_text_ids(dataset, path: str, column: str | None):
    """Numbers become text: partitions and errors call images by text."""
    feature = dataset.features["id"]
    if feature == Value("string"):
        return dataset
    if not isinstance(feature, Value) or not ("int" in feature.dtype or "string" in feature.dtype):
        found = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(
            f"Column {column!r} of {path} is of type {found}, expected text or whole numbers for `id_column`. Give "
            "another one."
        )
    if isinstance(dataset, IterableDataset):
        return dataset.cast_column("id", Value("string"))
    ids = [str(value) for value in dataset["id"]]  # a cast would write all images anew, into the cache
    return dataset.remove_columns("id").add_column("id", ids)


def _columns(dataset, wanted: str) -> str:
    known = [*dataset.features]
    close = difflib.get_close_matches(wanted, known, n=1) if wanted not in known else []
    return f" There are: {first_few(known, 12)}." + (f" Did you mean {close[0]!r}?" if close else "")


def _class_label_names(features) -> tuple[str, ...] | None:
    """Class names of a column that lists the classes of an image; `None` without exactly one such column.

    A single ClassLabel is none: it says what the whole image shows (a scene, the weather), not what its pixels do.
    """
    found = {
        column: tuple(feature.feature.names)
        for column, feature in features.items()
        if isinstance(getattr(feature, "feature", None), ClassLabel) and feature.feature.names
    }
    if len(found) != 1:
        return None
    ((column, names),) = found.items()
    logger.info("Class names are those of the column %r: %s.", column, first_few(names))
    return names
