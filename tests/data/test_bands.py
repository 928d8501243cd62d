"""Rows read from part of a TIFF equal those of the whole file, for every storage layout."""

import struct

import numpy as np
import pytest
import tifffile
from PIL import Image
from support.image_files import tiff

from cps_hf.data import bands
from cps_hf.data.bands import TiffBands, WholeBands, open_bands, pixels_of
from cps_hf.data.labels import stored_values
from cps_hf.data.raster import open_raster
from cps_hf.data.reading import read_image

HEIGHT, WIDTH = 70, 53
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(WIDTH) * 4, np.arange(HEIGHT) * 3), 2)[..., [0, 1, 1]].astype(np.uint8)


@pytest.fixture(autouse=True)
def few_pixels_at_once(monkeypatch):
    monkeypatch.setattr(bands, "PIXELS_AT_ONCE", 16 * WIDTH)


def by_tifffile(path, values, **options):
    tifffile.imwrite(path, values, **({"tile": (16, 32), "metadata": None} | options))


def by_pil(path, values, **options):
    Image.fromarray(values).save(path, strip_size=3 * WIDTH * 8, **options)


IMAGES = {
    "tiles": (by_tifffile, NOISE, {}),
    "tiles, deflated": (by_tifffile, NOISE, {"compression": "zlib"}),
    "tiles, BigTIFF": (by_tifffile, NOISE, {"bigtiff": True}),
    "tiles, big-endian": (by_tifffile, NOISE, {"byteorder": ">"}),
    "tiles, bands apart": (by_tifffile, NOISE.transpose(2, 0, 1), {"planarconfig": "separate", "photometric": "rgb"}),
    "tiles, RGBA": (by_tifffile, np.concatenate([NOISE, NOISE[..., :1]], 2), {"extrasamples": ["unassalpha"]}),
    "tiles, grey": (by_tifffile, NOISE[..., 0], {"compression": "zlib"}),
    "tiles, white is 0": (by_tifffile, NOISE[..., 0], {"photometric": "miniswhite"}),
    "tiles, grey, 16 bits": (by_tifffile, NOISE[..., 0].astype(np.uint16) * 7, {}),
    "tiles, RGB, 16 bits": (by_tifffile, NOISE.astype(np.uint16) * 257, {}),
    "tiles, RGB, 16 bits, big-endian": (by_tifffile, NOISE.astype(np.uint16) * 257, {"byteorder": ">"}),
    "tiles, 8 bits in 16": (by_tifffile, NOISE.astype(np.uint16), {}),
    "strips": (by_tifffile, NOISE, {"tile": None, "rowsperstrip": 8}),
    "strips, LZW": (by_pil, NOISE, {"compression": "tiff_lzw"}),
    "strips, predictor": (by_pil, NOISE, {"compression": "tiff_lzw", "tiffinfo": {317: 2}}),
    "strips, PackBits": (by_pil, NOISE, {"compression": "packbits"}),
    "strips, JPEG": (by_pil, SMOOTH, {"compression": "jpeg"}),
    "one plain strip": (by_tifffile, NOISE, {"tile": None, "rowsperstrip": HEIGHT}),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_rows_of_an_image_equal_the_whole_image(tmp_path, kind):
    write, values, options = IMAGES[kind]
    path = tmp_path / "a.tif"
    write(path, values, **options)
    whole = read_image({"path": str(path)}, name="a").permute(1, 2, 0).numpy()
    found = open_bands(path, name="a", what="image")
    assert isinstance(found, TiffBands) and found.size == (HEIGHT, WIDTH) == whole.shape[:2]
    for start, stop in ((0, HEIGHT), (0, 1), (15, 33), (16, 32), (HEIGHT - 1, HEIGHT)):
        rows = found.image_rows(start, stop)
        assert rows.dtype == np.uint8 and np.array_equal(rows, whole[start:stop])


def test_the_bits_in_use_are_found_from_the_whole_image(tmp_path):
    values = np.full((HEIGHT, WIDTH), 200, np.uint16)
    values[-1, -1] = 60_000  # so the upper 8 of 16 bits are kept everywhere
    by_tifffile(tmp_path / "a.tif", values)
    found = open_bands(tmp_path / "a.tif", name="a", what="image")
    assert found.image_rows(0, 16).max() == 0 and found.image_rows(HEIGHT - 1, HEIGHT).max() == 60_000 >> 8


@pytest.mark.parametrize(
    "values",
    [
        NOISE[..., 0] % 5,
        NOISE[..., 0].astype(np.uint16) * 100,
        NOISE[..., 0].astype(np.int32) - 1,
        NOISE[..., 0].astype(np.float32),
        NOISE[..., 0] > 100,
    ],
    ids=["8 bits", "16 bits", "32 bits", "fractions", "1 bit"],
)
def test_rows_of_a_mask_are_its_stored_values(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif", compression="tiff_adobe_deflate", strip_size=WIDTH * 8)
    raster = open_raster({"path": str(tmp_path / "a.tif")}, "a", "label")
    whole = stored_values(raster.stored(), name="a")
    rows = open_bands(tmp_path / "a.tif", name="a", what="label").mask_rows(5, 40)
    assert np.array_equal(rows, whole[5:40])


def test_a_mask_keeps_its_palette_and_its_colours(tmp_path):
    image = Image.fromarray(NOISE[..., 0] % 3)
    image.putpalette([1, 2, 3, 4, 5, 6, 7, 8, 9])
    for name in ("a.tif", "a.png"):
        image.save(tmp_path / name)
        found = open_bands(tmp_path / name, name="a", what="label")
        assert np.array_equal(found.mask_rows(3, 9), NOISE[3:9, :, 0] % 3)
        assert found.palette[:9] == bytes(range(1, 10))
    by_tifffile(tmp_path / "b.tif", NOISE)
    assert np.array_equal(open_bands(tmp_path / "b.tif", name="b", what="label").mask_rows(3, 9), NOISE[3:9])
    image.convert("RGB").quantize(3).save(tmp_path / "c.gif")  # renumbers its palette
    colors = open_bands(tmp_path / "c.gif", name="c", what="label").mask_rows(0, HEIGHT)
    assert np.array_equal(colors, np.asarray(image.convert("RGB")))


def left_out(path, *tiles):
    """Remove tiles from the file, as GDAL does with SPARSE_OK: offset and length are 0."""
    with tifffile.TiffFile(path) as file:
        tags = [file.pages[0].tags[number] for number in (324, 325)]
        places = [(tag.valueoffset, {3: 2, 4: 4}[int(tag.dtype)]) for tag in tags]
    data = bytearray(path.read_bytes())
    for tile in tiles:
        for offset, size in places:
            data[offset + tile * size : offset + (tile + 1) * size] = bytes(size)
    path.write_bytes(data)


def test_missing_tiles_get_the_no_data_value(tmp_path):
    path = tmp_path / "a.tif"
    for tags, value in (((), 0), ([(42113, "s", 0, "7", True)], 7)):
        by_tifffile(path, NOISE, compression="zlib", extratags=tags)
        left_out(path, 1, 2, 3)  # with two tiles per row
        rows = open_bands(path, name="a", what="image").image_rows(0, HEIGHT)
        expected = NOISE.copy()
        expected[:16, 32:] = expected[16:32] = value
        assert np.array_equal(rows, expected)
        assert np.array_equal(open_bands(path, name="a", what="image").image_rows(18, 20), expected[18:20])


def test_a_truncated_file_is_named_with_its_missing_part(tmp_path):
    path = tmp_path / "a.tif"
    by_tifffile(path, NOISE, tile=None, rowsperstrip=8)
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        last = file.pages[0].dataoffsets[-1]
    path.write_bytes(whole[: last + 5])
    found = open_bands(path, name="'a'", what="image")
    assert np.array_equal(found.image_rows(0, 8), NOISE[:8])
    with pytest.raises(ValueError, match=r"Cannot decode 'a' \(.*a\.tif\): it is truncated\. Tile or strip \d+ ends"):
        found.image_rows(0, HEIGHT)
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="'a'"):
        open_bands(path, name="'a'", what="image").image_rows(0, HEIGHT)


def test_other_files_are_decoded_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_bytes(tiff(NOISE, tags={274: (3, (6,))}))
    Image.fromarray(NOISE).save(tmp_path / "b.png")
    Image.fromarray(NOISE).save(tmp_path / "c.tif", compression="tiff_lzw", strip_size=2**20)
    by_tifffile(
        tmp_path / "d.tif",
        NOISE.transpose(2, 0, 1).astype(np.uint16) * 257,
        planarconfig="separate",
        photometric="rgb",
    )
    monkeypatch.setattr(bands, "MOST_OF_A_BLOCK", HEIGHT * WIDTH - 1)
    for name in ("a.tif", "b.png", "c.tif", "d.tif"):
        whole = read_image({"path": str(tmp_path / name)}, name="a").permute(1, 2, 0).numpy()
        found = open_bands(tmp_path / name, name="a", what="image")
        assert isinstance(found, WholeBands) and found.size == whole.shape[:2]
        assert np.array_equal(found.image_rows(4, 41), whole[4:41])


def test_the_size_is_read_from_the_header_despite_the_limit(tmp_path, monkeypatch):
    by_tifffile(tmp_path / "a.tif", NOISE)
    Image.fromarray(NOISE).save(tmp_path / "b.png")
    (tmp_path / "c.tif").write_bytes(b"II*\0" + struct.pack("<I", 8))
    (tmp_path / "d.png").write_bytes(b"no image")
    sizes = [pixels_of(tmp_path / name) for name in ("a.tif", "b.png", "c.tif", "d.png")]
    assert sizes == [HEIGHT * WIDTH, HEIGHT * WIDTH, None, None]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert pixels_of(tmp_path / "a.tif") == HEIGHT * WIDTH and pixels_of(tmp_path / "b.png") is None
    assert open_bands(tmp_path / "a.tif", name="a", what="image").size == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="limit of 200.*Save it as a tiled TIFF"):
        open_bands(tmp_path / "b.png", name="b", what="image")
