"""`cps-hf predict`: write masks, overlays with a legend and, optionally, class probabilities or annotation drafts.

    cps-hf predict outputs/train_cps photos --format labelme
        the better branch of a run on a folder of images; masks also in LabelMe's format. In a training folder, all
        images are predicted, and the masks are skipped.

    cps-hf predict --branches outputs/train_cps/best --inputs photos 'more/*/img_*.jpg' one.png
        image files, folders (recursively) and globs (quoted, so that names keep their subfolders).

    cps-hf predict --branches A B --dataset hub --data_root USER/SET --split test --probabilities
        the mean of two branches on a data set from the Hub, on parquet files, or on any other named data set.

Works with any AutoModelForSemanticSegmentation model. Written to `--output_dir`, each with its image's name and
subfolders: masks/ (PNGs of class ids in the class colours), overlays/ and probabilities/ (float16 (C, H, W) at the
image's size). Run again, it skips finished images, which predicted.jsonl lists; incomplete files never have their
final name. With `--format`, the masks are also written as polygons for an annotation tool: coco.json, cvat.xml or
labelme/ (`png`: classes.json, next to the masks).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from .. import visualization
from ..annotations.drafts import FORMATS, Draft, write_drafts
from ..data.layout import find_layout
from ..data.masks import output_path, write_mask, write_probabilities
from ..data.palettes import palette_of
from ..data.streams import EvaluationStream, undecoded
from ..data.table import build
from ..data.walk import find_images
from ..files import append_record, read_records, stamp_of, write_atomically
from ..inference.ensemble import Ensemble
from ..inference.windows import add_probabilities, class_ids
from . import branches as chosen
from . import datasets as named
from .arguments import ArgumentParser
from .console import log_warnings_alone
from .errors import user_errors
from .huge import HUGE, UnreadableError, huge_paths, is_huge, predict_huge, windows_for
from .main import COMMANDS

OF_HUGE = "windows over huge images"  # their name in prediction.json
SUFFIXES = {"masks": ".png", "overlays": ".png", "probabilities": ".npy"}


def make_parser() -> ArgumentParser:
    first = ("branches", "mode", "crop_size", "inputs", "dataset", "data_root", "split", "output_dir", "probabilities")
    usage = "RUN IMAGES [IMAGES ...] [--option value ...]"
    parser = ArgumentParser("predict", COMMANDS["predict"], first=(*first, "format"), usage=usage)
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's output folder (its better branch) or a branch")
    parser.add_argument("images", metavar="IMAGES", nargs="*", help="image files, folders (masks are skipped), globs")
    chosen.add_arguments(parser, required=False)
    group = parser.add_argument_group("images")
    group.add_argument("--inputs", nargs="+", default=[], help="same as IMAGES; or name a data set:")
    named.add_arguments(parser, default=None)
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="outputs/predictions", help="where everything is written")
    group.add_argument(
        "--huge_from", type=int, default=HUGE, metavar="PIXELS", help="predict larger files in windows, by rows"
    )
    group.add_argument("--probabilities", action="store_true", help="also write every class's probability; large")
    group.add_argument("--no_overlays", action="store_true", help="write no overlays")
    group.add_argument("--overlay_alpha", type=float, default=0.5, help="opacity of the class colours, 0 to 1")
    group.add_argument("--keep_suffix", action="store_true", help="a.jpg becomes a.jpg.png, to allow a.png as well")
    group.add_argument("--skip_bad_images", action="store_true", help="skip and count unreadable images")
    group.add_argument("--overwrite", action="store_true", help="first remove this command's earlier output")
    group = parser.add_argument_group("drafts for annotation tools")
    group.add_argument("--format", choices=FORMATS, help="also write a tool's import format; png: classes.json")
    group.add_argument("--tolerance", type=float, default=1.0, help="how far outlines may be simplified, in pixels")
    group.add_argument("--min_area", type=int, default=0, help="fill in smaller regions from around, in pixels")
    group.add_argument("--background", default="background", help="the class that is not drawn")
    return parser


def main(argv: Sequence[str]) -> dict[str, int]:
    """Predict as the command line says. Returns how many images were predicted, done before, and unreadable."""
    options = make_parser().parse_args(argv)
    log_warnings_alone()
    with user_errors(options.output_dir):
        return predict(options)


def predict(options: argparse.Namespace) -> dict[str, int]:
    """Predict everything. Returns how many images were predicted, done before, and unreadable."""
    _settle_words(options)
    _check_values(options)
    images = Images.from_files(options) if options.inputs else Images.from_dataset(options)
    branches, how = chosen.from_arguments(options)
    how_huge = windows_for(images.huge, branches, how, options) if images.huge else None
    kinds = ["probabilities"] * options.probabilities + ["overlays"] * (not options.no_overlays) + ["masks"]
    settings = _settings(options, branches, how, how_huge)
    outputs = Outputs(Path(options.output_dir), kinds, settings, overwrite=options.overwrite)
    progress = Progress(images.count, skip_bad_images=options.skip_bad_images)
    names = [*branches.id2label.values()]
    shown = names, palette_of(None, names), options.overlay_alpha
    for sample in images.samples(outputs, progress, options.num_workers):
        if isinstance(sample, Exception):
            progress.leave_out(sample)
            continue
        _predict_one(sample, images.source(sample["id"]), outputs, branches, how, shown)
        progress.count("predicted")
    for name, path in images.huge.items():
        _predict_huge(name, path, outputs, progress, branches, how_huge, shown)
    progress.bar.close()
    print(f"{progress}. Written to {options.output_dir}.")
    if options.format:
        settled = {name: getattr(options, name) for name in ("format", "tolerance", "min_area", "background")}
        drafts = images.drafts(outputs, keep_suffix=options.keep_suffix)
        print(f"Drafts: {', '.join(map(str, write_drafts(outputs.folder, drafts, names, **settled)))}")
    return progress.counts


def _check_values(options: argparse.Namespace) -> None:
    if not 0 <= options.overlay_alpha <= 1:
        raise ValueError(f"`--overlay_alpha` must be from 0 to 1, got {options.overlay_alpha}.")
    for name in ("tolerance", "min_area"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"`--{name}` must be 0 or more, got {getattr(options, name)}.")
    if options.format and not options.inputs:
        raise ValueError(f"`--format {options.format}` needs image files, which the tool opens too. Give IMAGES.")


def _settings(
    options: argparse.Namespace, branches: Ensemble, how: dict[str, Any], how_huge: dict[str, Any] | None
) -> dict[str, Any]:
    """What decides how the outputs look. Windows over huge images only if there is such an image."""
    found = {"weights": fingerprint(branches), "classes": [*branches.id2label.values()], **how}
    found["overlay_alpha"] = options.overlay_alpha
    found.pop("window_batch_size", None)
    if how_huge is not None:
        windows = {key: how_huge[key] for key in ("crop_size", "stride")}
        found[OF_HUGE] = {"pixels": options.huge_from, **windows}
    return found


class Progress:
    """How many images were predicted, done before, and unreadable; and the progress bar."""

    def __init__(self, total: int | None, *, skip_bad_images: bool):
        self.counts = {"predicted": 0, "done before": 0, "not readable": 0}
        self.bar = tqdm(total=total, desc="predicting", unit="image", dynamic_ncols=True, disable=None)
        self._skips = skip_bad_images

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items())

    def count(self, what: str) -> None:
        self.counts[what] += 1
        self.bar.update()

    def leave_out(self, error: Exception) -> None:
        """Count an image that cannot be read.

        Raises:
            ValueError: such images are not to be skipped.
            Exception: `error`, if it is not the image's fault.
        """
        if not isinstance(error, ValueError):
            raise error
        if not self._skips:
            raise ValueError(f"{error} `--skip_bad_images` skips such images.") from error
        self.bar.write(f"skipped: {error}", file=sys.stderr)
        self.count("not readable")


Shown = tuple[list[str], Sequence[tuple[int, int, int]], float]
"""The class names and colours, and the opacity of the colours on an overlay."""


def _predict_one(
    sample: dict[str, Any], source: str, outputs: Outputs, branches: Ensemble, how: dict[str, Any], shown: Shown
) -> None:
    """Predict an image as a whole and write its outputs, the mask last."""
    try:
        logits = branches.logits(sample["image"], **how)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    prediction = class_ids(logits)[0].to(torch.uint8).cpu().numpy()
    paths, (names, palette, alpha) = outputs.paths(sample["id"]), shown
    if "probabilities" in paths:
        write_probabilities(paths["probabilities"], add_probabilities(None, logits)[0].half().cpu().numpy())
    del logits
    if "overlays" in paths:
        visualization.overlay_page(sample["image"], prediction, names, palette, paths["overlays"], alpha=alpha)
    write_mask(paths["masks"], prediction, palette)
    outputs.record(sample["id"], source)


def _predict_huge(
    name: str,
    path: str,
    outputs: Outputs,
    progress: Progress,
    branches: Ensemble,
    how: dict[str, Any],
    shown: Shown,
) -> None:
    """Predict an image by rows, unless it is done."""
    paths = huge_paths(outputs.paths(name), path)
    if outputs.is_done(name, path, paths):
        progress.count("done before")
        return
    try:
        predict_huge(path, paths, branches, how, *shown)
    except UnreadableError as error:
        progress.leave_out(error)
        return
    outputs.record(name, path)
    progress.count("predicted")


def _settle_words(options: argparse.Namespace) -> None:
    """Use RUN and IMAGES as `--branches` and `--inputs`.

    Raises:
        ValueError: one of them is given twice, or there is no branch.
    """
    if options.images and options.inputs:
        raise ValueError("Give IMAGES or `--inputs`, not both.")
    chosen.settle_run(options, what="should predict")
    options.inputs = options.images or options.inputs


@dataclass
class Images:
    """The images to predict: rows with "image" and "id", and where each came from."""

    dataset: Any
    sources: dict[str, str] | None  # for files: name -> path
    origin: str  # for a data set: its name
    count: int | None
    huge: dict[str, str] = field(default_factory=dict)  # the files that are predicted by rows

    @classmethod
    def from_files(cls, options: argparse.Namespace) -> Images:
        if options.dataset or options.data_root:
            raise ValueError("Give `--inputs` or `--dataset`, not both.")
        sources = find_images(options.inputs, keep_suffix=options.keep_suffix, leave_out=Path(options.output_dir))
        masks = _masks_in(options.inputs)
        sources = {name: str(path) for name, path in sources.items() if path not in masks}
        huge = {name: path for name, path in sources.items() if is_huge(path, options.huge_from)}
        others = {name: path for name, path in sources.items() if name not in huge}
        return cls(build([*others], [*others.values()]), sources, "", len(sources), huge)

    @classmethod
    def from_dataset(cls, options: argparse.Namespace) -> Images:
        if not options.dataset:
            raise ValueError("Nothing to predict: give `--inputs` (files, folders, globs) or `--dataset`.")
        dataset = undecoded(named.from_arguments(options, with_labels=False), with_label=False, what="dataset")
        if "id" not in (dataset.features or {}):
            raise ValueError(
                "Rows of this stream have no id, so outputs would have no names. Give "
                "`--load_options '{\"id_column\": ...}'`, or remove `--streaming`."
            )
        origin = " ".join(filter(None, (options.dataset, options.data_root, options.split)))
        return cls(dataset, None, origin, len(dataset) if isinstance(dataset, Dataset) else None)

    def source(self, name: str) -> str:
        return self.sources[name] if self.sources is not None else f"{self.origin}: {name}"

    def drafts(self, outputs: Outputs, *, keep_suffix: bool) -> list[Draft]:
        """For files: the predicted ones. `keep_suffix`: names already have their images' suffixes."""
        done = [(name, Path(path)) for name, path in self.sources.items() if outputs.is_done(name, path)]
        found = []
        for name, path in done:
            called = name if keep_suffix else f"{name}{path.suffix}"
            found.append(Draft(name, path, called, outputs.paths(name)["masks"]))
        return found

    def samples(self, outputs: Outputs, progress: Progress, num_workers: int) -> Iterator[dict | Exception]:
        """The images that are not done. Of finished ones only the ids are read."""

        seen = set()

        def is_new(name: str) -> bool:
            if os.path.normpath(name) in seen:
                raise ValueError(f"Two rows have the id {name!r}, and one mask would overwrite the other.")
            seen.add(os.path.normpath(name))
            done = outputs.is_done(name, self.source(name))
            if done:
                progress.count("done before")
            return not done

        if isinstance(self.dataset, Dataset):
            dataset = self.dataset.select([i for i, name in enumerate(self.dataset["id"]) if is_new(name)])
            if not len(dataset):
                return
        else:
            dataset = self.dataset.filter(is_new, input_columns=["id"])
            num_workers = 0  # `is_new` counts in this process
        for batch in EvaluationStream(
            dataset,
            name="dataset",
            with_label=False,
            num_workers=num_workers,
            keep_errors=True,
            may_be_empty=True,  # a stream whose images are all done
        ):
            yield from batch


