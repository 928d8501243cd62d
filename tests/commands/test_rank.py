"""`cps-hf rank`: images without a mask, ranked by the disagreement of two branches, in a table and on a page."""

import base64
import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.toy import predict_by_hand, tiny_branch, write_world

from cps_hf.commands import rank


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for index, seed in enumerate((3, 4)):
        tiny_branch(folder / f"branch_{index}", 3, seed=seed, names=["ground", "disc", "bar"])
    return folder


@pytest.fixture
def photos(tmp_path):
    """Five images of odd sizes; the first two have a mask."""
    write_world(tmp_path / "world", [(33, 47), (40, 31), (21, 64), (30, 30), (25, 44)])
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for index in range(5):
        with Image.open(tmp_path / "world" / f"{index}.png") as image:
            image.convert("RGB").save(tmp_path / "data" / "images" / f"{index}.png")
            if index < 2:
                mask = Image.fromarray(np.zeros((image.height, image.width), np.uint8))
                mask.save(tmp_path / "data" / "masks" / f"{index}.png")
    return tmp_path / "data"


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def ranked(run, *images, output, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return rank.main([str(run), *map(str, images), "--output", str(output), "--num_workers", "0", *words])


def test_the_score_is_the_mean_divergence_of_both_predictions(tmp_path, run_folder, photos):
    order = ranked(run_folder, photos, output=tmp_path / "next.csv", count=2)
    rows = read(tmp_path / "next.csv")
    assert [row["image"] for row in rows] == order
    assert sorted(path.rsplit("/", 1)[-1] for path in order) == ["2.png", "3.png", "4.png"]  # images without a mask
    networks = [predict_by_hand(run_folder / f"branch_{index}") for index in range(2)]
    for row in rows:
        logits = [network(row["image"])[0] for network in networks]
        first, second = (one.softmax(0).double().numpy() for one in logits)
        mean = (first + second) / 2
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 is 0
            each = [np.nan_to_num(one * np.log(one / mean)).sum(0) for one in (first, second)]
        divergence = (each[0] + each[1]) / 2 / np.log(2)
        assert divergence.mean() > 0.001
        assert float(row["score"]) == pytest.approx(divergence.mean(), abs=1e-4)
        assert float(row["different_pixels"]) == pytest.approx((first.argmax(0) != second.argmax(0)).mean(), abs=1e-3)
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    with Image.open(tmp_path / "next.png") as sheet:
        assert sheet.width > 600


def test_the_runs_report_shows_the_newest_ranking(tmp_path, run_folder, photos, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    ranked(run, photos, output=tmp_path / "next.csv")
    assert not (run / "report.html").exists()  # branches without a run
    (run / "results.json").write_text(json.dumps({"training": {}, "steps": 4}))
    order = ranked(run, photos, output=tmp_path / "next.csv", count=2)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "The first 2 of 3 images" in text and "by disagreement" in text
    assert [path in text for path in order] == [True, True, False]
    sheet = base64.b64encode((tmp_path / "next.png").read_bytes()).decode()
    assert sheet in text and str(run / "report.html") in capsys.readouterr().out
    ranked(run, order[2], output=tmp_path / "next.csv")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert [path in text for path in order] == [False, False, True] and sheet not in text


def test_near_duplicates_rank_late_unless_no_spread(tmp_path, run_folder, photos):
    first, *_ = ranked(run_folder, photos, output=tmp_path / "next.csv")
    copy = photos / "images" / "9.png"
    shutil.copy(first, copy)
    order = ranked(run_folder, photos, output=tmp_path / "next.csv")
    assert len(order) == 4 and {order[0], order[-1]} == {first, str(copy)}
    words = [str(run_folder), str(photos), "--output", str(tmp_path / "next.csv"), "--num_workers", "0", "--no_spread"]
    assert {*rank.main(words)[:2]} == {first, str(copy)}


def test_one_branch_ranks_all_images_by_entropy(tmp_path, run_folder, photos):
    ranked(run_folder / "branch_0", photos / "images", output=tmp_path / "next.csv")
    rows = read(tmp_path / "next.csv")
    assert len(rows) == 5 and all(row["disagreement"] == "" and row["score"] == row["entropy"] for row in rows)


def test_images_labeled_in_the_training_folder_are_skipped(tmp_path, run_folder, photos, capsys):
    taken = tmp_path / "photos"  # the original images: converting links or copies them
    taken.mkdir()
    for index, bring in enumerate((os.link, shutil.copy, os.link, shutil.copy, shutil.copy)):
        bring(photos / "images" / f"{index}.png", taken / f"{index}.png")
    order = ranked(run_folder, taken, output=tmp_path / "next.csv", labeled=photos)
    assert sorted(path.rsplit("/", 1)[-1] for path in order) == ["2.png", "3.png", "4.png"]
    assert "3 images ranked by disagreement, 2 with a mask skipped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ranked(run_folder, taken / "0.png", taken / "1.png", output=tmp_path / "next.csv", labeled=photos)
    assert "No image is left to label" in capsys.readouterr().err


def test_a_folder_that_is_not_a_run_is_an_error(tmp_path, run_folder, photos, capsys):
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "run" / "branch_0").mkdir()  # from a run interrupted during export
    with pytest.raises(SystemExit):
        ranked(tmp_path / "run", photos, output=tmp_path / "next.csv")
    error = capsys.readouterr().err
    assert "run contains no branch: expected branch_0/" in error and error.count("\n") == 1
    assert rank.branches_of(str(run_folder)) == [str(run_folder / f"branch_{index}") for index in range(2)]


def test_an_image_that_a_network_cannot_take_is_named(tmp_path, run_folder, photos, capsys, monkeypatch):
    def reject(*_, **__):
        raise ValueError("cannot predict an image of 30 x 30 pixels.")

    monkeypatch.setattr(rank, "look", reject)
    with pytest.raises(SystemExit):
        ranked(run_folder, photos, output=tmp_path / "next.csv")
    assert ".png: cannot predict an image of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "0"], "`--count` must be at least 1"),
        (["--output", "next.txt"], "must name a .csv file"),
        (["--output", f"{__file__}/next.csv"], "must be in a folder, but "),
    ],
)
def test_invalid_options_fail_before_anything_is_read(tmp_path, run_folder, photos, capsys, words, said):
    with pytest.raises(SystemExit):
        rank.main([str(run_folder), str(photos), *words])
    assert said in capsys.readouterr().err


def test_nothing_left_to_label_a_missing_run_and_a_broken_image(tmp_path, run_folder, photos, capsys):
    broken = photos / "images" / "9.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SystemExit):
        ranked(run_folder, photos, output=tmp_path / "next.csv")
    assert "9.png" in (message := capsys.readouterr().err) and "--skip_bad_images" in message
    assert not (tmp_path / "next.csv").exists()
    broken.unlink()
    for index in range(2, 5):
        (photos / "images" / f"{index}.png").unlink()
    with pytest.raises(SystemExit):
        ranked(run_folder, photos, output=tmp_path / "next.csv")
    assert "No image is left to label" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ranked(tmp_path / "nowhere", photos / "images", output=tmp_path / "next.csv")
    assert "nowhere" in capsys.readouterr().err
