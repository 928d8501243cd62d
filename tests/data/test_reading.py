"""Decoding: every mode to RGB bytes, rotation only where image and label share it, and errors that name the file."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cps_hf.data.reading import read_image, read_label, read_sample

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(tensor):
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pngs_keep_their_pixels(mode):
    image = Image.fromarray(RGB).convert(mode)
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(pixels(read_image(encoded(image), name="x")), expected)
    assert np.array_equal(pixels(read_image(image, name="x")), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = Image.fromarray(RGB).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    format = "TIFF" if mode == "CMYK" else "PNG"
    decoded = pixels(read_image(encoded(image, format), name="x"))
    assert np.array_equal(decoded, np.array(image.convert("RGB")))


def test_alpha_is_dropped_and_not_blended():
    rgba = np.concatenate([RGB, np.zeros((6, 9, 1), np.uint8)], 2)  # wholly transparent
    assert np.array_equal(pixels(read_image(encoded(Image.fromarray(rgba)), name="x")), RGB)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    grey = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    decoded = pixels(read_image(encoded(Image.fromarray(grey)), name="x"))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 156, 255] and np.array_equal(decoded[..., 0], decoded[..., 2])


@pytest.mark.parametrize(("dtype", "format"), [(np.int32, "TIFF"), (np.uint16, "TIFF"), (np.uint16, "PNG")])
def test_eight_bits_in_a_wider_image_are_what_they_are(dtype, format):
    decoded = pixels(read_image(encoded(Image.fromarray(RGB[..., 0].astype(dtype)), format), name="x"))
    assert np.array_equal(decoded, np.stack([RGB[..., 0]] * 3, 2))
    beyond = np.array([[200, 256, 65535]], dtype)
    assert pixels(read_image(encoded(Image.fromarray(beyond), format), name="x"))[0, :, 0].tolist() == [0, 1, 255]


def test_an_image_that_becomes_nearly_black_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr("cps_hf.data.reading._told_of_few_bits", [])
    for name, most in (("'dark'", 255), ("'bright'", 4096), ("'few bits'", 4095), ("'another'", 4095)):
        read_image(encoded(Image.fromarray(np.array([[0, most]], np.uint16))), name=name)
    [record] = caplog.records
    assert record.getMessage().startswith("'few bits' has grey values up to 4095: of 16 bits the upper 8 are kept")
    assert "nearly black (0 to 15)" in record.getMessage()


def jpeg_with_orientation(array, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(array), "JPEG", quality=95, exif=exif)


def upright(array, orientation):
    """What a viewer shows, by the EXIF standard."""
    turned = {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.transpose(1, 0, 2)}
    turned |= {6: np.rot90(array, -1), 7: np.rot90(array, 2).transpose(1, 0, 2), 8: np.rot90(array, 1)}
    return turned[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_without_label_is_turned_as_a_viewer_turns_it(orientation):
    smooth = np.asarray(Image.fromarray(RGB[:2, :3]).resize((24, 16), Image.BICUBIC))
    value = jpeg_with_orientation(smooth, orientation)
    decoded = pixels(read_image(value, name="x")).astype(int)
    expected = upright(smooth, orientation).astype(int)
    assert decoded.shape == expected.shape and np.abs(decoded - expected).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("label_is", ["as stored", "turned"])
def test_an_image_is_turned_only_when_its_label_was(orientation, label_is):
    smooth = np.asarray(Image.fromarray(RGB[:2, :3]).resize((24, 16), Image.BICUBIC))
    shown = upright(smooth, orientation)
    shape = smooth.shape[:2] if label_is == "as stored" else shown.shape[:2]
    label = encoded(Image.fromarray(np.zeros(shape, np.uint8)))
    row = {"id": "a", "image": jpeg_with_orientation(smooth, orientation), "label": label}
    image, decoded_label = read_sample(row, None, with_label=True)
    assert tuple(image.shape[1:]) == tuple(decoded_label.shape) == shape
    turned = label_is == "turned" and orientation >= 5
    expected = (shown if turned else smooth).astype(int)
    assert np.abs(pixels(image).astype(int) - expected).mean() < 12


def exif_block(kind, count, value):
    """A TIFF header and one tag, the orientation, typed by hand."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI4sI", 1, 0x0112, kind, count, value, 0)


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (exif_block(3, 1, b"\x06\0\0\0"), True),
        (exif_block(2, 2, b"6\0\0\0"), False),  # text where a number belongs
        (exif_block(3, 1, b"\x63\0\0\0"), False),  # 99
        (b"Exif\0\0garbage, no header", False),
    ],
    ids=["6", "text", "99", "garbage"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_that_make_no_sense_turn_nothing_and_stop_nothing(exif, turned):
    value = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    label = encoded(Image.fromarray(np.zeros((6, 9), np.uint8)))
    assert tuple(read_image(value, name="x").shape) == ((3, 9, 6) if turned else (3, 6, 9))
    row = {"id": "a", "image": value, "label": label}
    assert tuple(read_sample(row, None, with_label=True)[0].shape) == (3, 6, 9)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("place", ["after a long comment", "at the end"])
def test_the_rotation_of_a_png_counts_wherever_it_stands(place):
    png = encoded(Image.fromarray(RGB))["bytes"]
    exif = chunk(b"eXIf", exif_block(3, 1, b"\x06\0\0\0")[6:])
    comment = chunk(b"tEXt", b"Comment\0" + b"x" * 9000)
    head, body, end = png[:33], png[33:-12], png[-12:]
    data = head + comment + exif + body + end if place != "at the end" else head + body + exif + end
    decoded = pixels(read_image({"bytes": data, "path": None}, name="x"))
    assert np.array_equal(decoded, np.rot90(RGB, -1))


def test_image_and_label_of_different_size_are_refused_with_both_sizes():
    label = encoded(Image.fromarray(np.zeros((9, 6), np.uint8)))
    with pytest.raises(ValueError, match=r"'a' is 6 x 9 .* label 'a' is 9 x 6"):
        read_sample({"id": "a", "image": encoded(Image.fromarray(RGB)), "label": label}, None, with_label=True)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing"])
@pytest.mark.parametrize("what", ["image", "label"])
def test_a_broken_file_is_named(tmp_path, format, damage, what):
    path = tmp_path / "pic.file"
    big = RNG.integers(0, 256, (60, 90, 3), np.uint8)
    image = Image.fromarray(big) if what == "image" else Image.fromarray(big[..., 0])
    image.save(path, format)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"hello" * 20, "empty": b""}[damage])
    read = read_image if what == "image" else lambda value, name: read_label(value, None, name=name)
    with pytest.raises(ValueError, match=r"'a7' \(.*pic.file\)"):
        read({"bytes": None, "path": str(path)}, name="'a7'")


