"""A run's report: the evaluation of its best network, the worst and best images, the page."""

import io
import json

import pytest
from PIL import Image
from support.toy import NAMES, settings, tiny_upernet, toy_models, write_world
from transformers import TrainerCallback

from cps_hf import visualization
from cps_hf.inference import as_logits_fn
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


def test_the_evaluation_is_of_the_network_in_best(tmp_path):
    trainer = trainer_for(
        tmp_path, toy_models(1), Supervised(), max_steps=3, eval_steps=1, num_pictures=1, learning_rate=0.05
    )
    matrices = {}

    class Choose(TrainerCallback):
        """Makes step 2 the best."""

        def on_evaluate(self, args, state, control, **kwargs):
            state.scores["branch_0"]["mean_iou"] = {1: 0.1, 2: 0.9, 3: 0.2}[state.global_step]
            matrices[state.global_step] = trainer.evaluator.confusion_matrices["branch_0"].tolist()

    trainer.add_callback(Choose())
    trainer.train()
    out, found = tmp_path / "out", read_evaluation(tmp_path / "out")
    assert (found["network"], found["step"]) == ("branch_0", 2) and found["confusion_matrix"] == matrices[2]
    assert matrices[1] != matrices[2] != matrices[3]
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "Branch 0 at step 2 (in <code>best/</code>)" in text
    assert text.count("data:image/jpeg;base64,") == 6

    best = as_logits_fn(type(trainer.models[0]).from_pretrained(out / "best").eval())
    (worst,) = found["worst"]
    samples = [sample for batch in trainer.evaluator.stream(trainer.eval_dataset) for sample in batch]
    (sample,) = (sample for sample in samples if sample["id"] == worst["id"])
    prediction = trainer.evaluator.logits(best, sample["image"][None]).argmax(1)[0]
    assert IoUCounter(3).compute(predictions=prediction, references=sample["label"])["mean_iou"] == worst["mean_iou"]


def test_without_an_evaluation_of_best_the_last_one_is_described(tmp_path):
    trainer = trainer_for(tmp_path, toy_models(1), Supervised(), num_pictures=0)

    class Other(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            state.best["step"] = 1  # as after a supervised stage that stays the best

    trainer.callback_handler.callbacks.insert(0, Other())
    trainer.train()
    assert read_evaluation(tmp_path / "out")["step"] == 2


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
