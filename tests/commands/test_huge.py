"""Images predicted by rows get the mask of sliding windows over the whole image, including georeferencing."""

import re
import weakref

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support.toy import tiny_branch

from cps_hf.commands import huge, predict, prepare
from cps_hf.commands.huge import is_huge
from cps_hf.inference.ensemble import Ensemble

PIXELS = np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
WINDOWS = {"mode": "sliding", "crop_size": (32, 48), "stride": (20, 32)}
WORDS = ["--mode", "sliding", "--crop_size", 32, 48, "--stride", 20, 32]


@pytest.fixture(scope="module")
def branches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    return [tiny_branch(folder / str(seed), seed, names=["ground", "disc", "bar"]) for seed in (3, 4)]


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "in" / "deep" / "scan.tif"
    path.parent.mkdir(parents=True)
    tifffile.imwrite(path, PIXELS, tile=(16, 16), compression="zlib", metadata=None)
    return path


def run(tmp_path, branches, *words):
    words = ("--branches", *branches, "--output_dir", tmp_path / "out", "--num_workers", 0, *words)
    return predict.main([*map(str, words)])


def fails(capsys, function, *words):
    with pytest.raises(SystemExit) as exit_:
        function(*words)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and "Traceback" not in message
    return message


def expected(branches, **options):
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    return Ensemble.from_pretrained([*map(str, branches)]).predict(image, **(WINDOWS | options)).numpy()


@pytest.mark.parametrize(("count", "flip"), [(1, False), (2, False), (2, True)])
def test_a_huge_image_gets_the_mask_of_sliding_windows_over_the_whole(tmp_path, branches, scan, count, flip):
    Image.fromarray(PIXELS[:9, :9]).save(tmp_path / "in" / "small.png")
    words = ["--inputs", tmp_path / "in", *WORDS, "--huge_from", 5000, *(["--flip"] if flip else [])]
    counts = run(tmp_path, branches[:count], *words)
    assert counts == {"predicted": 2, "done before": 0, "not readable": 0}
    with Image.open(tmp_path / "out/masks/deep/scan.png") as mask:
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), expected(branches[:count], flip=flip))
    assert (tmp_path / "out/masks/small.png").is_file() and (tmp_path / "out/overlays/deep/scan.png").is_file()
    assert run(tmp_path, branches[:count], *words)["done before"] == 2


def test_a_mask_keeps_the_georeference_of_its_image(tmp_path, branches, scan):
    scale, tie, keys = (0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 443_000.0, 5_000_000.0, 0.0), (1, 1, 0, 1, 3072, 0, 1, 32632)
    tags = [(33550, "d", 3, scale, True), (33922, "d", 6, tie, True), (34735, "H", 8, keys, True)]
    tifffile.imwrite(scan, PIXELS, tile=(16, 16), metadata=None, extratags=tags, byteorder=">")
    run(tmp_path, branches[:1], "--inputs", scan, *WORDS, "--huge_from", 0, "--no_overlays")
    with tifffile.TiffFile(tmp_path / "out/masks/scan.tif") as file:
        page = file.pages[0]
        assert np.array_equal(page.asarray(), expected(branches[:1]))
        assert [page.tags[tag].value for tag in (33550, 33922, 34735)] == [scale, tie, keys]
    assert run(tmp_path, branches[:1], "--inputs", scan, *WORDS, "--huge_from", 0, "--no_overlays")["done before"] == 1


def test_windows_of_a_default_size_are_chosen_and_printed(tmp_path, branches, scan, capsys, monkeypatch):
    monkeypatch.setattr("cps_hf.inference.ensemble.WINDOW", 48)
    run(tmp_path, branches[:1], "--inputs", scan, "--huge_from", 5000)
    assert "in windows of 48 x 48. Set others with `--mode sliding --crop_size H W`" in capsys.readouterr().out
    mask = np.asarray(Image.open(tmp_path / "out/masks/scan.png"))
    assert np.array_equal(mask, expected(branches[:1], crop_size=(48, 48), stride=(32, 32)))


def test_a_huge_photo_is_decoded_as_a_whole(tmp_path, branches, monkeypatch):
    monkeypatch.setattr(huge, "_OVERVIEW", 20)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    run(tmp_path, branches[:1], "--inputs", tmp_path / "a.png", *WORDS, "--huge_from", 100)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/masks/a.png")), expected(branches[:1]))


def test_the_overlay_is_drawn_from_rows_that_were_read_once(tmp_path, branches, scan, monkeypatch):
    monkeypatch.setattr(huge, "_OVERVIEW", 20)
    pages = []
    monkeypatch.setattr(huge.visualization, "overlay_page", lambda *page, alpha: pages.append(page))
    run(tmp_path, branches[:1], "--inputs", scan, *WORDS, "--huge_from", 100)
    ((image, prediction, *_),) = pages
    assert np.array_equal(image.permute(1, 2, 0), PIXELS[::6, ::6])
    assert np.array_equal(prediction, expected(branches[:1])[::6, ::6])


