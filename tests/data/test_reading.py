"""Decoding: every mode to RGB bytes, rotation only where image and label share it, and errors that name the file."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cps_hf.data import reading
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


@pytest.mark.parametrize("decoder", ["torchvision", "PIL"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pngs_are_the_same_pixels_with_either_decoder(monkeypatch, decoder, mode):
    if decoder == "PIL":
        monkeypatch.setattr(reading, "decode_image", None)
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


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}, 7])
def test_a_row_without_an_image_is_an_error(value):
    with pytest.raises(ValueError, match="'a' has no image"):
        read_image(value, name="'a'")


def test_labels_that_no_encoding_explains_must_fit_into_bytes():
    value = encoded(Image.fromarray(np.array([[3, 300]], np.uint16)))
    with pytest.raises(ValueError, match="values up to 300"):
        read_label(value, None, name="x")
