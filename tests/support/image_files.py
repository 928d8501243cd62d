"""Image files written byte by byte, in formats that no library at hand writes, and their arrays."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples of 1, 2, 4, 8, 12 or 16 bits, the highest bit first, each row padded to whole bytes."""
    rows = values.reshape(values.shape[0], -1).astype(np.int64)
    shifted = rows[..., None] >> np.arange(bits - 1, -1, -1)
    return np.packbits((shifted & 1).reshape(rows.shape[0], -1).astype(np.uint8), axis=1).tobytes()


# ------------------------------------------------------------------------------------------------ PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: np.ndarray, bits: int = 8, *, color: int | None = None, before: bytes = b"", after: bytes = b""):
    """A PNG of (H, W) or (H, W, C) samples.

    Args:
        color: PNG's colour type; if `None`, from the number of channels. before, after: chunks around the pixels.
    """
    height, width = values.shape[:2]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]] if color is None else color
    row = len(packed(values, bits)) // height
    data = packed(values, bits)
    lines = b"".join(b"\0" + data[y * row : (y + 1) * row] for y in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    parts = (head, before, chunk(b"IDAT", zlib.compress(lines)), after, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_palette(colors) -> bytes:
    return chunk(b"PLTE", bytes(value for color in colors for value in color))


def exif(orientation: int) -> bytes:
    """An EXIF block as in a PNG's chunk."""
    return b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x0112, 3, 1, orientation, 0)


def png_exif(orientation: int) -> bytes:
    return chunk(b"eXIf", exif(orientation))


# ------------------------------------------------------------------------------------------------ TIFF


def tiff(
    values: np.ndarray,
    bits: int | None = None,
    *,
    photometric: int | None = None,
    big_endian: bool = False,
    apart: bool = False,
    extra: tuple[int, ...] | None = None,
    tags: dict[int, tuple[int, tuple | bytes]] | None = None,
) -> bytes:
    """A baseline TIFF without compression, of (H, W) or (H, W, C) samples.

    Args:
        bits: bits per sample; if `None`, those of `values`.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 8 LAB; if `None`, 1 or 2.
        apart: store the bands one after the other instead of pixel by pixel.
        extra: the meaning of bands beyond those of the photometric; if `None`, omitted, except for RGB: 0.
        tags: more tags, number -> (type, values).
    """
    order = ">" if big_endian else "<"
    values = values if values.ndim == 3 else values[..., None]
    height, width, bands = values.shape
    photometric = (2 if bands == 3 else 1) if photometric is None else photometric
    bits = values.dtype.itemsize * 8 if bits is None else bits
    kind = {"u": 1, "i": 2, "f": 3, "b": 1, "c": 6}[values.dtype.kind]
    layers = [values[..., band] for band in range(bands)] if apart else [values]
    if bits in (1, 2, 4, 12):
        data = [packed(layer, bits) for layer in layers]
    else:
        data = [layer.astype(layer.dtype.newbyteorder(order)).tobytes() for layer in layers]
    entries = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, (bits,) * bands),
        259: (3, (1,)),
        262: (3, (photometric,)),
        273: (4, (0,) * len(data)),
        277: (3, (bands,)),
        278: (4, (height,)),
        279: (4, tuple(map(len, data))),
        284: (3, (2 if apart else 1,)),
        339: (3, (kind,) * bands),
    }
    if extra:
        entries[338] = (3, extra)
    entries |= tags or {}
    sizes, codes = {1: 1, 2: 1, 3: 2, 4: 4, 12: 8}, {1: "B", 3: "H", 4: "I", 12: "d"}

    def encoded(kind, content):
        return content if isinstance(content, bytes) else struct.pack(f"{order}{len(content)}{codes[kind]}", *content)

    start = 8 + 2 + 12 * len(entries) + 4
    lengths = {tag: len(encoded(*entry)) for tag, entry in entries.items()}
    pixels = start + sum(length + length % 2 for length in lengths.values() if length > 4)
    offsets = [pixels + sum(map(len, data[:i])) for i in range(len(data))]
    entries[273] = (4, tuple(offsets))
    table, outside = b"", b""
    for tag in sorted(entries):
        kind, content = entries[tag]
        body = encoded(kind, content)
        if len(body) > 4:
            place = struct.pack(f"{order}I", start + len(outside))
            outside += body + b"\0" * (len(body) % 2)
        else:
            place = body.ljust(4, b"\0")
        table += struct.pack(f"{order}HHI", tag, kind, len(body) // sizes[kind]) + place
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}I", 8)
    return (
        head + struct.pack(f"{order}H", len(entries)) + table + struct.pack(f"{order}I", 0) + outside + b"".join(data)
    )


# ------------------------------------------------------------------------------------------------ EXIF


def as_shown(stored: np.ndarray, orientation: int) -> np.ndarray:
    """How a viewer shows stored pixels, by the EXIF standard: the meaning of row 0 and column 0 of the file."""
    height, width = stored.shape[:2]
    shown = np.zeros_like(stored if orientation <= 4 else stored.swapaxes(0, 1))
    for y in range(height):
        for x in range(width):
            top, left, bottom, right = y, x, height - 1 - y, width - 1 - x
            place = {
                1: (top, left),  # row 0 is the top, column 0 the left side
                2: (top, right),
                3: (bottom, right),
                4: (bottom, left),
                5: (left, top),  # row 0 is the left side, column 0 the top
                6: (left, bottom),  # row 0 is the right side, column 0 the top
                7: (right, bottom),
                8: (right, top),
            }[orientation]
            shown[place] = stored[y, x]
    return shown


def as_stored(shown: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels of a file that a viewer shows as `shown`."""
    return as_shown(shown, {6: 8, 8: 6}.get(orientation, orientation))
