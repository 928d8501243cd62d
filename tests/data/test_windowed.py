"""Training on large tiled TIFFs: crops are those of the decoded image, and no tile outside them is decoded."""

import io
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from datasets import Dataset
from PIL import Image

from cps_hf.config import AugmentationConfig
from cps_hf.data import bands, mask_codes, streams, windowed
from cps_hf.data.bands import long_tag, short_tag, tiff_directory, tiff_header
from cps_hf.data.class_counts import count_class_pixels
from cps_hf.data.discover import discover
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.order import Shard
from cps_hf.data.streams import TrainStream, decodable
from cps_hf.data.survey import survey
from cps_hf.data.table import build
from cps_hf.planning.facts import DataFacts

HEIGHT, WIDTH, TILE = 150, 203, (16, 32)
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
IDS = np.kron(RANDOM.integers(0, 3, (15, 21)), np.ones((10, 10), int))[:HEIGHT, :WIDTH].astype(np.uint8)
IDS[:9] = 255
NAMES = ("a", "b", "c")
AUGMENTATION = AugmentationConfig(crop_size=(24, 32), random_scale=(0.5, 2.0), random_scale_mode="range")


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(windowed, "FROM_PIXELS", HEIGHT * WIDTH)
    windowed._opened.cache_clear()


def tiled(path, values, **options):
    tifffile.imwrite(path, values, **({"tile": TILE, "metadata": None, "compression": "zlib"} | options))


def tiled_by_pil(path, values, compression, tag):
    """Tiles of a codec that tifffile writes only with a further package."""
    height, width = values.shape[:2]
    packed = []
    for top, left in itertools.product(range(0, height, TILE[0]), range(0, width, TILE[1])):
        tile = np.zeros((*TILE, 3), np.uint8)
        part = values[top : top + TILE[0], left : left + TILE[1]]
        tile[: part.shape[0], : part.shape[1]] = part
        data = io.BytesIO()
        if compression == "jpeg":
            Image.fromarray(tile).save(data, "JPEG", quality=90, subsampling=0)
            packed.append(data.getvalue())
            continue
        Image.fromarray(tile).save(data, "TIFF", compression=compression, strip_size=tile.nbytes)
        data.seek(0)
        with tifffile.TiffFile(data) as file:
            [offset], [length] = file.pages[0].dataoffsets, file.pages[0].databytecounts
        packed.append(data.getvalue()[offset : offset + length])
    offsets = [8 + sum(map(len, packed[:i])) for i in range(len(packed))]
    short = {258: [8] * 3, 259: [tag], 262: [6 if compression == "jpeg" else 2], 277: [3], 284: [1]}
    short |= {530: [1, 1]} if compression == "jpeg" else {}
    long = {256: [width], 257: [height], 322: [TILE[1]], 323: [TILE[0]], 324: offsets, 325: [*map(len, packed)]}
    tags = {key: short_tag("<", value) for key, value in short.items()}
    tags |= {key: long_tag("<", value) for key, value in long.items()}
    body = b"".join(packed)
    body += bytes(len(body) % 2)
    at = 8 + len(body)
    path.write_bytes(tiff_header("<", at) + body + tiff_directory("<", tags, at))


def rows(image, mask, encoding=None):
    labels = (
        {} if mask is None else {"labels": [mask], "label_feature": (encoding or LabelEncoding(NAMES)).to_feature()}
    )
    return build(["scan"], [image], **labels)


def take(dataset, count=6, **options):
    options = {"name": "s", "augmentation": AUGMENTATION, "seed": 5, "num_labels": 3} | options
    stream = TrainStream(dataset, shard=Shard(batch_size=2), **options)
    return list(itertools.islice(iter(stream), count))


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


