"""Decoding one row: bytes or a path become an image and its label, or an error that names the file."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

try:  # twice as fast as PIL on PNGs; torchvision 0.29 announces its removal, after which PIL decodes them too
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

from .labels import LabelEncoding, stored_values

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # the EXIF tag; 1: as stored, 5 to 8: height and width swap


def read_image(value: Any, *, name: str) -> Tensor:
    """An image as a viewer shows it: uint8 (3, H, W), EXIF rotation applied, grey and RGBA made RGB (alpha dropped).

    Args:
        value: {"bytes", "path"} of an undecoded `datasets` row, or a PIL image.
        name: what an error calls it.

    Raises:
        ValueError: missing, empty, truncated, no image, or larger than PIL's limit against decompression bombs.
    """
    data, where = _bytes_of(value, name)
    if data is not None and _is_plain_png(data):
        return _decode_plain_png(data, where)
    return _to_rgb(ImageOps.exif_transpose(_open(value, data, where)), where)


def read_label(value: Any, encoding: LabelEncoding | None, *, name: str) -> Tensor:
    """A label map: uint8 (H, W) of class ids, 255 where ignored.

    Args:
        encoding: how it is coded; `None`: the stored values are class ids.

    Raises:
        ValueError: as `read_image`, and for values that the encoding does not know.
    """
    data, where = _bytes_of(value, name)
    return _decode_label(_open(value, data, where), encoding, where)


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
    data, where = _bytes_of(row["image"], name)
    label = read_label(row["label"], encoding, name=name)
    height, width = label.shape
    if data is not None and _is_plain_png(data):
        image = _decode_plain_png(data, where)
    else:
        stored = _open(row["image"], data, where)
        swaps = stored.getexif().get(_ORIENTATION, 1) >= 5
        rotate = swaps and stored.size != (width, height) and stored.size == (height, width)
        image = _to_rgb(ImageOps.exif_transpose(stored) if rotate else stored, where)
    if image.shape[-2:] != label.shape:
        raise ValueError(
            f"Image and label differ in size: {where} is {image.shape[-2]} x {image.shape[-1]} (height x width), its "
            f"label {_bytes_of(row['label'], name)[1]} is {height} x {width}. Each pixel needs a label: replace "
            "one of the files."
        )
    return image, label


def _bytes_of(value: Any, name: str) -> tuple[bytes | None, str]:
    """(the encoded file, or `None` for a PIL image; how errors call it)."""
    if isinstance(value, PILImage.Image):
        return None, name
    if not isinstance(value, dict) or (value.get("bytes") is None and not value.get("path")):
        raise ValueError(f"{name} has no image: expected bytes or a path, found {type(value).__name__} {value!r:.60}.")
    path = value.get("path")
    where = f"{name} ({path})" if path else name
    data = value.get("bytes")
    if data is None:
        try:
            data = _read(path)
        except OSError as error:
            raise ValueError(
                f"Cannot read {where}: {error.strerror or error}. Restore the file or drop the row."
            ) from error
    if not data:
        raise ValueError(f"{where} is empty: 0 bytes. Restore the file or drop the row.")
    return data, where


def _read(path: str) -> bytes:
    if "://" in path:  # a row of a streamed data set whose files lie on the Hub
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return file.read()
    with open(path, "rb") as file:
        return file.read()


def _open(value: Any, data: bytes | None, where: str) -> PILImage.Image:
    """A PIL image whose pixels are loaded, in its own mode."""
    try:
        image = value if data is None else PILImage.open(io.BytesIO(data))
        _refuse_bomb(*image.size, where)
        image.load()
    except ValueError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, zlib.error ... on broken files
        found = f"{len(data)} bytes, " if data is not None else ""
        raise ValueError(
            f"Cannot decode {where}: {found}{type(error).__name__}: {error}. It is corrupt or no image: restore the "
            "file, drop the row, or train with `skip_bad_samples`."
        ) from error
    return image


def _refuse_bomb(width: int, height: int, where: str) -> None:
    limit = PILImage.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{where} has {height} x {width} pixels, more than PIL's limit of {limit}, which guards against files "
            "made to exhaust memory. If it is meant, set `PIL.Image.MAX_IMAGE_PIXELS`."
        )


def _is_plain_png(data: bytes) -> bool:
    """8 bits a channel, grey or RGB, no rotation: what torchvision decodes to the same pixels in half PIL's time."""
    if decode_image is None:
        return False
    return data[:8] == _PNG and len(data) > 33 and data[24] == 8 and data[25] in (0, 2) and b"eXIf" not in data[:4096]


def _decode_plain_png(data: bytes, where: str) -> Tensor:
    _refuse_bomb(*struct.unpack(">II", data[16:24]), where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the removal announced above
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(
            f"Cannot decode {where}: {len(data)} bytes, {str(error).splitlines()[0]}. It is corrupt: restore the "
            "file, drop the row, or train with `skip_bad_samples`."
        ) from error


def _to_rgb(image: PILImage.Image, where: str) -> Tensor:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # PIL's own conversion would cut 16 bits off at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min(initial=0) < 0 or grey.max(initial=0) > 65535:
            raise ValueError(f"{where} has grey values from {grey.min()} to {grey.max()}; expected 16 bits.")
        rgb = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    elif image.mode == "F":
        raise ValueError(f"{where} holds floating-point pixels; expected 8 or 16 bits a channel. Convert the file.")
    else:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        rgb = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(rgb).permute(2, 0, 1)


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
