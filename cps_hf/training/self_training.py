"""Offline self-training: trained networks label the unlabeled images, and a new network is trained on both sets.

The paper compares CPS with this, and combines both (section 4.5 of arXiv 2106.01226). `label_dataset` writes the
pseudo labels as PNGs, with the soft-max confidence of each pixel; `with_pseudo_labels` adds them to their images. The
training before and after is the usual one: `examples/self_training.py`. The labels here are hard;
`FixedTeacher(labelers=..., soft=True)` makes soft ones during training.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from PIL import Image as PILImage
from tqdm.auto import tqdm

from .. import visualization
from ..data.labels import LabelEncoding
from ..data.streams import EvaluationStream
from ..files import write_atomically, written_whole
from ..functional import IGNORE_INDEX
from ..inference.ensemble import Ensemble, check_classes
from ..inference.windows import add_probabilities
from .setup import evenly_spaced

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def label_dataset(
    network: Ensemble,
    dataset: Dataset,
    folder: str | Path,
    *,
    label_feature: Image,
    rows_per_shard: int = 100,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[Path]:
    """Write a network's predictions for all images as `labels-00000-of-00004.parquet`, ... with the columns "id",
    "label", "confidence" (a grey image: the label's soft-max probability times 255, rounded) and "mean_confidence".

    Existing shards are not written again, so an interrupted call continues where it stopped.

    Args:
        network: one model, or several whose mean probabilities are used.
        dataset: has "image" and "id"; a label column is not read.
        label_feature: the feature of the labeled set's "label" column. Pseudo labels are encoded like those labels, so
            that the two sets can be joined.
        process_index, num_processes: each process writes its share of the shards.
        options: options of `Ensemble.logits`: `own_size`, `scales`, `flip`, `mode="sliding"` with `crop_size` and
            `stride`, ...

    Returns:
        All shards, including those of other processes, which may not exist yet.

    Raises:
        ValueError: the set is streamed or has other classes than the network, or the folder contains labels of other
            images or of another network.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("Pseudo labels need a data set that is not streamed: load it without `streaming`.")
    encoding = LabelEncoding.from_feature(label_feature)
    if encoding is not None:
        check_classes(encoding.names, network.id2label, f"The labels and {network.sources[0]}")
    folder = Path(folder)
    shards = _shard_paths(folder, len(dataset), rows_per_shard)
    _check_manifest(folder, dataset, network, {"rows_per_shard": rows_per_shard, "options": repr(options)})
    own = [index for index in range(process_index, len(shards), num_processes) if not shards[index].is_file()]
    first_rows = [range(i * rows_per_shard, min((i + 1) * rows_per_shard, len(dataset))) for i in own]
    bar = tqdm(total=sum(map(len, first_rows)), desc="labeling", unit="image", disable=not progress)
    for index, rows in zip(own, first_rows, strict=True):
        stream = EvaluationStream(
            dataset.select(rows), name="unlabeled_dataset", with_label=False, num_workers=num_workers
        )
        found: dict[str, list] = {"id": [], "label": [], "confidence": [], "mean_confidence": []}
        for sample in (sample for batch in stream for sample in batch):
            confidence, ids = add_probabilities(None, network.logits(sample["image"], **options))[0].max(0)
            ids = ids.to("cpu").numpy().astype(np.uint8)
            found["id"].append(sample["id"])
            found["label"].append(_png(PILImage.fromarray(ids) if encoding is None else encoding.encode(ids)))
            found["confidence"].append(_png(PILImage.fromarray((confidence * 255).round().byte().cpu().numpy())))
            found["mean_confidence"].append(confidence.mean().item())
            bar.update()
        _write(Dataset.from_dict(found, features=_features(label_feature)), shards[index])
    bar.close()
    return shards


def with_pseudo_labels(
    dataset: Dataset, folder: str | Path, *, confidence_threshold: float = 0.0, column: str = "label"
) -> Dataset:
    """The unlabeled images with the labels that `label_dataset` wrote for them. Images are not copied.

    Args:
        dataset: the data set that was labeled.
        confidence_threshold: ignore pixels where the network's confidence was lower (to 1/255). 0, as in the paper:
            keep all pixels.
        column: the name of the label column. "label": the set can be joined with a labeled one by
            `datasets.concatenate_datasets`. "pseudo_label": it stays unlabeled, and `FixedTeacher` learns from it.

    Returns:
        A data set with the columns "image", "id" and this one.

    Raises:
        ValueError: a shard is missing, or the labels belong to other images.
    """
    manifest = _read_manifest(Path(folder))
    if manifest is None:
        raise ValueError(f"{folder} has no pseudo labels ({MANIFEST} is missing): write them with `label_dataset`.")
    shards = _shard_paths(Path(folder), manifest["rows"], manifest["rows_per_shard"])
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} is incomplete: {missing[0]} is missing. Run `label_dataset` again to continue.")
    if manifest["ids_sha256"] != _ids_hash(dataset):
        raise ValueError(f"The pseudo labels in {folder} belong to other images than those of this data set.")
    columns = ["label", "confidence"] if confidence_threshold > 0 else ["label"]
    labels = Dataset.from_parquet([str(path) for path in shards], columns=columns)
    if confidence_threshold > 0:
        encoding = LabelEncoding.from_feature(labels.features["label"])
        labels = labels.map(
            lambda row: {"label": _png(_only_sure(row, encoding, confidence_threshold))},
            remove_columns="confidence",
            desc="confident pixels",
        )
    joined = concatenate_datasets([dataset.select_columns(["image", "id"]), labels], axis=1)
    return joined.select_columns(["image", "label", "id"]).rename_columns({"label": column})


