"""One small file of each kind of image and mask, with the expected result: the table of docs/data.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from support.image_files import as_shown, as_stored, packed, png, png_exif, png_palette, saved, tiff

HEIGHT, WIDTH = 12, 18
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([COLUMNS * 14, ROWS * 21, 40 + (ROWS + COLUMNS) * 7], 2).astype(np.uint8)
GREY = RGB[..., 0]
IDS = ((COLUMNS + 2 * ROWS) % 4).astype(np.uint8)
NAMES = ("a", "b", "c", "d")
COLORS = [(1, 2, 3), (9, 8, 7), (200, 0, 0), (0, 0, 200)]
WIDE = RGB.astype(np.uint16) << 8 | 77  # all 16 bits are used
ALPHA = (ROWS * 20).astype(np.uint8)


@dataclass(frozen=True)
class Kind:
    """A file of some kind.

    Args:
        name: its name in the table. suffix: of the file.
        data: its bytes.
        expected: the pixels (H, W, 3), or class ids (H, W); `None` if it is an error.
        becomes: its result in the table.
        error: the error message.
        about: the tolerance for pixels, if the compression is lossy.
        orientation: of an image's EXIF.
        options: of the label's encoding.
    """

    name: str
    suffix: str
    data: bytes
    expected: np.ndarray | None
    becomes: str
    error: str = ""
    about: int = 0
    orientation: int = 1
    options: Any = None


def grey3(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, 2)


def _exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def _turned(format: str, suffix: str, about: int, **options: Any) -> list[Kind]:
    kinds = []
    for orientation in range(2, 9):
        stored = Image.fromarray(as_stored(RGB, orientation))
        data = saved(stored, format, exif=_exif(orientation), **options)
        name, becomes = f"{format}, EXIF orientation {orientation}", "turned as a viewer shows it"
        kinds.append(Kind(name, suffix, data, RGB, becomes, about=about, orientation=orientation))
    return kinds


def images() -> list[Kind]:
    """Each has the picture `RGB`, or its red channel as grey, unless its row says otherwise."""
    rgb, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    rgba, la = np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])
    levels = np.array(COLORS, np.uint8)[IDS]
    lut = tuple(value * 257 for band in range(3) for value in [c[band] for c in COLORS] + [0] * 252)
    smooth = {"quality": 98, "subsampling": 0}
    plain, eight = "as it is", "the upper 8 bits"
    as_8, no_alpha = "8 bits in 16, as they are", "alpha dropped"
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    kinds = [
        Kind("JPEG, RGB", ".jpg", saved(rgb, "JPEG", **smooth), RGB, plain, about=12),
        Kind("JPEG, RGB", ".jfif", saved(rgb, "JPEG", **smooth), RGB, plain, about=12),
        Kind("JPEG, progressive", ".jpg", saved(rgb, "JPEG", progressive=True, **smooth), RGB, plain, about=12),
        Kind("JPEG, grey", ".jpg", saved(grey, "JPEG", quality=98), grey3(GREY), "grey repeated", about=6),
        Kind("JPEG, CMYK", ".jpg", saved(rgb.convert("CMYK"), "JPEG", quality=98), RGB, "converted to RGB", about=12),
        Kind("JPEG of two pictures (MPO)", ".jpg", _mpo(), RGB, "the first", about=12),
        *_turned("JPEG", ".jpg", 12, **smooth),
        Kind("PNG, RGB", ".png", png(RGB), RGB, plain),
        Kind("PNG, RGB, 16 bits", ".png", png(WIDE, 16), RGB, eight),
        Kind("PNG, RGB, 8 of 16 bits used", ".png", png(RGB.astype(np.uint16), 16), RGB, as_8),
        Kind("PNG, RGBA", ".png", png(rgba), RGB, no_alpha),
        Kind("PNG, RGBA, 16 bits", ".png", png(rgba.astype(np.uint16) << 8, 16), RGB, f"{eight}, {no_alpha}"),
        Kind("PNG, grey, 1 bit", ".png", png(IDS % 2, 1), grey3(IDS % 2 * 255), "0 and 255"),
        Kind("PNG, grey, 2 bits", ".png", png(IDS, 2), grey3(IDS * 85), "spread over 0 to 255"),
        Kind("PNG, grey, 4 bits", ".png", png(IDS * 5, 4), grey3(IDS * 85), "spread over 0 to 255"),
        Kind("PNG, grey", ".png", png(GREY), grey3(GREY), "grey repeated"),
        Kind("PNG, grey, 16 bits", ".png", png(WIDE[..., 0], 16), grey3(GREY), eight),
        Kind("PNG, grey, 8 of 16 bits used", ".png", png(GREY.astype(np.uint16), 16), grey3(GREY), as_8),
        Kind("PNG, grey and alpha", ".png", png(la), grey3(GREY), no_alpha),
        Kind("PNG, grey and alpha, 8 of 16 bits", ".png", png(la.astype(np.uint16), 16), grey3(GREY), as_8),
        Kind("PNG, palette", ".png", png(IDS, 2, color=3, before=png_palette(COLORS)), levels, "its colours"),
        Kind("PNG, palette, transparent", ".png", _transparent(), levels, f"its colours, {no_alpha}"),
        *_turned("PNG", ".png", 0),
        Kind("PNG, orientation behind the pixels", ".png", _late(), RGB, "turned as a viewer shows it", orientation=6),
        Kind(
            "PNG, animated",
            ".png",
            saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            grey3(GREY),
            "the first frame",
        ),
        Kind("BMP", ".bmp", saved(rgb, "BMP"), RGB, plain),
        Kind("GIF", ".gif", saved(grey, "GIF"), grey3(GREY), "its colours"),
        Kind(
            "GIF, animated",
            ".gif",
            saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            grey3(GREY),
            "the first frame",
        ),
        Kind("WebP", ".webp", saved(rgb, "WEBP", quality=100), RGB, plain, about=24),
        Kind(
            "WebP, lossless, RGBA",
            ".webp",
            saved(Image.fromarray(np.dstack([RGB, ALPHA | 1])), "WEBP", lossless=True, exact=True),
            RGB,
            no_alpha,
        ),
        *_turned("WEBP", ".webp", 0, lossless=True),
        Kind("AVIF", ".avif", saved(rgb, "AVIF", quality=100, subsampling="4:4:4"), RGB, plain, about=6),
        *_turned("AVIF", ".avif", 6, quality=100, subsampling="4:4:4"),
        Kind("JPEG 2000", ".jp2", saved(rgb, "JPEG2000"), RGB, plain),
        Kind("PPM", ".ppm", saved(rgb, "PPM"), RGB, plain),
        Kind("TGA", ".tga", saved(rgb, "TGA"), RGB, plain),
        Kind("TIFF, RGB", ".tif", tiff(RGB), RGB, plain),
        Kind("TIFF, RGB, LZW", ".tif", saved(rgb, "TIFF", compression="tiff_lzw"), RGB, plain),
        Kind("TIFF, RGB, bands apart", ".tif", tiff(RGB, apart=True), RGB, plain),
        Kind("TIFF, RGB, 16 bits", ".tif", tiff(WIDE), RGB, eight),
        Kind("TIFF, RGB, 16 bits, big-endian", ".tif", tiff(WIDE, big_endian=True), RGB, eight),
        Kind("TIFF, RGB, 16 bits, bands apart", ".tif", tiff(WIDE, apart=True), RGB, eight),
        Kind("TIFF, RGB, 8 of 16 bits used", ".tif", tiff(RGB.astype(np.uint16)), RGB, as_8),
        Kind(
            "TIFF, RGB, 8 of 16 bits, bands apart",
            ".tif",
            tiff(RGB.astype(np.uint16), apart=True),
            None,
            "",
            "uses few of its 16 bits",
        ),
        Kind("TIFF, RGBA", ".tif", tiff(rgba, photometric=2, extra=(2,)), RGB, no_alpha),
        Kind("TIFF, RGB and near infrared", ".tif", tiff(rgba, photometric=2, extra=(0,)), RGB, "fourth band dropped"),
        Kind("TIFF, 2 bands", ".tif", tiff(la), None, "", "TIFF of 2 bands of 8 bits"),
        Kind("TIFF, 4 bands that are no RGB", ".tif", tiff(rgba), None, "", "TIFF of 4 bands of 8 bits"),
        Kind("TIFF, 5 bands", ".tif", tiff(np.dstack([rgba, GREY])), None, "", "TIFF of 5 bands of 8 bits"),
        Kind("TIFF, grey, 2 bits", ".tif", tiff(IDS, 2), grey3(IDS * 85), "spread over 0 to 255"),
        Kind("TIFF, grey, 12 bits", ".tif", tiff(WIDE[..., 0] >> 4, 12), grey3(GREY), eight),
        Kind("TIFF, grey, 16 bits", ".tif", tiff(WIDE[..., 0]), grey3(GREY), eight),
        Kind("TIFF, grey, white is 0", ".tif", tiff(255 - GREY, photometric=0), grey3(GREY), "as a viewer shows it"),
        Kind("TIFF, grey, 16 bits, white is 0", ".tif", tiff(65535 - WIDE[..., 0], photometric=0), grey3(GREY), eight),
        Kind("TIFF, grey, 32 bits, up to 255", ".tif", tiff(GREY.astype(np.uint32)), grey3(GREY), "as they are"),
        Kind("TIFF, grey, fractions", ".tif", tiff(GREY.astype(np.float32)), None, "", "1 band of 32 bits that holds"),
        Kind("TIFF, grey, fractions of 64 bits", ".tif", tiff(GREY.astype(float)), None, "", "1 band of 64 bits"),
        Kind("TIFF, palette", ".tif", tiff(IDS, photometric=3, tags={320: (3, lut)}), levels, "its colours"),
        Kind("TIFF, CMYK", ".tif", tiff(np.dstack([255 - RGB, GREY * 0]), photometric=5), RGB, "converted to RGB"),
        Kind(
            "TIFF, LAB",
            ".tif",
            tiff(np.dstack([GREY, GREY * 0, GREY * 0]), photometric=8),
            _of_lab(),
            "converted to RGB",
            about=1,
        ),
        Kind(
            "TIFF, two pages", ".tif", saved(rgb, "TIFF", save_all=True, append_images=[grey]), RGB, "the first page"
        ),
        *_turned("TIFF", ".tif", 0),
        Kind("HEIC", ".jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", None, "", "HEIC, which is not read"),
        Kind(
            "a pointer of Git LFS",
            ".png",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
            None,
            "",
            "`git lfs pull`",
        ),
    ]
    return kinds


def masks() -> list[Kind]:
    """Each has the class ids `IDS`, or another array given in its row."""
    palette, lut = png_palette(COLORS), tuple(v * 257 for b in range(3) for v in [c[b] for c in COLORS] + [0] * 252)
    colored = np.array(COLORS, np.uint8)[IDS]
    colors = {"colors": {color: i for i, color in enumerate(COLORS)}}
    minus = IDS.astype(np.int16) - 1
    missing = np.where(minus < 0, 255, minus).astype(np.uint8)
    far = np.where(minus < 0, -9999, minus).astype(np.int16)
    values, index, small = "its values", "its indices", Image.fromarray(IDS)
    lossy = "which changes values"
    return [
        Kind("PNG, grey, 1 bit", ".png", png(IDS % 2, 1), IDS % 2, "0 and 1"),
        Kind("PNG, grey, 2 bits", ".png", png(IDS, 2), IDS, values),
        Kind("PNG, grey, 4 bits", ".png", png(IDS, 4), IDS, values),
        Kind("PNG, grey", ".png", png(IDS), IDS, values),
        Kind("PNG, grey, 16 bits", ".png", png(IDS.astype(np.uint16), 16), IDS, values),
        Kind("PNG, palette, 2 bits", ".png", png(IDS, 2, color=3, before=palette), IDS, index),
        Kind("PNG, palette", ".png", png(IDS, color=3, before=palette), IDS, index),
        Kind(
            "PNG, palette, with `colors`",
            ".png",
            png(IDS, color=3, before=palette),
            IDS,
            "its colours",
            options=colors,
        ),
        Kind("PNG, grey and alpha", ".png", png(np.dstack([IDS, IDS])), None, "", "mode 'LA' (2 channels)"),
        Kind("PNG, RGB", ".png", png(colored), None, "", "`colors={(r, g, b): class id"),
        Kind("PNG, RGB, with `colors`", ".png", png(colored), IDS, "its colours", options=colors),
        Kind(
            "PNG, RGB, 16 bits, with `colors`",
            ".png",
            png(colored.astype(np.uint16) * 257, 16),
            None,
            "",
            "16 bits a channel",
            options=colors,
        ),
        Kind("BMP", ".bmp", saved(small, "BMP"), IDS, values),
        Kind("GIF of plain grey", ".gif", saved(small, "GIF"), IDS, values),
        Kind("GIF of colours", ".gif", saved(Image.fromarray(colored), "GIF"), None, "", "is a GIF with the colours"),
        Kind(
            "GIF of colours, with `colors`",
            ".gif",
            saved(Image.fromarray(colored), "GIF"),
            IDS,
            "its colours",
            options=colors,
        ),
        Kind("PGM", ".pgm", saved(small, "PPM"), IDS, values),
        Kind("PGM with a largest value of 3", ".pgm", b"P5 18 12 3\n" + IDS.tobytes(), IDS, values),
        Kind("TIFF, grey", ".tif", tiff(IDS), IDS, values),
        Kind("TIFF, grey, LZW", ".tif", saved(small, "TIFF", compression="tiff_lzw"), IDS, values),
        Kind("TIFF, grey, 1 bit", ".tif", tiff(IDS % 2, 1), IDS % 2, "0 and 1"),
        Kind("TIFF, grey, 1 bit, white is 0", ".tif", tiff(1 - IDS % 2, 1, photometric=0), IDS % 2, "white is 1"),
        Kind("TIFF, grey, 2 bits", ".tif", tiff(IDS, 2), IDS, values),
        Kind("TIFF, grey, 4 bits", ".tif", tiff(IDS, 4), IDS, values),
        Kind("TIFF, grey, white is 0", ".tif", tiff(IDS, photometric=0), None, "", "stores white as 0"),
        Kind("TIFF, grey, 16 bits", ".tif", tiff(IDS.astype(np.uint16), big_endian=True), IDS, values),
        Kind("TIFF, signed 8 bits, -1", ".tif", tiff(minus.astype(np.int8)), missing, "-1 ignored"),
        Kind("TIFF, signed 16 bits, -1", ".tif", tiff(minus), missing, "-1 ignored"),
        Kind("TIFF, signed 32 bits, -1", ".tif", tiff(minus.astype(np.int32)), missing, "-1 ignored"),
        Kind(
            "TIFF, -9999 declared as missing",
            ".tif",
            tiff(far, tags={42113: (2, b"-9999\0")}),
            missing,
            "missing data ignored",
        ),
        Kind("TIFF, -9999 not declared", ".tif", tiff(far), None, "", "`values={-9999: 255, 0: 0"),
        Kind(
            "TIFF, -9999 with `values`",
            ".tif",
            tiff(far),
            missing,
            "as `values` says",
            options={"values": {-9999: 255, 0: 0, 1: 1, 2: 2}},
        ),
        Kind("TIFF, fractions that are whole", ".tif", tiff(IDS.astype(np.float32)), IDS, values),
        Kind(
            "TIFF, fractions, NaN",
            ".tif",
            tiff(np.where(minus < 0, np.nan, minus).astype(np.float32)),
            missing,
            "NaN ignored",
        ),
        Kind("TIFF, fractions", ".tif", tiff(IDS.astype(np.float32) / 3), None, "", "holds fractions"),
        Kind("TIFF, 64 bits", ".tif", tiff(IDS.astype(np.int64)), None, "", "1 band of 64 bits (signed whole"),
        Kind("TIFF, palette", ".tif", tiff(IDS, photometric=3, tags={320: (3, lut)}), IDS, index),
        Kind("TIFF, 3 bands", ".tif", tiff(colored), None, "", "`colors={(r, g, b): class id"),
        Kind("TIFF, JPEG compression", ".tif", saved(small, "TIFF", compression="jpeg"), None, "", lossy),
        Kind("JPEG", ".jpg", saved(small, "JPEG", quality=100), None, "", lossy),
        Kind("JPEG that is called PNG", ".png", saved(small, "JPEG", quality=100), None, "", lossy),
        Kind("JPEG, with `colors`", ".jpg", saved(Image.fromarray(colored), "JPEG"), None, "", lossy, options=colors),
        Kind("WebP", ".webp", saved(small, "WEBP"), None, "", lossy),
        Kind(
            "WebP, lossless, with `colors`",
            ".webp",
            saved(Image.fromarray(colored), "WEBP", lossless=True),
            IDS,
            "its colours",
            options=colors,
        ),
        Kind("AVIF", ".avif", saved(small, "AVIF", quality=100), None, "", lossy),
        Kind("JPEG 2000", ".jp2", saved(small, "JPEG2000"), None, "", lossy),
    ]


def _mpo() -> bytes:
    second = Image.fromarray(255 - RGB)
    return saved(Image.fromarray(RGB), "MPO", save_all=True, append_images=[second], quality=98, subsampling=0)


def _transparent() -> bytes:
    from support.image_files import chunk

    return png(IDS, 2, color=3, before=png_palette(COLORS) + chunk(b"tRNS", bytes([0, 90, 255, 7])))


def _late() -> bytes:
    return png(as_stored(RGB, 6), after=png_exif(6))


def _of_lab() -> np.ndarray:
    """Grey of a lightness: the sRGB curve of CIE's L*."""
    lightness = GREY / 255 * 100
    linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return grey3(np.rint(curve * 255))


__all__ = ["COLORS", "GREY", "IDS", "NAMES", "RGB", "Kind", "as_shown", "images", "masks", "packed"]
