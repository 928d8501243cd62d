"""Cut a folder of large images and their masks into tiles, which are read like a folder of small images.

Tiles keep the subfolders and are named `<image>_r<row>_c<column>` after the pixel in their upper left corner. The last
tiles of a row or column are shifted to end with the image, so that all tiles of an image have the same size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ..files import append_record, read_records, stamp_of, write_atomically, written_whole
from .bands import Bands, WholeBands, open_bands
from .class_tables import READERS
from .labels import IGNORE_INDEX
from .layout import Pair, find_layout, images_alone
from .table import first_few

ABOUT, DONE, LEFT_OUT = "tiles.json", "tiles.jsonl", "left_out.csv"
GROUP_BY = r"^(.*)_r\d+_c\d+\."
"""For `--group_by`: keeps all tiles of an image on one side of a split."""

EMPTY, IGNORED = "empty: one colour", "all pixels of the mask are ignored"


@dataclass
class Tiled:
    """The result of `cut_tiles`.

    Attributes:
        images: number of images that were cut. done_before: those cut before this call.
        tiles: by "labeled" and "unlabeled", the number of tiles.
        left_out: (the tile's name, the reason) of skipped tiles.
        scans: number of images with labeled tiles.
    """

    images: int = 0
    done_before: int = 0
    tiles: dict[str, int] = field(default_factory=lambda: {"labeled": 0, "unlabeled": 0})
    left_out: list[tuple[str, str]] = field(default_factory=list)
    scans: int = 0


def cut_tiles(
    root: str | Path,
    out: str | Path,
    *,
    tile: int,
    overlap: int = 0,
    ignored: Sequence[int] = (IGNORE_INDEX,),
    images_only: bool = False,
    layout_options: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Tiled:
    """Cut the images and masks of `root`, as `find_layout` finds them, into square tiles below `out`.

    Image tiles are RGB PNGs of 8 bits, read as training reads images. Mask tiles contain the stored values (or
    colours) of the mask, with its palette. Image tiles of a single colour and tiles whose mask is entirely ignored are
    skipped and listed in `out/left_out.csv`. An interrupted call resumes with the images that are not cut yet.

    Args:
        tile: height and width in pixels, a multiple of 16. A smaller image becomes a single smaller tile.
        overlap: pixels that neighbouring tiles share.
        ignored: stored values of masks that are not classes.
        images_only: omit masks; `root` may have none.
        layout_options: `images`, `masks`, `image_suffix` and `mask_suffix` of `find_layout`.

    Raises:
        ValueError: an option is invalid, a file cannot be read, a mask has another size than its image, or `out`
            contains something else.
    """
    root, out, options = Path(root), Path(out), dict(layout_options or {})
    if tile < 16 or tile % 16:
        raise ValueError(f"`--tile` must be a multiple of 16, got {tile}.")
    if not 0 <= overlap < tile:
        raise ValueError(f"`--overlap` must be from 0 to less than `--tile` ({tile}), got {overlap}.")
    if out.resolve() == root.resolve() or out.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{out} is inside {root}, whose images are read. Choose a folder outside.")
    layout = None if images_only else find_layout(root, **options)
    pairs = images_alone(root) if layout is None else layout.pairs
    by_list = layout is not None and layout.sentence.endswith("of ImageSets/Segmentation")
    names = [_Names.of(pair, root, options.get("mask_suffix")) for pair in pairs]
    _check_names(names, root)
    settings = {"root": str(root.resolve()), "tile": tile, "overlap": overlap, "ignored": sorted(ignored)}
    settings |= {"images_only": images_only, "options": options}
    done = _open_folder(out, settings)
    result = Tiled(images=len(pairs))
    stems: dict[str, list[str]] = {}
    for pair, name in tqdm([*zip(pairs, names, strict=True)], desc="cutting", unit="image", disable=not progress):
        stamp = [stamp_of(path) for path in (pair.image, pair.mask) if path is not None]
        entry = done.get(pair.path)
        if entry is not None and entry["stamp"] != stamp:
            raise ValueError(f"{pair.path} has changed since it was cut into {out}. Choose another folder.")
        if entry is None:
            kept, left_out = _cut_one(pair, name, out, tile, overlap, ignored)
            entry = {"image": pair.path, "stamp": stamp, "tiles": kept, "left_out": left_out}
            append_record(out / DONE, entry)
        else:
            result.done_before += 1
        result.tiles["unlabeled" if pair.mask is None else "labeled"] += len(entry["tiles"])
        result.scans += pair.mask is not None and bool(entry["tiles"])
        result.left_out += map(tuple, entry["left_out"])
        if by_list and pair.split is not None:
            stems.setdefault(pair.split, []).extend(PurePosixPath(kept).stem for kept in entry["tiles"])
    lines = ["tile,why", *(f'"{name}",{why}' for name, why in result.left_out)]
    write_atomically(out / LEFT_OUT, "\n".join(lines) + "\n")
    for split, kept in stems.items():
        path = out / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{stem}\n" for stem in kept))
    _copy_class_tables(root, out, pairs)
    return result


@dataclass
class _Names:
    """Where the tiles of an image and its mask are: the folder below the output, and the beginning of their names."""

    image: PurePosixPath
    mask: PurePosixPath | None
    mask_end: str = ""

    @classmethod
    def of(cls, pair: Pair, root: Path, mask_suffix: str | None) -> _Names:
        """A mask's tile has the name of the image's tile, plus a suffix if both are in one folder."""
        image = PurePosixPath(pair.path).with_suffix("")
        if pair.mask is None:
            return cls(image, None)
        folder = PurePosixPath(pair.mask.relative_to(root).parent.as_posix())
        end = (mask_suffix or "_mask") if folder == image.parent else ""
        return cls(image, folder / image.name, end)

    def tile(self, top: int, left: int) -> tuple[str, str]:
        """(the image tile's path below the output, the mask tile's), without the mask's file type."""
        place = f"_r{top:06d}_c{left:06d}"
        mask = "" if self.mask is None else f"{self.mask}{place}{self.mask_end}"
        return f"{self.image}{place}.png", mask


def _check_names(names: Sequence[_Names], root: Path) -> None:
    seen: set[str] = set()
    for name in names:
        for path in (str(name.image), *([f"{name.mask}{name.mask_end}"] if name.mask is not None else [])):
            if path in seen:
                raise ValueError(f"Two files in {root} are called {path}, except for their suffixes. Rename one.")
            seen.add(path)


def _open_folder(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The finished images.

    Raises:
        ValueError: the folder contains tiles with other settings, or something else.
    """
    about = out / ABOUT
    if about.is_file():
        there = json.loads(about.read_text(encoding="utf-8"))
        other = [key for key in settings if there.get(key) != settings[key]]
        if other:
            raise ValueError(
                f"{out} contains tiles with another {other[0]} ({there.get(other[0])} there, "
                f"{settings[other[0]]} here). Choose another folder."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and contains no tiles of this command. Choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(about, json.dumps(settings, indent=1, ensure_ascii=False))
    return {entry["image"]: entry for entry in read_records(out / DONE)}


# ------------------------------------------------------------------------------------------------ one image


def _cut_one(
    pair: Pair, name: _Names, out: Path, tile: int, overlap: int, ignored: Sequence[int]
) -> tuple[list[str], list[tuple[str, str]]]:
    """(the written tiles, the skipped ones with reasons), one row of tiles at a time."""
    image = open_bands(pair.image, name=repr(pair.path), what="image")
    mask = None if pair.mask is None else _mask_of(pair, image)
    height, width = image.size
    kept, left_out = [], []
    for top in starts(height, tile, overlap):
        stop = min(top + tile, height)
        pixels = image.image_rows(top, stop)
        values = None if mask is None else mask.mask_rows(top, stop)
        for left in starts(width, tile, overlap):
            columns = slice(left, min(left + tile, width))
            image_path, mask_path = name.tile(top, left)
            part = pixels[:, columns]
            stored = None if values is None else values[:, columns]
            reason = EMPTY if (part == part[:1, :1]).all() else None
            if reason is None and stored is not None and stored.ndim == 2 and np.isin(stored, [*ignored, -1]).all():
                reason = IGNORED
            if reason is not None:
                left_out.append((image_path, reason))
                continue
            if stored is not None:  # first: an image without a mask would count as unlabeled
                _save_mask(out / mask_path, stored, mask.palette)
            _save(out / image_path, PILImage.fromarray(np.ascontiguousarray(part)), compress_level=3)
            kept.append(image_path)
    return kept, left_out


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side."""
    if side <= tile:
        return [0]
    found = list(range(0, side - tile, tile - overlap))
    return [*found, side - tile]


def _mask_of(pair: Pair, image: Bands) -> Bands:
    """The mask, rotated with its image if it only fits then."""
    mask = open_bands(pair.mask, name=repr(pair.path), what="label")
    if mask.size != image.size and isinstance(mask, WholeBands) and mask.orientation == 1:
        if mask.size == image.stored_size:
            mask.turn(image.orientation)
    if mask.size != image.size:
        raise ValueError(
            f"Image and label differ in size: {pair.image} is {image.size[0]} x {image.size[1]} (height x width), its "
            f"label {pair.mask} is {mask.size[0]} x {mask.size[1]}. Each pixel needs a label: replace one of them."
        )
    return mask


def _save_mask(path: Path, values: np.ndarray, palette: bytes | None) -> None:
    image = PILImage.fromarray(np.ascontiguousarray(values))
    if palette is not None:
        image.putpalette(palette)
    # A PNG has no values below 0 or above 16 bits.
    _save(path.with_name(f"{path.name}{'.tif' if image.mode in ('I', 'F') else '.png'}"), image)


def _save(path: Path, image: PILImage.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        image.save(temporary, **options)


# ------------------------------------------------------------------------------------------------ class names


def _copy_class_tables(root: Path, out: Path, pairs: Sequence[Pair]) -> None:
    """Copy the files that name the classes to the tiles' folders."""
    files = [path for pair in pairs for path in (pair.image, pair.mask) if path is not None]
    folders = {folder for path in files for folder in path.parents if folder.is_relative_to(root)}
    for folder in sorted(folders):
        for name in READERS:
            source, target = folder / name, out / folder.relative_to(root) / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(target) as temporary:
                    shutil.copyfile(source, temporary)


def summary(result: Tiled, out: str | os.PathLike) -> str:
    """A summary, and how to train on the tiles."""
    total = sum(result.tiles.values())
    reasons = [why for _, why in result.left_out]
    told = first_few([f"{reasons.count(why)} {why}" for why in sorted({*reasons})])
    lines = [
        f"{total} tiles of {result.images} images in {out}: {result.tiles['labeled']} with a mask, "
        f"{result.tiles['unlabeled']} without. {result.done_before} images were cut before.",
    ]
    if reasons:
        lines.append(f"{len(reasons)} tiles were skipped ({told}), listed in {Path(out) / LEFT_OUT}.")
    if result.scans > 1:
        lines.append(f"To train: cps-hf train {out} --group_by '{GROUP_BY}' (tiles of one image stay on one side)")
    elif result.scans == 1:
        lines.append(
            f"To train: cps-hf train {out}. All masks are of one image: held-out tiles are next to training tiles, so "
            "their scores are too good. Masks of a second image would give better estimates."
        )
    return "\n".join(lines)