def _masks_in(inputs: Sequence[str]) -> set[Path]:
    """The masks, as absolute paths, of the training folders among the inputs. Prints how many there are.

    `a.jpg` and `a.png` in one folder are two images here: only the file type suggests that one is a mask.
    """
    found = set()
    for folder in filter(os.path.isdir, inputs):
        try:
            pairs = find_layout(folder).pairs
        except ValueError:  # not a training folder: all files are images
            continue
        masks = {
            pair.mask.resolve()
            for pair in pairs
            if pair.mask is not None and pair.mask.with_suffix("") != pair.image.with_suffix("")
        }
        if masks:
            print(
                f"{folder} is a training folder: {len(masks)} mask file{'s' if len(masks) > 1 else ''} skipped.",
                flush=True,
            )
        found |= masks
    return found


class Outputs:
    """The files of an output folder, which images are done there, and how they were predicted.

    Args:
        kinds: of `SUFFIXES`, what is written for each image.
        settings: what decides how the files look; other settings in the folder are an error unless `overwrite`.

    Raises:
        ValueError: the folder contains masks with other settings, or files of another command.
    """

    def __init__(self, folder: Path, kinds: list[str], settings: dict[str, Any], *, overwrite: bool):
        self.folder, self.kinds = folder, kinds
        self.index, about = folder / "predicted.jsonl", folder / "prediction.json"
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they are in the file
        strange = [k for k in kinds if not about.is_file() and (folder / k).exists()]
        if strange:
            raise ValueError(f"{folder / strange[0]} was not written by this command. Choose another `--output_dir`.")
        there = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else settings
        kept = {OF_HUGE: there.get(OF_HUGE, settings.get(OF_HUGE))}  # absent until there is a huge image
        other = [name for name in settings if (kept | there).get(name) != settings[name]]
        if other and not overwrite:
            values = "" if other[0] == "weights" else f" ({there.get(other[0])} there, {settings[other[0]]} now)"
            raise ValueError(
                f"{folder} contains predictions made with other {other[0]}{values}. Choose another `--output_dir`, or "
                "replace them with `--overwrite`."
            )
        self.done = {entry["name"]: entry for entry in read_records(self.index)}
        if overwrite:
            for name in self.done:
                output_path(folder / "masks", name, ".tif").unlink(missing_ok=True)  # from a huge image
                for kind, suffix in SUFFIXES.items():
                    output_path(folder / kind, name, suffix).unlink(missing_ok=True)
            self.index.unlink(missing_ok=True)
            self.done = {}
        elif kept[OF_HUGE] is not None:
            settings |= kept
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(about, json.dumps(settings, indent=1, ensure_ascii=False))

    def paths(self, name: str) -> dict[str, Path]:
        return {kind: output_path(self.folder / kind, name, SUFFIXES[kind]) for kind in self.kinds}

    def is_done(self, name: str, source: str, paths: dict[str, Path] | None = None) -> bool:
        """Whether all files of this image are there and the image has not changed since.

        Raises:
            ValueError: they belong to another image.
        """
        entry = self.done.get(name)
        if entry is None:
            return False
        if entry["source"] != source:
            raise ValueError(
                f"{self.paths(name)['masks']} was predicted from {entry['source']}, not from {source}. Choose another "
                "`--output_dir`, or replace it with `--overwrite`."
            )
        return entry["stamp"] == stamp(source) and all(path.is_file() for path in (paths or self.paths(name)).values())

    def record(self, name: str, source: str) -> None:
        self.done[name] = {"name": name, "source": source, "stamp": stamp(source)}
        append_record(self.index, self.done[name])


def stamp(source: str) -> list[int] | None:
    """A file's size and modification time; `None` for rows of a data set."""
    try:
        return stamp_of(source)
    except OSError:
        return None


def fingerprint(branches: Ensemble) -> str:
    """SHA-256 of all weights and image processors: the same name may have other weights tomorrow."""
    digest = hashlib.sha256()
    for network, processor in zip(branches.networks, branches.processors, strict=True):
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(processor.to_json_string().encode())
    return digest.hexdigest()
