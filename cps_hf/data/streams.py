"""The labeled, unlabeled and evaluation streams of one process.

The order is defined in order.py; here samples are read, augmented and batched. Crops, flips, jitter and CutMix of a
sample depend only on the seed and its position, so nothing depends on the number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import AugmentationConfig
from ..functional import IGNORE_INDEX
from .labels import LabelEncoding
from .order import IterableReader, MapReader, Plan, Shard, Source, check_length, read_ahead, seeded_generator
from .reading import NO_ID, read_sample
from .table import as_typed
from .transforms import labeled_sample, unlabeled_views
from .windowed import is_beyond_decoding, open_windowed
from .workers import allowed_workers, outlive_signals

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 10  # replacements for one bad sample before giving up
NUM_SPARES = 32  # rows of a streamed data set that may replace bad ones
SHARE_COUNTED_OVER = 200  # samples; a bad one among the first few proves nothing
SLOW_FROM = 2**24  # pixels of an image that is decoded whole for each crop, from which on tiles would pay
PSEUDO_LABEL = "pseudo_label"
"""The column of an unlabeled set with labels from a network, coded like those of the labeled set."""


class TrainStream:
    """The labeled stream (`views=None`) or the unlabeled one, of one process.

    Iterating yields micro-batches without end, from `start` on: uint8 images, "labels" uint8 (B, H, W) or the views,
    "valid" bool (B, H, W), "ids" (a list of str) and "bad_samples" (a list of dicts, empty unless samples were
    replaced). The unlabeled stream never reads the column "label"; the view "pseudo_labels" is made from the column
    "pseudo_label". A batch of an odd size that needs CutMix partners also contains them: "partner_weak",
    "partner_strong", ... like the views, and "partner_valid".

    Args:
        name: the data set's name in error messages; also part of the seed.
        start: the position to begin at, from a checkpoint.
        length: for a resumed stream, the value of `state()["length"]`; `None` in a new run.
        cutmix_masks: keyword arguments of `draw_cutmix_masks` for the views that are masks.
        reshuffle: draw a new order for each pass; otherwise the first order is repeated (crops still vary).
        num_labels: a label outside [0, num_labels) that is not 255 is an error.
        skip_bad_samples: replace a sample that cannot be read by one that depends only on (seed, position, attempt).
        max_bad_sample_share: a larger share of bad samples ends the run.

    Raises:
        ValueError: while iterating: a sample cannot be read (the message names it), or too many cannot.
    """

    def __init__(
        self,
        dataset,
        *,
        name: str,
        shard: Shard,
        augmentation: AugmentationConfig,
        seed: int,
        views: tuple[str, ...] | None = None,
        cutmix_masks: Mapping[str, Any] | None = None,
        reshuffle: bool = True,
        num_labels: int | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        shuffle_buffer_size: int = 1000,
        start: int = 0,
        length: int | None = None,
        skip_bad_samples: bool = False,
        max_bad_sample_share: float = 0.05,
    ):
        label_column = label_column_of(views)
        dataset = undecoded(
            dataset, with_label=label_column is not None, what=name, label_column=label_column or "label"
        )
        num_workers = allowed_workers(num_workers)
        self.name, self.shard, self.start = name, shard, start
        self.plans_ahead = prefetch_factor * max(1, num_workers)
        self.max_bad_sample_share = max_bad_sample_share
        # With an odd batch size, some neighbours, (0, 1), (2, 3), ..., are in different batches.
        self.sends_partners = views is not None and "cutmix_mask" in views and shard.batch_size % 2 == 1
        if isinstance(dataset, Dataset):
            check_length(len(dataset), shard, name)
            self.reader = MapReader(dataset, seed, name, reshuffle=reshuffle)
        else:
            self.reader = IterableReader(dataset, seed, shuffle_buffer_size, length, shard, name, reshuffle=reshuffle)
        maker = SampleMaker(
            dataset,
            name=name,
            seed=seed,
            augmentation=augmentation,
            views=views,
            cutmix_masks=cutmix_masks,
            num_labels=num_labels,
        )
        if skip_bad_samples:
            maker.spares = self.reader.spares(NUM_SPARES)
        self._loader = DataLoader(
            maker,
            sampler=_Plans(self),
            batch_size=None,  # a plan is already a whole batch
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),  # otherwise the loader draws from the global generator
            worker_init_fn=outlive_signals,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen = bad = 0
        for batch in self._loader:
            if isinstance(batch, Exception):  # returned by a worker, without the worker's traceback
                raise batch
            seen, bad = seen + len(batch["ids"]), bad + len(batch["bad_samples"])
            if bad > self.max_bad_sample_share * max(seen, SHARE_COUNTED_OVER):
                raise ValueError(
                    f"`{self.name}`: {bad} of the last {seen} samples could not be read, more than "
                    f"`max_bad_sample_share={self.max_bad_sample_share}` allows. "
                    f"The newest: {batch['bad_samples'][-1:]}. "
                    "OUT/bad_samples.jsonl lists them. Fix the data set or raise the limit."
                )
            yield batch

    def plans(self) -> Iterator[Plan]:
        """The content of each micro-batch, without end."""
        return self.reader.plans(self._positions())

    def ids(self, start: int, count: int) -> list[str]:
        """The ids at the positions `start`, ... `start + count - 1` of the global order, for all processes."""
        return [id_of(row) for row in self.reader.rows(start, count)]

    def state(self) -> dict[str, Any]:
        """What a resumed stream needs in addition to its position."""
        return {"length": self.reader.length}

    def _positions(self) -> Iterator[tuple[range, list[int]]]:
        for positions in self.shard.micro_batches(self.start):
            partners = [p ^ 1 for p in positions if p ^ 1 not in positions] if self.sends_partners else []
            yield positions, partners


class _Plans(torch.utils.data.Sampler):
    """A sampler that yields plans: the DataLoader passes each to a worker as if it were an index."""

    def __init__(self, stream: TrainStream):
        self.stream = stream

    def __iter__(self) -> Iterator[Plan]:
        plans = self.stream.plans()
        return plans if isinstance(self.stream.reader, MapReader) else read_ahead(plans, self.stream.plans_ahead)


class SampleMaker(torch.utils.data.Dataset):
    """Runs in the workers: turns a plan into a batch of uint8 tensors, or returns the error."""

    def __init__(
        self,
        dataset,
        *,
        name: str,
        seed: int,
        augmentation: AugmentationConfig,
        views: tuple[str, ...] | None,
        cutmix_masks: Mapping[str, Any] | None = None,
        num_labels: int | None = None,
    ):
        self.dataset, self.name, self.seed = dataset, name, seed
        self.augmentation, self.num_labels = augmentation, num_labels
        self.views, self.cutmix_masks = views, cutmix_masks  # no views: the labeled stream
        self.with_label = label_column_of(views) is not None
        self.encoding = LabelEncoding.from_feature(dataset.features["label"]) if self.with_label else None
        self._told_of_slow = False
        self.spares: list[Source] = []  # replacements for bad samples; if empty, bad samples are errors

    def __getitem__(self, plan: Plan) -> dict[str, Any] | Exception:
        try:
            return self.batch(plan)
        except Exception as error:
            return error

    def batch(self, plan: Plan) -> dict[str, Any]:
        bad: list[dict[str, Any]] = []
        samples = {position: self.sample(position, source, bad) for position, source in plan.samples}
        batch = _stack(list(samples.values()))
        if plan.partners:
            # If these are bad, another batch lists them too.
            outside = {position: self.sample(position, source, []) for position, source in plan.partners}
            partners = [(samples | outside)[position ^ 1] for position in samples]
            for view in {"weak", "strong", "strong_2", "pseudo_labels", "valid"} & set(partners[0]):
                batch[f"partner_{view}"] = torch.stack([p[view] for p in partners])
        return {**batch, "bad_samples": bad}

    def sample(self, position: int, source: Source, bad: list[dict[str, Any]]) -> dict[str, Any]:
        """The sample at a position, or its replacement; each failure is added to `bad`."""
        for attempt in range(MAX_ATTEMPTS):
            generator = seeded_generator(self.seed, self.name + "/augmentation", position, attempt)
            row = None
            try:
                row = self.dataset[source] if isinstance(source, int) else source
                return self._make(row, generator)
            except ValueError as error:
                if not self.spares:
                    raise ValueError(f"{error} To train without such samples: `skip_bad_samples`.") from error
                bad.append(
                    {
                        "dataset": self.name,
                        "position": position,
                        "attempt": attempt,
                        "id": None if row is None else id_of(row),
                        "error": str(error),
                    }
                )
            draw = seeded_generator(self.seed, self.name + "/replacement", position, attempt)
            source = self.spares[int(torch.randint(len(self.spares), (), generator=draw))]
        raise ValueError(f"`{self.name}`: {MAX_ATTEMPTS} samples in a row could not be read. The last: {bad[-1]}")

    def _make(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        windowed = open_windowed(row, self.encoding, with_label=self.with_label)
        image, label = windowed or read_sample(row, self.encoding, with_label=self.with_label)
        if not windowed:
            self._tell_if_slow(image, row)
        if self.with_label and not windowed:
            check_label_range(label, self.num_labels, label_name(row))
        if self.views is None:
            sample = labeled_sample(image, label, self.augmentation, generator)
        else:
            sample = unlabeled_views(image, self.views, self.augmentation, generator, self.cutmix_masks, label)
        if self.with_label and windowed:
            ids = sample["labels" if self.views is None else "pseudo_labels"]
            check_label_range(ids, self.num_labels, label_name(row))
        return {**sample, "ids": id_of(row)}

    def _tell_if_slow(self, image: Tensor, row: dict[str, Any]) -> None:
        """Once per stream, and by one worker."""
        worker = torch.utils.data.get_worker_info()
        height, width = image.shape[-2:]
        if height * width >= SLOW_FROM and not self._told_of_slow and (worker is None or worker.id == 0):
            self._told_of_slow = True
            logger.warning(
                "`%s`: %r is %d x %d (height x width) and decoded whole for every crop. `cps-hf prepare --tile 1024` "
                "cuts such images once; of a tiled TIFF training reads only the tiles under a crop.",
                *(self.name, id_of(row), height, width),
            )


def decodable(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset | None:
    """Without the images that are too large to be decoded whole, `None` if none is left; a stream as it is."""
    if not isinstance(dataset, Dataset):
        return dataset
    rows = undecoded(dataset, with_label=False, what="dataset")
    kept = [i for i in range(len(rows)) if not is_beyond_decoding(rows[i]["image"])]
    return dataset.select(kept) if kept else None


def label_column_of(views: tuple[str, ...] | None) -> str | None:
    """The label column that a stream with these views reads; none if it only reads images."""
    if views is None:
        return "label"
    return PSEUDO_LABEL if "pseudo_labels" in views else None


def label_name(row: dict[str, Any]) -> str:
    """A row's label in error messages: its id and, if known, the file."""
    path = row["label"].get("path") if isinstance(row.get("label"), dict) else None
    return f"{id_of(row)!r} ({path})" if path else repr(id_of(row))


