"""Surveying a whole set: its classes, what is unusual but readable, and how much was read."""

import itertools
import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from support.image_files import as_stored, chunk, png, png_exif, png_palette, tiff

from cps_hf.data import survey as surveying
from cps_hf.data.check import check_dataset, check_splits, format_report
from cps_hf.data.folder import load_folder
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.survey import seams, survey

NAMES = ("ground", "disc", "bar")
IMAGE = np.full((8, 12, 3), 90, np.uint8)


def data_set(masks, *, images=None, encoding=None, names=NAMES):
    """Rows of encoded files. `encoding`: the label coding; if None, class ids."""
    images = images or [png(IMAGE)] * len(masks)
    rows = {
        "image": [{"bytes": data, "path": None} for data in images],
        "label": [{"bytes": data, "path": None} for data in masks],
        "id": [f"row {i}" for i in range(len(masks))],
    }
    encoding = encoding or LabelEncoding(names)
    features = {"image": Image(), "label": encoding.to_feature(), "id": Value("string")}
    return Dataset.from_dict(rows, features=Features(features))


def looked_at(masks, **options):
    return survey(data_set(masks, **options), what="train_dataset", progress=False)


def ids(*values):
    """A mask of vertical stripes of these values."""
    return np.tile(np.repeat(np.array(values, np.uint8), 12 // len(values)), (8, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_label_is_counted_once(workers):
    masks = [ids(0, 1, 255), ids(0), ids(2, 2, 1)] * 6
    dataset = data_set([png(mask) for mask in masks])
    found = survey(dataset, num_workers=workers, progress=False)
    pixels = np.concatenate([mask.ravel() for mask in masks])
    assert found.pixels.tolist() == np.bincount(pixels, minlength=256).tolist()
    assert found.images.tolist() == [sum((mask == c).any() for mask in masks) for c in range(256)]
    assert found.is_whole and found.scope == "all 18 samples" and found.absent == [] and found.faults() == []


def test_unreadable_rows_and_invalid_classes_are_problems():
    found = looked_at([png(ids(0, 1)), png(ids(0, 7)), b"no image", png(np.zeros((3, 3), np.uint8))])
    said = {problem["id"]: problem["problem"] for problem in found.problems}
    assert found.readable == 1 and set(said) == {"row 1", "row 2", "row 3"}
    assert "7 (48 pixels)" in said["row 1"] and "no kind" in said["row 2"] and "3 x 3" in said["row 3"]


def test_sizes_are_read_from_headers_without_decoding():
    cut = png(np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8))[:-40]
    dataset = data_set([png(ids(0, 1, 2))], images=[cut])
    assert survey(dataset, progress=False).problems == []
    assert "truncated" in survey(dataset, whole=True, progress=False).problems[0]["problem"]


def test_classes_without_a_pixel_are_named():
    assert looked_at([png(ids(0, 2)), png(ids(0))]).absent == ["disc"]


def test_entirely_ignored_masks_are_a_problem_of_the_set():
    [fault] = looked_at([png(ids(255)), png(ids(255))]).faults()
    assert (
        "No pixel of `train_dataset` is labeled: the masks of all 2 samples contain only ignored pixels (255)" in fault
    )
    assert looked_at([png(ids(255)), png(ids(255, 1))]).faults() == []


def as_said(fault, option):
    """The command-line options that a message suggests, parsed."""
    found = [json.loads(part.split("'")[0]) for part in fault.split("--load_options '")[1:]]
    return next(options[option] for options in found if option in options)


def test_advice_for_black_and_white_masks_fixes_them():
    two = {"names": ("ground", "disc")}
    masks = [png(ids(0, 255)), png(ids(0))]
    [fault] = looked_at(masks, **two).faults()
    assert "contain only 0 and 255" in fault and "`values={0: 0, 255: 1}`" in fault
    told = {int(k): v for k, v in as_said(fault, "values").items()}
    found = looked_at(masks, encoding=LabelEncoding(two["names"], values=told))
    assert found.faults() == [] and found.absent == [] and found.white_is_a_class
    ignored = LabelEncoding(two["names"], values={0: 0, 1: 1, 255: 255})  # the other advice
    assert looked_at(masks, encoding=ignored).faults() == []
    for harmless in ([png(ids(0, 1, 255))], [png(ids(0))], [png(ids(1, 255))]):
        assert looked_at(harmless, **two).faults() == []
    assert looked_at([png(ids(0, 255))]).faults() == [], "with three classes, one may be missing"


RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)


def indexed(values, *colors):
    return png(values, color=3, before=png_palette(colors))


