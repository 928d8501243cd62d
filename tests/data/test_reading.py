"""Decoding: every mode becomes RGB bytes, images and labels are oriented as in a viewer, and errors name
the file."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_files import as_shown, as_stored, chunk, png, png_exif, saved, tiff

from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import examine, read_image, read_label, read_sample, same_aspect

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
    rgba = np.concatenate([RGB, np.zeros((6, 9, 1), np.uint8)], 2)  # fully transparent
    assert np.array_equal(pixels(read_image(encoded(Image.fromarray(rgba)), name="x")), RGB)


def test_sixteen_bits_are_scaled_and_not_clipped():
    grey = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    decoded = pixels(read_image(encoded(Image.fromarray(grey)), name="x"))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 156, 255] and np.array_equal(decoded[..., 0], decoded[..., 2])


@pytest.mark.parametrize(("most", "expected"), [(255, [0, 200, 255]), (256, [0, 0, 1])])
def test_one_value_above_255_makes_an_image_sixteen_bit(most, expected):
    decoded = pixels(read_image(encoded(Image.fromarray(np.array([[0, 200, most]], np.uint16))), name="x"))
    assert decoded[0, :, 0].tolist() == expected


def test_twelve_bits_of_jpeg_2000_are_scaled_and_do_not_wrap():
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    # Written as 16 bits, lossless, then declared as 12: decoders then add 2048 for the sign instead of 32768.
    data = bytearray(saved(Image.fromarray(values + np.uint16(32768 - 2048)), "JPEG2000", no_jp2=True))
    data[42] = 12 - 1
    decoded = pixels(read_image({"bytes": bytes(data), "path": None}, name="x"))
    assert np.array_equal(decoded[..., 0], values >> 4)


@pytest.mark.parametrize(("dtype", "format"), [(np.int32, "TIFF"), (np.uint16, "TIFF"), (np.uint16, "PNG")])
def test_eight_bits_in_a_wider_image_are_unchanged(dtype, format):
    decoded = pixels(read_image(encoded(Image.fromarray(RGB[..., 0].astype(dtype)), format), name="x"))
    assert np.array_equal(decoded, np.stack([RGB[..., 0]] * 3, 2))
    beyond = np.array([[200, 256, 65535]], dtype)
    assert pixels(read_image(encoded(Image.fromarray(beyond), format), name="x"))[0, :, 0].tolist() == [0, 1, 255]


def test_an_image_that_becomes_nearly_black_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr("cps_hf.data.raster._told_of_few_bits", [])
    for name, most in (("'dark'", 255), ("'bright'", 4096), ("'few bits'", 4095), ("'another'", 4095)):
        read_image(encoded(Image.fromarray(np.array([[0, most]], np.uint16))), name=name)
    [record] = caplog.records
    assert record.getMessage().startswith("'few bits' has values up to 4095 in 16 bits: the upper 8 are kept")
    assert "nearly black (0 to 15)" in record.getMessage()


def jpeg_with_orientation(array, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(array), "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_unlabeled_image_is_rotated_as_in_a_viewer(orientation):
    smooth = np.asarray(Image.fromarray(RGB[:2, :3]).resize((24, 16), Image.BICUBIC))
    value = jpeg_with_orientation(smooth, orientation)
    decoded = pixels(read_image(value, name="x")).astype(int)
    expected = as_shown(smooth, orientation).astype(int)
    assert decoded.shape == expected.shape and np.abs(decoded - expected).mean() < 12


def halves(shape):
    """Red above, blue below, and a matching label: (image (H, W, 3), label (H, W)), as displayed."""
    label = np.zeros(shape, np.uint8)
    label[: shape[0] // 2, : shape[1] // 3] = 1  # a corner: every rotation moves it
    return np.array([(20, 20, 220), (220, 20, 20)], np.uint8)[label], label


def fits(image, label):
    """The share of pixels whose colour matches their label."""
    return float(((pixels(image)[..., 0] > 120) == (label.numpy() == 1)).mean())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("shape", [(32, 48), (40, 40)])
def test_an_exif_rotated_image_fits_its_drawn_label(format, orientation, shape):
    image, label = halves(shape)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    stored = encoded(Image.fromarray(as_stored(image, orientation)), format, exif=exif, **options)
    row = {"id": "a", "image": stored, "label": encoded(Image.fromarray(label))}
    sample = read_sample(row, None, with_label=True)
    assert torch.equal(sample[0], read_image(stored, name="a")) and fits(*sample) > 0.98


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_label_of_the_stored_size_rotates_with_its_image(format, orientation):
    image, label = halves((32, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(Image.fromarray(as_stored(image, orientation)), format, exif=exif)
    row = {"id": "a", "image": stored, "label": encoded(Image.fromarray(as_stored(label, orientation)))}
    sample = read_sample(row, None, with_label=True)
    assert tuple(sample[1].shape) == (32, 48) and fits(*sample) > 0.98


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("label_is", ["tagged as its image", "tagged, and drawn upright"])
def test_a_label_with_its_own_orientation_is_rotated_if_it_fits(orientation, label_is):
    image, label = halves((32, 48))
    tag = png_exif(orientation)
    stored = {"bytes": png(as_stored(image, orientation), before=tag), "path": None}
    copied = label_is == "tagged as its image"  # from a tool that copies metadata
    drawn = as_stored(label, orientation) if copied else label
    row = {"id": "a", "image": stored, "label": {"bytes": png(drawn, before=tag), "path": None}}
    sample = read_sample(row, None, with_label=True)
    found = examine(row, None, with_label=True, whole=True)
    if copied or orientation >= 5:
        assert fits(*sample) == 1
    assert ("label", "turned itself") in found.unusual and np.array_equal(found.ids, sample[1].numpy())


@pytest.mark.parametrize(
    ("orientation", "shape", "label_is", "said"),
    [
        (1, (32, 48), "drawn", set()),
        (3, (32, 48), "drawn", {"cannot tell"}),
        (6, (32, 48), "drawn", set()),
        (6, (40, 40), "drawn", {"cannot tell"}),
        (6, (32, 48), "stored", {"turned with image"}),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_ambiguous_sizes_are_reported(orientation, shape, label_is, said, whole):
    image, label = halves(shape)
    for after in (False, True):  # also after the pixels
        place = {"after" if after else "before": png_exif(orientation)}
        stored = {"bytes": png(as_stored(image, orientation), **place), "path": None}
        drawn = label if label_is == "drawn" else as_stored(label, orientation)
        row = {"id": "a", "image": stored, "label": encoded(Image.fromarray(drawn))}
        found = examine(row, None, with_label=True, whole=whole)
        assert {kind for what, kind in found.unusual if what == "label"} == said and found.size == shape
        assert (("image", "turned") in found.unusual) == (orientation != 1)


@pytest.mark.parametrize("factor", [1 / 4, 1 / 3, 2])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_label_of_the_same_aspect_is_resized_if_allowed(factor, orientation):
    image, label = halves((120, 180))
    small = np.asarray(Image.fromarray(label).resize((round(180 * factor), round(120 * factor)), Image.NEAREST))
    stored = {"bytes": png(as_stored(image, orientation), before=png_exif(orientation)), "path": None}
    encoding = LabelEncoding(("ground", "corner"), resize_masks=True)
    for drawn in [small] + [as_stored(small, orientation)] * (orientation == 6):
        row = {"id": "a", "image": stored, "label": encoded(Image.fromarray(drawn))}
        sample = read_sample(row, encoding, with_label=True)
        assert tuple(sample[1].shape) == (120, 180) and fits(*sample) == 1
        with pytest.raises(
            ValueError, match=r"the label is .*`resize_masks=True` .*--load_options '{\"resize_masks\""
        ):
            read_sample(row, LabelEncoding(("ground", "corner")), with_label=True)


def test_a_resized_label_has_no_interpolated_class():
    small = np.random.default_rng(0).choice(np.array([0, 2, 255], np.uint8), (6, 9))
    row = {"id": "a", "image": encoded(Image.new("RGB", (18, 12))), "label": encoded(Image.fromarray(small))}
    _, label = read_sample(row, LabelEncoding(("a", "b", "c"), resize_masks=True), with_label=True)
    assert np.array_equal(label.numpy(), small.repeat(2, 0).repeat(2, 1))


def test_a_label_of_another_aspect_stays_an_error():
    image, label = halves((120, 180))
    row = {"id": "a", "image": encoded(Image.fromarray(image)), "label": encoded(Image.fromarray(label[:90]))}
    for encoding in (None, LabelEncoding(("ground", "corner"), resize_masks=True)):
        with pytest.raises(ValueError, match=r"120 x 180 .* is 90 x 180\. Each pixel needs a label"):
            read_sample(row, encoding, with_label=True)


def test_invalid_values_are_an_error_with_a_suggested_option():
    label = np.full((8, 8), 300, np.uint16)
    row = {"id": "a", "image": encoded(Image.new("RGB", (8, 8))), "label": encoded(Image.fromarray(label))}
    said = (
        r"contains values from 300 to 300; expected class ids 0 to 254.*`--load_options '{\"values\": {\"0\": 0, \"300"
    )
    with pytest.raises(ValueError, match=said):
        read_sample(row, None, with_label=True)


@pytest.mark.parametrize(
    ("shape", "size", "same"),
    [
        ((166, 250), (667, 1000), True),  # 667 / 4 rounded down
        ((167, 250), (667, 1000), True),
        ((1334, 2000), (667, 1000), True),
        ((165, 250), (667, 1000), False),
        ((90, 180), (120, 180), False),
        ((100, 100), (101, 100), True),
        ((1, 1), (600, 400), True),  # matches anything
    ],
)
def test_aspects_are_equal_up_to_a_pixel(shape, size, same):
    assert same_aspect(shape, size) == same


def exif_block(kind, count, value):
    """A handwritten TIFF header with one tag, the orientation."""
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
def test_invalid_metadata_is_ignored(exif, turned):
    value = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    label = encoded(Image.fromarray(np.zeros((6, 9), np.uint8)))
    assert tuple(read_image(value, name="x").shape) == ((3, 9, 6) if turned else (3, 6, 9))
    row = {"id": "a", "image": value, "label": label}
    image, label = read_sample(row, None, with_label=True)  # a label of the stored size is rotated with it
    assert tuple(image.shape) == ((3, 9, 6) if turned else (3, 6, 9)) and image.shape[1:] == label.shape


@pytest.mark.parametrize("place", ["after a long comment", "at the end"])
def test_the_rotation_of_a_png_is_found_anywhere(place):
    png = encoded(Image.fromarray(RGB))["bytes"]
    exif = chunk(b"eXIf", exif_block(3, 1, b"\x06\0\0\0")[6:])
    comment = chunk(b"tEXt", b"Comment\0" + b"x" * 9000)
    head, body, end = png[:33], png[33:-12], png[-12:]
    data = head + comment + exif + body + end if place != "at the end" else head + body + exif + end
    decoded = pixels(read_image({"bytes": data, "path": None}, name="x"))
    assert np.array_equal(decoded, np.rot90(RGB, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("own", [2, 3, 4])
def test_a_label_rotated_by_90_degrees_is_an_error(orientation, own):
    image, label = halves((32, 48))
    across = png(np.ascontiguousarray(label.T), before=png_exif(own))
    stored = png(as_stored(image, orientation), before=png_exif(orientation))
    row = {"id": "a", "image": {"bytes": stored, "path": None}, "label": {"bytes": across, "path": None}}
    with pytest.raises(ValueError, match="32 x 48 .height x width., its label 'a' is 48 x 32"):
        read_sample(row, None, with_label=True)


def test_image_and_label_of_different_sizes_are_an_error():
    label = encoded(Image.fromarray(np.zeros((9, 6), np.uint8)))
    with pytest.raises(ValueError, match=r"'a' is 6 x 9 .* label 'a' is 9 x 6\. Each pixel needs a label"):
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
def test_a_png_with_any_wrong_bit_is_an_error(what):
    """Smooth content: PIL alone silently decodes about one in seven of these."""
    smooth = (np.indices((60, 80)).sum(0) % 256).astype(np.uint8)
    whole = encoded(Image.fromarray(np.stack([smooth] * 3, 2) if what == "image" else smooth))["bytes"]
    read = read_image if what == "image" else lambda value, name: read_label(value, None, name=name)
    for _ in range(60):
        data = bytearray(whole)
        data[RNG.integers(8, len(data))] ^= 1 << RNG.integers(8)
        with pytest.raises(ValueError, match=f"Cannot decode 'a7': {what} of {len(whole)} bytes"):
            read({"bytes": bytes(data), "path": None}, name="'a7'")
    for missing in (1, 12, 13, 30):
        with pytest.raises(ValueError, match="Cannot decode 'a7': .*is truncated"):
            read({"bytes": whole[:-missing], "path": None}, name="'a7'")


def test_a_memory_exhausting_text_chunk_is_rejected_by_name():
    png = encoded(Image.fromarray(RGB))["bytes"]
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (2 << 20)))
    with pytest.raises(ValueError, match=r"Cannot decode 'a7': .*too large"):
        read_image({"bytes": png[:33] + text + png[33:], "path": None}, name="'a7'")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_memory_exhausting_file_is_rejected(monkeypatch, mode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # PIL raises beyond twice as many
    value, image = encoded(Image.fromarray(RGB).convert(mode)), Image.fromarray(RGB).convert(mode)
    for read in (lambda v: read_image(v, name="x"), lambda v: read_label(v, None, name="x")):
        with pytest.raises(ValueError, match="has 54 pixels, more than the limit of 40.*`CPS_HF_MAX_IMAGE_PIXELS=54`"):
            read(value)
        with pytest.raises(ValueError, match="has 6 x 9 pixels, more than the limit of 40"):
            read(image)
    monkeypatch.setenv("CPS_HF_MAX_IMAGE_PIXELS", "54")  # as the error suggests
    assert tuple(read_image(value, name="x").shape) == (3, 6, 9)
    monkeypatch.setenv("CPS_HF_MAX_IMAGE_PIXELS", "54 million")
    with pytest.raises(ValueError, match="`CPS_HF_MAX_IMAGE_PIXELS` must be a number of pixels, got '54 million'"):
        read_image(value, name="x")


def test_an_image_that_only_triggers_a_pil_warning_is_read(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.warns(Image.DecompressionBombWarning):
        assert tuple(read_image(encoded(Image.fromarray(RGB)), name="x").shape) == (3, 6, 9)


def test_one_pixel_is_an_image():
    assert read_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), name="x").flatten().tolist() == [1, 2, 3]


def test_a_row_without_a_label_is_an_error():
    with pytest.raises(ValueError, match="'a' has no label"):
        read_sample({"id": "a", "image": encoded(Image.fromarray(RGB)), "label": None}, None, with_label=True)


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}, 7])
def test_a_row_without_an_image_is_an_error(value):
    with pytest.raises(ValueError, match="'a' has no image"):
        read_image(value, name="'a'")


def test_labels_without_encoding_must_fit_into_bytes():
    value = encoded(Image.fromarray(np.array([[3, 300]], np.uint16)))
    with pytest.raises(ValueError, match="values from 3 to 300"):
        read_label(value, None, name="x")
    missing = {"bytes": tiff(np.array([[-1, 3]], np.int16)), "path": None}
    assert read_label(missing, None, name="x").tolist() == [[255, 3]]