def check_label_range(label: Tensor, num_labels: int | None, name: str) -> None:
    """Check that every class id is below `num_labels` or 255 (ignored). `name`: from `label_name`, for the error."""
    if num_labels is None:
        return
    if torch.where(label == IGNORE_INDEX, 0, label).max() >= num_labels:
        values, counts = label[(label != IGNORE_INDEX) & (label >= num_labels)].unique(return_counts=True)
        found = ", ".join(f"{v} ({c} pixels)" for v, c in zip(values.tolist()[:5], counts.tolist()[:5], strict=True))
        raise ValueError(
            f"The label of {name} contains the values {found}, but the models have {num_labels} classes: "
            f"expected 0 to {num_labels - 1}, or {IGNORE_INDEX} for pixels to ignore. If these are classes, name all "
            f'of them: in the data set\'s folder, a `classes.json` like ["background", ...] with a name for each of 0 '
            f"to {values.max()}, or `class_names`. If not, set the coding of labels: `reduce_labels`, `values` or "
            f"`colors`, for instance {as_typed(reduce_labels=True)}."
        )


def _stack(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch from several samples: tensors are stacked, ids listed."""
    return {
        key: torch.stack([s[key] for s in samples]) if isinstance(value, Tensor) else [s[key] for s in samples]
        for key, value in samples[0].items()
    }


def check_columns(dataset, *, with_label: bool, what: str, label_column: str = "label") -> None:
    """Check that this is a data set of images.

    Args:
        what: the data set's name in error messages, e.g. "train_dataset".
        label_column: the name of the label column.

    Raises:
        ValueError: it is not a data set, or a column is missing or does not contain images.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        hint = ' Choose a split: `dataset["train"]`.' if isinstance(dataset, dict) else ""
        raise ValueError(
            f"`{what}` must be a datasets.Dataset or datasets.IterableDataset, found {type(dataset).__name__}.{hint} "
            "cps_hf.data's load_* functions return one."
        )
    if dataset.features is None:
        raise ValueError(
            f"`{what}` is streamed without features, as after `map`, so its columns and label coding are unknown. "
            "Pass the features of the original stream to `map`: `stream.map(..., "
            "features=stream.features)`."
        )
    for column in ["image", label_column] if with_label else ["image"]:
        if not isinstance(dataset.features.get(column), Image):
            found = ", ".join(f"{name} ({type(f).__name__})" for name, f in dataset.features.items())
            cast = "datasets.Image()"
            kept = ""
            if column == label_column:  # the feature contains the label coding
                cast = f'loaded.features["{column}"]'
                kept = (
                    " `loaded` is the result of `load_folder` or `load_hub`: its feature contains the label coding; "
                    "for your own labels, use `LabelEncoding(class_names).to_feature()` of `cps_hf.data`."
                )
            raise ValueError(
                f"`{what}` needs a column {column!r} of type Image, found {found}. Rename or cast yours: "
                f'`dataset.rename_column("<yours>", "{column}").cast_column("{column}", {cast})`.{kept}'
            )


def undecoded(dataset, *, with_label: bool, what: str, label_column: str = "label"):
    """The data set with its images as bytes and paths, an "id" column, and no unneeded columns.

    Args:
        what, label_column: as for `check_columns`; the label column is renamed to "label".

    Raises:
        ValueError: as for `check_columns`.
    """
    check_columns(dataset, with_label=with_label, what=what, label_column=label_column)
    wanted = ["image", label_column] if with_label else ["image"]
    if "id" not in dataset.features and isinstance(dataset, Dataset):
        dataset = dataset.add_column("id", [str(i) for i in range(len(dataset))])
    # A streamed set without ids stays so: rows numbered before shuffling would be renumbered in each shard.
    features = dataset.features
    dataset = dataset.select_columns([name for name in (*wanted, "id") if name in features]).with_format(None)
    for column in wanted:
        # `id` contains the label coding
        dataset = dataset.cast_column(column, Image(decode=False, id=features[column].id))
    return dataset.rename_column(label_column, "label") if with_label and label_column != "label" else dataset


def id_of(row: dict[str, Any]) -> str:
    """A row's name: its id or, in a streamed set without ids, its file."""
    return str(row["id"] if "id" in row else (row["image"] or {}).get("path") or NO_ID)


class EvaluationStream:
    """Whole images, once each, without padding or duplicates: this process gets `rank`, `rank + num_processes`, ...

    Yields lists of at most `batch_size` samples {"image": uint8 (3, H, W), "label": uint8 (H, W) or absent,
    "id": str}, since whole images differ in size.

    Args:
        keep_errors: yield the error in place of a sample that cannot be read, instead of raising it.
        may_be_empty: a streamed data set without rows is not an error.

    Raises:
        ValueError: while iterating: a sample cannot be read (the message names it), or there are none.
    """

    def __init__(
        self,
        dataset,
        *,
        name: str = "eval_dataset",
        with_label: bool = True,
        num_labels: int | None = None,
        batch_size: int = 1,
        rank: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        keep_errors: bool = False,
        may_be_empty: bool = False,
    ):
        self.keep_errors = keep_errors
        dataset = undecoded(dataset, with_label=with_label, what=name)
        if isinstance(dataset, Dataset):
            if len(dataset) == 0:
                raise ValueError(f"`{name}` is empty.")
            sources = range(rank, len(dataset), num_processes)
        else:
            sources = _EveryNth(dataset, rank, num_processes, None if may_be_empty else name)
        self._loader = DataLoader(
            _WholeSamples(dataset, with_label, num_labels),
            sampler=sources,
            batch_size=batch_size,
            collate_fn=list,
            num_workers=allowed_workers(num_workers),
            generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )

    def __iter__(self) -> Iterator[list[dict[str, Any] | Exception]]:
        for batch in self._loader:
            for sample in batch:
                if isinstance(sample, Exception) and not self.keep_errors:
                    raise sample
            yield batch


class _EveryNth:
    """This process's rows of a streamed data set, passed to the workers unchanged.

    Args:
        name: the name of a data set without rows in the error message. If None, there may be none.
    """

    def __init__(self, dataset: IterableDataset, rank: int, num_processes: int, name: str | None):
        self.dataset, self.rank, self.num_processes, self.name = dataset, rank, num_processes, name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen = 0
        for row in self.dataset:
            if seen % self.num_processes == self.rank:
                yield row
            seen += 1
        if seen == 0 and self.name is not None:
            raise ValueError(f"`{self.name}` is empty.")


class _WholeSamples(torch.utils.data.Dataset):
    def __init__(self, dataset, with_label: bool, num_labels: int | None):
        self.dataset, self.with_label, self.num_labels = dataset, with_label, num_labels
        self.encoding = LabelEncoding.from_feature(dataset.features["label"]) if with_label else None

    def __getitem__(self, source: Source) -> dict[str, Any] | Exception:
        try:
            row = self.dataset[source] if isinstance(source, int) else source
            image, label = read_sample(row, self.encoding, with_label=self.with_label)
            sample = {"image": image, "id": id_of(row)}
            if self.with_label:
                check_label_range(label, self.num_labels, label_name(row))
                sample["label"] = label
            return sample
        except Exception as error:
            return error
