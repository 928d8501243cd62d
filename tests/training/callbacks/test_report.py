"""A run's report: its last evaluation, the worst and best images, the page."""

import io
import json

import pytest
from PIL import Image
from support.toy import NAMES, settings, tiny_upernet, toy_models, write_world

from cps_hf import visualization
from cps_hf.metrics.mean_iou import IoUCounter
from cps_hf.objectives import CrossPseudoSupervision, Supervised
from cps_hf.training.trainer import CPSTrainer
from cps_hf.visualization.runs import read_evaluation

SIZES = [(31, 45), (46, 30), (33, 33), (40, 28), (36, 36)]


def trainer_for(tmp_path, models, objective, **fields):
    world = write_world(tmp_path / "world", SIZES)
    unlabeled = {} if not objective.views else {"unlabeled_dataset": world.remove_columns("label")}
    values = {"output_dir": str(tmp_path / "out"), "crop_size": [32, 40], "per_device_train_batch_size": 2}
    values |= {"optim": "adamw", "dataloader_num_workers": 0, "disable_tqdm": True, "max_steps": 2} | fields
    return CPSTrainer(
        models, **settings(**values), objective=objective, train_dataset=world, eval_dataset=world, **unlabeled
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    trainer = trainer_for(tmp_path, toy_models(), CrossPseudoSupervision(), num_pictures=2)
    trainer.train()
    return trainer, tmp_path / "out"


def test_the_best_networks_evaluation_ranks_its_images(finished):
    trainer, out = finished
    found, row = read_evaluation(out), trainer.state.best["branch"]
    assert found["network"] == row and found["step"] == 2 and found["images"] == len(SIZES)
    assert found["confusion_matrix"] == trainer.evaluator.confusion_matrices[row].tolist()
    assert found["classes"] == [*NAMES] and len(found["palette"]) == 3

    network, scores = trainer.module.networks()[row].eval(), {}
    for batch in trainer.evaluator.stream(trainer.eval_dataset):
        for sample in batch:
            prediction = trainer.evaluator.logits(network, sample["image"][None]).argmax(1)[0]
            own = IoUCounter(3).compute(predictions=prediction, references=sample["label"])
            scores[sample["id"]] = own["mean_iou"], sample, prediction
    ranked = sorted(scores, key=lambda name: scores[name][0])
    assert [entry["id"] for entry in found["worst"]] == ranked[:2]
    assert [entry["id"] for entry in found["best"]] == ranked[:-3:-1]
    for entry in found["worst"] + found["best"]:
        score, sample, prediction = scores[entry["id"]]
        assert entry["mean_iou"] == pytest.approx(score)
        palette = [tuple(color) for color in found["palette"]]
        for name, labels in zip(entry["files"][1:], (sample["label"], prediction), strict=True):
            expected = visualization.enlarged(visualization.overlay(sample["image"], labels, palette, 0.6), 480)
            as_jpeg = io.BytesIO()
            Image.fromarray(expected).save(as_jpeg, format="JPEG", quality=88)
            assert (out / name).read_bytes() == as_jpeg.getvalue()


def test_the_page_shows_images_and_is_in_no_pushed_folder(finished):
    _, out = finished
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == 12 and text.count("data:image/png;base64,") == 1
    for name in NAMES:
        assert name in text
    for branch in ("best", "branch_0", "branch_1"):
        held = {path.name for path in (out / branch).rglob("*")}
        assert not held & {"report.html", "evaluation.json"} and not any(name.endswith(".jpg") for name in held)


def test_the_report_omits_images_and_classes_that_are_missing(tmp_path):
    trainer_for(tmp_path / "a", toy_models(1), Supervised(), num_pictures=0).train()
    out = tmp_path / "a" / "out"
    assert read_evaluation(out)["worst"] == [] and not (out / "pictures" / "images").exists()
    assert "<h2>Classes" in (out / "report.html").read_text(encoding="utf-8")
    trainer = trainer_for(tmp_path / "b", toy_models(1), Supervised())
    trainer.eval_dataset = None
    trainer.train()
    assert not (tmp_path / "b" / "out" / "evaluation.json").exists()
    assert "<h2>Classes" not in (tmp_path / "b" / "out" / "report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("cps_hf.training.callbacks.report.write_report", fail)
    results = trainer_for(tmp_path, tiny_upernet(), CrossPseudoSupervision(), num_pictures=0).train()
    assert results["steps"] == 2 and "Without the report: OSError: the disk is full" in caplog.text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["steps"] == 2