@pytest.mark.parametrize("what", ["image", "label"])
def test_a_png_with_any_wrong_bit_is_an_error_and_never_wrong_pixels(what):
    """Smooth content: PIL alone decodes about one in seven of these without a word."""
    smooth = (np.indices((60, 80)).sum(0) % 256).astype(np.uint8)
    whole = encoded(Image.fromarray(np.stack([smooth] * 3, 2) if what == "image" else smooth))["bytes"]
    read = read_image if what == "image" else lambda value, name: read_label(value, None, name=name)
    for _ in range(60):
        data = bytearray(whole)
        data[RNG.integers(8, len(data))] ^= 1 << RNG.integers(8)
        with pytest.raises(ValueError, match=f"Cannot decode 'a7': {what} of {len(whole)} bytes"):
            read({"bytes": bytes(data), "path": None}, name="'a7'")
    for missing in (1, 12, 13, 30):
        with pytest.raises(ValueError, match="Cannot decode 'a7': .*breaks off"):
            read({"bytes": whole[:-missing], "path": None}, name="'a7'")


def test_a_text_made_to_exhaust_memory_is_refused_with_the_name():
    png = encoded(Image.fromarray(RGB))["bytes"]
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (2 << 20)))
    with pytest.raises(ValueError, match=r"Cannot decode 'a7': .*too large"):
        read_image({"bytes": png[:33] + text + png[33:], "path": None}, name="'a7'")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_file_made_to_exhaust_memory_is_refused(monkeypatch, mode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    value = encoded(Image.fromarray(RGB).convert(mode))
    with pytest.raises(ValueError, match="6 x 9 pixels, more than PIL's limit of 50"):
        read_image(value, name="x")
    with pytest.raises(ValueError, match="more than PIL's limit"):
        read_label(value, None, name="x")


def test_one_pixel_is_an_image():
    assert read_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), name="x").flatten().tolist() == [1, 2, 3]


def test_a_row_without_a_label_says_so():
    with pytest.raises(ValueError, match="'a' has no label"):
        read_sample({"id": "a", "image": encoded(Image.fromarray(RGB)), "label": None}, None, with_label=True)


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}, 7])
def test_a_row_without_an_image_is_an_error(value):
    with pytest.raises(ValueError, match="'a' has no image"):
        read_image(value, name="'a'")


def test_labels_that_no_encoding_explains_must_fit_into_bytes():
    value = encoded(Image.fromarray(np.array([[3, 300]], np.uint16)))
    with pytest.raises(ValueError, match="values up to 300"):
        read_label(value, None, name="x")
