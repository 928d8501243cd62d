"""Pages of pictures, checked pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.pictures import blocks, read

from cps_hf.visualization import colorize, overlay, overlay_page, palette, panel

LONG_NAMES = [f"a class with a rather long name {i}" for i in range(19)]


def corners_of(page, picture):
    """Every (top, left) at which the page shows the picture exactly."""
    height, width = picture.shape[:2]
    tops, lefts = page.shape[0] - height + 1, page.shape[1] - width + 1
    here = np.ones((tops, lefts), bool)
    for row, column in zip(*np.random.default_rng(0).integers(0, [[height], [width]], (2, 12)), strict=True):
        here &= (page[row : row + tops, column : column + lefts] == picture[row, column]).all(-1)
    return [(t, x) for t, x in np.argwhere(here) if np.array_equal(page[t : t + height, x : x + width], picture)]


def shows(page, color):
    return bool((page == color).all(-1).any())


@pytest.fixture
def texts(monkeypatch):
    """The texts on a page: (text, whether all of it is on the page)."""
    said, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, fill=None, font=None, anchor=None, **options):
        left, top, right, bottom = self.textbbox(xy, text, font=font, anchor=anchor)
        width, height = self.im.size
        said.append((text, 0 <= left and 0 <= top and right <= width and bottom <= height))
        return draw_text(self, xy, text, fill=fill, font=font, anchor=anchor, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return said


@pytest.mark.parametrize("shape", [(70, 90), (600, 421)])
def test_an_overlay_page_is_the_overlay_above_a_legend(tmp_path, texts, shape):
    labels, image = blocks(*shape, [0, 3, 255])
    overlay_page(image, labels, LONG_NAMES, palette(19), tmp_path / "page.png")
    page, factor = read(tmp_path / "page.png"), 5 if shape[0] == 70 else 1
    ((top, _),) = corners_of(page, overlay(image, labels, palette(19)).repeat(factor, 0).repeat(factor, 1))
    assert [text for text, _ in texts] == [f"{LONG_NAMES[0]} (not tinted)", LONG_NAMES[3], "ignored"]
    assert all(inside for _, inside in texts) and top < 30
    assert shows(page[top + factor * shape[0] :], palette(19)[3])


def test_a_panel_shows_each_cell_enlarged_by_whole_factors(tmp_path):
    portrait, landscape = blocks(64, 40, [0, 1, 255]), blocks(30, 50, [0, 1])
    rows = [[image, labels, torch.from_numpy(labels).long()] for labels, image in (portrait, landscape)]
    panel(rows, ["image", "label", "branch 0"], ["a", "b"], palette(2), tmp_path / "panel.png")
    page = read(tmp_path / "panel.png")
    for (labels, image), factor in ((portrait, 512 // 64), (landscape, 512 // 50)):
        large = [x.repeat(factor, 0).repeat(factor, 1) for x in (image, colorize(labels, palette(2)))]
        (image_at,), maps_at = corners_of(page, large[0]), corners_of(page, large[1])
        assert len(maps_at) == 2 and {top for top, _ in maps_at} == {image_at[0]}
        assert image_at[1] < min(left for _, left in maps_at)


def test_the_legend_lists_only_classes_that_occur(tmp_path, texts):
    labels, image = blocks(20, 31, [1, 4])
    names, colors = [f"class {i}" for i in range(6)], palette(6)
    panel([[image, labels]], ["image", "label"], names, colors, tmp_path / "panel.png")
    assert [text for text, _ in texts] == ["image", "label", "class 1", "class 4"]
    below = read(tmp_path / "panel.png")[20 * 16 + 40 :]  # under the pictures
    assert [shows(below, color) for color in colors[1:]] == [True, False, False, True, False]  # black is text too

    texts.clear()
    labels[3:6] = 255
    panel(
        [[image, labels]], ["image", "label"], names, colors, tmp_path / "panel.png", legend={"and more": (9, 9, 200)}
    )
    assert [text for text, _ in texts][2:] == ["class 1", "class 4", "ignored", "and more"]
    assert shows(read(tmp_path / "panel.png"), (9, 9, 200))


@pytest.mark.parametrize("shape", [(5, 4), (200, 30), (64, 128)])
@pytest.mark.parametrize("columns", [1, 3])
def test_nothing_is_cut_off(tmp_path, texts, shape, columns):
    labels, _ = blocks(*shape, list(range(19)))
    titles = [f"the title of column {i}, longer than its picture is wide" for i in range(columns)]
    captions = [f"{'a/deep/' * 9}name of row {i}" for i in range(2)]
    panel([[labels] * columns] * 2, titles, LONG_NAMES, palette(19), tmp_path / "panel.png", captions=captions)
    assert [text for text, _ in texts] == captions + titles + LONG_NAMES
    assert all(inside for _, inside in texts)


def test_large_maps_are_reduced_without_mixing_classes(tmp_path):
    labels, image = blocks(1024, 2048, [1, 2, 3])
    panel([[image, labels, labels, labels]], list("abcd"), LONG_NAMES[:4], palette(4), tmp_path / "panel.png")
    page = read(tmp_path / "panel.png")
    height, width = page.shape[:2]
    assert width < 1700 and height < 400
    right = page[40:190, width - 380 : width - 30]  # inside the last map
    assert {tuple(color) for color in right.reshape(-1, 3)} == set(palette(4)[1:])


def test_mismatched_panels_are_rejected(tmp_path):
    labels, image = blocks(8, 8, [0, 1])
    with pytest.raises(ValueError, match=r"needs 2 cells, one per title; got \[2, 1\]"):
        panel([[image, labels], [image]], ["a", "b"], ["x", "y"], palette(2), tmp_path / "panel.png")
    with pytest.raises(ValueError, match="2 colours for 3 class names"):
        panel([[image]], ["a"], ["x", "y", "z"], palette(2), tmp_path / "panel.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    labels, image = blocks(8, 8, [0, 1])
    panel([[labels]], ["a"], ["x", "y"], palette(2), tmp_path / "pictures" / "panel.png")  # makes the folder
    before = (tmp_path / "pictures" / "panel.png").read_bytes()

    def half(self, path, **options):
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space left"):
        panel([[image]], ["a"], ["x", "y"], palette(2), tmp_path / "pictures" / "panel.png")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["panel.png"]
    assert (tmp_path / "pictures" / "panel.png").read_bytes() == before


def test_names_are_on_one_line_and_shown_letter_by_letter(tmp_path, texts):
    """Users choose class names: line ends, invalid formulas, a leading underscore."""
    names, labels = ["two\nlines", "$\\frac$", "_hidden"], np.array([[0, 1, 2]])
    panel([[labels]], ["a\ntitle"], names, palette(3), tmp_path / "panel.png")
    assert [text for text, _ in texts] == ["a title", "two lines", "$\\frac$", "_hidden"]
