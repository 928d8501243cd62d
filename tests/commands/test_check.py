"""`cps-hf check`: its report, its exit status, and its messages about bad input."""

import json
import re
import shutil

import pytest
from support.toy import write_world

from cps_hf.commands import check

SIZES = [(20, 31), (33, 18), (25, 25), (12, 40), (31, 20)]


def status_of(*words):
    with pytest.raises(SystemExit) as exit_:
        check.main(words)
    return exit_.value.code


def test_the_report_and_the_exit_status(tmp_path, capsys):
    write_world(tmp_path / "set" / "images", SIZES, labels=False)
    (tmp_path / "set" / "masks").mkdir()
    for path in (tmp_path / "set" / "images").glob("*_label.png"):
        path.rename(tmp_path / "set" / "masks" / path.name.replace("_label", ""))
    words = [str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    assert check.main(words)["readable"] == 5
    said = capsys.readouterr().out
    assert "5 samples, 5 readable" in said and "no problems" in said
    assert json.loads((tmp_path / "out" / "report.json").read_text())["readable"] == 5
    (tmp_path / "set" / "images" / "4.png").write_bytes(b"no image")
    assert status_of(*words, "--images_only") == 1
    said = capsys.readouterr().out
    assert "1 problem\n" in said and "4.png" in said
    for path in (tmp_path / "set" / "images").iterdir():
        path.write_bytes(b"no image")
    assert status_of(str(tmp_path / "set"), "--output_dir", str(tmp_path / "none"), "--images_only") == 1
    said = capsys.readouterr().out
    assert "5 problems" in said and "contact_sheet" not in said and len([*(tmp_path / "none").iterdir()]) == 1
    assert status_of(str(tmp_path / "nowhere")) == 2
    assert "error: No folder" in capsys.readouterr().err
    for options, said in (
        ("foo", "`--load_options` must be JSON, found 'foo'"),
        ("[1]", "`--load_options` must be like .*found '\\[1\\]'"),
        ('{"mask": "m"}', "load_folder has no argument 'mask', only .*masks"),
    ):
        assert status_of(*words, "--load_options", options) == 2
        assert re.search(said, capsys.readouterr().err)
    (tmp_path / "file").touch()
    assert status_of(words[0], "--images_only", "--output_dir", str(tmp_path / "file")) == 2
    assert f"{tmp_path / 'file'}: expected a folder, found a file" in capsys.readouterr().err


def test_without_split_every_split_is_checked_and_a_wrong_name_fails(tmp_path, capsys, caplog):
    for split in ("train", "val"):
        write_world(tmp_path / "set" / split / "images", SIZES, labels=False)
        (tmp_path / "set" / split / "masks").mkdir()
        for path in (tmp_path / "set" / split / "images").glob("*_label.png"):
            path.rename(tmp_path / "set" / split / "masks" / path.name.replace("_label", ""))
    words = [str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    report = check.main(words)
    assert {name: part["readable"] for name, part in report["splits"].items()} == {"train": 5, "val": 5}
    said = capsys.readouterr().out
    assert "== train ==" in said and "contact_sheet_train.png, contact_sheet_val.png" in said
    (tmp_path / "set" / "val" / "images" / "4.png").write_bytes(b"no image")
    assert status_of(*words) == 1
    assert check.main([*words, "--split", "train"])["readable"] == 5
    for split in ("train", "val"):
        (tmp_path / "set" / split / "images").rename(tmp_path / "set" / split / "photos")
        (tmp_path / "set" / split / "photos" / "x.heic").write_bytes(b"x")
    assert status_of(*words, "--load_options", '{"images": "photos"}', "--num_workers", "2") == 1
    assert "== val ==" in capsys.readouterr().out
    assert caplog.text.count("1 passed over, of a kind that is not read (.heic: 1): x.heic") == 2


def test_a_partly_labeled_folder_is_checked_as_train_reads_it(tmp_path, capsys):
    write_world(tmp_path / "set" / "images", [(20, 31)] * 12, labels=False)
    (tmp_path / "set" / "masks").mkdir()
    for number in range(12):
        label = tmp_path / "set" / "images" / f"{number}_label.png"
        label.rename(tmp_path / "set" / "masks" / f"{number}.png") if number < 6 else label.unlink()
    words = [str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    report = check.main(words)
    counts = {name: part["samples"] for name, part in report["splits"].items()}
    assert counts == {"labeled": 5, "validation": 1, "unlabeled": 6}
    assert "no problems" in (said := capsys.readouterr().out) and "No class names were found" in said
    for kind in ("images", "masks"):
        (tmp_path / "set" / "test" / kind).mkdir(parents=True)
    write_world(tmp_path / "set" / "test" / "images", [(20, 31)], labels=False)
    (tmp_path / "set" / "test" / "images" / "0_label.png").rename(tmp_path / "set" / "test" / "masks" / "0.png")
    assert check.main(words)["splits"].keys() == report["splits"].keys()
    assert "The test split (1 images, 1 with a mask) is left alone" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "set" / "test")
    (tmp_path / "set" / "images" / "9.png").write_bytes(b"no image")  # an unlabeled one
    assert status_of(*words) == 1 and "9" in capsys.readouterr().out
    assert status_of(*words, "--dataset", "folder") == 2 and "have no mask" in capsys.readouterr().err
