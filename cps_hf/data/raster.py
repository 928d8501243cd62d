"""One image file: opened, checked, decoded, with its metadata.

PIL decodes everything. torchvision's decoders were tried: 29 instead of 34 ms for a 1024 x 2048 PNG, and JPEGs may
differ by a bit from PIL's; but a PNG with one wrong byte ends the process (torchvision 0.29) without naming the file.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import TiffImagePlugin, UnidentifiedImageError

logger = logging.getLogger(__name__)

MAX_PIXELS = "CPS_HF_MAX_IMAGE_PIXELS"
"""The environment variable that raises the limit on an image's pixels, for commands and data workers alike."""

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # the EXIF tag; 1: as stored, 5 to 8: height and width are swapped
_PHOTOMETRIC, _SAMPLE_FORMAT, _PLANAR, _NO_DATA = 262, 339, 284, 42113  # TIFF tags; the last one is GDAL's
_OF_PNG = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # where a PNG may store its orientation
_GREY_WIDE = ("I;16", "I;16B", "I;16L", "I")
_SUPPORTED = "expected 1 band (grey or palette), 3 (RGB) or 4 (RGB and alpha), of 8 or 16 bits"

_told_of_few_bits: list[str] = []  # the first such image of this process


class Raster:
    """An image or a mask. Created by `open_raster`; its pixels are decoded on first use.

    Attributes:
        image: PIL's image; its pixels as stored, except for a TIFF, which PIL rotates.
        where: its name in error messages. what: "image" or "label".
        orientation: from its EXIF, 1 to 8 (1: no rotation).
        bits: per sample, as stored. bands: samples per pixel, as stored.
        largest: for a part of an image with more than 8 bits, the whole image's largest value, if known. It shows how
            many bits are in use, and all parts must be read alike.
    """

    largest: int | None = None

    def __init__(self, image: PILImage.Image, data: bytes | None, where: str, what: str):
        self.image, self.data, self.where, self.what = image, data, where, what
        self.format = image.format or ""
        self.tags = image.tag_v2 if data is not None and isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        self.bits, self.bands = _depth(image, data)
        self.white_is_zero = bool(self.tags) and self.tags.get(_PHOTOMETRIC, 0) == 0
        self.signed_bytes = bool(self.tags) and (self.bits, self.tags.get(_SAMPLE_FORMAT, (1,))[0]) == (8, 2)
        # PIL rotates a TIFF when it loads it, and then forgets that it did.
        self._of_tiff = _orientation(image) if self.tags else None
        self._tile = image.tile[0] if data is not None and image.tile else None
        self._loaded = False

    @cached_property
    def orientation(self) -> int:
        if self._of_tiff is not None:
            return self._of_tiff
        if self.format == "PNG" and self.data is not None and not self._loaded:
            if not any(word in self.data for word in _OF_PNG):
                return 1  # without decoding the pixels, which may come first
            self.load()
        return _orientation(self.image)

    @property
    def is_upright(self) -> bool:
        """Whether the decoded pixels need no rotation."""
        return self.orientation == 1 or self._of_tiff is not None

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of the pixels in the file."""
        height, width = self.image.height, self.image.width
        if self.tags:  # PIL's size is that of the rotated image, before or after loading
            return int(self.tags[257]), int(self.tags[256])
        return height, width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as displayed."""
        height, width = self.stored_size
        return (width, height) if self.orientation >= 5 else (height, width)

    @property
    def pages(self) -> int:
        """Pages, frames or pictures in the file; only the first is read."""
        try:
            return int(getattr(self.image if self.data is None else _open_with_pil(self.data), "n_frames", 1))
        except Exception:  # a damaged page that is not read
            return 1

    @cached_property
    def lossy(self) -> str | None:
        """The compression that may have changed values, or none. Unless a file declares it is lossless, it counts."""
        compression = self.tags.get(259)
        if self.format in ("JPEG", "MPO"):
            return "JPEG"
        if compression in (6, 7, 34892):
            return "TIFF with JPEG compression"
        if compression in (50001, 50002, 33003, 33005, 34712, 34887):
            return "TIFF with a compression that may be lossy"
        if self.format == "WEBP" and not _is_lossless_webp(self.data or b""):
            return "WebP with lossy compression"
        return {"AVIF": "AVIF", "JPEG2000": "JPEG 2000"}.get(self.format)  # they do not say whether they are lossless

    def load(self) -> PILImage.Image:
        """Decode the pixels.

        Raises:
            ValueError: they are damaged.
        """
        with _named_errors(self.where, self.what, self.data):
            if self.format == "PNG" and self.data is not None and not self._loaded:
                _check_png(self.data)
            self.image.load()
        self._loaded = True
        return self.image

    # ------------------------------------------------------------------------------------------------ as an image

    def rgb(self) -> np.ndarray:
        """uint8 (H, W, 3), as stored except for the rotation of a TIFF: grey is repeated, alpha and further bands
        dropped.

        Of 16 bits, the upper 8 are kept. If no value exceeds 255 (8 bits stored in 16 or 32), values are kept
        unchanged. 12 bits stored in 16 become nearly black, which is logged once.

        Raises:
            ValueError: the file is damaged, or is not a picture: fractions, values beyond 16 bits.
        """
        image = self.load()
        if image.mode == "F":
            raise ValueError(
                f"{self.where} has 1 band of {self.bits} bits that contains fractions; {_SUPPORTED}. Scale it to 0 to "
                "255 and save it as PNG."
            )
        if self._wide is not None:
            pixels = self._eight_bits(self._wide)
            return pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels
        few = self.largest is None and self.bits == 16 and self.format == "TIFF"
        if few and np.asarray(image).max(initial=0) < 16:
            raise ValueError(
                f"{self.where} uses few of its 16 bits and would become nearly black; of such a file ({image.mode}, "
                "with separate bands or premultiplied alpha) only the upper 8 bits are read. Scale it to 8 bits."
            )
        with _named_errors(self.where, self.what, None):
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))

    @property
    def becomes_nearly_black(self) -> bool:
        """Whether an image uses 9 to 12 bits of 16 and does not declare it."""
        says_so = self.bits == 12 and self.tags  # for other files than TIFF, PIL scales values to all 16 bits
        return self._wide is not None and not says_so and 255 < self._most(self._wide) < 4096

    def wide(self) -> np.ndarray:
        """The values of an image with more than 8 bits, (H, W, C) without alpha; otherwise its pixels."""
        return np.asarray(self.load()) if self._wide is None else self._wide

    def _most(self, values: np.ndarray) -> int:
        return int(values.max(initial=0)) if self.largest is None else self.largest

    @cached_property
    def _wide(self) -> np.ndarray | None:
        """Grey (H, W, 1) or colours (H, W, 3) of more than 8 bits, without alpha; none if PIL reads 8 bits."""
        image = self.load()
        if image.mode in _GREY_WIDE:
            return np.asarray(image)[..., None]
        wide = self._wide_color() if self.bits == 16 else None
        return None if wide is None else wide[..., : 1 if wide.shape[2] == 2 else 3]

    def _wide_color(self) -> np.ndarray | None:
        """All 16 bits of a colour image or of grey with alpha, uint16 (H, W, C); none for kinds that only PIL reads.

        PIL keeps the upper byte of each sample. Told the opposite byte order, it keeps the lower one.
        """
        if self.image.mode not in ("RGB", "RGBA", "RGBX") or self.format not in ("PNG", "TIFF"):
            return None
        if self.format == "PNG":
            other = {3: "RGB;16L", 4: "RGBA;16L", 2: "RGBA"}[self.bands]  # two bands: four bytes unchanged
        else:
            raw = self._tile[3][0]
            if not raw.startswith(("RGB;", "RGBA;", "RGBX;")) or self.tags.get(_PLANAR) == 2:
                return None  # premultiplied, CMYK, or separate bands
            little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
            other = f"{raw[:-1]}{'B' if little else 'L'}"
        with _named_errors(self.where, self.what, self.data):
            again = _open_with_pil(self.data)
            again.tile = [_changed(tile, raw_mode=other) for tile in again.tile]
            again.load()
        low = np.asarray(again).astype(np.uint16)
        if self.format == "PNG" and self.bands == 2:
            return low[..., 0::2] << 8 | low[..., 1::2]
        return np.asarray(self.image).astype(np.uint16) << 8 | low

    def _eight_bits(self, values: np.ndarray) -> np.ndarray:
        """Values of up to 16 bits as uint8, as described at `rgb`."""
        least, most = int(values.min(initial=0)), self._most(values)
        if least < 0 or most > 65535:
            raise ValueError(
                f"{self.where} has 1 band of {self.bits} bits with values from {least} to {most}; {_SUPPORTED}. "
                "Scale it to 0 to 255 and save it as PNG."
            )
        if self.bits == 12 and self.tags:  # the file declares it
            return (values >> 4).astype(np.uint8)
        if self.becomes_nearly_black and not _told_of_few_bits:
            _told_of_few_bits.append(self.where)
            logger.warning(
                "%s has values up to %d in 16 bits: the upper 8 are kept, so it becomes nearly black (0 to %d). "
                "If it has fewer bits, scale it: 12 bits by 16. This is logged only for the first such image.",
                *(self.where, most, most >> 8),
            )
        values = (values >> 8 if most > 255 else values).astype(np.uint8)
        if self.white_is_zero and self.image.mode in _GREY_WIDE:  # PIL only applies it to up to 8 bits
            return 255 - values
        return values

    # ------------------------------------------------------------------------------------------------ as a mask

    def shown(self) -> PILImage.Image:
        """A mask's image as displayed, for colours.

        Raises:
            ValueError: it is damaged, or its compression may have changed values.
        """
        if self.lossy:
            raise ValueError(
                f"{self.where}, the label, is stored as {self.lossy}, which changes values: pixels between two "
                "classes are read as others. Save the masks again as PNG, from the original annotations; masks of two "
                "classes can be fixed by a threshold."
            )
        return self.load()

    def stored(self) -> PILImage.Image:
        """A mask's image with the values stored in the file; PIL would scale few bits to 0 to 255.

        The value of GDAL's no-data tag becomes -1 if it cannot be a class.

        Raises:
            ValueError: as for `shown`, or white is stored as 0.
        """
        image = self.shown()
        if self.white_is_zero and image.mode != "1":
            raise ValueError(
                f"{self.where}, the label, stores white as 0 (TIFF photometric 0, {self.bits} bits), so the "
                "stored and the displayed value differ. Save it with black as 0, or as PNG."
            )
        if image.mode == "L" and self.bits in (2, 4):
            most = (1 << self.bits) - 1
            return image.point([value * most // 255 for value in range(256)])
        if self.signed_bytes:
            return PILImage.fromarray(np.asarray(image).view(np.int8).astype(np.int32))
        if self.format == "PPM" and self._tile is not None and image.mode in ("L", "I"):
            return _unscaled(image, self._tile)
        return self._without_no_data(image) if self.tags and image.mode in ("I", "F") else image

    def _without_no_data(self, image: PILImage.Image) -> PILImage.Image:
        """Replace the file's no-data value by -1 if it cannot be a class."""
        try:
            no_data = float(str(self.tags.get(_NO_DATA, "")).strip("\0 "))
        except ValueError:
            return image
        if 0 <= no_data <= 65535 or no_data != no_data:
            return image
        values = np.asarray(image)
        return PILImage.fromarray(np.where(values == values.dtype.type(no_data), values.dtype.type(-1), values))

    def palette(self) -> dict[int, tuple[int, int, int]] | None:
        """The colours of the palette entries that occur; none without a palette, or for a plain grey palette."""
        if self.image.mode != "P" or self.format == "GIF":
            return None
        image = self.load()
        flat, colors = image.getpalette("RGB"), image.getcolors(256) or []
        used = sorted(index for _, index in colors if 3 * index + 3 <= len(flat))
        shown = {index: tuple(flat[3 * index : 3 * index + 3]) for index in used}
        return None if all(color == (i, i, i) for i, color in shown.items()) else shown

    # ------------------------------------------------------------------------------------------------ what is reported

    def unusual(self) -> list[str]:
        """What is read differently than it may look, or is not read; see `UNUSUAL` in survey.py."""
        found = []
        if self.orientation != 1:
            found.append("turned")
        if self.pages > 1:
            found.append("pages")
        if self.bits > 8:
            found.append("depth")
        if self.image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in self.image.info:
            found.append("alpha")
        elif self.bands > 3 and self.image.mode == "RGB":
            found.append("bands")
        if self.image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
            found.append("colour space")
        if self.white_is_zero:
            found.append("white is zero")
        return found


def open_raster(value: Any, name: str, what: str) -> Raster:
    """Open an image of a row and read its header.

    Args:
        value: {"bytes", "path"} of an undecoded `datasets` row, or a PIL image.
        name: the row's name in error messages. what: "image" or "label".

    Raises:
        ValueError: it is missing, empty, not an image, of an unsupported kind, or has more pixels than the limit.
    """
    if isinstance(value, PILImage.Image):
        data, where, image = None, name, value
        with _named_errors(where, what, None):
            image.load()
    else:
        data, where = _bytes_of(value, name, what)
        image = _opened(data, where, what)
    width, height = image.size
    limit = most_pixels()
    if limit is not None and width * height > limit:
        raise _too_large(where, what, f"{height} x {width} pixels", width * height, limit)
    with _named_errors(where, what, data):
        return Raster(image, data, where, what)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W) or (H, W, C), rotated for display according to an EXIF orientation."""
    swapped = pixels.swapaxes(0, 1)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }[orientation]


def _bytes_of(value: Any, name: str, what: str) -> tuple[bytes, str]:
    """(the encoded file, the row's name in error messages)."""
    if not isinstance(value, dict) or (value.get("bytes") is None and not value.get("path")):
        raise ValueError(
            f"{name} has no {what}: expected bytes or a path, found {type(value).__name__} {value!r:.60}. Complete "
            "the row or drop it."
        )
    path, data = value.get("path"), value.get("bytes")
    where = f"{name} ({path})" if path else name
    if data is None:
        try:
            data = _read(path)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise  # the process has too many open files: not the fault of this file
            said = getattr(error, "strerror", None) or error
            raise ValueError(f"Cannot read {where}, the {what}: {said}. Restore or remove it.") from error
    if not data:
        raise ValueError(f"{where}, the {what}, is empty: 0 bytes. Restore or remove it.")
    return data, where


def _read(path: str) -> bytes:
    if "://" in path:  # a row of a streamed data set whose files are on the Hub
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return file.read()
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block, a device has no end
        raise OSError("it is a folder, a pipe or a device, not a regular file")
    with open(path, "rb") as file:
        return file.read()


def _opened(data: bytes, where: str, what: str) -> PILImage.Image:
    limit = most_pixels()
    try:
        return _open_with_pil(data)
    except PILImage.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        raise _too_large(where, what, f"{pixels} pixels", pixels, limit) from error
    except UnidentifiedImageError as error:  # its own text names an object in memory
        raise ValueError(_of_no_kind(data, where, what)) from error
    except MemoryError:  # not the fault of the file
        raise
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error ... on broken files
        raise _cannot_decode(error, where, what, data) from error


def _open_with_pil(data: bytes) -> PILImage.Image:
    image = PILImage.open(io.BytesIO(data))
    apart = image.format == "TIFF" and image.tag_v2.get(_PLANAR) == 2 and len(image.tag_v2.get(258, ())) > 1
    if apart and image.tag_v2[258][0] == 16 and image.tile[0][0] == "raw":
        # PIL's own decoder would skip every second byte there; libtiff's is correct.
        if image.mode not in ("RGB", "RGBA"):
            raise OSError(f"a TIFF of 16 bits with separate bands, of mode {image.mode}, is not supported")
        stored = int(image.tag_v2[256]), int(image.tag_v2[257])
        whole = _changed(image.tile[0], codec="libtiff", extents=(0, 0, *stored), offset=0)
        arguments = (f"{image.mode};16N", "raw", False, image.tag_v2.offset)
        image.tile, image.use_load_libtiff = [_changed(whole, arguments=arguments)], True
    return image


def most_pixels() -> int | None:
    """The most pixels of an image: PIL's own limit, or the environment variable.

    Raises:
        ValueError: the environment variable is not a number.
    """
    given = os.environ.get(MAX_PIXELS)
    if given:
        if not given.isdigit():
            raise ValueError(f"The environment variable `{MAX_PIXELS}` must be a number of pixels, got {given!r}.")
        if PILImage.MAX_IMAGE_PIXELS is not None:
            PILImage.MAX_IMAGE_PIXELS = max(PILImage.MAX_IMAGE_PIXELS, -(-int(given) // 2))  # PIL raises at twice this
    return None if PILImage.MAX_IMAGE_PIXELS is None else 2 * PILImage.MAX_IMAGE_PIXELS


def _too_large(where: str, what: str, size: str, pixels: int, limit: int | None) -> ValueError:
    return ValueError(
        f"{where}, the {what}, has {size}, more than the limit of {limit}, which guards against files made to exhaust "
        "memory. Save it as a tiled TIFF, of which training reads crops and `cps-hf predict` predicts parts; images "
        "to be scored are cut by `cps-hf prepare --tile`. Or, if the file is trusted, set the environment variable "
        f"`{MAX_PIXELS}={pixels}`."
    )


@contextmanager
def _named_errors(where: str, what: str, data: bytes | None) -> Iterator[None]:
    try:
        yield
    except MemoryError:  # not the fault of the file
        raise
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error ... on broken files
        raise _cannot_decode(error, where, what, data) from error


def _cannot_decode(error: Exception, where: str, what: str, data: bytes | None) -> ValueError:
    found = f"{what} of {len(data)} bytes, " if data is not None else f"{what}, "
    return ValueError(
        f"Cannot decode {where}: {found}{type(error).__name__}: {error}. It is damaged or not an image. "
        "Restore or remove it."
    )


_OTHER_KINDS = (
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the file: `git lfs pull` downloads it"),
    (b"ftyphei", 4, "HEIC, which is not supported: save it as JPEG or PNG"),
    (b"ftypmif1", 4, "HEIC or AVIF of an unsupported kind: save it as JPEG or PNG"),
    (b"ftypavi", 4, "AVIF, which this Pillow does not support: `pip install -U pillow`, or save it as JPEG or PNG"),
    (b"\xff\x0a", 0, "JPEG XL, which is not supported: save it as JPEG or PNG"),
    (b"\0\0\0\x0cJXL ", 0, "JPEG XL, which is not supported: save it as JPEG or PNG"),
    (b"\x93NUMPY", 0, "a NumPy array: save it as PNG"),
    (b"\x89HDF", 0, "an HDF5 file: save its image as PNG"),
    (b"DICM", 128, "a DICOM file: save its image as PNG"),
    (b"<svg", 0, "SVG, which is not supported: save it as PNG"),
    (b"<!DOCTYPE html", 0, "a web page, perhaps from a failed download: download the file again"),
    (b"<html", 0, "a web page, perhaps from a failed download: download the file again"),
)


def _of_no_kind(data: bytes, where: str, what: str) -> str:
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and (found := _tiff_layout(data)):
        bands = "-b 1 -b 2 -b 3 -scale" if what == "image" else "-b 1"
        return (
            f"{where}, the {what}, is a TIFF of {found}, which is not supported; {_SUPPORTED}. Save the bands that a "
            f"{'picture' if what == 'image' else 'mask'} needs as such a file, for instance with `gdal_translate "
            f"{bands} -ot Byte`."
        )
    for begin, at, kind in _OTHER_KINDS:
        if data[at : at + len(begin)] == begin:
            return f"Cannot decode {where}: {what} of {len(data)} bytes, {kind}."
    return (
        f"Cannot decode {where}: {what} of {len(data)} bytes, of no kind that PIL knows. "
        "It is damaged or not an image. Restore or remove it."
    )


def _tiff_layout(data: bytes) -> str | None:
    """ "5 bands of 8 bits, ..." for a TIFF that PIL has no mode for; none if its tags cannot be read."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        if 256 not in tags or 257 not in tags:
            return None
        bands = int(tags.get(277, 1))
        bits = tags.get(258, (1,))
        of = {2: "signed integers", 3: "fractions", 5: "complex integers", 6: "complex fractions"}
        kind = tags.get(_SAMPLE_FORMAT, (1,))[0]
        text = f"{bands} band{'s' * (bands != 1)} of {bits[0]} bit{'s' * (bits[0] != 1)}"
        return text + (f" ({of[kind]})" if kind in of else "") + f", photometric {tags.get(_PHOTOMETRIC, 0)}"
    except Exception:  # a broken file: its content is unknown
        return None


def _depth(image: PILImage.Image, data: bytes | None) -> tuple[int, int]:
    """Bits per sample and samples per pixel, as stored; as decoded if the format does not say."""
    bands = len(image.getbands())
    bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
    if data is None:
        return bits, bands
    if image.format == "PNG":
        return data[24], {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(data[25], bands)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stored = image.tag_v2.get(258, (1,))
        return int(stored[0]), int(image.tag_v2.get(277, len(stored)))
    if image.format == "AVIF" and 0 < (at := data.find(b"av1C")) < len(data) - 7:
        return (12 if data[at + 6] & 0x20 else 10) if data[at + 6] & 0x40 else 8, bands
    if image.format == "JPEG2000" and 0 <= (at := data.find(b"\xff\x4f\xff\x51")) < len(data) - 43:
        return (data[at + 42] & 0x7F) + 1, int.from_bytes(data[at + 40 : at + 42], "big")
    if image.format == "PPM" and image.mode != "F":
        largest = image.tile[0][3][-1] if isinstance(image.tile[0][3], tuple) else 255
        return 16 if image.mode == "I" or (isinstance(largest, int) and largest > 255) else bits, bands
    return bits, bands


def _orientation(image: PILImage.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is missing or invalid, as viewers do."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken block of metadata says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def _check_png(data: bytes) -> None:
    """Check that all chunks are complete and their checksums right: PIL skips this for pixels."""
    view, start = memoryview(data), len(_PNG)
    kind = b""
    while kind != b"IEND":
        if start + 12 > len(data):
            raise OSError("the PNG is truncated before its end chunk")
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if end + 4 > len(data):
            raise OSError(f"the PNG is truncated in the chunk at byte {start}")
        if zlib.crc32(view[start + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise OSError(f"the checksum of the PNG's chunk at byte {start} is wrong")
        start = end + 4


def _is_lossless_webp(data: bytes) -> bool:
    """Whether all frames are lossless, according to their chunks."""
    start, kinds = 12, set()
    while start + 8 <= len(data):
        kind, length = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        kinds.add(kind)
        start += 8 + 16 if kind == b"ANMF" else 8 + length + length % 2  # a frame's chunks are inside of it
    return b"VP8L" in kinds and b"VP8 " not in kinds


def _changed(tile: tuple, *, raw_mode: str | None = None, arguments: Any = None, **fields: Any) -> tuple:
    """One of PIL's tiles (codec, extents, offset, arguments), modified."""
    if raw_mode is not None:
        arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
    values = {"codec": tile[0], "extents": tile[1], "offset": tile[2], **fields}
    changed = (*values.values(), tile[3] if arguments is None else arguments)
    return type(tile)(*changed) if hasattr(tile, "_fields") else changed


def _unscaled(image: PILImage.Image, tile: tuple) -> PILImage.Image:
    """The values of a PGM file, which PIL would scale to the range of 8 or 16 bits."""
    largest = tile[3][-1] if isinstance(tile[3], tuple) else None
    full = 65535 if image.mode == "I" else 255
    if not isinstance(largest, int) or largest in (0, full) or tile[0] == "raw":
        return image
    values = np.rint(np.asarray(image).astype(np.float64) * largest / full)
    return PILImage.fromarray(values.astype(np.int32 if image.mode == "I" else np.uint8))
