"""Tiles have the same pixels as their images and masks, and a folder of tiles is read like the original folder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cps_hf.data import tiles
from cps_hf.data.discover import discover
from cps_hf.data.layout import find_layout
from cps_hf.data.raster import open_raster
from cps_hf.data.tiles import GROUP_BY, cut_tiles, starts, summary

RANDOM = np.random.default_rng(0)


def picture(height, width):
    return RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(height, width):
    return RANDOM.integers(0, 3, (height, width), dtype=np.uint8)


@pytest.fixture
def scans(tmp_path):
    """A tiled TIFF and a PNG with masks in a subfolder, an unlabeled JPEG, and class names."""
    root = tmp_path / "scans"
    for folder in ("images/north", "masks/north"):
        (root / folder).mkdir(parents=True)
    tifffile.imwrite(root / "images/north/a.tif", picture(70, 53), tile=(16, 16), compression="zlib")
    Image.fromarray(picture(40, 64)).save(root / "images/north/b.png")
    Image.fromarray(picture(33, 35)).save(root / "images/c.jpg")
    mask = Image.fromarray(ids(70, 53))
    mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    mask.save(root / "masks/north/a.png")
    tifffile.imwrite(root / "masks/north/b_mask.tif", ids(40, 64), tile=(16, 16))
    (root / "classes.json").write_text('["ground", "tree", "road"]')
    return root


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file())


def joined(folder: Path, name: str, size):
    """The reassembled tiles, and how many of them contain each pixel."""
    out, seen = None, np.zeros(size, int)
    for path in sorted(folder.glob(f"{name}_r*")):
        row, column = (int(part[1:7]) for part in path.stem.removesuffix("_mask").split("_")[-2:])
        values = np.asarray(Image.open(path))
        out = np.zeros((*size, *values.shape[2:]), values.dtype) if out is None else out
        out[row : row + values.shape[0], column : column + values.shape[1]] = values
        seen[row : row + values.shape[0], column : column + values.shape[1]] += 1
    return out, seen


@pytest.mark.parametrize(("tile", "overlap"), [(32, 0), (32, 8), (32, 31), (1024, 0)])
def test_tiles_have_the_same_pixels_and_subfolders(tmp_path, scans, tile, overlap):
    result = cut_tiles(scans, tmp_path / "out", tile=tile, overlap=overlap, progress=False)
    for name, size in (("north/a", (70, 53)), ("north/b", (40, 64)), ("c", (33, 35))):
        source = next((scans / "images").glob(f"{name}.*"))
        folder = Path(name).parent
        image, seen = joined(tmp_path / "out" / "images" / folder, Path(name).name, size)
        assert seen.min() >= 1 and np.array_equal(image, np.asarray(Image.open(source)))
        if name != "c":
            found, seen = joined(tmp_path / "out" / "masks" / folder, Path(name).name, size)
            assert np.array_equal(found, np.asarray(Image.open(next((scans / "masks").glob(f"{name}*")))))
    with Image.open(next((tmp_path / "out/masks/north").glob("a_*"))) as mask:
        assert mask.mode == "P" and mask.getpalette()[3:6] == [200, 0, 0]
    sizes = {Image.open(path).size for path in (tmp_path / "out/images").rglob("*.png")}
    assert tile == 1024 or sizes == {(tile, tile)}
    assert (result.images, result.scans, result.left_out) == (3, 2, [])


def test_where_tiles_begin():
    assert [starts(70, 32, 0), starts(64, 32, 0), starts(32, 32, 0), starts(5, 32, 8)] == [
        [0, 32, 38],
        [0, 32],
        [0],
        [0],
    ]
    assert starts(70, 32, 8) == [0, 24, 38]


def test_a_folder_of_tiles_is_read_like_the_original_folder(tmp_path, scans):
    result = cut_tiles(scans, tmp_path / "out", tile=16, progress=False)
    found = discover(tmp_path / "out", group_by=GROUP_BY, validation=0.4)
    assert found.class_names == ("ground", "tree", "road")
    assert len(found.unlabeled) == result.tiles["unlabeled"] == 9
    assert len(found.labeled) + len(found.evaluation) == result.tiles["labeled"] == 20 + 12
    sides = [{name.split("_r")[0] for name in dataset["id"]} for dataset in (found.labeled, found.evaluation)]
    assert len(sides[0]) == len(sides[1]) == 1 and sides[0] != sides[1]
    assert f"cps-hf train {tmp_path / 'out'} --group_by '{GROUP_BY}'" in summary(result, tmp_path / "out")


@pytest.mark.parametrize(
    "layout",
    [
        {"a.tif": "a_mask.png", "b.tif": "b_mask.png", "c.tif": None},
        {"a.jpg": "a.png", "b.jpg": "b.png"},
        {"train/images/a.png": "train/masks/a.png", "val/images/a.png": "val/masks/a.png"},
        {"images/21_training.tif": "masks/21_manual1.png", "images/22_training.tif": "masks/22_manual1.png"},
        {"images/img_1.png": "labels/label_1.png", "unlabeled/x.png": None},
        {"wrapped/up/a_image.tif": "wrapped/up/a_label.png", "wrapped/up/b_image.tif": "wrapped/up/b_label.png"},
    ],
    ids=["side by side", "by kind", "splits", "common ends", "beginnings", "wrapped"],
)
def test_every_layout_is_found_again(tmp_path, layout):
    root, out = tmp_path / "in", tmp_path / "out"
    for image, mask in layout.items():
        for name, values in ((image, picture(32, 48)), (mask, ids(32, 48))):
            if name is not None:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / name)
    cut_tiles(root, out, tile=16, progress=False)
    before, after = find_layout(root), find_layout(out)
    count = lambda layout: sorted((pair.split, pair.mask is not None) for pair in layout.pairs)  # noqa: E731
    assert count(after) == sorted(6 * count(before))
    for pair in after.pairs:
        assert pair.mask is None or pair.mask.stem.removesuffix("_mask") == pair.image.stem


def test_split_lists_name_the_tiles(tmp_path):
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in "abc":
        Image.fromarray(picture(32, 32)).save(root / f"JPEGImages/{name}.jpg")
        Image.fromarray(ids(32, 32)).save(root / f"SegmentationClass/{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("c\n")
    cut_tiles(root, tmp_path / "out", tile=16, progress=False)
    splits = [(pair.id.split("_")[0], pair.split) for pair in find_layout(tmp_path / "out").pairs]
    assert {*splits} == {("a", "train"), ("b", "train"), ("c", "val")} and len(splits) == 12


def test_empty_and_ignored_tiles_are_skipped_and_listed(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    image, mask = picture(32, 32), ids(32, 32)
    image[:16, :16] = (255, 255, 255)  # outside the orthophoto
    mask[16:, 16:] = 255
    mask[16:, :16] = 9
    Image.fromarray(image).save(root / "images/a.png")
    Image.fromarray(mask).save(root / "masks/a.png")
    cut_tiles(root, out, tile=16, ignored=(255, 9), progress=False)
    assert [path.name for path in (out / "images").iterdir()] == ["a_r000000_c000016.png"]
    assert [path.name for path in (out / "masks").iterdir()] == ["a_r000000_c000016.png"]
    assert (out / "left_out.csv").read_text().splitlines() == [
        "tile,why",
        '"images/a_r000000_c000000.png",empty: one colour',
        '"images/a_r000016_c000000.png",all pixels of the mask are ignored',
        '"images/a_r000016_c000016.png",all pixels of the mask are ignored',
    ]


@pytest.mark.parametrize(
    "values",
    [
        ids(32, 32) > 0,
        ids(32, 32).astype(np.uint16) * 300,
        ids(32, 32).astype(np.int32) - 1,
        picture(32, 32),
    ],
    ids=["1 bit", "16 bits", "below 0", "colours"],
)
def test_a_mask_keeps_its_type(tmp_path, values):
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    Image.fromarray(picture(32, 32)).save(tmp_path / "in/images/a.png")
    Image.fromarray(values).save(tmp_path / "in/masks/a.tif")
    cut_tiles(tmp_path / "in", tmp_path / "out", tile=32, progress=False)
    (path,) = (tmp_path / "out/masks").iterdir()
    assert np.array_equal(np.asarray(open_raster({"path": str(path)}, "a", "label").shown()), values)
    assert Image.open(path).mode == Image.fromarray(values).mode.replace("I;16B", "I;16")


def test_a_mask_rotates_with_its_photo(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate it by 90 degrees clockwise
    Image.fromarray(picture(16, 32)).save(tmp_path / "in/images/a.jpg", exif=exif)
    values = ids(16, 32)
    Image.fromarray(values).save(tmp_path / "in/masks/a.png")
    cut_tiles(tmp_path / "in", tmp_path / "out", tile=16, progress=False)
    assert np.array_equal(joined(tmp_path / "out/masks", "a", (32, 16))[0], np.rot90(values, -1))


def test_an_interrupted_call_resumes(tmp_path, scans, monkeypatch):
    out, real, opened = tmp_path / "out", tiles.open_bands, []

    def dies_at_b(path, **options):
        opened.append(path.name)
        if path.name == "b.png":
            raise KeyboardInterrupt
        return real(path, **options)

    monkeypatch.setattr(tiles, "open_bands", dies_at_b)
    with pytest.raises(KeyboardInterrupt):
        cut_tiles(scans, out, tile=32, progress=False)
    with open(out / "tiles.jsonl", "a") as file:
        file.write('{"image": "imag')
    monkeypatch.setattr(tiles, "open_bands", real)
    result = cut_tiles(scans, out, tile=32, progress=False)
    assert result.done_before == len(opened) - len(["b.png", "a's mask"])
    cut_tiles(scans, tmp_path / "again", tile=32, progress=False)
    assert files(out) == files(tmp_path / "again")
    assert result.tiles == {"labeled": 6 + 4, "unlabeled": 4}
    assert cut_tiles(scans, out, tile=32, progress=False).done_before == 3
    os.utime(scans / "images/c.jpg", (1, 1))
    with pytest.raises(ValueError, match=r"images/c\.jpg has changed since it was cut"):
        cut_tiles(scans, out, tile=32, progress=False)


def test_other_settings_and_other_folders_are_errors(tmp_path, scans):
    cut_tiles(scans, tmp_path / "out", tile=32, progress=False)
    with pytest.raises(ValueError, match=r"contains tiles with another tile \(32 there, 16 here\)"):
        cut_tiles(scans, tmp_path / "out", tile=16, progress=False)
    with pytest.raises(ValueError, match=r"another overlap \(0 there, 4 here\)"):
        cut_tiles(scans, tmp_path / "out", tile=32, overlap=4, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="mine is not empty"):
        cut_tiles(scans, tmp_path / "mine", tile=16, progress=False)
    with pytest.raises(ValueError, match="Choose a folder outside"):
        cut_tiles(scans, scans / "tiles", tile=16, progress=False)
    assert "tiles" not in [path.name for path in scans.iterdir()]


@pytest.mark.parametrize(
    ("options", "said_of_it"),
    [
        ({"tile": 100}, "`--tile` must be a multiple of 16, got 100"),
        ({"tile": 0}, "`--tile` must be a multiple of 16, got 0"),
        ({"tile": 32, "overlap": 32}, r"`--overlap` must be from 0 to less than `--tile` \(32\), got 32"),
        ({"tile": 32, "overlap": -1}, "got -1"),
    ],
)
def test_invalid_sizes_fail_before_anything_is_written(tmp_path, scans, options, said_of_it):
    with pytest.raises(ValueError, match=said_of_it):
        cut_tiles(scans, tmp_path / "out", **options, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_bad_image_or_mask_leaves_no_incomplete_tiles(tmp_path, scans):
    data = (scans / "images/north/a.tif").read_bytes()
    (scans / "images/north/a.tif").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=r"a\.tif"):
        cut_tiles(scans, tmp_path / "out", tile=16, progress=False)
    (scans / "images/north/a.tif").write_bytes(data)
    Image.fromarray(ids(70, 54)).save(scans / "masks/north/a.png")
    with pytest.raises(ValueError, match=r"a\.tif is 70 x 53 \(height x width\), its label .*a\.png is 70 x 54"):
        cut_tiles(scans, tmp_path / "out", tile=16, progress=False)
    done = [json.loads(line)["image"] for line in (tmp_path / "out/tiles.jsonl").open()]
    assert "images/north/a.tif" not in done and not [*(tmp_path / "out").rglob(".tmp-*")]
    for path in (tmp_path / "out").rglob("*.png"):
        assert Image.open(path).size == (16, 16)


def test_images_alone(tmp_path, scans):
    result = cut_tiles(scans / "images", tmp_path / "out", tile=32, images_only=True, progress=False)
    assert result.tiles["labeled"] == 0 and result.tiles["unlabeled"] == 6 + 4 + 4
    Image.fromarray(picture(20, 20)).save(scans / "images/c.png")
    with pytest.raises(ValueError, match="Two files in .* are called c, except for their suffixes"):
        cut_tiles(scans / "images", tmp_path / "other", tile=32, images_only=True, progress=False)
