"""`cps-hf rank`: which images to label next, ranked by how much a run's branches disagree.

cps-hf rank outputs/run DIR --count 12
    DIR may be the training folder: images with a mask are skipped. Writes ranking.csv with all images, best first, and
    ranking.png next to it: the first images with the disagreement drawn in. outputs/run/report.html shows both.

cps-hf rank outputs/run photos --labeled DIR
    photos contains the original images, DIR is the output of `cps-hf convert`: images with a mask there are
    skipped.

cps-hf rank BRANCH photos 'more/*.jpg' --output next.csv
    a single network: ranked by the entropy of its prediction.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .. import visualization
from ..data.layout import NoMasksError, find_layout
from ..data.palettes import palette_of
from ..data.same_files import KnownFiles
from ..data.streams import EvaluationStream
from ..data.table import build
from ..data.walk import find_images
from ..files import write_atomically, written_whole
from ..inference.ensemble import Ensemble
from ..inference.ranking import descriptor, spread, uncertainty
from ..inference.windows import add_probabilities, class_ids
from ..report.page import RANKING, RANKING_SHEET, write_report
from . import branches as chosen
from .arguments import ArgumentParser
from .console import log_warnings_alone
from .errors import user_errors
from .main import COMMANDS

COLUMNS = ("rank", "image", "score", "disagreement", "entropy", "different_pixels")


def make_parser() -> ArgumentParser:
    first = ("run", "images", "labeled", "output", "count", "mode", "crop_size")
    parser = ArgumentParser(
        "rank", COMMANDS["rank"], first=first, usage="RUN IMAGES [IMAGES ...] [--option value ...]"
    )
    parser.add_argument("run", metavar="RUN", help="a run's output folder, whose branches are compared, or one branch")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="a folder, even the training folder; files, globs")
    parser.add_argument("--labeled", metavar="DIR", help="skip images that have a mask in this training folder")
    group = parser.add_argument_group("output")
    group.add_argument("--output", default="ranking.csv", help="the table; the contact sheet is next to it, as .png")
    group.add_argument("--count", type=int, default=12, help="how many images you want to label; all are drawn")
    group.add_argument("--no_spread", action="store_true", help="rank by score alone, even near-duplicates")
    group.add_argument("--skip_bad_images", action="store_true", help="skip and count unreadable images")
    group.add_argument("--num_workers", type=int, default=1, help="processes that read images")
    chosen.add_options(parser)
    return parser


def main(argv: Sequence[str]) -> list[str]:
    """Rank as the command line says. Returns the images' paths, best first."""
    options = make_parser().parse_args(argv)
    log_warnings_alone()
    with user_errors(options.output):
        return rank(options)


def rank(options: argparse.Namespace) -> list[str]:
    """Rank everything. Returns the images' paths, best first."""
    if options.count < 1:
        raise ValueError(f"`--count` must be at least 1, got {options.count}.")
    output = Path(options.output)
    if output.suffix != ".csv" or output.is_dir():
        raise ValueError(f"`--output` must name a .csv file, got `{output}`.")
    if file := next((path for path in output.parents if path.is_file()), None):
        raise ValueError(f"`--output` {output} must be in a folder, but {file} is a file.")
    sources, left_out = unlabeled_images(options.images, options.labeled)
    options.branches = branches_of(options.run)
    ensemble, how = chosen.from_arguments(options)
    scored = score(ensemble, how, sources, options)
    if not scored:
        raise ValueError("None of the images could be read.")
    key = "disagreement" if len(ensemble.networks) > 1 else "entropy"
    scores = [one.means[key] for one in scored]
    if options.no_spread:
        order = [int(i) for i in np.argsort(-np.asarray(scores), kind="stable")]
    else:
        order = spread(scores, np.stack([one.descriptor for one in scored]), options.count)
    ranked = [scored[i] for i in order]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, table(ranked, sources, key))
    sheet = output.with_suffix(".png")
    contact_sheet(ensemble, how, ranked[: options.count], sources, key, sheet)
    print(f"{len(ranked)} images ranked by {key}{left_out}; the first {min(options.count, len(ranked))}:")
    for place, one in enumerate(ranked[: options.count], 1):
        print(f"  {place:3}  {one.means[key]:.4f}  {sources[one.name]}")
    written = [output, sheet]
    if (Path(options.run) / "results.json").is_file():
        written.append(add_to_report(Path(options.run), ranked[: options.count], len(ranked), sources, key, sheet))
    print(f"Written: {', '.join(map(str, written))}.")
    return [str(sources[one.name]) for one in ranked]


def unlabeled_images(given: Sequence[str], labeled: str | None = None) -> tuple[dict[str, Path], str]:
    """Name -> path of the images without a mask, and a text with the number of images that have one.

    Args:
        given: a folder, files, globs. labeled: a training folder; images with a mask there, under any path, are
            skipped too.

    Raises:
        ValueError: there are no images left, or a folder has masks that cannot be matched to images.
    """
    found, count = _without_mask(given)
    if labeled is not None:
        known = KnownFiles(pair.image for pair in find_layout(labeled).pairs if pair.mask is not None)
        everything, found = found, {name: path for name, path in found.items() if path not in known}
        count += len(everything) - len(found)
    if not found:
        raise ValueError(f"Every image of {' '.join(given)} has a mask. No image is left to label.")
    return found, f", {count} with a mask skipped" if count else ""


