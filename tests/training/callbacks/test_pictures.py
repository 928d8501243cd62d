"""The pictures that a run draws and gives to its trackers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.toy import NAMES, settings, toy_models, write_world
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cps_hf import visualization
from cps_hf.data.cityscapes import NAMES as CITYSCAPES
from cps_hf.data.cityscapes import PALETTE
from cps_hf.data.labels import LabelEncoding
from cps_hf.objectives import CrossPseudoSupervision, Supervised
from cps_hf.training.callbacks import pictures
from cps_hf.training.trainer import CPSTrainer


@pytest.fixture
def small_curves():
    """Replaces that of conftest.py: here the curves are drawn."""


def trainer_for(tmp_path, models, objective, **fields):
    world = write_world(tmp_path / "world", [(31, 45), (46, 30), (33, 33)])
    unlabeled = {} if not objective.views else {"unlabeled_dataset": world.remove_columns("label")}
    values = {"output_dir": str(tmp_path / "out"), "crop_size": [32, 40], "per_device_train_batch_size": 2}
    values |= {"optim": "adamw", "dataloader_num_workers": 0, "logging_steps": 1, "disable_tqdm": True} | fields
    return CPSTrainer(
        models, **settings(**values), objective=objective, train_dataset=world, eval_dataset=world, **unlabeled
    )


def test_predictions_are_drawn_at_each_evaluation_and_logged(tmp_path, monkeypatch):
    panels, panel = [], visualization.panel
    monkeypatch.setattr(visualization, "panel", lambda *a, **k: panels.append((a, k)) or panel(*a, **k))
    matrices, figure = [], visualization.write_confusion_matrix
    monkeypatch.setattr(
        visualization, "write_confusion_matrix", lambda *a, **k: matrices.append((a, k)) or figure(*a, **k)
    )
    trainer = trainer_for(
        tmp_path, toy_models(), CrossPseudoSupervision(), max_steps=4, eval_steps=2, num_pictures=2,
        report_to=["tensorboard"], run_name="a-run",
    )  # fmt: skip
    trainer.train()
    folder = tmp_path / "out" / "pictures"
    drawn = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert drawn == ["confusion_matrix.png", "curves.png", "predictions.png"]

    (events,) = {path.parent for path in (tmp_path / "out").rglob("events.*") if path.parent.name == "a-run"}
    shown = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    steps = {tag: [image.step for image in shown.Images(tag)] for tag in shown.Tags()["images"]}
    assert steps == {"pictures/predictions": [2, 4], "pictures/curves": [4], "pictures/confusion_matrix": [4]}
    for name in ("predictions", "curves", "confusion_matrix"):
        size = Image.open(folder / f"{name}.png").size
        assert (shown.Images(f"pictures/{name}")[-1].width, shown.Images(f"pictures/{name}")[-1].height) == size

    (rows, titles, *_), options = panels[-1]
    assert titles == ["image", "label", "branch 0", "branch 1", "agreement"] and len(rows) == 2
    assert "only branch 1 is right" in options["legend"]
    networks = [branch.eval() for branch in trainer.module.branches]
    for (image, label, *predictions, agreement), size in zip(rows, [(31, 45), (46, 30)], strict=True):
        pixels = trainer.evaluator.logits(networks[0], image[None]).argmax(1)[0]
        assert tuple(label.shape) == size and torch.equal(predictions[0], pixels)
        np.testing.assert_array_equal(agreement, visualization.agreement_map(*predictions, label))

    written = json.loads((tmp_path / "out" / "results.json").read_text())["final"]
    best = max(("branch_0", "branch_1"), key=lambda row: written[row]["mean_iou"])
    ((matrix, names, _), named), = matrices  # fmt: skip
    assert torch.equal(matrix, trainer.evaluator.confusion_matrices[best]) and names == [*NAMES]
    assert named["title"] == f"{best.replace('_', ' ')}, step 4"


def test_without_pictures_only_curves_are_drawn(tmp_path, monkeypatch):
    trainer_for(tmp_path, toy_models(1), Supervised(), max_steps=1, num_pictures=0).train()
    assert [path.name for path in (tmp_path / "out" / "pictures").iterdir()] == ["curves.png"]
    titles = []
    monkeypatch.setattr(visualization, "panel", lambda rows, given, *a, **k: titles.append((given, k["legend"])))
    trainer = trainer_for(tmp_path / "b", toy_models(1), Supervised(), max_steps=1, num_pictures=1)
    trainer.exporter.pictures.draw({"branch 0": trainer.module.branches[0]}, tmp_path / "x.png")
    assert titles == [(["image", "label", "branch 0"], None)]


def test_curves_are_grouped_by_meaning(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(visualization, "write_curves", lambda records, groups, path: drawn.update(groups))
    record = {"step": 1, "loss": 1.0, "cps_loss": 1.0, "eval_mean_iou": 0.5, "eval_branch_0_mean_iou": 0.5}
    record |= {"eval_mean_mean_iou": 0.6, "agreement": 0.9, "learning_rate": 0.1, "eval_branch_0_mean_accuracy": 0.1}
    assert pictures.draw_curves([record], tmp_path)
    assert drawn == {
        "loss": ["cps_loss", "loss"],
        "mean IoU": ["eval_branch_0_mean_iou", "eval_mean_mean_iou"],
        "agreement": ["agreement"],
    }
    assert not pictures.draw_curves([{"step": 1, "learning_rate": 0.1}], tmp_path)


@pytest.mark.parametrize("name", ["aim", "wandb", "trackio"])
def test_other_trackers_get_pictures_in_their_format(tmp_path, name):
    Image.new("RGB", (5, 3), (1, 2, 3)).save(tmp_path / "a.png")
    given = []

    class Tracker:
        pass

    tracker = Tracker()
    tracker.name = name
    if name != "trackio":
        tracker.log_images = lambda values, step: given.append((values, step))
    pictures.give_to_trackers([tracker], [tmp_path / "a.png"], step=7)
    if name == "trackio":
        assert not given
        return
    ((values, step),) = given
    picture = values["pictures/a"] if name == "aim" else values["pictures/a"][0]
    assert step == 7 and np.asarray(picture).tolist() == [[[1, 2, 3]] * 5] * 3


def test_colours_come_from_the_data_set_or_the_default_palette():
    own = ((9, 9, 9), (8, 8, 8))
    assert pictures.palette_of(LabelEncoding(("a", "b"), palette=own).to_feature(), ["a", "b"]) == own
    assert pictures.palette_of(None, CITYSCAPES) == PALETTE
    for background in ("background", "Un-labeled", "class_0", "LABEL_0"):
        assert pictures.palette_of(None, [background, "b"]) == visualization.palette(2)  # black: not tinted
    feature = LabelEncoding(("a", "b")).to_feature()
    assert pictures.palette_of(feature, ["a", "b"]) == visualization.palette(3)[1:]  # class 0 is tinted
    names = [f"thing {i}" for i in range(255)]
    assert pictures.palette_of(None, names) == visualization.palette(255)