def test_predicted_rows_are_not_kept_in_memory(tmp_path, scan):
    class Rows:
        def predict_rows(self, rows_of, size, **options):
            yielded = []
            for start in range(0, size[0], 5):
                assert sum(rows() is not None for rows in yielded) <= 1, "earlier rows are kept"
                rows_of(slice(start, start + 5))
                ids = np.zeros((5, size[1]), np.uint8)
                yielded.append(weakref.ref(ids))
                ids = torch.from_numpy(ids)  # its memory is the array's
                yield slice(start, start + 5), ids

    paths = {"masks": tmp_path / "mask.png", "overlays": tmp_path / "overlay.png"}
    huge.predict_huge(str(scan), paths, Rows(), {}, ["ground"], [(0, 0, 0)], 0.5)
    assert paths["overlays"].is_file() and Image.open(paths["masks"]).size == (101, 75)


def test_invalid_options_for_huge_images_fail_before_writing(tmp_path, branches, scan, capsys):
    words = ("--inputs", scan, "--huge_from", 100)
    said = fails(capsys, run, tmp_path, branches[:1], *words, "--probabilities")
    assert re.search(r"scan\.tif: more than 100 pixels, predicted by rows; `--probabilities` would need all", said)
    assert "`--scales` must be 1" in fails(capsys, run, tmp_path, branches[:1], *words, "--scales", 1, 2)
    assert "`--format` draws whole masks. Cut it" in fails(
        capsys, run, tmp_path, branches[:1], *words, "--format", "coco"
    )
    assert not (tmp_path / "out").exists()
    run(tmp_path, branches[:1], *words)
    said = fails(capsys, run, tmp_path, branches[:1], *words, *WORDS)
    assert "contains predictions made with other mode (whole there, sliding now)" in said


def test_a_huge_image_can_be_added_later_and_keeps_its_windows(tmp_path, branches, scan, capsys):
    small = tmp_path / "in" / "small.png"
    Image.fromarray(PIXELS[:9, :9]).save(small)
    run(tmp_path, branches[:1], "--inputs", small)
    assert run(tmp_path, branches[:1], "--inputs", small, scan, "--huge_from", 100)["predicted"] == 1
    assert run(tmp_path, branches[:1], "--inputs", small)["done before"] == 1
    said = fails(capsys, run, tmp_path, branches[:1], "--inputs", small, scan, "--huge_from", 50)
    assert "contains predictions made with other windows over huge images" in said


def test_a_truncated_scan_leaves_no_mask(tmp_path, branches, scan, capsys):
    data = scan.read_bytes()
    tifffile.imwrite(scan, PIXELS, tile=(16, 16), metadata=None)
    data = scan.read_bytes()
    scan.write_bytes(data[: len(data) - 3000])
    words = ("--inputs", scan, *WORDS, "--huge_from", 100)
    said = fails(capsys, run, tmp_path, branches[:1], *words)
    assert re.search(r"scan\.tif\): it is truncated\..*`--skip_bad_images` skips such images", said)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix == ".png"]
    assert run(tmp_path, branches[:1], *words, "--skip_bad_images")["not readable"] == 1


def test_small_files_are_not_opened_to_find_their_size(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    assert [is_huge(str(tmp_path / name), 10**9) for name in ("a.png", "b.png")] == [False, False]
    assert [is_huge(str(tmp_path / name), 1000) for name in ("a.png", "b.png")] == [False, True]


def test_prepare_cuts_a_folder_into_tiles(tmp_path, scan, capsys):
    (tmp_path / "in" / "masks").mkdir()
    (tmp_path / "in" / "images").mkdir()
    scan.rename(tmp_path / "in/images/scan.tif")
    Image.fromarray(PIXELS[..., 0] % 3).save(tmp_path / "in/masks/scan.png")
    prepare.main(["--tile", "32", "--overlap", "8", str(tmp_path / "in"), str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "12 tiles of 1 images" in out and "All masks are of one image" in out
    assert len([*(tmp_path / "out/masks").iterdir()]) == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tile", "100", "a", "b"], "`--tile` must be a multiple of 16, got 100."),
        (
            ["--tile", "32", "--overlap", "32", "a", "b"],
            "`--overlap` must be from 0 to less than `--tile` (32), got 32.",
        ),
        (["--tile", "32", "a"], "--tile needs two folders, DIR and OUT, got 1"),
        (["--tile", "32", "a", "b", "--split", "x"], "--split cannot be combined with --tile"),
        (["--tile", "32", "a", "b"], "No folder a."),
        (["--overlap", "32"], "--overlap requires --tile"),
        (["a", "b"], "DIR OUT requires --tile"),
        ([], "give --dataset NAME, or --tile PIXELS DIR OUT"),
        (["--tile", "32", "a", "b", "--load_options", '{"colours": 1}'], "with --tile: no 'colours'"),
    ],
)
def test_what_prepare_cannot_cut_is_a_one_line_error(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, prepare.main, words)
    assert said in message and message.count("\n") == 1
    assert not [*tmp_path.iterdir()]
