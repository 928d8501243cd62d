"""The notebook runs from top to bottom, shows its pictures, and completes one round of the loop."""

import ast
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cps_hf.annotations.labelme import is_labelme

NOTEBOOK = Path(__file__).parents[2] / "examples" / "labelling_loop.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(code, number, names):
    """Execute a cell and return the value of its last line, which a notebook shows."""
    tree = ast.parse(code, f"cell {number}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)


def test_it_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(len(code.splitlines()) <= 35 for code in code_cells())


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_closes_the_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the notebook changes the directory; this restores it for other tests
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {"__name__": "__main__"}
    shown = [run_cell(code, number, names) for number, code in enumerate(code_cells())]
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert len(pictures) == 8 and all(np.asarray(picture.convert("L")).std() > 5 for picture in pictures)
    printed = capsys.readouterr().out

    (folder,) = tmp_path.glob("labelling_loop_*")
    classes = json.loads((folder / "data" / "classes.json").read_text())
    labeled = {path.stem for path in (folder / "data" / "masks").iterdir()}
    chosen = names["chosen"]
    assert len(labeled) == 14 and {*chosen} < labeled
    assert "6 written, 8 done before" in printed
    # training used what a person drew
    for name in labeled:
        mask, truth = (np.asarray(Image.open(folder / kind / f"{name}.png")) for kind in ("data/masks", "truth"))
        assert (mask == truth).mean() > 0.99
    # ranked images had no mask, and no image was trained on twice
    with open(folder / "next.csv", newline="") as file:
        ranked = [Path(row["image"]).stem for row in csv.DictReader(file)]
    assert len(ranked) == 22 and ranked[:6] == chosen
    assert "8 images of photos are already in data" in printed and "14 images of photos are already in data" in printed
    # each draft is a LabelMe file that finds its image
    for name in chosen:
        draft = folder / "drafts" / "labelme" / f"{name}.json"
        content = json.loads(draft.read_text(encoding="utf-8"))
        assert is_labelme(content) and (draft.parent / content["imagePath"]).samefile(folder / f"photos/{name}.png")
        assert {shape["label"] for shape in content["shapes"]} <= {*classes}
    assert (folder / "round_1" / "validation.txt").read_text() == (folder / "round_2" / "validation.txt").read_text()
    for run in ("round_1", "round_2"):
        assert (folder / run / "report.html").is_file() and (folder / run / "best" / "model.safetensors").is_file()
        scores = json.loads((folder / f"scores_{run}" / "results.json").read_text())
        assert scores
