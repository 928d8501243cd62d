"""Decoding one row: bytes or a path become an image and its label, or an error that names the file.

PIL decodes everything. torchvision's decoders were tried: 29 against 34 ms for a 1024 x 2048 PNG, and a JPEG of theirs
may differ by a bit from PIL's, but a PNG with one wrong byte ends the process (torchvision 0.29), file unnamed.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from .labels import LabelEncoding, stored_values

logger = logging.getLogger(__name__)

_PNG = b"\x89PNG\r\n\x1a\n"
_told_of_few_bits: list[str] = []  # the first such image of this process
_ORIENTATION = 0x0112  # the EXIF tag; 1: as stored, 5 to 8: height and width swap


def read_image(value: Any, *, name: str) -> Tensor:
    """An image as a viewer shows it: uint8 (3, H, W), EXIF rotation applied, grey and RGBA made RGB (alpha dropped).

    Of grey values of 16 bits the upper 8 are kept. Those of an image without any above 255 are kept as they are: 8
    bits stored in 16 or 32. Of 12 bits stored in 16 only 4 remain, nearly black, which is said once; multiply by 16.

    Args:
        value: {"bytes", "path"} of an undecoded `datasets` row, or a PIL image.
        name: what an error calls it.

    Raises:
        ValueError: missing, empty, truncated, no image, or larger than PIL's limit against decompression bombs.
    """
    data, where = _bytes_of(value, name, "image")
    stored = _open(value, data, where, "image")
    return _to_rgb(stored, where, upright=_orientation(stored) != 1)


def read_label(value: Any, encoding: LabelEncoding | None, *, name: str) -> Tensor:
    """A label map: uint8 (H, W) of class ids, 255 where ignored. EXIF rotation is never applied to it.

    Args:
        encoding: how it is coded; `None`: the stored values are class ids.

    Raises:
        ValueError: as `read_image`, and for values that the encoding does not know.
    """
    data, where = _bytes_of(value, name, "label")
    return _decode_label(_open(value, data, where, "label"), encoding, where)


def read_sample(
    row: dict[str, Any], encoding: LabelEncoding | None = None, *, with_label: bool
) -> tuple[Tensor, Tensor | None]:
    """Image (3, H, W) and label (H, W) of a row whose image columns are not decoded, both uint8.

    EXIF rotation is applied where the label (or there being none) says that the image is meant rotated: a label of the
    image's stored size belongs to the stored pixels; one of the rotated size, to the rotated ones. Where both sizes
    are the same (180 degrees, mirrored, square), image and label are taken as stored.

    Raises:
        ValueError: a file cannot be read, or the two sizes do not fit.
    """
    name = repr(str(row.get("id", "a row without an id")))
    if not with_label:
        return read_image(row["image"], name=name), None
    data, where = _bytes_of(row["image"], name, "image")
    label = read_label(row["label"], encoding, name=name)
    height, width = label.shape
    stored = _open(row["image"], data, where, "image")
    swaps = _orientation(stored) >= 5
    upright = swaps and stored.size != (width, height) and stored.size == (height, width)
    image = _to_rgb(stored, where, upright=upright)
    if image.shape[-2:] != label.shape:
        raise ValueError(
            f"Image and label differ in size: {where} is {image.shape[-2]} x {image.shape[-1]} (height x width), its "
            f"label {_bytes_of(row['label'], name, 'label')[1]} is {height} x {width}. Each pixel needs a label: "
            "replace one of the files."
        )
    return image, label


def _bytes_of(value: Any, name: str, what: str) -> tuple[bytes | None, str]:
    """(the encoded file, or `None` for a PIL image; how errors call the row). `what`: "image" or "label"."""
    if isinstance(value, PILImage.Image):
        return None, name
    if not isinstance(value, dict) or (value.get("bytes") is None and not value.get("path")):
        raise ValueError(
            f"{name} has no {what}: expected bytes or a path, found {type(value).__name__} {value!r:.60}. Complete "
            "the row or drop it."
        )
    path = value.get("path")
    where = f"{name} ({path})" if path else name
    data = value.get("bytes")
    if data is None:
        try:
            data = _read(path)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise  # the process has too many files open: that is no fault of this one
            said = getattr(error, "strerror", None) or error
            raise ValueError(f"Cannot read {where}, the {what}: {said}. Restore the file or drop the row.") from error
    if not data:
        raise ValueError(f"{where}, the {what}, is empty: 0 bytes. Restore the file or drop the row.")
    return data, where


def _read(path: str) -> bytes:
    if "://" in path:  # a row of a streamed data set whose files lie on the Hub
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return file.read()
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for, a device has no end
        raise OSError("it is a folder, a pipe or a device, no regular file")
    with open(path, "rb") as file:
        return file.read()


def _open(value: Any, data: bytes | None, where: str, what: str) -> PILImage.Image:
    """A PIL image whose pixels are loaded, in its own mode."""
    with _named_errors(where, what, data):
        image = value if data is None else PILImage.open(io.BytesIO(data))
    width, height = image.size
    limit = PILImage.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{where}, the {what}, has {height} x {width} pixels, more than PIL's limit of {limit}, which guards "
            "against files made to exhaust memory. If it is meant, set `PIL.Image.MAX_IMAGE_PIXELS`."
        )
    with _named_errors(where, what, data):
        if data is not None and data.startswith(_PNG):
            _check_png(data)
        image.load()
    return image


@contextmanager
def _named_errors(where: str, what: str, data: bytes | None) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error ... on broken files
        found = f"{what} of {len(data)} bytes, " if data is not None else f"{what}, "
        if isinstance(error, UnidentifiedImageError):  # its own text shows an object in memory
            found += f"of no kind that PIL knows, beginning with {data[:8]!r}"
        else:
            found += f"{type(error).__name__}: {error}"
        raise ValueError(
            f"Cannot decode {where}: {found}. It is corrupt or no image: restore it or leave it out."
        ) from error


def _check_png(data: bytes) -> None:
    """Every chunk is whole and has its checksum; PIL skips those of the pixels, and may give wrong ones."""
    view, start = memoryview(data), len(_PNG)
    kind = b""
    while kind != b"IEND":
        if start + 12 > len(data):
            raise OSError("the PNG breaks off before its end chunk")
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if end + 4 > len(data):
            raise OSError(f"the PNG breaks off in the chunk at byte {start}")
        if zlib.crc32(view[start + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise OSError(f"the checksum of the PNG's chunk at byte {start} is wrong")
        start = end + 4


def _orientation(image: PILImage.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that makes sense, as viewers take it."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken block of metadata says nothing of the pixels
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: PILImage.Image, where: str, *, upright: bool) -> Tensor:
    """uint8 (3, H, W); `upright`: with the EXIF rotation."""
    if image.mode == "F":
        raise ValueError(f"{where} holds floating-point pixels; expected 8 or 16 bits a channel. Convert the file.")
    with _named_errors(where, "image", None):
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        wide = image.mode in ("I;16", "I;16B", "I;16L", "I")  # PIL's own conversion would cut 16 bits off at 255
        pixels = np.array(image if wide or image.mode == "RGB" else image.convert("RGB"))
    if wide:
        pixels = np.repeat(_eight_bits(pixels, where)[..., None], 3, axis=2)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _eight_bits(values: np.ndarray, where: str) -> np.ndarray:
    """Grey values of up to 16 bits as uint8, as `read_image` says."""
    least, most = int(values.min(initial=0)), int(values.max(initial=0))
    if least < 0 or most > 65535:
        raise ValueError(f"{where} has grey values from {least} to {most}; expected 16 bits.")
    if 255 < most < 4096 and not _told_of_few_bits:
        _told_of_few_bits.append(where)
        logger.warning(
            "%s has grey values up to %d: of 16 bits the upper 8 are kept, so that it becomes nearly black (0 to %d). "
            "If it holds fewer bits, scale it: those of 12 bits by 16. This is said of the first such image alone.",
            *(where, most, most >> 8),
        )
    return (values >> 8 if most > 255 else values).astype(np.uint8)


def _decode_label(image: PILImage.Image, encoding: LabelEncoding | None, where: str) -> Tensor:
    if encoding is not None:
        return torch.from_numpy(encoding.decode(image, name=where))
    values = stored_values(image, name=where)
    if values.max(initial=0) > 255:
        raise ValueError(
            f"The label of {where} holds values up to {values.max()}; expected class ids 0 to 254, or 255 for "
            "pixels to ignore. Say how labels are coded when loading the data set (`values`)."
        )
    return torch.from_numpy(values.astype(np.uint8))
