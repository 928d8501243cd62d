"""Write a mask that does not fit into memory: row by row into a palette PNG, or a tiled palette TIFF with geo-tags.

PIL can only write whole images. Both formats store deflated 8-bit indices and a colour table.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..files import written_whole
from ..functional import IGNORE_INDEX
from .bands import long_tag, short_tag, tiff_directory, tiff_header

TILE = 256


@contextmanager
def mask_writer(
    path: Path,
    size: tuple[int, int],
    palette: Sequence[tuple[int, int, int]],
    *,
    geo: dict[int, tuple[int, int, bytes]] | None = None,
    order: str = "<",
) -> Iterator[PngRows | TiffRows]:
    """Write a mask by `writer.write(ids)`, from the top down. The file appears, complete, when the block ends.

    Args:
        path: a `.png` or `.tif` file. size: height and width.
        palette: the colour of each class id; 255 is white.
        geo: tags for a TIFF, in byte order `order`.

    Raises:
        ValueError: the number of written rows differs from `size`, or a TIFF exceeds 4 GiB.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        writer = PngRows(file, size, table) if path.suffix == ".png" else TiffRows(file, size, table, geo or {}, order)
        yield writer
        if writer.done != size[0]:
            raise ValueError(f"{path}: {writer.done} of {size[0]} rows were written.")
        writer.finish()
        file.flush()
        os.fsync(file.fileno())


class PngRows:
    """A palette PNG of 8 bits."""

    def __init__(self, file: BinaryIO, size: tuple[int, int], table: np.ndarray):
        self._file, self.done = file, 0
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 8, zlib.Z_DEFAULT_STRATEGY)
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 3, 0, 0, 0))
        self._chunk(b"PLTE", table.tobytes())

    def write(self, ids: np.ndarray) -> None:
        """uint8 (rows, W)."""
        rows = np.zeros((ids.shape[0], ids.shape[1] + 1), np.uint8)  # each row starts with a 0: no filter
        rows[:, 1:] = ids
        self.done += len(ids)
        if data := self._deflate.compress(rows.tobytes()):
            self._chunk(b"IDAT", data)

    def finish(self) -> None:
        self._chunk(b"IDAT", self._deflate.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


class TiffRows:
    """A palette TIFF of 8 bits in deflated tiles of 256 x 256."""

    def __init__(
        self,
        file: BinaryIO,
        size: tuple[int, int],
        table: np.ndarray,
        geo: dict[int, tuple[int, int, bytes]],
        order: str,
    ):
        self._file, self._size, self._table, self._geo, self._order = file, size, table, geo, order
        self.done = 0
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._waiting = np.zeros((TILE, -(-size[1] // TILE) * TILE), np.uint8)
        file.write(tiff_header(order, 0))

    def write(self, ids: np.ndarray) -> None:
        """uint8 (rows, W)."""
        while len(ids):
            first = self.done % TILE
            some, ids = ids[: TILE - first], ids[TILE - first :]
            self._waiting[first : first + len(some), : self._size[1]] = some
            self.done += len(some)
            if self.done % TILE == 0:
                self._write_tiles()

    def finish(self) -> None:
        if self.done % TILE:
            self._write_tiles()
        at = self._file.tell() + self._file.tell() % 2
        if at > 2**32 - 2**24:
            raise ValueError("The mask needs more than 4 GiB, the limit of this kind of TIFF. Cut the image.")
        colors = (self._table.T.astype(np.uint16) * 257).flatten().tolist()
        short = {258: [8], 259: [8], 262: [3], 277: [1], 284: [1], 320: colors, 339: [1]}
        long = {256: [self._size[1]], 257: [self._size[0]], 322: [TILE], 323: [TILE]}
        long |= {324: self._offsets, 325: self._lengths}
        tags = {tag: short_tag(self._order, values) for tag, values in short.items()}
        tags |= {tag: long_tag(self._order, values) for tag, values in long.items()}
        self._file.seek(at)
        self._file.write(tiff_directory(self._order, tags | self._geo, at))
        self._file.seek(0)
        self._file.write(tiff_header(self._order, at))

    def _write_tiles(self) -> None:
        for left in range(0, self._waiting.shape[1], TILE):
            data = zlib.compress(np.ascontiguousarray(self._waiting[:, left : left + TILE]).tobytes(), 6)
            self._offsets.append(min(self._file.tell(), 2**32 - 1))
            self._lengths.append(len(data))
            self._file.write(data)
        self._waiting[:] = 0