def contact_sheet(dataset: Dataset, folder: str | Path, path: str | Path, *, count: int = 6) -> None:
    """Draw evenly spaced images with their pseudo labels and confidence (white: high, black: low).

    Args:
        dataset: the images that were labeled into `folder`.
    """
    manifest = _read_manifest(Path(folder))
    shards = _shard_paths(Path(folder), manifest["rows"], manifest["rows_per_shard"])
    labels = Dataset.from_parquet([str(shard) for shard in shards])
    encoding = LabelEncoding.from_feature(labels.features["label"])
    images = EvaluationStream(evenly_spaced(dataset, count), name="unlabeled_dataset", with_label=False)
    cells = []
    for [sample], row in zip(images, evenly_spaced(labels, count), strict=True):
        ids = _decoded(row, encoding)
        confidence = np.asarray(row["confidence"])
        cells.append([sample["image"], ids, np.stack([confidence] * 3, axis=-1)])
    names = [*encoding.names] if encoding else [f"class {i}" for i in range(255)]
    palette = encoding.palette if encoding and encoding.palette else visualization.palette(len(names))
    visualization.panel(
        cells, ["unlabeled image", "pseudo label", "confidence, black 0, white 1"], names, palette, path
    )


def _only_sure(row: dict[str, Any], encoding: LabelEncoding | None, threshold: float) -> PILImage.Image:
    ids = _decoded(row, encoding).copy()
    ids[np.asarray(row["confidence"]) < threshold * 255] = IGNORE_INDEX
    return PILImage.fromarray(ids) if encoding is None else encoding.encode(ids)


def _decoded(row: dict[str, Any], encoding: LabelEncoding | None) -> np.ndarray:
    return np.asarray(row["label"]) if encoding is None else encoding.decode(row["label"], name="a pseudo label")


def _features(label_feature: Image) -> Features:
    columns = {"id": Value("string"), "label": label_feature, "confidence": Image()}
    return Features({**columns, "mean_confidence": Value("float32")})


def _png(image: PILImage.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def _write(shard: Dataset, path: Path) -> None:
    with written_whole(path) as temporary:
        shard.to_parquet(str(temporary))


def _shard_paths(folder: Path, rows: int, rows_per_shard: int) -> list[Path]:
    count = -(-rows // rows_per_shard)
    return [folder / f"labels-{index:05d}-of-{count:05d}.parquet" for index in range(count)]


def _ids_hash(dataset: Dataset) -> str:
    return hashlib.sha256("".join(f"{name}\n" for name in dataset["id"]).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _check_manifest(folder: Path, dataset: Dataset, network: Ensemble, how: dict[str, Any]) -> None:
    """Check which images were labeled by which network; continuing with others would mix two sets of labels."""
    weights = hashlib.sha256()
    for tensor in (tensor for one in network.networks for tensor in one.state_dict().values()):
        weights.update(tensor.cpu().numpy().tobytes())
    wanted = {"rows": len(dataset), "ids_sha256": _ids_hash(dataset), "weights_sha256": weights.hexdigest(), **how}
    found = _read_manifest(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / MANIFEST, json.dumps({**wanted, "network": network.sources}, indent=1))
        return
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        raise ValueError(
            f"{folder} contains pseudo labels of other images or of another network: {other[0]} is "
            f"{found.get(other[0])!r:.80} there and {wanted[other[0]]!r:.80} here. Choose another folder or delete it."
        )
