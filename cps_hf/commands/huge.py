"""Predict an image that is too large to decode or predict as a whole: in windows, a few rows at a time.

A tiled or striped TIFF is read in parts, and the mask is written as it is predicted. If the file is georeferenced, the
mask is a GeoTIFF with the same position. The overlay is reduced in size.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import visualization
from ..data.bands import TIFF_SUFFIXES, Bands, is_georeferenced, open_bands, pixels_of
from ..data.mask_rows import mask_writer
from ..data.table import first_few
from ..inference.ensemble import Ensemble

HUGE = 50_000_000
"""Image files with more pixels than this are predicted by rows: 7,071 x 7,071."""
_MOST_PER_BYTE = 1000  # pixels, in files other than TIFF; smaller files are not opened to find their size
_OVERVIEW = 2048  # the longer side of an overlay, in pixels


class UnreadableError(ValueError):
    """An image that cannot be read."""


def is_huge(path: str, limit: int) -> bool:
    """Whether an image file has more pixels than `limit`. False if its header cannot be read."""
    if Path(path).suffix.lower() not in TIFF_SUFFIXES and os.path.getsize(path) < limit // _MOST_PER_BYTE:
        return False
    return (pixels_of(path) or 0) > limit


def windows_for(
    images: Mapping[str, str], branches: Ensemble, how: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """How to predict huge images: as the command line says, or in windows of a default size, which is printed.

    Raises:
        ValueError: probabilities, drafts or scales are set.
    """
    what = f"{first_few([*images.values()], 2)}: more than {options.huge_from} pixels, predicted by rows"
    if options.probabilities:
        raise ValueError(f"{what}; `--probabilities` would need all of them in memory. Remove it, or cut the image.")
    if options.format:
        raise ValueError(f"{what}; `--format` draws whole masks. Cut it first: `cps-hf prepare --tile 1024 DIR OUT`.")
    if [*how["scales"]] != [1.0]:
        raise ValueError(f"{what}; `--scales` must be 1.")
    found = {key: value for key, value in how.items() if key != "own_size"}
    if how["mode"] != "sliding":
        found |= branches.default_windows() | {"window_batch_size": options.window_batch_size}
        height, width = found["crop_size"]
        print(f"{what} in windows of {height} x {width}. Set others with `--mode sliding --crop_size H W`.")
    return found


def huge_paths(paths: Mapping[str, Path], source: str) -> dict[str, Path]:
    """The outputs of a huge image. A georeferenced image gets a TIFF mask."""
    masks = paths["masks"]
    if is_georeferenced(source):
        masks = masks.with_name(f"{masks.name.removesuffix('.png')}.tif")
    return {**paths, "masks": masks}


def predict_huge(
    source: str,
    paths: Mapping[str, Path],
    branches: Ensemble,
    how: Mapping[str, Any],
    names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    overlay_alpha: float,
) -> None:
    """Write the mask of one image, and a reduced overlay if `paths` has one.

    Raises:
        UnreadableError: the image is damaged or not an image.
        ValueError: a network cannot take windows of this size.
    """
    try:
        image = open_bands(source, name=Path(source).name, what="image")
    except ValueError as error:
        raise UnreadableError(str(error)) from error
    step = -(-max(image.size) // _OVERVIEW)
    rows_of = _Rows(image, step)
    # Written in place: a list of parts, as views or small copies, would keep or fragment the memory of all rows.
    overview = np.zeros(rows_of.overview.shape[:2], np.uint8)
    geo = {"geo": image.geo, "order": image.order} if paths["masks"].suffix == ".tif" else {}
    bar = tqdm(total=image.size[0], desc=Path(source).name, unit="row", leave=False, dynamic_ncols=True, disable=None)
    with bar, mask_writer(paths["masks"], image.size, palette, **geo) as writer:
        for rows, ids in branches.predict_rows(rows_of, image.size, **how):
            ids = ids.numpy()
            writer.write(ids)
            _reduce(ids, rows.start, step, overview)
            bar.update(len(ids))
        if "overlays" in paths:
            small = torch.from_numpy(rows_of.overview).permute(2, 0, 1)
            visualization.overlay_page(small, overview, [*names], palette, paths["overlays"], alpha=overlay_alpha)


def _reduce(rows: np.ndarray, start: int, step: int, overview: np.ndarray) -> None:
    """Write each `step`-th pixel of each `step`-th row into the overview. `start`: the number of the first row."""
    some = rows[-start % step :: step, ::step]
    first = -(-start // step)
    overview[first : first + len(some)] = some


class _Rows:
    """Rows of an image, each read once. Rows that the next windows need again are kept.

    Attributes:
        overview: each `step`-th pixel of each `step`-th row, uint8 (H / step, W / step, 3), black until it is read.
    """

    def __init__(self, image: Bands, step: int):
        self._image, self._step = image, step
        height, width = (-(-side // step) for side in image.size)
        self.overview = np.zeros((height, width, 3), np.uint8)
        self._start, self._kept = 0, np.zeros((0, image.size[1], 3), np.uint8)

    def __call__(self, rows: slice) -> Tensor:
        """uint8 (3, rows, W)."""
        assert rows.start >= self._start, "rows must be requested from the top down"
        end = self._start + len(self._kept)
        kept = self._kept[rows.start - self._start :]
        if rows.stop > end:
            try:
                new = self._image.image_rows(end, rows.stop)
            except ValueError as error:
                raise UnreadableError(str(error)) from error
            _reduce(new, end, self._step, self.overview)
            kept = np.concatenate([kept, new])
        self._start, self._kept = rows.start, kept
        return torch.from_numpy(kept[: rows.stop - rows.start].copy()).permute(2, 0, 1)