IMAGES = {
    "none": lambda path: tiled(path, NOISE, compression=None),
    "deflate": lambda path: tiled(path, NOISE),
    "BigTIFF": lambda path: tiled(path, NOISE, bigtiff=True),
    "big-endian": lambda path: tiled(path, NOISE, byteorder=">"),
    "LZW": lambda path: tiled_by_pil(path, NOISE, "tiff_lzw", 5),
    "JPEG": lambda path: tiled_by_pil(path, NOISE // 16 * 3, "jpeg", 7),
    "strips": lambda path: tiled(path, NOISE, tile=None, rowsperstrip=7),
    "grey": lambda path: tiled(path, NOISE[..., 0]),
    "16 bits": lambda path: tiled(path, NOISE.astype(np.uint16) * 257),
    "8 bits in 16": lambda path: tiled(path, NOISE.astype(np.uint16)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_seeded_crop_of_a_tiled_tiff_is_that_of_the_decoded_image(tmp_path, monkeypatch, kind):
    IMAGES[kind](tmp_path / "a.tif")
    tiled(tmp_path / "mask.tif", IDS)
    Image.fromarray(IDS).save(tmp_path / "mask.png")
    whole = streams.read_sample({"id": "a", "image": {"path": str(tmp_path / "a.tif")}}, with_label=False)[0]
    Image.fromarray(whole.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    views = ("weak", "strong", "second_crop")
    expected = take(rows(tmp_path / "a.png", tmp_path / "mask.png"))
    expected_views = take(rows(tmp_path / "a.png", None), views=views)
    monkeypatch.setattr(streams, "read_sample", None)  # nothing is decoded whole
    assert_same(take(rows(tmp_path / "a.tif", tmp_path / "mask.tif")), expected)
    assert_same(take(rows(tmp_path / "a.tif", None), views=views), expected_views)


MASKS = {
    "values": (IDS.astype(np.uint16) * 100, LabelEncoding(NAMES, values={0: 0, 100: 2, 200: 1, 25500: 255})),
    "colours": (
        np.array([[1, 2, 3], [9, 9, 9], [200, 0, 0]], np.uint8)[IDS % 3],
        LabelEncoding(NAMES, colors={(1, 2, 3): 0, (9, 9, 9): 1, (200, 0, 0): 2}),
    ),
    "floating point": (np.where(IDS == 255, np.nan, IDS).astype(np.float32), LabelEncoding(NAMES)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_read_in_windows_however_they_code_their_classes(tmp_path, monkeypatch, kind):
    values, encoding = MASKS[kind]
    tiled(tmp_path / "a.tif", NOISE)
    tiled(tmp_path / "mask.tif", values)
    dataset = rows(tmp_path / "a.tif", tmp_path / "mask.tif", encoding)
    found, counts = take(dataset), count_class_pixels(dataset, 3)
    monkeypatch.setattr(windowed, "FROM_PIXELS", 10**9)
    windowed._opened.cache_clear()
    assert_same(found, take(dataset))
    assert torch.equal(counts, count_class_pixels(dataset, 3)) and counts.sum() > 0


def test_pseudo_labels_are_cropped_with_their_image(tmp_path, monkeypatch):
    tiled(tmp_path / "a.tif", NOISE)
    tiled(tmp_path / "mask.tif", IDS)
    dataset = rows(tmp_path / "a.tif", tmp_path / "mask.tif").rename_column("label", "pseudo_label")
    views = ("weak", "pseudo_labels")
    found = take(dataset, views=views)
    monkeypatch.setattr(windowed, "FROM_PIXELS", 10**9)
    windowed._opened.cache_clear()
    assert_same(found, take(dataset, views=views))


def test_images_are_read_in_windows_from_four_megapixels(tmp_path, monkeypatch):
    monkeypatch.undo()  # the sizes of real use
    windowed._opened.cache_clear()
    for side, in_windows in ((2032, False), (2048, True)):
        path = tmp_path / f"{side}.tif"
        tifffile.imwrite(path, np.zeros((side, side, 3), np.uint8), tile=(256, 256), compression="zlib", metadata=None)
        assert (windowed.windowed_size({"path": str(path)}) == (side, side)) == in_windows


def test_only_the_tiles_under_a_crop_are_decoded(tmp_path, monkeypatch):
    tiled(tmp_path / "a.tif", NOISE)
    decoded = []

    def watched(value, name, what):
        raster = open_raster(value, name, what)
        decoded.append(raster.size)
        return raster

    open_raster = bands.open_raster
    monkeypatch.setattr(bands, "open_raster", watched)
    image, _ = windowed.open_windowed({"id": "a", "image": {"path": str(tmp_path / "a.tif")}}, None, with_label=False)
    assert image.shape == (3, HEIGHT, WIDTH) and not decoded
    assert np.array_equal(image.window(20, 70, 10, 20).permute(1, 2, 0), NOISE[20:30, 70:90])
    assert decoded == [TILE]  # rows 16 to 31, columns 64 to 95
    decoded.clear()
    assert np.array_equal(image.window(30, 90, 20, 70).permute(1, 2, 0), NOISE[30:50, 90:160])
    assert decoded == [(3 * TILE[0], 3 * TILE[1])]


def test_tiles_missing_from_a_mask_have_the_class_of_their_value(tmp_path):
    tiled(tmp_path / "a.tif", NOISE)
    tiled(tmp_path / "mask.tif", IDS + 5, extratags=[(42113, "s", 0, "6", True)], compression=None)
    with tifffile.TiffFile(tmp_path / "mask.tif") as file:
        tags = [file.pages[0].tags[number] for number in (324, 325)]
        places = [(tag.valueoffset, {3: 2, 4: 4}[int(tag.dtype)]) for tag in tags]
    data = bytearray((tmp_path / "mask.tif").read_bytes())
    for place, size in places:
        data[place : place + size] = bytes(size)  # the first tile
    (tmp_path / "mask.tif").write_bytes(data)
    encoding = LabelEncoding(NAMES, values={5: 0, 6: 1, 7: 2, 4: 255})
    row = {"id": "a", "image": {"path": str(tmp_path / "a.tif")}, "label": {"path": str(tmp_path / "mask.tif")}}
    _, label = windowed.open_windowed(row, encoding, with_label=True)
    expected = IDS.copy()
    expected[: TILE[0], : TILE[1]] = 1
    assert np.array_equal(label.window(0, 0, 40, 50), expected[:40, :50])


def test_values_that_are_no_class_are_named_when_they_are_read(tmp_path):
    tiled(tmp_path / "a.tif", NOISE)
    tiled(tmp_path / "mask.tif", IDS * 0 + 7)
    with pytest.raises(ValueError, match=r"The label of 'scan' \(.*mask\.tif\) contains 7"):
        take(rows(tmp_path / "a.tif", tmp_path / "mask.tif"), 1)
    tiled(tmp_path / "mask.tif", IDS * 0 + 2)
    with pytest.raises(
        ValueError, match="The label of 'scan' .*contains the values 2 .*but the models have 2 classes"
    ):
        take(rows(tmp_path / "a.tif", tmp_path / "mask.tif"), 1, num_labels=2)


def test_a_file_that_changes_is_opened_again(tmp_path):
    row = {"id": "a", "image": {"path": str(tmp_path / "a.tif")}}
    for values in (NOISE, 255 - NOISE[:, :180]):
        tiled(tmp_path / "a.tif", values, compression=None)
        found = windowed.open_windowed(row, None, with_label=False)
        assert (found is None) == (values.shape[1] < WIDTH)
    tiled(tmp_path / "a.tif", NOISE[::-1].copy(), compression=None)
    image, _ = windowed.open_windowed(row, None, with_label=False)
    assert np.array_equal(image.window(0, 0, 5, 5).permute(1, 2, 0), NOISE[::-1][:5, :5])


def test_what_cannot_be_read_in_windows_is_decoded_whole_or_named(tmp_path, monkeypatch):
    tiled(tmp_path / "a.tif", NOISE)
    tiled(tmp_path / "small.tif", IDS[:, :-1])
    Image.fromarray(IDS).save(tmp_path / "mask.png")
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    row = {"id": "a", "image": {"path": str(tmp_path / "a.tif")}, "label": {"path": str(tmp_path / "mask.png")}}
    assert windowed.open_windowed(row, None, with_label=True) is None
    assert windowed.open_windowed({"image": {"path": str(tmp_path / "a.png")}}, None, with_label=False) is None
    embedded = {"image": {"path": str(tmp_path / "a.tif"), "bytes": (tmp_path / "a.tif").read_bytes()}}
    assert windowed.open_windowed(embedded, None, with_label=False) is None
    assert windowed.open_windowed({"image": {"path": "absent.tif"}}, None, with_label=False) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 4)
    with pytest.raises(ValueError, match=r"read in windows; its label \(.*mask\.png\) is no tiled TIFF"):
        windowed.open_windowed(row, None, with_label=True)
    monkeypatch.setattr(windowed, "FROM_PIXELS", HEIGHT * (WIDTH - 1))
    row["label"] = {"path": str(tmp_path / "small.tif")}
    with pytest.raises(ValueError, match=r"its label \(.*small\.tif\) is 150 x 202\. Save it as a tiled TIFF"):
        windowed.open_windowed(row, None, with_label=True)


@pytest.mark.parametrize("mode", ["values", "palette", "colours", "fractions"])
def test_what_a_large_mask_stores_is_counted_some_rows_at_a_time(tmp_path, monkeypatch, mode):
    path = tmp_path / "mask.tif"
    if mode == "palette":
        image = Image.fromarray(IDS)
        image.putpalette([7, 8, 9, 1, 1, 1, 50, 60, 70])
        image.save(path, compression="tiff_adobe_deflate", strip_size=WIDTH * 8)
    else:
        tiled(path, {"values": IDS, "colours": NOISE // 100 * 100, "fractions": IDS * np.float32(0.5)}[mode])
    monkeypatch.setattr(bands, "PIXELS_AT_ONCE", 40 * WIDTH)
    [found] = mask_codes.look_at_masks(["a"], [path])
    monkeypatch.setattr(windowed, "FROM_PIXELS", 10**9)
    windowed._opened.cache_clear()
    [expected] = mask_codes.look_at_masks(["a"], [path])
    if mode == "fractions":
        assert "fractions" in found.problem and "fractions" in expected.problem
    else:
        assert found == expected and found.problem is None


def write_folder(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for i in range(6):
        tiled(root / "images" / f"{i}.tif", NOISE)
        tiled(root / "masks" / f"{i}.tif", IDS)


def test_a_folder_of_images_beyond_the_limit_is_found_and_none_is_held_out(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(bands, "PIXELS_AT_ONCE", 16 * WIDTH)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 4)
    found = discover(tmp_path)
    assert len(found.labeled) == 6 and found.evaluation is None
    assert "6 labeled images are too large to be scored whole and are not held out" in found.table()
    assert "With 0 labeled images" not in found.table()
    assert found.sizes["labeled"] == [(HEIGHT, WIDTH)] * 6
    facts = DataFacts.of(found.labeled, None, None, found.class_names)
    assert facts.largest == (HEIGHT, WIDTH) and not facts.grey
    assert decodable(found.labeled) is None
    seen = survey(found.labeled, progress=False, whole=True)
    assert not seen.problems and np.array_equal(seen.pixels, 6 * np.bincount(IDS.reshape(-1), minlength=256))
    seen = survey(found.labeled, progress=False, in_windows=False)
    assert len(seen.problems) == 6 and "more than the limit" in seen.problems[0]["problem"]


def test_a_group_with_an_image_beyond_the_limit_stays_in_training(tmp_path, monkeypatch):
    write_folder(tmp_path)
    for i in range(5):
        for kind, values in (("images", NOISE), ("masks", IDS)):
            for group in "abc":
                Image.fromarray(values[:60, :60]).save(tmp_path / kind / f"{group}_{i}.png")
    for kind in ("images", "masks"):
        (tmp_path / kind / "0.tif").rename(tmp_path / kind / "a_scan.tif")
        for i in range(1, 6):
            (tmp_path / kind / f"{i}.tif").unlink()
    monkeypatch.setattr(bands, "PIXELS_AT_ONCE", 16 * WIDTH)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 4)
    assert {name[0] for name in discover(tmp_path, group_by="([abc])_").held_out} in ({"b"}, {"c"})
    assert len(discover(tmp_path, validation=0.3).held_out) > 1


def test_a_large_image_that_is_not_tiled_is_told_of_once(tmp_path, monkeypatch, caplog):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    monkeypatch.setattr(streams, "SLOW_FROM", HEIGHT * WIDTH)
    with caplog.at_level(logging.WARNING):
        take(rows(tmp_path / "a.png", None), views=("weak",))
    [record] = [r for r in caplog.records if r.name == streams.__name__]
    assert "`s`: 'scan' is 150 x 203" in record.message and "`cps-hf prepare --tile 1024" in record.message


def test_rows_without_a_path_are_decoded_as_before(tmp_path):
    dataset = Dataset.from_dict({"image": [Image.fromarray(NOISE)], "id": ["scan"]})
    assert take(dataset, 1, views=("weak",))[0]["weak"].shape == (2, 3, 24, 32)