def test_advice_for_differing_palettes_fixes_them():
    masks = [indexed(ids(0, 1, 2), BLACK, RED, GREEN), indexed(ids(0, 1), GREEN, BLACK)]  # renumbered
    [fault] = looked_at(masks).faults()
    assert "value 0 is shown as (0, 0, 0) in 'row 0' and as (0, 255, 0) in 'row 1'" in fault
    colors = {key: i for i, key in enumerate(as_said(fault, "colors"))}
    assert set(colors) == {"0, 0, 0", "255, 0, 0", "0, 255, 0"}
    by_color = {tuple(map(int, key.split(","))): value for key, value in colors.items()}
    told = looked_at(masks, encoding=LabelEncoding(NAMES, colors=by_color))
    assert told.faults() == [] and told.pixels[by_color[GREEN]] == 32 + 48
    values = {int(k): v for k, v in as_said(fault, "values").items()}
    assert looked_at(masks, encoding=LabelEncoding(NAMES, values=values)).faults() == []


def test_palettes_may_differ_in_unused_entries():
    grey = [(i, i, i) for i in range(3)]
    unused = indexed(ids(0, 1), BLACK, RED, WHITE)  # entry 2 is never used
    assert looked_at([indexed(ids(0, 1, 2), BLACK, RED, GREEN), unused, png(ids(0, 2))]).faults() == []
    assert looked_at([indexed(ids(0, 1, 2), BLACK, RED, GREEN), indexed(ids(0, 1), *grey)]).faults() == []


def test_a_palette_with_the_color_of_another_class_is_a_problem():
    encoding = LabelEncoding(NAMES, palette=(BLACK, RED, GREEN))
    assert looked_at([indexed(ids(0, 1), BLACK, RED)], encoding=encoding).faults() == []
    [fault] = looked_at([indexed(ids(0, 1), BLACK, GREEN)], encoding=encoding).faults()
    assert "value 1 is shown as (0, 255, 0) in 'row 0', the colour of 'bar'" in fault


def test_seams_from_interpolation_are_noted():
    small = np.zeros((16, 24), np.uint8)
    small[4:12, 6:18] = 2
    smooth = np.asarray(PILImage.fromarray(small * 100).resize((96, 64), PILImage.BILINEAR))
    mask = np.rint(smooth / 100).astype(np.uint8)
    image = png(np.zeros((64, 96, 3), np.uint8))
    [note] = looked_at([png(mask)], images=[image]).notes()
    assert note.kind == ("label", "seams") and note.first == ["row 0"]
    nearest = np.asarray(PILImage.fromarray(small).resize((96, 64), PILImage.NEAREST))
    assert looked_at([png(nearest)], images=[image]).notes() == []


def test_a_thin_object_is_not_a_seam():
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 48:] = 2  # half building, half tree
    mask[40:, 47:49] = 1  # a pole in front of their border
    image = png(np.zeros((64, 96, 3), np.uint8))
    assert looked_at([png(mask)], images=[image]).notes() == []
    mask[:, 47:49] = 1  # along all of the border
    [note] = looked_at([png(mask)], images=[image]).notes()
    assert note.kind == ("label", "seams")


def test_seams_are_counted_correctly():
    label = np.random.default_rng(0).integers(0, 4, (9, 13)).astype(np.uint8)
    label[label == 3] = 255
    label[4] = 1  # a run across the whole mask, without neighbours
    label[2, :8] = label[6, :8] = [0, 0, 0, 2, 2, 2, 1, 0]  # a border without a seam
    wanted = np.zeros((2, 4, 256), int)
    for found, lines in zip(wanted, (label, label.T), strict=True):
        for line in lines.tolist():
            runs = [(value, len([*same])) for value, same in itertools.groupby(line)]
            is_seam = [False] * len(runs)
            for i in range(1, len(runs) - 1):
                low, high = sorted((runs[i - 1][0], runs[i + 1][0]))
                is_seam[i] = runs[i][1] <= 2 and low < runs[i][0] < high < 255
            for (value, length), seam in zip(runs, is_seam, strict=True):
                found[:3, value] += length, length * seam, seam
            for i in range(1, len(runs)):
                low, high = sorted((runs[i - 1][0], runs[i][0]))
                if high < 255 and not is_seam[i - 1] and not is_seam[i]:
                    found[3, low + 1 : high] += 1
    assert seams(label).tolist() == wanted.tolist()
    assert (wanted[:, 1].sum(-1) > 0).all() and (wanted[:, 3].sum(-1) > 0).all()


def test_unusual_files_are_counted_with_first_names():
    rgba = np.dstack([IMAGE, IMAGE[..., 0]])
    images = [
        png(as_stored(IMAGE, 6), before=png_exif(6)),
        png(IMAGE.astype(np.uint16) << 8, 16),
        png(rgba),
        tiff(rgba, photometric=2, extra=(0,)),
        png(IMAGE.astype(np.uint16) * 12, 16),
        png(as_stored(IMAGE, 3), before=png_exif(3)),
    ]
    masks = [png(as_stored(ids(0, 1, 2), 6)), *[png(ids(0, 1, 2))] * 5]
    report = check_dataset(data_set(masks, images=images), progress=False)
    said = {note["what"]: (note["count"], note["first"]) for note in report["notes"]}
    assert said == {
        "images rotated according to their EXIF orientation": (2, ["row 0", "row 5"]),
        surveying.UNUSUAL[("label", "turned with image")]: (1, ["row 0"]),
        surveying.UNUSUAL[("label", "cannot tell")]: (1, ["row 5"]),
        surveying.UNUSUAL[("image", "depth")]: (2, ["row 1", "row 4"]),
        surveying.UNUSUAL[("image", "few bits")]: (1, ["row 4"]),
        surveying.UNUSUAL[("image", "alpha")]: (1, ["row 2"]),
        surveying.UNUSUAL[("image", "bands")]: (1, ["row 3"]),
    }
    assert (
        "2 images rotated according to their EXIF orientation: row 0, row 5" in format_report(report)
        and report["problems"] == []
    )