def _without_mask(given: Sequence[str]) -> tuple[dict[str, Path], int]:
    """In a folder with masks, the images without one, and how many have one. Otherwise all images."""
    if len(given) > 1 or not Path(given[0]).is_dir():
        return find_images(given), 0
    try:
        layout = find_layout(given[0])
    except NoMasksError:
        return find_images(given), 0
    bare = {pair.path: pair.image for pair in layout.pairs if pair.mask is None}
    return bare, len(layout.pairs) - len(bare)


def branches_of(run: str) -> list[str]:
    """The branches of a run's output folder. Anything else is a branch itself, a folder or a Hub id.

    Raises:
        ValueError: the folder is neither.
    """
    folder = Path(run)
    numbers = {path.name.removeprefix("branch_"): path for path in folder.glob("branch_[0-9]*")}
    whole = {int(n): path for n, path in numbers.items() if n.isdigit() and (path / "config.json").is_file()}
    if not whole and folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{run} contains no branch: expected branch_0/ and branch_1/ of a finished run, or the config.json of a "
            "single branch. Give the output folder of `cps-hf train`, or a branch in it."
        )
    return [str(path) for _, path in sorted(whole.items())] or [run]


@dataclass
class Scored:
    """An image: its name, the means of its maps, the share of pixels on which two networks differ, and a small copy
    for near-duplicates."""

    name: str
    means: dict[str, float]
    different: float | None
    descriptor: np.ndarray


def score(ensemble: Ensemble, how: dict[str, Any], sources: dict[str, Path], options) -> list[Scored]:
    """Read and predict each image once."""
    stream = EvaluationStream(
        build([*sources], [*sources.values()]),
        name="IMAGES",
        with_label=False,
        num_workers=options.num_workers,
        keep_errors=True,
    )
    found = []
    bar = tqdm(total=len(sources), desc="ranking", unit="image", dynamic_ncols=True, disable=None)
    for batch in stream:
        for sample in batch:
            if isinstance(sample, ValueError):
                if not options.skip_bad_images:
                    raise ValueError(f"{sample} `--skip_bad_images` skips such images.") from sample
                bar.write(f"skipped: {sample}", file=sys.stderr)
            elif isinstance(sample, Exception):
                raise sample
            else:
                try:
                    predictions, maps = look(ensemble, how, sample["image"])
                except ValueError as error:
                    raise ValueError(f"{sources[sample['id']]}: {error}") from error
                means = {name: float(values.mean()) for name, values in maps.items()}
                different = float((predictions[0] != predictions[1]).mean()) if len(predictions) > 1 else None
                found.append(Scored(sample["id"], means, different, descriptor(sample["image"])))
            bar.update()
    bar.close()
    return found


def look(ensemble: Ensemble, how: dict[str, Any], image) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Each network's class map (H, W), and the maps of `uncertainty`."""
    probabilities, predictions = [], []
    for index in range(len(ensemble.networks)):
        logits = ensemble.logits(image, only=index, **how)
        predictions.append(class_ids(logits)[0].cpu().numpy())
        probabilities.append(add_probabilities(None, logits)[0].cpu())
    return predictions, {name: values.numpy() for name, values in uncertainty(probabilities).items()}


def table(ranked: Sequence[Scored], sources: dict[str, Path], key: str) -> str:
    """The CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, one in enumerate(ranked, 1):
        numbers = (one.means[key], one.means.get("disagreement"), one.means["entropy"], one.different)
        shown = ("" if number is None else f"{number:.6f}" for number in numbers)
        writer.writerow([place, sources[one.name], *shown])
    return text.getvalue()


def contact_sheet(ensemble, how, ranked: Sequence[Scored], sources: dict[str, Path], key: str, path: Path) -> None:
    """Draw the first images, the networks' predictions, and their uncertainty: brighter is more."""
    names = [*ensemble.id2label.values()]
    stream = EvaluationStream(
        build([one.name for one in ranked], [sources[one.name] for one in ranked]), name="IMAGES", with_label=False
    )
    rows = []
    for batch in stream:
        for sample in batch:
            predictions, maps = look(ensemble, how, sample["image"])
            rows.append([sample["image"].numpy(), *predictions, heat(maps[key])])
    titles = ["image", *(f"branch {i}" for i in range(len(ensemble.networks))), key]
    captions = [f"{place}  {one.name}" for place, one in enumerate(ranked, 1)]
    visualization.panel(rows, titles, names, palette_of(None, names), path, captions=captions)


def add_to_report(
    run: Path, first: Sequence[Scored], count: int, sources: dict[str, Path], key: str, sheet: Path
) -> Path:
    """Show the first of `count` ranked images on the run's page, instead of those of an earlier ranking."""
    rows = [{"image": str(sources[one.name]), "score": one.means[key]} for one in first]
    (run / RANKING_SHEET).parent.mkdir(exist_ok=True)
    with written_whole(run / RANKING_SHEET) as temporary:
        shutil.copyfile(sheet, temporary)
    write_atomically(run / RANKING, json.dumps({"key": key, "images": count, "first": rows}, ensure_ascii=False))
    return write_report(run)


def heat(values: np.ndarray) -> np.ndarray:
    """A map of shares as a picture, uint8 (3, H, W): black is 0, white is 1 (matplotlib's "inferno")."""
    from matplotlib import colormaps

    colors = colormaps["inferno"](np.clip(np.sqrt(values), 0, 1))[..., :3]  # the root, as most values are small
    return np.ascontiguousarray(np.moveaxis((255 * colors).round().astype(np.uint8), -1, 0))
