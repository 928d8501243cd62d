"""Masks written row by row can be read by other libraries."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from cps_hf.data import mask_rows
from cps_hf.data.mask_rows import mask_writer

IDS = np.random.default_rng(0).integers(0, 3, (37, 41), dtype=np.uint8)
IDS[0, 0] = 255
PALETTE = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]


def write(path, pieces=(1, 12, 24), **options):
    with mask_writer(path, IDS.shape, PALETTE, **options) as writer:
        for rows in np.split(IDS, np.cumsum(pieces)):
            writer.write(rows)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_mask_written_by_rows_is_a_palette_image(tmp_path, monkeypatch, name):
    monkeypatch.setattr(mask_rows, "TILE", 16)
    write(tmp_path / "deep" / name)
    with Image.open(tmp_path / "deep" / name) as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), IDS)
        colors = np.array([*PALETTE, (255, 255, 255)], np.uint8)
        assert np.array_equal(np.asarray(image.convert("RGB")), colors[np.minimum(IDS, 3)])


@pytest.mark.parametrize("order", ["<", ">"])
def test_geo_tags_are_copied_byte_for_byte(tmp_path, order):
    scale = (12, 3, np.array([0.5, 0.25, 0]).astype(f"{order}f8").tobytes())
    text = (2, 5, b"WGS|\0")
    write(tmp_path / "a.tif", geo={33550: scale, 34737: text}, order=order)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages[0]
        assert page.is_tiled and np.array_equal(page.asarray(), IDS)
        assert page.tags[33550].value == (0.5, 0.25, 0) and page.tags[34737].value == "WGS|"


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_an_incomplete_mask_leaves_no_file(tmp_path, name):
    with pytest.raises(ValueError, match="12 of 37 rows"), mask_writer(tmp_path / name, IDS.shape, PALETTE) as writer:
        writer.write(IDS[:12])
    with pytest.raises(KeyboardInterrupt), mask_writer(tmp_path / name, IDS.shape, PALETTE) as writer:
        writer.write(IDS)
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]
