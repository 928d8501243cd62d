"""Pictures, looked at pixel by pixel."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cps_hf.visualization import panels as visualization
from cps_hf.visualization.panels import (
    AGREEMENT,
    ERRORS,
    agreement_legend,
    agreement_map,
    colorize,
    confusion_matrix_figure,
    curves_figure,
    denormalize,
    error_map,
    overlay,
    overlay_page,
    palette,
    panel,
)

LONG_NAMES = [f"a class with a rather long name {i}" for i in range(19)]


def blocks(height, width, classes, seed=0):
    """A class map of blocks in which every class of `classes` occurs, and a picture of the same size."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, (height, width)).astype(np.uint8)
    labels.flat[: len(classes)] = classes
    return labels, rng.integers(100, 156, (height, width, 3), dtype=np.uint8)


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


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
    """What a page says: (text, whether all of it is on the page)."""
    said, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, fill=None, font=None, anchor=None, **options):
        left, top, right, bottom = self.textbbox(xy, text, font=font, anchor=anchor)
        width, height = self.im.size
        said.append((text, 0 <= left and 0 <= top and right <= width and bottom <= height))
        return draw_text(self, xy, text, fill=fill, font=font, anchor=anchor, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return said


@pytest.mark.parametrize(("count", "apart"), [(8, 15), (12, 15), (19, 15), (30, 13), (60, 8)])
def test_colours_stay_apart_for_eyes_without_red_or_green_cones(count, apart):
    """Distances in CIELAB; one of 2 can just be seen."""
    views = {
        "usual": np.eye(3),
        "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    }
    for matrix in views.values():
        looks = [lab_of(color, np.array(matrix)) for color in palette(count)]
        nearest = min(np.linalg.norm(a - b) for i, a in enumerate(looks) for b in looks[:i])
        assert nearest > apart
    voc = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    looks = [lab_of(color, np.array(views["no red"])) for color in voc]
    assert np.linalg.norm(looks[2] - looks[3]) < 5, "the test could not tell good colours from bad"
    assert palette(count) == palette(min(255, count + 7))[:count]


def test_the_colours_of_agreement_stay_apart_for_all_eyes():
    blind = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    no_blue = [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    for matrix in (np.eye(3), np.array(blind), np.array(no_blue)):
        looks = [lab_of(color, matrix) for color in AGREEMENT.values()]
        assert min(np.linalg.norm(a - b) for i, a in enumerate(looks) for b in looks[:i]) > 25


def lab_of(color, matrix):
    """CIELAB by hand, one colour at a time."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    r, g, b = np.clip(matrix @ linear, 0, 1)
    x, y, z = 0.4124 * r + 0.3576 * g + 0.1805 * b, 0.2126 * r + 0.7152 * g + 0.0722 * b, 0.0193 * r + 0.1192 * g
    z += 0.9505 * b
    f = [t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x / 0.9505, y, z / 1.089)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("count", [1, 2, 8, 9, 19, 150, 255])
def test_no_two_classes_share_a_colour_and_none_is_that_of_ignored_pixels(count):
    colors = palette(count)
    assert len(colors) == len(set(colors)) == count and (255, 255, 255) not in colors
    assert not set(colors) & set(AGREEMENT.values())


def test_a_class_has_its_colour_where_the_label_is_and_ignored_pixels_have_none():
    labels = np.array([[0, 1, 255], [2, 2, 1]], np.uint8)
    colors = [(1, 2, 3), (40, 50, 60), (7, 8, 9)]
    expected = [[(1, 2, 3), (40, 50, 60), (255, 0, 255)], [(7, 8, 9), (7, 8, 9), (40, 50, 60)]]
    for given in (labels, labels.astype(np.int64), torch.from_numpy(labels), torch.from_numpy(labels).long()):
        np.testing.assert_array_equal(colorize(given, colors, ignore_color=(255, 0, 255)), expected)
    assert colorize(np.full((1, 1), 255), [(i, i, i) for i in range(256)]).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("value", [3, 254, -1, 1000])
def test_a_class_without_a_colour_is_an_error(value):
    with pytest.raises(ValueError, match=rf"holds \[{value}\], but the palette has 3 colours"):
        colorize(np.array([[0, value, 255]]), palette(3))


def test_an_overlay_mixes_by_alpha_and_leaves_ignored_pixels_and_black_classes_alone():
    labels, image = blocks(7, 9, [0, 1, 2, 255])
    colors = np.array([(250, 10, 20), (0, 100, 200), (0, 0, 0)])
    mixed = overlay(image, labels, colors, alpha=0.25)
    for row in range(7):
        for column in range(9):
            expected = image[row, column].astype(float)
            if labels[row, column] not in (2, 255):
                expected = 0.75 * expected + 0.25 * colors[labels[row, column]]
            assert np.abs(mixed[row, column] - expected).max() <= 0.5
    tensors = overlay(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels), colors, alpha=0.25)
    np.testing.assert_array_equal(tensors, mixed)
    assert mixed.dtype == np.uint8
    with pytest.raises(ValueError, match="`alpha` must be from 0 to 1, got 1.5"):
        overlay(image, labels, colors, alpha=1.5)
    with pytest.raises(ValueError, match=r"one size, got \(7, 9\) and \(7, 8\)"):
        overlay(image, labels[:, :8], colors)
    with pytest.raises(ValueError, match="must be uint8.*float64.*see `denormalize`"):
        overlay(image / 255, labels, colors)


def test_three_rows_of_a_tensor_are_channels_and_of_an_array_rows():
    picture = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    empty = np.full((3, 5), 255, np.uint8)
    np.testing.assert_array_equal(overlay(picture, empty, palette(2)), picture)
    tensor = torch.from_numpy(picture)  # (3, 5, 3): three channels of 5 x 3 pixels
    np.testing.assert_array_equal(
        overlay(tensor, np.full((5, 3), 255, np.uint8), palette(2)), picture.transpose(1, 2, 0)
    )


def test_denormalizing_gives_back_every_value():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    picture[..., 1] = 255 - picture[..., 1]
    normal = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(
        std
    )[:, None, None]
    np.testing.assert_array_equal(denormalize(normal, mean, std), picture)
    assert denormalize(torch.full((3, 1, 1), 1e6), mean, std).tolist() == [[[255, 255, 255]]]


def test_agreement_says_who_is_right():
    rng = np.random.default_rng(3)
    a, b, labels = rng.integers(0, 3, (3, 11, 8))
    labels[0] = 255
    painted = agreement_map(torch.from_numpy(a), b, labels)
    seen = set()
    for index in np.ndindex(labels.shape):
        known = labels[index] != 255
        if a[index] == b[index]:
            case = "agree, both wrong" if known and a[index] != labels[index] else "agree"
        else:
            case = "disagree"
            if known and a[index] == labels[index]:
                case = "only the first is right"
            if known and b[index] == labels[index]:
                case = "only the second is right"
        seen.add(case)
        assert tuple(painted[index]) == AGREEMENT[case]
    assert seen == set(AGREEMENT)
    alone = agreement_map(a, b)
    np.testing.assert_array_equal((alone == AGREEMENT["agree"]).all(-1), a == b)


def test_the_legend_of_agreement_names_the_networks():
    legend = agreement_legend("branch 0", "the teacher")
    assert [*legend.values()] == [*AGREEMENT.values()]
    assert [*legend][1:4] == ["agree, both wrong", "only branch 0 is right", "only the teacher is right"]
    assert [*legend][4] == "disagree, both wrong"


def test_errors_are_marked_and_void_is_neither_right_nor_wrong():
    labels, guess = np.array([[0, 1, 255], [2, 2, 1]]), torch.tensor([[0, 2, 1], [2, 1, 1]])
    right, wrong, void = ERRORS["right"], ERRORS["wrong"], (255, 255, 255)
    assert [[tuple(c) for c in row] for row in error_map(guess, labels).tolist()] == [
        [right, wrong, void],
        [right, wrong, right],
    ]
    with pytest.raises(ValueError, match="one size"):
        error_map(guess, labels[:, :2])


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


def test_panels_that_do_not_fit_together_are_refused(tmp_path):
    labels, image = blocks(8, 8, [0, 1])
    with pytest.raises(ValueError, match=r"needs 2 cells, one a title; got \[2, 1\]"):
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


def test_a_confusion_matrix_has_the_truth_in_rows_and_empty_rows_stay_empty(tmp_path):
    def dark(matrix):
        """Where the plot (left of the colour bar) is as dark as 100 %: mean (row, column) in shares of the page."""
        confusion_matrix_figure(matrix, ["first", "second"], tmp_path / "matrix.png")
        page = read(tmp_path / "matrix.png")
        page = page[:, : int(0.79 * page.shape[1])]
        rows, columns = np.nonzero((np.abs(page.astype(int) - (8, 48, 107)) < 6).all(-1))
        return page, rows.mean() / page.shape[0], columns.mean() / page.shape[1]

    page, above, right = dark(torch.tensor([[0, 7], [0, 0]]))
    assert (page == 237).all(-1).mean() > 0.1, "the row of a class that does not occur is gray"
    page, below, left = dark(np.array([[1000, 1000], [30, 0]]))
    assert (page == 237).all(-1).mean() < 0.01
    assert above < below and left < right
    with pytest.raises(ValueError, match=r"must be \(2, 2\) for 2 names, got \(3, 3\)"):
        confusion_matrix_figure(np.eye(3), ["first", "second"], tmp_path / "matrix.png")


def test_names_are_shown_letter_by_letter(tmp_path, texts, monkeypatch):
    """Class names are a user's: line ends, formulas that are none, a leading underscore."""
    from matplotlib.axes import Axes

    names, labels = ["two\nlines", "$\\frac$", "_hidden"], np.array([[0, 1, 2]])
    panel([[labels]], ["a\ntitle"], names, palette(3), tmp_path / "panel.png")
    assert [text for text, _ in texts] == ["a title", "two lines", "$\\frac$", "_hidden"]
    shown, legend = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda *a, **k: shown.append(legend(*a, **k)) or shown[-1])
    curves_figure([{"step": 1, **dict.fromkeys(names, 1.0)}], names, tmp_path / "curves.png")
    escaped = ["two lines", r"\$\frac\$", "_hidden"]
    assert [text.get_text() for text in shown[0].get_texts()] == escaped
    confusion_matrix_figure(np.eye(3), names, tmp_path / "matrix.png")  # a formula that is none would raise


@pytest.mark.slow
def test_a_confusion_matrix_of_many_classes_stays_a_picture_one_can_open(tmp_path):
    count = 150
    matrix = np.eye(count) + np.eye(count, k=5)
    confusion_matrix_figure(matrix, [f"class {i}" for i in range(count)], tmp_path / "matrix.png")
    page = read(tmp_path / "matrix.png")
    assert max(page.shape) < 2600
    assert (np.abs(page.astype(int) - (8, 48, 107)) < 6).all(-1).sum() > 5 * 100, "the last rows are at 100 %"


def test_curves_follow_their_records(tmp_path):
    records = [{"step": step, "loss": 1.0, "score": step**1.1} for step in (10, 5, 30, 20)]
    records += [{"step": 40}, {"step": 50, "loss": None}, {"note": "without a step"}]
    curves_figure(records, ["loss", "score"], tmp_path / "curves.png")
    page = read(tmp_path / "curves.png")
    curves_figure(sorted(records, key=lambda r: r.get("step", 0)), ["loss", "score"], tmp_path / "in_order.png")
    np.testing.assert_array_equal(read(tmp_path / "in_order.png"), page)
    orange = (np.abs(page.astype(int) - (230, 159, 0)) < 12).all(-1)[:, : page.shape[1] * 7 // 10]
    rows, columns = np.nonzero(orange)  # the second key's line; smaller rows are higher
    assert np.corrcoef(rows, columns)[0, 1] < -0.99, "it rises, nearly straight"
    with pytest.raises(ValueError, match="No record has 'agreement'.*'loss', 'note', 'score', 'step'"):
        curves_figure(records, ["loss", "agreement"], tmp_path / "curves.png")


def test_several_plots_share_their_steps_and_have_their_own_lines(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, subplots = [], Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda *a, **k: figures.append(subplots(*a, **k)) or figures[-1])
    records = [{"step": step, **{f"key {i}": float(step * i) for i in range(9)}} for step in (1, 2)]
    groups = {"loss": ["key 1"], "many": [f"key {i}" for i in range(9)]}
    curves_figure(records, groups, tmp_path / "curves.png")
    (grid,) = figures
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["loss", "many"]
    assert [len(axes.get_lines()) for axes in grid[:, 0]] == [1, 9]
    assert grid[0, 0].get_lines()[0].get_ydata().tolist() == [1, 2] and grid[1, 0].get_xlabel() == "step"
    looks = {(line.get_color(), line.get_linestyle()) for line in grid[1, 0].get_lines()}
    assert len(looks) == 9, "each line can be told from the others"
    for axes in grid[:, 0]:  # nothing is clipped
        box = axes.get_legend().get_window_extent()
        width, height = axes.figure.canvas.get_width_height()
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height


def test_matplotlib_is_imported_only_by_what_draws_with_it():
    tree = ast.parse(Path(visualization.__file__).read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "matplotlib" not in ast.unparse(top)
