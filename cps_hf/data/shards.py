"""Parquet shards of a data set: images and labels as the bytes of their files, together with the label coding.

A shard is written under a temporary name and renamed, so an interrupted call resumes. `load_hub(folder)` reads the
shards back, as a data set or as a stream.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from datasets.table import embed_table_storage
from pyarrow import ArrowInvalid
from tqdm.auto import tqdm

from ..files import write_atomically, written_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest-{split}.json"
ROW_GROUP = 8  # rows that a reader of the stream keeps in memory at once


def write_shards(
    dataset: Dataset,
    folder: str | Path,
    *,
    split: str = "train",
    rows_per_shard: int = 500,
    progress: bool = True,
    on_shard: Callable[[Path, int], None] | None = None,
) -> tuple[list[Path], int]:
    """Write `<split>-00000-of-00003.parquet`, ... into a folder. Complete shards that already exist are kept: after
    changing an image, remove its shard.

    Args:
        dataset: with "image", "id" and optionally "label", from a `load_*` function.
        split: the name of the shards; letters, digits and underscores.
        rows_per_shard: images per file.
        on_shard: called with each complete shard and its number of rows.

    Returns:
        (all shards, how many of them this call wrote; the others already existed).

    Raises:
        ValueError: the data set is streamed or empty, `split` is not a valid name, or the folder contains shards of
            another set.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("Shards cannot be written from a stream. Load the data set with `streaming=False`.")
    if not re.fullmatch(r"\w+", split):
        raise ValueError(f"`split` names the shards: expected letters, digits and underscores, got {split!r}.")
    _require_rows(rows_per_shard)
    if len(dataset) == 0:
        raise ValueError("The data set is empty: there is nothing to write.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-len(dataset) // rows_per_shard)
    _check_manifest(dataset, folder, split, count)
    shards, written = [], 0
    for index in tqdm(range(count), desc=f"{split} shards", disable=not progress):
        path = folder / f"{split}-{index:05d}-of-{count:05d}.parquet"
        rows = range(index * rows_per_shard, min((index + 1) * rows_per_shard, len(dataset)))
        if not _is_whole(path, len(rows)):
            _write_one(dataset.select(rows), path)
            written += 1
            if on_shard is not None:
                on_shard(path, len(rows))
        shards.append(path)
    return shards, written


def _require_rows(rows_per_shard: int) -> None:
    if rows_per_shard < 1:
        raise ValueError(f"`rows_per_shard` must be at least 1, got {rows_per_shard}.")


def _is_whole(path: Path, rows: int) -> bool:
    """Whether the shard exists with a readable footer and all rows."""
    if not path.is_file():
        return False
    try:
        found = f"{pq.read_metadata(path).num_rows} rows of {rows}"
    except (OSError, ArrowInvalid) as error:
        found = str(error)
    if found != f"{rows} rows of {rows}":
        logger.warning("%s is damaged (%s): writing it again.", path, found)
        return False
    return True


def _write_one(part: Dataset, path: Path) -> None:
    """Write a few rows at a time, so that no whole shard is in memory, and without `datasets`' cache, which would keep
    a second copy of all images and return it even after a file was fixed. (`to_parquet` would write local paths.)"""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        with pq.ParquetWriter(file, part.features.arrow_schema) as writer:
            for rows in part.with_format("arrow").iter(ROW_GROUP):
                writer.write_table(embed_table_storage(rows))
        file.flush()
        os.fsync(file.fileno())


def _check_manifest(dataset: Dataset, folder: Path, split: str, count: int) -> None:
    """Check which rows the shards contain: resuming with other rows would mix two data sets."""
    ids = hashlib.sha256("".join(f"{name}\n" for name in dataset["id"]).encode()).hexdigest()
    label = dataset.features.get("label")
    wanted = {"rows": len(dataset), "shards": count, "ids_sha256": ids, "columns": dataset.column_names}
    wanted["label"] = getattr(label, "id", None)
    path = folder / MANIFEST.format(split=split)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in wanted if found.get(key) != wanted[key]]
        if other:
            raise ValueError(
                f"{folder} contains shards of another {split!r}: {other[0]} is {found.get(other[0])!r:.80} there and "
                f"{wanted[other[0]]!r:.80} here. Choose another folder, or remove its {split}-*.parquet and "
                f"{path.name}."
            )
    elif any(folder.glob(f"{split}-*.parquet")):
        raise ValueError(f"{folder} contains {split}-*.parquet files of another program. Choose another folder.")
    else:
        write_atomically(path, json.dumps(wanted, indent=1))


def push_shards(
    dataset: Dataset,
    repo_id: str,
    *,
    split: str,
    rows_per_shard: int = 500,
    private: bool = True,
    token: str | None = None,
) -> int:
    """Push a data set to the Hub as parquet shards with embedded images. Returns the number of shards.

    Raises:
        ValueError: there is no token, the data set is empty, or it should be private but the repository is public.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    _require_rows(rows_per_shard)
    if len(dataset) == 0:
        raise ValueError("The data set is empty: there is nothing to push.")
    if (token or get_token()) is None:
        raise ValueError("Pushing needs a token: `hf auth login`, or set HF_TOKEN.")
    if private:  # `push_to_hub(private=True)` alone writes to an existing public repository
        try:
            public = not HfApi(token=token).repo_info(repo_id, repo_type="dataset").private
        except RepositoryNotFoundError:
            public = False  # it will be created as private
        if public:
            raise ValueError(
                f"{repo_id} exists and is public, but the data set should be private. Choose another name, make the "
                "repository private, or allow a public one (`private=False`, `--public`)."
            )
    count = -(-len(dataset) // rows_per_shard)
    dataset.push_to_hub(
        repo_id, split=split, private=private, token=token, embed_external_files=True, num_shards=count
    )
    return count