def test_every_kind_of_unusual_file_has_a_text():
    from support.formats import images, masks

    from cps_hf.data.raster import open_raster

    kinds = {("image", kind) for k in images() if k.expected is not None for kind in unusual(open_raster, k, "image")}
    kinds |= {("label", kind) for k in masks() if k.expected is not None for kind in ("pages", "white is zero")}
    assert kinds <= set(surveying.UNUSUAL)


def unusual(open_raster, kind, what):
    return open_raster({"bytes": kind.data, "path": None}, "x", what).unusual()


def test_a_time_limit_surveys_a_random_choice(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(surveying.time, "monotonic", lambda: float(next(clock)))
    dataset = data_set([png(ids(i % 3)) for i in range(30)])
    found = survey(dataset, seconds=4.5, progress=False)
    assert found.looked_at == 5 and found.scope == "5 of 30 samples" and not found.is_whole
    assert {int(i) for i in np.flatnonzero(found.pixels)} == {0, 1, 2}, (
        "a random choice finds what the first rows may lack"
    )


def test_only_the_first_rows_of_a_stream_are_surveyed(monkeypatch):
    monkeypatch.setattr(surveying, "FIRST_ROWS", 3)
    dataset = data_set([png(ids(0, 1, 2))] * 3 + [b"no image"]).to_iterable_dataset()
    found = survey(dataset, progress=False)
    assert (found.looked_at, found.scope, found.problems) == (3, "the first 3 samples", [])


def test_images_without_labels_are_surveyed_too():
    dataset = data_set([png(ids(0))]).remove_columns("label")
    found = survey(dataset, whole=True, progress=False)
    assert found.sizes == [(8, 12)] and found.absent == [] and found.faults() == []


# ------------------------------------------------------------------------------------------------ check, in folders


def write(root, masks, images=None):
    for i, mask in enumerate(masks):
        for folder, data in (("images", png(IMAGE) if images is None else images[i]), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{i}.png").write_bytes(data)


def test_check_reports_which_class_white_is(tmp_path):
    write(tmp_path, [png(ids(0, 255)), png(ids(0))])
    report = check_dataset(load_folder(tmp_path, class_names=NAMES[:2]), progress=False)
    assert report["classes"][1] == {"name": "disc", "pixel_share": 0.25, "image_share": 0.5, "stored": 255}
    assert "disc         25.00        50.0   255 in the masks" in format_report(report) and not report["problems"]


def test_check_reports_problems_of_the_whole_set(tmp_path):
    write(tmp_path, [indexed(ids(0, 1, 2), BLACK, RED, GREEN), indexed(ids(0, 1), GREEN, BLACK)])
    report = check_dataset(load_folder(tmp_path, class_names=NAMES), progress=False)
    [problem] = report["problems"]
    assert problem["id"] == "the whole set" and "palettes" in problem["problem"]


def test_check_reports_resized_masks(tmp_path):
    write(tmp_path, [png(ids(0, 1, 2)), png(ids(0, 1, 2)[::2, ::2])])
    report = check_dataset(load_folder(tmp_path, class_names=NAMES), progress=False)
    assert "the label is 2 times smaller" in report["problems"][0]["problem"]
    report = check_dataset(load_folder(tmp_path, class_names=NAMES, resize_masks=True), progress=False)
    assert report["problems"] == [] and report["notes"] == [
        {"what": "masks resized to their images", "count": 1, "first": ["1"]}
    ]


def test_every_split_is_checked(tmp_path):
    write(tmp_path / "train", [png(ids(0, 1, 2))])
    write(tmp_path / "val", [png(ids(0, 7))])
    (tmp_path / "broken" / "images").mkdir(parents=True)
    options = {"class_names": NAMES}
    report = check_splits(
        lambda split: load_folder(tmp_path, split, **options),
        ["train", "val", "broken"],
        sheet=tmp_path / "out" / "sheet.png",
        progress=False,
    )
    assert [*report["splits"]] == ["train", "val", "broken"] and report["splits"]["train"]["problems"] == []
    assert [problem["split"] for problem in report["problems"]] == ["val", "broken"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sheet_train.png"}
    text = format_report(report)
    assert "== train ==" in text and "== val ==" in text and "7 (48 pixels)" in text and "No image in" in text


def test_a_text_chunk_that_mentions_exif_rotates_nothing():
    said = chunk(b"tEXt", b"Comment\0eXIf")
    found = looked_at([png(ids(0, 1, 2))], images=[png(IMAGE, after=said)])
    assert found.notes() == [] and found.problems == []
