"""Class names, colours and values from the files that annotation tools write next to the images."""

import pytest

from cps_hf.data.class_tables import find_class_tables, given_classes, without_ignored

LABELMAP = """\
# label:color_rgb:parts:actions
background:0,0,0::
Auto:128,0,0::

straße, nass:0,128,0::
"""
NAMES = ("background", "Auto", "straße, nass")
COLORS = ((0, 0, 0), (128, 0, 0), (0, 128, 0))


@pytest.mark.parametrize(
    ("file", "text", "names", "colors", "values"),
    [
        ("classes.json", '["background", "Auto", "straße, nass"]', NAMES, None, None),
        ("classes.json", '{"1": "Auto", "0": "background", "2": "straße, nass"}', NAMES, None, None),
        ("classes.txt", "background\r\nAuto\n\nstraße, nass\n", NAMES, None, None),
        ("classes.txt", "\ufeffbackground\nAuto\nstraße, nass", NAMES, None, None),
        ("labelmap.txt", LABELMAP, NAMES, COLORS, None),
        ("labelmap.txt", "a\nb:::\nc", ("a", "b", "c"), None, None),
        ("label_colors.txt", "0 0 0\tbackground\n128 0 0  Auto\n0 128 0 straße, nass\n", NAMES, COLORS, None),
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, Auto\n", NAMES[:2], None, None),
        ("_classes.csv", "Pixel Value,Class\n2,Auto\n0,background\n", NAMES[:2], None, (0, 2)),
        (
            *("class_dict.csv", 'name,r,g,b\nbackground,0,0,0\nAuto,128,0,0\n"straße, nass",0,128,0\n'),
            *(NAMES, COLORS, None),
        ),
    ],
)
def test_files_of_classes(tmp_path, file, text, names, colors, values):
    (tmp_path / file).write_text(text, encoding="utf-8")
    (table,) = find_class_tables([tmp_path])
    assert table[1:] == (names, colors, values) and table.path == tmp_path / file
    assert given_classes(tmp_path / file) == table and given_classes(list(names)).names == names


def test_the_most_specific_class_file_comes_first(tmp_path):
    folders = [tmp_path / "train", tmp_path / "valid"]
    for folder in folders:
        folder.mkdir()
        (folder / "_classes.csv").write_text("Pixel Value, Class\n0, a\n1, b\n")
    (tmp_path / "labelmap.txt").write_text(LABELMAP)
    (tmp_path / "classes.json").write_text('["a", "b"]')
    found = find_class_tables([tmp_path, *folders])
    assert [table.path.name for table in found] == ["classes.json", "labelmap.txt", "_classes.csv"]
    (folders[1] / "_classes.csv").write_text("Pixel Value, Class\n0, a\n1, c\n")
    with pytest.raises(ValueError, match=r"train/_classes\.csv and .*valid/_classes\.csv describe different classes"):
        find_class_tables([tmp_path, *folders])


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("labelmap.txt", "a:1,2\n", r"labelmap\.txt: expected a colour, three numbers from 0 to 255, found 'a:1,2'"),
        ("labelmap.txt", "a:1,2,300::", "three numbers"),
        ("labelmap.txt", "a:1,2,3::\nb", "1 of 2 lines have a colour"),
        ("label_colors.txt", "1 2 3", "expected lines of `red green blue name`, found '1 2 3'"),
        ("_classes.csv", "", "found nothing"),
        ("_classes.csv", "Pixel Value, Class\nx, a\n", "expected lines of `Pixel Value, Class`"),
        ("_classes.csv", "Pixel Value, Class\n0\n", "expected lines of `Pixel Value, Class`"),
        ("class_dict.csv", "name,r,g,b\na,0,0,x\n", "three numbers"),
        ("classes.json", "[", "Cannot read class names"),
        ("classes.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, file, text, said):
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        find_class_tables([tmp_path])


def test_void_is_not_a_class(tmp_path):
    (tmp_path / "label_colors.txt").write_text("128 0 0 Car\n0 0 0 Void\n0 128 0 Tree\n")
    (table,) = find_class_tables([tmp_path])
    assert without_ignored(table) == (("Car", "Tree"), {(128, 0, 0): 0, (0, 0, 0): 255, (0, 128, 0): 1})
