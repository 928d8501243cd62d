"""Predicting files and data sets into folders: compared with plain transformers, interrupted, resumed, bad input."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.convert import masks_of
from support.full_disk import full_disk
from support.toy import predict_by_hand, tiny_branch, write_world

from cps_hf.commands import predict
from cps_hf.data import masks
from cps_hf.data.cityscapes import NAMES as CITYSCAPES
from cps_hf.data.cityscapes import PALETTE
from cps_hf.data.masks import output_path, write_probabilities


@pytest.fixture(scope="module")
def branch(tmp_path_factory):
    return tiny_branch(tmp_path_factory.mktemp("branch") / "best", 3, names=["ground", "disc", "bar"])


@pytest.fixture
def photos(tmp_path):
    """photos/a.png, photos/deep/a.jpg and photos/deep/b.png, of odd sizes, plus a text file and a hidden file."""
    folder = tmp_path / "photos"
    write_world(tmp_path / "world", [(33, 47), (40, 31), (21, 64)])
    (folder / "deep").mkdir(parents=True)
    os.rename(tmp_path / "world" / "0.png", folder / "a.png")
    Image.open(tmp_path / "world" / "1.png").save(folder / "deep" / "a.jpg")
    os.rename(tmp_path / "world" / "2.png", folder / "deep" / "b.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def run(tmp_path, branch, *words):
    branches = () if "--branches" in words else ("--branches", branch)
    words = (*branches, *words, "--output_dir", tmp_path / "out", "--num_workers", 0)
    return predict.main([*map(str, words)])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fails(capsys, tmp_path, branch, *words):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, branch, *words)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and "Traceback" not in message
    return message


def test_every_image_gets_mask_overlay_and_probabilities(tmp_path, branch, photos):
    counts = run(tmp_path, branch, "--inputs", photos, "--probabilities")
    assert counts == {"predicted": 3, "done before": 0, "not readable": 0}
    out, network = tmp_path / "out", predict_by_hand(branch)
    assert files(out / "masks") == files(out / "overlays") == ["a.png", "deep/a.png", "deep/b.png"]
    assert files(out / "probabilities") == ["a.npy", "deep/a.npy", "deep/b.npy"]
    for name, source in (("a", "a.png"), ("deep/a", "deep/a.jpg"), ("deep/b", "deep/b.png")):
        expected = network(photos / source)[0]
        mask = Image.open(out / "masks" / f"{name}.png")
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), expected.argmax(0))
        colors = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115)])[expected.argmax(0)]  # Okabe and Ito's
        assert np.array_equal(np.asarray(mask.convert("RGB")), colors)
        probabilities = np.load(out / "probabilities" / f"{name}.npy")
        assert probabilities.dtype == np.float16
        np.testing.assert_allclose(probabilities, expected.softmax(0), atol=2e-3)
        with Image.open(out / "overlays" / f"{name}.png") as page:
            assert page.width >= mask.width and page.height > mask.height  # a legend below


def test_globs_keep_subfolders_and_files_their_names(tmp_path, branch, photos):
    run(tmp_path, branch, "--inputs", f"{tmp_path}/*/dee?/*.png", photos / "a.png", "--no_overlays")
    assert files(tmp_path / "out") == ["masks/a.png", "masks/photos/deep/b.png", "predicted.jsonl", "prediction.json"]


def test_two_images_never_share_an_output(tmp_path, branch, photos, capsys):
    Image.new("RGB", (9, 8)).save(photos / "a.jpg")
    for given in ([photos], [photos / "a.png", photos / "deep" / "a.jpg"]):
        said = fails(capsys, tmp_path, branch, "--inputs", *given)
        assert re.search(r"the same name, 'a': \S*photos/\S+ and \S*photos/\S+\. Give a folder above", said)
    assert not (tmp_path / "out").exists()
    run(tmp_path, branch, "--inputs", photos, photos / "deep" / "b.png", "--keep_suffix", "--no_overlays")
    names = ["a.jpg.png", "a.png.png", "b.png.png", "deep/a.jpg.png", "deep/b.png.png"]
    assert files(tmp_path / "out" / "masks") == names
    assert run(tmp_path, branch, "--inputs", photos, photos, "--keep_suffix")["done before"] == 0, "overlays are new"
    assert run(tmp_path, branch, "--inputs", photos, photos, "--keep_suffix")["done before"] == 4, (
        "given twice is once"
    )


def test_finished_images_are_skipped_truncated_or_changed_ones_not(tmp_path, branch, photos, capsys):
    real, calls = masks.write_mask, []

    def dies_at_the_second(path, *rest):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict, "write_mask", dies_at_the_second)
        run(tmp_path, branch, "--inputs", photos)
    out = tmp_path / "out"
    assert len(files(out / "overlays")) == 2 and len(files(out / "masks")) == 1
    with open(out / "predicted.jsonl", "a") as file:
        file.write('{"name": "deep/b", "sou')  # the power failed while this was written
    before = (out / "masks" / "a.png").stat().st_mtime_ns
    assert run(tmp_path, branch, "--inputs", photos) == {"predicted": 2, "done before": 1, "not readable": 0}
    assert (out / "masks" / "a.png").stat().st_mtime_ns == before
    assert [json.loads(line)["name"] for line in (out / "predicted.jsonl").open()] == ["a", "deep/a", "deep/b"]
    assert run(tmp_path, branch, "--inputs", photos)["done before"] == 3
    Image.new("RGB", (10, 12)).save(photos / "deep" / "b.png")
    assert run(tmp_path, branch, "--inputs", photos)["predicted"] == 1
    assert Image.open(out / "masks" / "deep" / "b.png").size == (10, 12)
    assert "1 predicted, 2 done before, 0 not readable. Written to" in capsys.readouterr().out


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    probabilities = np.full((2, 3, 4), 0.5, np.float32)
    write_probabilities(tmp_path / "a.npy", probabilities)
    assert np.load(tmp_path / "a.npy", mmap_mode="r").dtype == np.float16

    def cut_off(file, values):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(masks.np, "save", cut_off)
    for name in ("a.npy", "b.npy"):
        with pytest.raises(OSError, match="no space left"):
            write_probabilities(tmp_path / name, probabilities)
    assert files(tmp_path) == ["a.npy"] and (tmp_path / "a.npy").stat().st_size > 24


def test_an_unreadable_image_is_an_error_or_skipped_and_counted(tmp_path, branch, photos, capsys):
    whole = (photos / "deep" / "b.png").read_bytes()
    (photos / "deep" / "b.png").write_bytes(whole[: len(whole) // 2])
    said = fails(capsys, tmp_path, branch, "--inputs", photos)
    assert re.search(r"'deep/b' \(\S*/photos/deep/b\.png\).*truncated.*`--skip_bad_images`", said, re.S)
    assert "train with" not in said and "row" not in said
    counts = run(tmp_path, branch, "--inputs", photos, "--skip_bad_images")
    assert counts == {"predicted": 0, "done before": 2, "not readable": 1}
    assert "deep/b.png" in capsys.readouterr().err
    (photos / "deep" / "b.png").write_bytes(whole)
    assert run(tmp_path, branch, "--inputs", photos) == {"predicted": 1, "done before": 2, "not readable": 0}


def test_predictions_of_other_weights_settings_or_images_are_not_mixed(tmp_path, branch, photos, capsys):
    run(tmp_path, branch, "--inputs", photos)
    moved = branch.rename(branch.with_name("moved"))
    assert run(tmp_path, moved, "--inputs", photos)["done before"] == 3, "the weights count, not where they lie"
    other = tiny_branch(branch, 3, seed=5, names=["ground", "disc", "bar"])
    assert "made with other weights. Choose another" in fails(capsys, tmp_path, other, "--inputs", photos)
    said = fails(capsys, tmp_path, moved, "--inputs", photos, "--flip")
    assert "made with other flip (False there, True now)" in said
    elsewhere = photos.rename(tmp_path / "elsewhere")
    said = fails(capsys, tmp_path, moved, "--inputs", elsewhere)
    assert re.search(r"masks/a\.png was predicted from \S*/photos/a\.png, not from \S*/elsewhere/a\.png", said)
    run(tmp_path, moved, "--inputs", elsewhere / "deep", "--flip", "--overwrite")
    assert files(tmp_path / "out" / "masks") == files(tmp_path / "out" / "overlays") == ["a.png", "b.png"]
    moved.rename(tmp_path / "kept")
    branch.rename(tmp_path / "other")
    (tmp_path / "kept").rename(branch)


def test_a_folder_of_foreign_masks_is_not_written_to(tmp_path, branch, photos, capsys):
    (tmp_path / "out" / "masks").mkdir(parents=True)
    (tmp_path / "out" / "masks" / "a.png").write_bytes(b"drawn by hand")
    said = fails(capsys, tmp_path, branch, "--inputs", photos, "--overwrite")
    assert "out/masks was not written by this command" in said
    assert (tmp_path / "out" / "masks" / "a.png").read_bytes() == b"drawn by hand"


def test_own_outputs_are_not_inputs(tmp_path, branch, photos):
    words = ("--branches", branch, "--inputs", photos, "--output_dir", photos / "out", "--num_workers", 0)
    for done in (0, 3):
        assert predict.main([*map(str, words)])["done before"] == done
    assert files(photos / "out" / "masks") == ["a.png", "deep/a.png", "deep/b.png"]


def test_masks_of_a_training_folder_are_not_predicted(tmp_path, branch, capsys):
    for name, kind in (("images/a", "RGB"), ("images/new", "RGB"), ("masks/a", "L")):
        path = tmp_path / "set" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(kind, (9, 8)).save(path)
    assert run(tmp_path, branch, "--inputs", tmp_path / "set", "--format", "labelme")["predicted"] == 2
    assert files(tmp_path / "out" / "masks") == ["images/a.png", "images/new.png"]
    assert files(tmp_path / "out" / "labelme") == ["images/a.json", "images/new.json"]
    assert f"{tmp_path / 'set'} is a training folder: 1 mask file skipped.\n" in capsys.readouterr().out
    # masks that are named themselves are files like any other
    assert run(tmp_path, branch, "--inputs", tmp_path / "set" / "masks")["predicted"] == 1


def test_a_folder_of_images_is_not_its_own_output_folder(tmp_path, branch, photos, capsys):
    words = ("--branches", branch, "--inputs", photos / "deep", "--output_dir", photos)
    with pytest.raises(SystemExit):
        predict.main([*map(str, words)])
    said = capsys.readouterr().err
    assert "All 2 images in" in said and "are in `--output_dir`" in said and "Choose another" in said
    assert not (photos / "masks").exists()


def test_a_disk_error_is_one_line_with_the_path(tmp_path, branch, photos, capsys):
    (tmp_path / "out").write_text("a file")
    said = fails(capsys, tmp_path, branch, "--inputs", photos / "a.png")
    assert re.search(r"error: \S*/out: expected a folder, found a file", said)
    (tmp_path / "out").unlink()
    (tmp_path / "out" / "masks").mkdir(parents=True)
    (tmp_path / "out" / "prediction.json").write_text("{}")
    with full_disk(tmp_path / "out" / "masks" / "a.png"):
        said = fails(capsys, tmp_path, branch, "--inputs", photos / "a.png", "--overwrite")
    assert re.search(r"error: \S*/out: No space left on device\.\n$", said)


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_a_parquet_file_is_predicted_by_its_ids_whole_or_streamed(tmp_path, branch, streaming, capsys):
    dataset = write_world(tmp_path / "world", [(33, 47), (40, 31)])
    dataset = dataset.remove_columns("id").add_column("name", ["city/one", "two"])
    dataset.to_parquet(tmp_path / "val-00000-of-00001.parquet")
    words = ("--dataset", "hub", "--data_root", tmp_path, *streaming, "--no_overlays")
    named = (*words, "--load_options", '{"id_column": "name"}')
    assert run(tmp_path, branch, *named)["predicted"] == 2
    assert run(tmp_path, branch, *named) == {"predicted": 0, "done before": 2, "not readable": 0}
    assert files(tmp_path / "out" / "masks") == ["city/one.png", "two.png"]
    expected = predict_by_hand(branch)(tmp_path / "world" / "0.png")[0].argmax(0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "masks" / "city" / "one.png")), expected)
    if streaming:
        assert "Rows of this stream have no id" in fails(capsys, tmp_path, branch, *words)
    twice = dataset.remove_columns("name").add_column("name", ["city/one", "city/./one"])
    twice.to_parquet(tmp_path / "val-00000-of-00001.parquet")
    assert "Two rows have the id 'city/./one'" in fails(capsys, tmp_path, branch, *named, "--overwrite")


def test_official_classes_have_official_colors(tmp_path, photos):
    branch = tiny_branch(tmp_path / "streets", 19, names=CITYSCAPES)
    run(tmp_path, branch, "--inputs", photos / "a.png")
    mask = Image.open(tmp_path / "out" / "masks" / "a.png")
    assert np.array_equal(np.asarray(mask.convert("RGB")), np.array(PALETTE)[np.asarray(mask)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Nothing to predict: give `--inputs`"),
        (["--inputs", "nowhere.png"], "No such file or folder: nowhere.png"),
        (["--inputs", "no*where/x.png"], r"No image in no\*where/x.png: looked for .jpg"),
        (["--inputs", "PHOTOS", "--dataset", "voc"], "Give `--inputs` or `--dataset`, not both"),
        (["--dataset", "voc"], "`--dataset voc` needs `--data_root`"),
        (["--dataset", "hub", "--data_root", "x", "--load_options", "[1]"], "`--load_options` must be like"),
        (["--inputs", "PHOTOS", "--overlay_alpha", "2"], "from 0 to 1, got 2.0"),
        (["--inputs", "PHOTOS", "--mode", "sliding"], "needs `--crop_size H W`"),
        (["--inputs", "PHOTOS/notes.txt"], "notes.txt.*of no kind that PIL knows"),
        (["--dataset", "voc", "--format", "coco"], "`--format coco` needs image files"),
        (["--inputs", "PHOTOS", "--tolerance", "-1"], "`--tolerance` must be 0 or more, got -1.0"),
        (["--flip", "somewhere", "--inputs", "PHOTOS"], "Give RUN or `--branches`, not both"),
        (["--inputs", "PHOTOS", "--branches", "nowhere"], "`nowhere`: no model could be read"),
    ],
)
def test_a_mistake_ends_with_one_line(tmp_path, branch, photos, capsys, words, said):
    message = fails(capsys, tmp_path, branch, *(word.replace("PHOTOS", str(photos)) for word in words))
    assert re.search(said, message) and not (tmp_path / "out" / "masks").exists()


def test_an_invalid_file_name_is_an_error(tmp_path):
    for name in ("", "a/", "a/..", "."):
        with pytest.raises(ValueError, match="not a valid file name"):
            output_path(tmp_path, name, ".png")


def test_drafts_include_images_that_were_done_before(tmp_path, branch, photos, capsys):
    run_folder = tmp_path / "run"
    os.symlink(branch.parent, run_folder)
    out, names = tmp_path / "out", ("ground", "disc", "bar")
    words = (str(run_folder), str(photos), "--output_dir", str(out), "--num_workers", "0", "--no_overlays")
    predict.main([*words])
    for format, path in (("coco", "coco.json"), ("labelme", "labelme"), ("cvat", "cvat.xml"), ("png", "classes.json")):
        counts = predict.main([*words, "--format", format, "--tolerance", "0", "--background", "ground"])
        assert counts["done before"] == 3 and f"Drafts: {out / path}" in capsys.readouterr().out
        if format == "png":
            assert json.loads((out / path).read_text()) == [*names]
            continue
        found, masks = masks_of(out / path, images=photos, table={"classes": names, "background": "ground"})
        assert found == names and {*masks} == {"a", "deep/a", "deep/b"}
        for name, ids in masks.items():
            assert np.array_equal(ids, np.asarray(Image.open(out / "masks" / f"{name}.png")))


def test_a_draft_keeps_an_image_name_with_two_suffixes(tmp_path, branch):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "a.jpg.jpg")
    for more, mask in ((), "a.jpg.png"), (("--keep_suffix",), "a.jpg.jpg.png"):
        out = tmp_path / f"out{len(more)}"
        words = (branch, tmp_path / "photos", "--format", "coco", "--output_dir", out, "--num_workers", 0, *more)
        predict.main([*map(str, words)])
        assert (out / "masks" / mask).is_file()
        [image] = json.loads((out / "coco.json").read_text())["images"]
        assert image["file_name"] == "a.jpg.jpg"


@pytest.mark.slow
def test_branches_predict_windows_with_workers(tmp_path, branch, photos, capsys):
    words = ("--branches", branch, branch, "--inputs", photos, "--mode", "sliding", "--crop_size", 20, 24)
    words += ("--flip", "--output_dir", tmp_path / "out", "--num_workers", 2)
    predict.main([*map(str, words)])
    printed = capsys.readouterr()
    assert "3 predicted" in printed.out and "\r" not in printed.err  # a bar needs a terminal
    assert torch.from_numpy(np.array(Image.open(tmp_path / "out" / "masks" / "a.png"))).shape == (33, 47)
