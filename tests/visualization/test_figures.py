"""Matplotlib figures, checked pixel by pixel."""

import numpy as np
import pytest
import torch
from support.pictures import read

from cps_hf.visualization import write_confusion_matrix, write_curves


def test_a_confusion_matrix_has_the_truth_in_rows(tmp_path):
    def dark(matrix):
        """Where the plot (left of the colour bar) is as dark as 100 %: mean (row, column) in shares of the page."""
        write_confusion_matrix(matrix, ["first", "second"], tmp_path / "matrix.png")
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
        write_confusion_matrix(np.eye(3), ["first", "second"], tmp_path / "matrix.png")


def test_names_are_not_formulas(tmp_path, monkeypatch):
    """Users choose class names: line ends, invalid formulas, a leading underscore."""
    from matplotlib.axes import Axes

    names = ["two\nlines", "$\\frac$", "_hidden"]
    shown, legend = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda *a, **k: shown.append(legend(*a, **k)) or shown[-1])
    write_curves([{"step": 1, **dict.fromkeys(names, 1.0)}], names, tmp_path / "curves.png")
    escaped = ["two lines", r"\$\frac\$", "_hidden"]
    assert [text.get_text() for text in shown[0].get_texts()] == escaped
    write_confusion_matrix(np.eye(3), names, tmp_path / "matrix.png")  # an invalid formula would raise


@pytest.mark.slow
def test_a_large_confusion_matrix_stays_small_enough(tmp_path):
    count = 150
    matrix = np.eye(count) + np.eye(count, k=5)
    write_confusion_matrix(matrix, [f"class {i}" for i in range(count)], tmp_path / "matrix.png")
    page = read(tmp_path / "matrix.png")
    assert max(page.shape) < 2600
    assert (np.abs(page.astype(int) - (8, 48, 107)) < 6).all(-1).sum() > 5 * 100, "the last rows are at 100 %"


def test_curves_follow_their_records(tmp_path):
    records = [{"step": step, "loss": 1.0, "score": step**1.1} for step in (10, 5, 30, 20)]
    records += [{"step": 40}, {"step": 50, "loss": None}, {"note": "without a step"}]
    write_curves(records, ["loss", "score"], tmp_path / "curves.png")
    page = read(tmp_path / "curves.png")
    write_curves(sorted(records, key=lambda r: r.get("step", 0)), ["loss", "score"], tmp_path / "in_order.png")
    np.testing.assert_array_equal(read(tmp_path / "in_order.png"), page)
    orange = (np.abs(page.astype(int) - (230, 159, 0)) < 12).all(-1)[:, : page.shape[1] * 7 // 10]
    rows, columns = np.nonzero(orange)  # the second key's line; smaller rows are higher
    assert np.corrcoef(rows, columns)[0, 1] < -0.99, "it rises, nearly straight"
    with pytest.raises(ValueError, match="No record has 'agreement'.*'loss', 'note', 'score', 'step'"):
        write_curves(records, ["loss", "agreement"], tmp_path / "curves.png")


def test_several_plots_share_their_steps_and_have_their_own_lines(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, subplots = [], Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda *a, **k: figures.append(subplots(*a, **k)) or figures[-1])
    records = [{"step": step, **{f"key {i}": float(step * i) for i in range(9)}} for step in (1, 2)]
    groups = {"loss": ["key 1"], "many": [f"key {i}" for i in range(9)]}
    write_curves(records, groups, tmp_path / "curves.png")
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
