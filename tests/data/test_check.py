"""Checking a data set: expected counts, every problem by file, a contact sheet with labels."""

import numpy as np
import pytest
from PIL import Image
from support.toy import NAMES, write_world

from cps_hf.data import check
from cps_hf.data.check import check_dataset, format_report
from cps_hf.data.palettes import palette_of

SIZES = [(20, 31), (33, 18), (25, 25), (12, 40), (31, 20)]


def test_counts_sizes_and_shares_match_the_files(tmp_path):
    dataset = write_world(tmp_path / "w", SIZES)
    report = check_dataset(dataset, progress=False)
    labels = [np.array(Image.open(tmp_path / "w" / f"{i}_label.png")) for i in range(5)]
    pixels = np.concatenate([label.ravel() for label in labels])
    assert (report["samples"], report["readable"], report["problems"]) == (5, 5, [])
    assert report["sizes"] == {"min": [12, 18], "median": [25.0, 25.0], "max": [33, 40]}
    assert report["orientations"] == {"landscape": 2, "portrait": 2, "square": 1}
    assert [row["name"] for row in report["classes"]] == list(NAMES)
    for c, row in enumerate(report["classes"]):
        assert row["pixel_share"] == pytest.approx((pixels == c).sum() / (pixels != 255).sum())
        assert row["image_share"] == np.mean([(label == c).any() for label in labels])
    assert report["ignored_share"] == pytest.approx((pixels == 255).mean())


def test_every_problem_is_listed_by_file(tmp_path):
    dataset = write_world(tmp_path / "w", SIZES)
    (tmp_path / "w" / "0.png").write_bytes(b"")
    (tmp_path / "w" / "1.png").unlink()
    Image.fromarray(np.zeros((7, 7), np.uint8)).save(tmp_path / "w" / "2_label.png")
    Image.fromarray(np.full(SIZES[3], 77, np.uint8)).save(tmp_path / "w" / "3_label.png")
    report = check_dataset(dataset, progress=False)
    said = {p["id"]: p["problem"] for p in report["problems"]}
    assert report["readable"] == 1 and set(said) == {"w-0", "w-1", "w-2", "w-3"}
    for name, part in (("w-0", "0 bytes"), ("w-1", "1.png"), ("w-2", "7 x 7"), ("w-3", "77 (480 pixels)")):
        assert part in said[name]
    text = format_report(report)
    assert "4 problems" in text and "w-3" in text and "never occurs" not in text.split("disc")[0]


def test_shared_advice_is_printed_once_below_its_problems():
    advice = "Fix the file, or remove it. Either is enough."
    problems = [{"id": str(i), "problem": f"The label of {i} (a.B.png) is 7 x 7. {advice}"} for i in range(3)]
    problems.insert(1, {"id": "x", "problem": "Cannot decode x. It is corrupt."})
    report = {"samples": 1, "readable": 0, "problems": problems}
    assert format_report(report).splitlines() == [
        *("1 sample, 0 readable", "", "4 problems"),
        *(f"  {i}: The label of {i} (a.B.png) is 7 x 7." for i in range(3)),
        f"  For these 3: {advice}",
        "  x: Cannot decode x. It is corrupt.",
    ]
    assert "\n1 problem\n" in format_report({**report, "problems": problems[:1]})


def test_duplicate_ids_are_a_problem(tmp_path):
    from datasets import concatenate_datasets

    dataset = write_world(tmp_path / "w", SIZES[:2])
    report = check_dataset(concatenate_datasets([dataset, dataset.select([0])]), progress=False)
    assert report["problems"] == [{"id": "w-0", "problem": "this id occurs more than once"}]


def test_the_sheet_shows_the_image_and_its_label_over_it(tmp_path):
    dataset = write_world(tmp_path / "w", [(40, 60)])
    check_dataset(dataset, sheet=tmp_path / "s" / "sheet.png", progress=False)
    sheet = np.array(Image.open(tmp_path / "s" / "sheet.png")).astype(int)
    image, label = (
        np.array(Image.open(tmp_path / "w" / "0.png")).astype(int),
        Image.open(tmp_path / "w" / "0_label.png"),
    )
    legend = sheet[2 * 160 + 16 + 12 :].reshape(-1, 3).tolist()
    occur = [c for c in range(3) if (np.array(label) == c).any()]
    colors = palette_of(None, NAMES)
    assert sheet.shape[1] == 172 and all([*colors[c]] in legend for c in occur)
    row, column = (int(v[0]) for v in np.nonzero(np.array(label) == 2))
    row, column = row + 5, column + 2
    scale, top = 160 / 60, (160 - round(40 * 160 / 60)) // 2
    y, x = 6 + top + round((row + 0.5) * scale), 6 + round((column + 0.5) * scale)
    assert np.abs(sheet[y, x] - image[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))).max() < 60
    blended = 0.4 * sheet[y, x] + 0.6 * np.array(colors[2])  # the class colour is blended in, as in all pictures
    assert np.abs(sheet[y + 160, x] - blended).max() < 30


def test_captions_keep_what_distinguishes_images():
    def shown(name, most=14):
        return check._shortened(name, lambda text: len(text) <= most)

    assert shown("train/01") == "train/01" and shown("train/frankfurt/01") == "…/frankfurt/01"
    assert shown("train/street_00_png.rf.0123456789abcdef") == "street…9abcdef"  # Roboflow's names end in a hash


def test_an_unwritable_sheet_does_not_lose_the_report(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check, "_write_sheet", full)
    report = check_dataset(write_world(tmp_path / "w", SIZES), sheet=tmp_path / "sheet.png", progress=False)
    assert report["readable"] == 5 and "contact_sheet" not in report
    assert report["contact_sheet_error"] == f"{tmp_path / 'sheet.png'}: No space left on device."


def test_a_stream_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="streaming=False"):
        check_dataset(write_world(tmp_path / "w", SIZES[:1]).to_iterable_dataset(), progress=False)
