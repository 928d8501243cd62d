"""The stored values of masks and their classes: ids, grey levels, black and white, colours, palettes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.own_folders import BANDS, write_mask

from cps_hf.data import mask_codes
from cps_hf.data.class_tables import ClassTable, given_classes
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.mask_codes import class_pixels, look_at_masks, settle

COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
TABLE = ClassTable(Path("labelmap.txt"), ("ground", "car", "tree"), tuple(COLORS))
NAMES = ClassTable(Path("classes.json"), ("ground", "car", "tree"))
HALF = BANDS.size // 2


def settled(tmp_path, *images, tables=(), **options):
    """(how the masks are read, the pixels of each class in the first one)."""
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))).save(path)
    names = [path.name for path in paths]
    looks = look_at_masks(names, paths)
    coding = settle(names, looks, tables, **options)
    return coding, class_pixels(looks[0], coding.encoding)


def rgb(ids, colors=COLORS):
    return np.array(colors, np.uint8)[ids]


def in_palette(ids, colors=COLORS, void=None):
    image = Image.fromarray(np.asarray(ids, np.uint8))
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    table[255] = void or (224, 224, 192)
    image.putpalette(table.tobytes())
    return image


def test_ids_with_names_are_unchanged(tmp_path):
    coding, pixels = settled(tmp_path, BANDS, BANDS * 2, tables=[NAMES])
    assert coding.encoding == LabelEncoding(NAMES.names) and coding.notes == []
    assert pixels.tolist()[:3] == [HALF, HALF, 0]


def test_values_below_zero_are_ignored(tmp_path):
    stored = BANDS.astype(np.int32) * 200
    stored[0, 0] = -1
    Image.fromarray(stored).save(tmp_path / "a.tif")
    [look] = look_at_masks(["a.tif"], [tmp_path / "a.tif"])
    coding = settle(["a.tif"], [look], ())
    assert coding.encoding.names == ("class_0", "class_200")
    assert class_pixels(look, coding.encoding)[[0, 1, 255]].tolist() == [HALF - 1, HALF, 1]


def test_given_classes_override_files(tmp_path):
    coding, _ = settled(tmp_path, BANDS, tables=[NAMES], given=given_classes(["a", "b"]))
    assert coding.encoding.names == ("a", "b")


def test_ids_without_names_are_numbered_with_advice(tmp_path):
    ids = np.where(BANDS == 0, 3, 1)
    ids[0, 0], ids[0, 1] = 255, 0
    coding, pixels = settled(tmp_path, ids)
    assert coding.encoding == LabelEncoding(("class_0", "class_1", "class_2", "class_3"))
    assert "`--class_names NAME NAME ...`" in coding.notes[0] and "classes.txt" in coding.notes[0]
    assert coding.notes[1].startswith("255 is ignored: 1.2 %") and pixels[255] == 1


def test_grey_levels_without_names_are_one_class_each(tmp_path):
    coding, pixels = settled(tmp_path, BANDS * 200, BANDS * 90)
    assert coding.encoding == LabelEncoding(("class_0", "class_90", "class_200"), values={0: 0, 90: 1, 200: 2})
    assert pixels[:3].tolist() == [HALF, 0, HALF]


@pytest.mark.parametrize("table", [None, ClassTable(Path("_classes.csv"), ("ground", "car"), values=(0, 90))])
def test_255_stays_ignored_if_values_are_listed(tmp_path, table):
    ids = BANDS * 90
    ids[0] = 255
    coding, pixels = settled(tmp_path, ids, tables=[table] if table else [])
    assert coding.encoding.values == {0: 0, 90: 1, 255: 255}
    assert pixels[[0, 1, 255]].tolist() == [HALF - 10, HALF, 10] and "255 is ignored" in coding.notes[-1]


@pytest.mark.parametrize("given", [None, ["road", "not road"]])
def test_black_and_white_are_two_classes(tmp_path, given):
    coding, pixels = settled(tmp_path, BANDS * 255, given=given and given_classes(given))
    assert coding.encoding == LabelEncoding(tuple(given or ("class_0", "class_1")), values={0: 0, 255: 1})
    assert "255 is" in coding.notes[0] and pixels[:2].tolist() == [HALF, HALF]


def test_a_one_somewhere_makes_255_ignored(tmp_path):
    coding, pixels = settled(tmp_path, BANDS * 255, BANDS, given=given_classes(["a", "b"]))
    assert coding.encoding.values is None and pixels[255] == HALF


def test_gray_masks_saved_as_rgb_are_gray(tmp_path):
    grey = [(0, 0, 0), (1, 1, 1), (255, 255, 255)]
    coding, pixels = settled(tmp_path, rgb(BANDS, grey), rgb(BANDS * 2, grey), tables=[NAMES])
    assert coding.encoding.colors == {(0, 0, 0): 0, (1, 1, 1): 1, (2, 2, 2): 2, (255, 255, 255): 255}
    assert pixels[:2].tolist() == [HALF, HALF] and "saved as RGB" in coding.notes[0]
    coding, pixels = settled(tmp_path, rgb(BANDS * 2, grey), BANDS * 255)  # one of them of one channel
    assert coding.encoding.colors == {(0, 0, 0): 0, (255, 255, 255): 1} and pixels[1] == HALF


@pytest.mark.parametrize("tables", [[TABLE], [NAMES, TABLE]])
def test_colors_are_those_of_the_table(tmp_path, tables):
    coding, pixels = settled(tmp_path, rgb(BANDS * 2), tables=tables)
    assert coding.encoding == LabelEncoding(
        TABLE.names, colors=dict(zip(COLORS, range(3), strict=True)), palette=tuple(COLORS)
    )
    assert pixels[:3].tolist() == [HALF, 0, HALF]


def test_palette_colors_count_more_than_values(tmp_path):
    ids = BANDS.copy()
    ids[0] = 255
    coding, pixels = settled(tmp_path, in_palette(ids, [COLORS[2], COLORS[1]]), tables=[TABLE])
    assert pixels[:3].tolist() == [0, HALF, HALF - 10] and pixels[255] == 10
    assert coding.encoding.colors[224, 224, 192] == 255


def test_other_palettes_and_gray_ids_are_ids_despite_a_color_table(tmp_path):
    coding, pixels = settled(tmp_path, in_palette(BANDS, [(9, 9, 9), (7, 0, 0)]), tables=[TABLE])
    assert coding.encoding == LabelEncoding(TABLE.names) and pixels[:2].tolist() == [HALF, HALF]
    coding, _ = settled(tmp_path, BANDS, tables=[TABLE])
    assert coding.encoding == LabelEncoding(TABLE.names)


def test_values_of_a_table_map_to_its_classes(tmp_path):
    table = ClassTable(Path("_classes.csv"), ("ground", "car"), values=(0, 7))
    coding, pixels = settled(tmp_path, BANDS * 7, tables=[table])
    assert coding.encoding == LabelEncoding(("ground", "car"), values={0: 0, 7: 1}) and pixels[1] == HALF


def test_a_given_coding_is_used(tmp_path):
    coding, pixels = settled(tmp_path, BANDS * 4, tables=[NAMES], coding={"values": {"0": 1, "4": 255}})
    assert coding.encoding.values == {0: 1, 4: 255} and pixels[[1, 255]].tolist() == [HALF, HALF]
    coding, pixels = settled(tmp_path, BANDS, tables=[NAMES], coding={"reduce_labels": True})
    assert pixels[[0, 255]].tolist() == [HALF, HALF]
    with pytest.raises(ValueError, match="needs `class_names`"):
        settled(tmp_path, BANDS, coding={"values": {"0": 1}})


def test_an_unreadable_mask_is_reported_and_others_are_used(tmp_path):
    write_mask(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no mask")
    looks = look_at_masks(["a", "b"], [tmp_path / "a.png", tmp_path / "b.png"])
    coding = settle(["a", "b"], looks, [])
    assert looks[1].problem and not class_pixels(looks[1], coding.encoding).any()
    with pytest.raises(ValueError, match="No mask can be read"):
        settle(["b"], looks[1:], [])


def test_all_colours_of_a_missing_table_are_listed_in_lines():
    colors = [(i, 100 + i, 200 + i) for i in range(12)]
    picture = np.array(colors, np.uint8)[np.arange(12)[:, None].repeat(9, 1)]
    look = mask_codes._look_at_colors(picture, "a")
    with pytest.raises(ValueError) as error:
        settle(["a"], [look], [])
    message = str(error.value)
    assert all(
        str(color) in message and f'{", ".join(map(str, color))}": {i}' in message for i, color in enumerate(colors)
    )
    lines = message.split("\n")
    assert len(lines) == 4 and lines[0].endswith("12 colours:") and max(map(len, lines[1:3])) <= 100
    assert lines[1].endswith(",") and lines[1].count("(") == lines[1].count(")") > 3


def smoothed():
    ids = np.zeros((60, 60), np.uint8)
    ids[30:] = 255
    ids[29, :20] = np.arange(10, 210, 10)
    return ids


@pytest.mark.parametrize(
    ("masks", "options", "said"),
    [
        (
            [rgb(BANDS * 2)],
            {},
            r"1 of 1 masks are colour pictures, e\.g\. '0\.png'; together they use 2 colours: \(0, 0, 0\), "
            r"\(0, 128, 0\).*`labelmap\.txt`.*\"colors\": {\"0, 0, 0\": 0, \"0, 128, 0\": 1}",
        ),
        ([rgb(BANDS), BANDS], {}, r"1 of 2 masks \(the other 1 have one channel\)"),
        (
            [rgb(BANDS, [(0, 0, 0), (1, 2, 3)])],
            {"tables": [TABLE]},
            r"1 colours that labelmap\.txt does not list: \(1, 2",
        ),
        ([rgb(BANDS)], {"tables": [TABLE], "given": given_classes(["a"])}, "1 names, but labelmap.txt has 3 classes"),
        (
            [BANDS * 3],
            {"tables": [NAMES]},
            r"Masks contain 3, e\.g\. '0\.png', but classes\.json names classes 0 to 2" r'.*"2": 2, "3": 255}',
        ),
        (
            [BANDS * 255],
            {"given": given_classes(["road"])},
            "contain 0, 255: name the background too, .* background road`",
        ),
        (
            [np.arange(0, 240, 10).repeat(9).reshape(24, 9)],
            {},
            "The masks contain 24 values with gaps between them: 0, 10, 20",
        ),
        ([BANDS * 0], {}, "The masks contain 0 alone: at least two classes"),
        ([BANDS * 0 + 255], {}, "no value but 255, which is ignored"),
        ([smoothed()], {}, "smoothed edges. Save them with a threshold"),
        ([np.random.default_rng(0).integers(0, 255, (60, 60, 3))], {}, "colours, like a picture, not a mask"),
    ],
)
def test_ambiguous_masks_report_what_was_found(tmp_path, masks, options, said):
    with pytest.raises(ValueError, match=said):
        settled(tmp_path, *masks, **options)


def test_object_numbers_are_not_classes(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(path)
    with pytest.raises(ValueError, match="The masks contain 399 values, .*numbers of objects"):
        settle(["a"], look_at_masks(["a"], [path]), [])
