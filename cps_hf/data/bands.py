"""An image or a mask of any size, read some rows at a time.

PIL decodes the whole of a TIFF. Here the tiles (or strips) of some rows are copied, still compressed, into a small
TIFF in memory, which PIL decodes: every codec of libtiff and every rule of raster.py holds, and no further library is
needed. (tifffile reads LZW and JPEG only with imagecodecs; rasterio brings GDAL.) Tiled and striped TIFFs, COGs and
BigTIFFs are read this way. Other files, and TIFFs of a single compressed strip, are decoded whole.
"""

from __future__ import annotations

import os
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image as PILImage

from .raster import Raster, most_pixels, open_raster, turn

PIXELS_AT_ONCE = 2**23  # decoded at a time, or one row of tiles
MOST_OF_A_BLOCK = 2**26  # pixels of a row of tiles or of a strip; a file of larger ones is decoded whole

TIFF_SUFFIXES = (".tif", ".tiff")
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""Where a GeoTIFF says what place on Earth it shows."""
_NO_DATA = 42113
_DECODING = (258, 259, 262, 266, 277, 284, 292, 293, 317, 320, 338, 339, 347, 529, 530, 531, 532, _NO_DATA)
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}


def open_bands(path: str | Path, *, name: str, what: str) -> Bands:
    """
    Args:
        name: what errors call the row. what: "image" or "label".

    Raises:
        ValueError: the file cannot be read, or has to be decoded whole and has more pixels than the limit.
    """
    path = Path(path)
    return open_in_parts(path, name=name, what=what) or WholeBands(path, name, what)


def open_in_parts(path: Path, *, name: str, what: str) -> TiffBands | None:
    """As `open_bands`; `None` for a file that has to be decoded whole."""
    found = _Tiff.of(path, name, what)
    return TiffBands(found, path, name, what) if found and found.is_in_parts else None


def pixels_of(path: str | Path) -> int | None:
    """How many pixels an image file has, from its header; `None` where it does not tell, or PIL refuses to."""
    path = Path(path)
    try:
        if path.suffix.lower() in TIFF_SUFFIXES:
            tiff = _Tiff.of(path, str(path), "image")
            return None if tiff is None else tiff.height * tiff.width
        most_pixels()  # lets the environment variable raise PIL's limit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            with PILImage.open(path) as image:
                return image.width * image.height
    except Exception:  # whatever is wrong with the file is said where it is read
        return None


def is_georeferenced(path: str | Path) -> bool:
    """Whether `open_bands` finds geo-tags in the file."""
    try:
        tiff = _Tiff.of(Path(path), str(path), "image")
    except ValueError:  # said where it is read
        return False
    return tiff is not None and tiff.is_in_parts and any(tag in tiff.tags for tag in GEO_TAGS)


class Bands(ABC):
    """An image or a mask that gives some rows at a time.

    Attributes:
        size: height and width as a viewer shows it.
        geo: by tag of `GEO_TAGS`, (type, count, bytes) as the file holds them; and `order`, its byte order.
        palette: after `mask_rows`, the mask's palette (256 x 3 bytes), where it has one.
    """

    size: tuple[int, int]
    geo: dict[int, tuple[int, int, bytes]] = {}
    order = "<"
    palette: bytes | None = None

    @abstractmethod
    def image_rows(self, start: int, stop: int) -> np.ndarray:
        """uint8 (stop - start, W, 3), as `read_image` gives them.

        Raises:
            ValueError: these rows are damaged.
        """

    @abstractmethod
    def mask_rows(self, start: int, stop: int) -> np.ndarray:
        """The stored values (stop - start, W), or colours (stop - start, W, C).

        Raises:
            ValueError: these rows are damaged, or are no values that a mask may have.
        """


class WholeBands(Bands):
    """Decoded as a whole when the first rows are read."""

    def __init__(self, path: Path, name: str, what: str):
        self._raster = open_raster({"path": str(path)}, name, what)
        self.size, self.stored_size = self._raster.size, self._raster.stored_size
        self.orientation = self._raster.orientation
        self._pixels: np.ndarray | None = None

    def image_rows(self, start: int, stop: int) -> np.ndarray:
        return self._rows(lambda raster: raster.rgb(), start, stop)

    def mask_rows(self, start: int, stop: int) -> np.ndarray:
        return self._rows(self._mask_of, start, stop)

    def turn(self, orientation: int) -> None:
        """Turn a mask as its image is turned."""
        self.orientation = orientation
        height, width = self.stored_size
        self.size = (width, height) if orientation >= 5 else (height, width)

    def _mask_of(self, raster: Raster) -> np.ndarray:
        values, self.palette = _stored(raster)
        return values

    def _rows(self, take: Callable[[Raster], np.ndarray], start: int, stop: int) -> np.ndarray:
        if self._pixels is None:
            pixels = take(self._raster)
            is_turned_already = self._raster.is_upright and self._raster.orientation == self.orientation
            self._pixels = pixels if is_turned_already else turn(pixels, self.orientation)
            self._raster = None  # with its bytes, and PIL's copy of the pixels
        return np.ascontiguousarray(self._pixels[start:stop])


class TiffBands(Bands):
    """A TIFF, of which only the tiles or strips of the wanted rows are read."""

    orientation = 1

    def __init__(self, tiff: _Tiff, path: Path, name: str, what: str):
        self._tiff, self._path, self._name, self._what = tiff, path, name, what
        self.size = self.stored_size = tiff.height, tiff.width
        self.geo = {tag: tiff.tags[tag] for tag in GEO_TAGS if tag in tiff.tags}
        self.order = tiff.order

    def image_rows(self, start: int, stop: int) -> np.ndarray:
        return self.image_window(start, 0, stop - start, self.size[1])

    def mask_rows(self, start: int, stop: int) -> np.ndarray:
        return self.window(self._mask_of, start, 0, stop - start, self.size[1])

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows that are decoded at a time, from the top down."""
        height, width = self.size
        step = max(1, PIXELS_AT_ONCE // width)
        return ((start, min(start + step, height)) for start in range(0, height, step))

    def image_window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3); only the tiles or strips that it touches are decoded.

        Raises:
            ValueError: as `image_rows`.
        """
        return self.window(self._rgb, top, left, height, width)

    def _rgb(self, raster: Raster) -> np.ndarray:
        if raster.bits > 8:
            raster.largest = self._largest
        return raster.rgb()

    @cached_property
    def _largest(self) -> int:
        """Of more than 8 bits, the image's largest value: how many bits are in use is a question to the whole."""
        found = 0
        for start, stop in self.row_ranges():
            rows = self.window(Raster.wide, start, 0, stop - start, self._tiff.width)
            found = max(found, int(rows.max(initial=0)))
        return found

    def _mask_of(self, raster: Raster) -> np.ndarray:
        values, self.palette = _stored(raster)
        return values

    def window(self, take: Callable[[Raster], np.ndarray], top: int, left: int, height: int, width: int) -> np.ndarray:
        """What `take` makes of a window's pixels: (height, width) or (height, width, C).

        Args:
            take: gets the tiles as a `Raster`; returns an array of its height and width.
        """
        tiff, out = self._tiff, None
        bottom, right = top + height, left + width
        columns = range(left // tiff.block_width, -(-right // tiff.block_width))
        step = max(1, PIXELS_AT_ONCE // (tiff.block_height * len(columns) * tiff.block_width))
        end = -(-bottom // tiff.block_height)
        if tiff.is_sparse:
            value = tiff.missing_value
            fill = take(open_raster({"bytes": tiff.pixel(value)}, self._where, self._what))[0, 0]
            out = np.empty((height, width, *fill.shape), fill.dtype)
            out[:] = fill
        with open(self._path, "rb") as file:
            for first in range(top // tiff.block_height, end, step):
                for part in tiff.parts(file, first, min(first + step, end), columns, self._where):
                    raster = open_raster({"bytes": part.data, "path": str(self._path)}, self._name, self._what)
                    pixels = take(raster)
                    if out is None:
                        out = np.empty((height, width, *pixels.shape[2:]), pixels.dtype)
                    y, stop_y = max(part.top, top), min(part.top + pixels.shape[0], bottom)
                    x, stop_x = max(part.left, left), min(part.left + pixels.shape[1], right)
                    out[y - top : stop_y - top, x - left : stop_x - left] = pixels[
                        y - part.top : stop_y - part.top, x - part.left : stop_x - part.left
                    ]
        return out

    @property
    def _where(self) -> str:
        return f"{self._name} ({self._path})"


def _stored(raster: Raster) -> tuple[np.ndarray, bytes | None]:
    """(a mask's values, its palette), so that a PNG or TIFF of both is read as the mask itself is."""
    image = raster.shown()
    if image.mode in ("1", "L", "P", "I", "F") or image.mode.startswith("I;16"):
        of_gif = image.mode == "P" and raster.format == "GIF"
        if of_gif and any(color != (i, i, i) for i, color in _shown_colors(image).items()):
            return np.asarray(image.convert("RGB")), None  # indices of a GIF mean nothing, colours may
        image = raster.stored()
        return np.asarray(image), bytes(image.getpalette("RGB")) if image.mode == "P" else None
    if raster.bits > 8 or image.mode not in ("LA", "RGB", "RGBA", "RGBX"):
        raise ValueError(
            f"{raster.where}, the label, has mode {image.mode!r} with {raster.bits} bits a channel, which cannot be "
            "cut without loss. Save it as a PNG of class ids or of colours, 8 bits a channel."
        )
    return np.asarray(image.convert("RGB") if image.mode == "RGBX" else image), None


def _shown_colors(image: PILImage.Image) -> dict[int, tuple[int, ...]]:
    flat = image.getpalette("RGB")
    return {index: tuple(flat[3 * index : 3 * index + 3]) for _, index in image.getcolors(256) or []}


# ------------------------------------------------------------------------------------------------ the file


@dataclass
class _Part:
    """A small TIFF, and where in the image its upper left corner lies."""

    data: bytes
    top: int
    left: int


class _Tiff:
    """The first directory of a TIFF: where its tiles or strips are.

    Attributes:
        order: "<" or ">", as `struct` says it.
        tags: by number, (type, count, bytes), in the file's byte order.
    """

    def __init__(self, order: str, tags: dict[int, tuple[int, int, bytes]], length: int):
        self.order, self.tags, self.length = order, tags, length
        self.width, self.height = self.one(256), self.one(257)
        self.is_tiled = 324 in tags
        self.planes = self.one(277, 1) if self.one(284, 1) == 2 else 1
        if self.is_tiled:
            self.block_width, self.block_height = self.one(322), self.one(323)
            self.offsets, self.counts = self.numbers(324), self.numbers(325)
        else:
            self.block_width, self.block_height = self.width, min(self.one(278, self.height), self.height)
            self.offsets, self.counts = self.numbers(273), self.numbers(279)
            self._divide_plain_strip()
        self.columns = -(-self.width // self.block_width)
        self.rows = -(-self.height // self.block_height)

    @classmethod
    def of(cls, path: Path, name: str, what: str) -> _Tiff | None:
        """None where the file is no TIFF, or its directory is broken: PIL then says what is wrong."""
        if path.suffix.lower() not in TIFF_SUFFIXES:
            return None
        try:
            with open(path, "rb") as file:
                order, tags = _directory(file)
                found = cls(order, tags, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise ValueError(f"Cannot read {name} ({path}), the {what}: {error.strerror or error}.") from error
        except (struct.error, KeyError, ValueError, IndexError, ZeroDivisionError):
            return None
        return found if min(found.width, found.height, found.block_width, found.block_height) > 0 else None

    @property
    def is_in_parts(self) -> bool:
        """Whether rows can be read without the rest: upright, in tiles or strips that are small, all of them known."""
        known = self.rows * self.columns * self.planes == len(self.offsets) == len(self.counts)
        small = self.block_height * self.columns * self.block_width <= MOST_OF_A_BLOCK
        apart = self.planes > 1 and self.one(258, 1) > 8  # how many bits are in use PIL does not tell
        return known and small and not apart and self.one(274, 1) in (0, 1) and self.one(259, 1) != 6

    def numbers(self, tag: int) -> list[int]:
        kind, count, data = self.tags[tag]
        return list(struct.unpack(f"{self.order}{count}{_INTEGERS[kind]}", data))

    def one(self, tag: int, default: int | None = None) -> int:
        return default if tag not in self.tags and default is not None else self.numbers(tag)[0]

    def _divide_plain_strip(self) -> None:
        """One strip of pixels that are not compressed is as good as many."""
        if len(self.offsets) != 1 or self.planes != 1 or self.one(259, 1) != 1 or self.height < 2:
            return
        row = -(-self.width * self.one(277, 1) * self.one(258, 1) // 8)
        self.block_height = max(1, min(self.height, 2**20 // row))
        starts = range(0, self.height, self.block_height)
        self.offsets = [self.offsets[0] + start * row for start in starts]
        self.counts = [min(self.block_height, self.height - start) * row for start in starts]

    @cached_property
    def is_sparse(self) -> bool:
        """Whether the file leaves out tiles, as GDAL does with SPARSE_OK: their length is 0."""
        return not all(self.counts)

    @property
    def missing_value(self) -> int:
        """The stored value of left out tiles: what the file calls missing data, or 0."""
        try:
            value, dtype = int(float(self.tags[_NO_DATA][2].strip(b"\0 "))), self._dtype
            holds = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
            return value if holds.min <= value <= holds.max else 0
        except (KeyError, ValueError, OverflowError, TypeError):
            return 0

    @property
    def _dtype(self) -> np.dtype:
        """Of a sample.

        Raises:
            TypeError: NumPy has none such.
        """
        kind = {1: "u", 2: "i", 3: "f"}.get(self.one(339, 1), "u")
        bits = self.one(258, 1)
        return np.dtype(f"{self.order}{kind}{bits // 8 if bits % 8 == 0 else bits}")

    def parts(self, file: BinaryIO, first: int, end: int, columns: range, where: str) -> list[_Part]:
        """The tiles of these rows and columns as one part; one part per tile if the file leaves out some."""
        blocks = [row * self.columns + column for row in range(first, end) for column in columns]
        there = [block for block in blocks if all(self.counts[block + plane] for plane in self._planes())]
        if len(there) == len(blocks):
            groups = [(blocks, first, columns.start, end - first, len(columns))]
        else:
            groups = [([block], *divmod(block, self.columns), 1, 1) for block in there]
        return [
            _Part(
                self._small(file, group, row, column, rows, count, where),
                row * self.block_height,
                column * self.block_width,
            )
            for group, row, column, rows, count in groups
        ]

    def _planes(self) -> list[int]:
        return [plane * self.rows * self.columns for plane in range(self.planes)]

    def _small(self, file, blocks, row: int, column: int, rows: int, columns: int, where: str) -> bytes:
        height = min(rows * self.block_height, self.height - row * self.block_height)
        width = min(columns * self.block_width, self.width - column * self.block_width)
        found = []
        for index in (block + plane for plane in self._planes() for block in blocks):
            offset, count = self.offsets[index], self.counts[index]
            if offset + count > self.length:
                raise ValueError(
                    f"Cannot decode {where}: it breaks off. Its tile or strip {index} ends at byte {offset + count} "
                    f"and the file at {self.length}. Restore the file or leave it out."
                )
            file.seek(offset)
            found.append(file.read(count))
        return self._tiff_of(found, height, width)

    def pixel(self, value: int) -> bytes:
        """A TIFF of one pixel of this kind, not compressed, whose samples have this value."""
        samples = self.one(277, 1)
        data = bytes(-(-samples * self.one(258, 1) // 8))
        if value:
            data = np.full(samples, value, self._dtype).tobytes()
        plain = {259: (3, 1, struct.pack(f"{self.order}H", 1)), 317: (3, 1, struct.pack(f"{self.order}H", 1))}
        plain |= {284: (3, 1, struct.pack(f"{self.order}H", 1))}
        if self.one(262, 1) == 6:  # of JPEG
            plain |= {262: (3, 1, struct.pack(f"{self.order}H", 2))}
        plain_tiff = _Tiff.__new__(_Tiff)
        plain_tiff.order, plain_tiff.tags, plain_tiff.is_tiled = self.order, {**self.tags, **plain}, False
        plain_tiff.block_height = 1
        plain_tiff.tags.pop(347, None)
        return plain_tiff._tiff_of([data], 1, 1)

    def _tiff_of(self, blocks: list[bytes], height: int, width: int) -> bytes:
        """A TIFF of some tiles or strips."""
        tags = {tag: self.tags[tag] for tag in _DECODING if tag in self.tags}
        starts, at = [], 8
        for block in blocks:
            starts.append(at)
            at += len(block)
        sizes = [*map(len, blocks)]
        numbers = {256: [width], 257: [height]}
        if self.is_tiled:
            numbers |= {322: [self.block_width], 323: [self.block_height], 324: starts, 325: sizes}
        else:
            numbers |= {278: [self.block_height], 273: starts, 279: sizes}
        tags |= {tag: long_tag(self.order, values) for tag, values in numbers.items()}
        at += at % 2
        body = b"".join(blocks)
        body += b"\0" * ((8 + len(body)) % 2)
        return tiff_header(self.order, at) + body + tiff_directory(self.order, tags, at)


def _directory(file: BinaryIO) -> tuple[str, dict[int, tuple[int, int, bytes]]]:
    """The byte order and the tags of the first directory, of a TIFF or a BigTIFF."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}[head[:2]]
    is_big = {42: False, 43: True}[struct.unpack_from(f"{order}H", head, 2)[0]]
    entry, inline, start = ("HHQ8s", 8, 8) if is_big else ("HHI4s", 4, 4)
    file.seek(struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", head, start)[0])
    count = struct.unpack(f"{order}{'Q' if is_big else 'H'}", file.read(8 if is_big else 2))[0]
    if count > 4096:
        raise ValueError("no directory of a TIFF")
    raw = file.read(count * struct.calcsize(order + entry))
    tags = {}
    for tag, kind, number, value in struct.iter_unpack(order + entry, raw):
        length = number * _SIZES.get(kind, 0)
        if length > inline:
            file.seek(struct.unpack(f"{order}{'Q' if is_big else 'I'}", value)[0])
            data = file.read(length) if length < 2**28 else b""
            if len(data) != length:
                raise ValueError("the directory of the TIFF breaks off")
        else:
            data = value[:length]
        tags.setdefault(tag, (kind, number, data))
    return order, tags


def long_tag(order: str, values: list[int]) -> tuple[int, int, bytes]:
    """Whole numbers of 32 bits as (type, count, bytes)."""
    return 4, len(values), struct.pack(f"{order}{len(values)}I", *values)


def short_tag(order: str, values: list[int]) -> tuple[int, int, bytes]:
    """Whole numbers of 16 bits as (type, count, bytes)."""
    return 3, len(values), struct.pack(f"{order}{len(values)}H", *values)


def tiff_header(order: str, directory: int) -> bytes:
    """The first 8 bytes of a TIFF whose directory is at that byte."""
    return struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, directory)


def tiff_directory(order: str, tags: dict[int, tuple[int, int, bytes]], at: int) -> bytes:
    """A directory that stands at byte `at`, with the values that do not fit into it behind it."""
    entries, rest = [], b""
    behind = at + 2 + 12 * len(tags) + 4
    for tag, (kind, count, data) in sorted(tags.items()):
        if len(data) > 4:
            value = struct.pack(f"{order}I", behind + len(rest))
            rest += data + b"\0" * (len(data) % 2)
        else:
            value = data.ljust(4, b"\0")
        entries.append(struct.pack(f"{order}HHI4s", tag, kind, count, value))
    return struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4) + rest
