"""A finished run's figures are returned, not written."""

import itertools
import json

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cps_hf.visualization import classes_figure, confusion_figure, curves_figure, images_figure
from cps_hf.visualization.runs import class_rows, read_records, worst_and_best


@pytest.fixture
def run(tmp_path):
    records = [{"step": 1, "loss": 2.0, "cps_loss": 1.0}, {"step": 2, "loss": 1.5, "cps_loss": 0.5}]
    records.append({"step": 2, "eval_branch_0_mean_iou": 0.5, "eval_agreement": 0.9, "eval_commonest_class": 0.6})
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')  # killed while writing
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg")
    entry = {"id": "$\\frac$ <b>", "mean_iou": 0.25, "files": ["a.jpg"] * 3}
    evaluation = {"network": "branch_0", "step": 2, "images": 1, "classes": ["$x", "b", "c"], "worst": [entry]}
    evaluation |= {"best": [], "palette": [[0, 0, 0], [9, 9, 9], [8, 8, 8]]}
    evaluation |= {"confusion_matrix": [[6, 2, 0], [1, 1, 0], [0, 0, 0]]}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return tmp_path


def test_figures_are_returned_without_pyplot(run):
    import matplotlib.pyplot as plt

    before, files = plt.get_fignums(), sorted(run.iterdir())
    figures = [draw(run) for draw in (curves_figure, confusion_figure, classes_figure, images_figure)]
    assert all(isinstance(figure, Figure) for figure in figures) and plt.get_fignums() == before
    for figure in figures:
        figure.canvas.draw()  # an invalid formula would raise
    assert sorted(run.iterdir()) == files
    curves, confusion, classes, images = figures
    assert [axes.get_ylabel() for axes in curves.axes] == ["loss", "mean IoU", "agreement"]
    assert curves.axes[0].get_lines()[1].get_ydata().tolist() == [2.0, 1.5]
    assert [text.get_text() for text in curves.axes[1].get_legend().get_texts()] == ["branch 0"]
    assert confusion.axes[0].get_title() == "branch 0, step 2"
    assert [bar.get_width() for bar in classes.axes[0].patches] == pytest.approx([100 * 6 / 9, 25, 0])
    assert [bar.get_width() for bar in classes.axes[1].patches] == pytest.approx([80, 20, 0])
    assert len(images.axes) == 3


def test_titles_of_images_do_not_overlap(run):
    path = run / "evaluation.json"
    content = json.loads(path.read_text())
    content["worst"][0]["id"] = "street_00_png.rf.0123456789abcdef0123456789abcdef"
    path.write_text(json.dumps(content))
    figure = images_figure(run)
    figure.canvas.draw()
    titles = [text for axes in figure.axes for text in axes.findobj(Text) if text.get_text().strip()]
    assert len(titles) == 4
    # An empty last line does not count.
    boxes = [text.get_window_extent() for text in titles]
    lines = [text.get_text().count("\n") + 1 for text in titles]
    for box, count in zip(boxes, lines, strict=True):
        box.y0 += (box.y1 - box.y0) * (count - 1) / count
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_scores_by_class_follow_the_formulas(run):
    first, second, third = class_rows(json.loads((run / "evaluation.json").read_text()))
    assert (first["iou"], first["dice"], first["accuracy"]) == pytest.approx((6 / 9, 12 / 15, 6 / 8))
    assert (second["share"], second["predicted"]) == pytest.approx((0.2, 0.3))
    assert third["iou"] is third["dice"] is third["accuracy"] is None and third["share"] == 0


def test_a_wrong_folder_is_an_error_with_advice(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for draw, said in ((curves_figure, "no metrics.jsonl"), (confusion_figure, "no evaluation.json")):
        with pytest.raises(ValueError, match=f"{said}.*pass .*output folder"):
            draw(tmp_path / "empty")
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "worst": []}))
    with pytest.raises(ValueError, match="no pictures.*num_pictures"):
        images_figure(run)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="evaluation.json is incomplete"):
        classes_figure(run)
    assert [record["step"] for record in read_records(run)] == [1, 2, 2]


def test_images_are_ranked_and_none_is_shown_twice():
    assert worst_and_best([0.5, None, 0.1, 0.9, float("nan")], 2) == ([2, 0], [3])
    assert worst_and_best([0.5, 0.1, 0.9, 0.3, 0.7], 2) == ([1, 3], [2, 4])
    assert worst_and_best([], 2) == ([], []) and worst_and_best([0.4], 3) == ([0], [])
