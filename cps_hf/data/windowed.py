"""Large images and masks in tiled TIFFs: training decodes only the tiles that a random crop touches.

A COG of 20,000 x 20,000 pixels is 1.2 GB as RGB. A crop of 512 x 512 touches nine tiles of 256 x 256, and its bytes
are those of the decoded image. Each process keeps the directories of the last files, not their pixels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bands import TIFF_SUFFIXES, TiffBands, open_in_parts
from .labels import LabelEncoding
from .raster import most_pixels
from .reading import NO_ID, class_ids_of, read_label

logger = logging.getLogger(__name__)

FROM_PIXELS = 2**22
"""Smaller images, below 2048 x 2048, are decoded whole: that is as fast, and damage anywhere in the file is found."""
OPEN_FILES = 64  # whose directories a process keeps; one of 100,000 tiles takes a few MB


class WindowedImage:
    """An image that `random_crop` reads a window of; it has the tensor's `shape`, (3, H, W)."""

    def __init__(self, bands: TiffBands):
        self._bands = bands
        self.shape = (3, *bands.size)

    def window(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 (3, height, width), as `read_image` decodes it.

        Raises:
            ValueError: a tile of it is damaged.
        """
        pixels = self._bands.image_window(top, left, height, width)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)

    def bands(self) -> Iterator[np.ndarray]:
        """The whole image, some rows at a time: uint8 (rows, W, 3)."""
        return (self._bands.image_rows(start, stop) for start, stop in self._bands.row_ranges())


class WindowedLabel:
    """A label map that `random_crop` reads a window of; it has the tensor's `shape`, (H, W)."""

    def __init__(self, bands: TiffBands, encoding: LabelEncoding | None):
        self._bands, self._encoding = bands, encoding
        self.shape = bands.size

    def window(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 (height, width), as `read_label` decodes it.

        Raises:
            ValueError: a tile of it is damaged, or contains values that the encoding does not know.
        """
        return torch.from_numpy(self._ids(top, left, height, width))

    def bands(self) -> Iterator[np.ndarray]:
        """The whole label map, some rows at a time: uint8 (rows, W)."""
        return (self._ids(start, 0, stop - start, self.shape[1]) for start, stop in self._bands.row_ranges())

    def _ids(self, *window: int) -> np.ndarray:
        return self._bands.window(lambda raster: class_ids_of(raster, self._encoding), *window)


def open_windowed(
    row: dict[str, Any], encoding: LabelEncoding | None, *, with_label: bool
) -> tuple[WindowedImage, WindowedLabel | None] | None:
    """The image and label of a row, to be read in windows; `None` where they are to be decoded whole.

    That is what `read_sample` does: for images below `FROM_PIXELS`, files other than tiled or striped TIFFs, and masks
    of another size than their image.

    Raises:
        ValueError: the image is too large to be decoded whole, and its label cannot be read in windows.
    """
    name = repr(str(row.get("id", NO_ID)))
    image = _in_parts(row["image"], name, "image")
    if image is None:
        return None
    if not with_label:
        return WindowedImage(image), None
    label = _in_parts(row["label"], name, "label")
    if label is not None and label.size == image.size:
        return WindowedImage(image), WindowedLabel(label, encoding)
    limit = most_pixels()
    if limit is None or image.size[0] * image.size[1] <= limit:
        return None
    path = row["label"].get("path") if isinstance(row["label"], dict) else None
    fault = "is no tiled TIFF" if label is None else f"is {label.size[0]} x {label.size[1]}"
    raise ValueError(
        f"The image of {name} is {image.size[0]} x {image.size[1]} (height x width) and read in windows; its label "
        f"({path}) {fault}. Save it as a tiled TIFF of the image's size, e.g. `gdal_translate -co TILED=YES`."
    )


def label_bands(value: Any, encoding: LabelEncoding | None, *, name: str) -> Iterator[np.ndarray]:
    """A label map, uint8 (rows, W): a large tiled TIFF some rows at a time, any other mask as `read_label` gives it.

    Raises:
        ValueError: as `read_label`.
    """
    bands = _in_parts(value, name, "label")
    if bands is None:
        yield read_label(value, encoding, name=name).numpy()
    else:
        yield from WindowedLabel(bands, encoding).bands()


def open_mask_bands(path: Path, *, name: str) -> TiffBands | None:
    """A large tiled mask, to be read some rows at a time; `None` where it is decoded whole."""
    return _in_parts({"path": str(path)}, name, "label")


def is_beyond_decoding(value: Any) -> bool:
    """Whether an image is too large to be decoded whole, and can be read in windows."""
    size, limit = windowed_size(value), most_pixels()
    return size is not None and limit is not None and size[0] * size[1] > limit


def windowed_size(value: Any) -> tuple[int, int] | None:
    """Height and width of an image that is read in windows; `None` where it is decoded whole."""
    bands = _in_parts(value, "image", "image")
    return None if bands is None else bands.size


def _in_parts(value: Any, name: str, what: str) -> TiffBands | None:
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
    if not path or Path(path).suffix.lower() not in TIFF_SUFFIXES or not os.path.isfile(path):
        return None
    status = os.stat(path)
    return _opened(str(path), status.st_mtime_ns, status.st_size, name, what)


@lru_cache(OPEN_FILES)
def _opened(path: str, changed: int, length: int, name: str, what: str) -> TiffBands | None:
    """`changed` and `length` tell whether it is still the same file."""
    try:
        found = open_in_parts(Path(path), name=name, what=what)
    except ValueError:  # whoever decodes it says what is wrong
        return None
    return None if found is None or found.size[0] * found.size[1] < FROM_PIXELS else found
