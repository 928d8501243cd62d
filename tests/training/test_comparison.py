"""Did the unlabeled images help? Counts per image, the second stage against the first, and the choice of `best`."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.resume_cases import (
    BrokenOff,
    Case,
    break_off,
    make_trainer,
    run_whole,
    same,
    without_cards_and_pictures,
    write_resume_world,
)
from support.toy import ID2LABEL, NAMES, write_world

from cps_hf.data.streams import EvaluationStream
from cps_hf.metrics.bootstrap import ImageCounts, paired_bootstrap
from cps_hf.metrics.mean_iou import IoUCounter
from cps_hf.training import comparison, evaluation
from cps_hf.training.reporting import without_nan

CPS = Case("cps", "map", workers=0, processes=1)
TWO_STAGES = {"max_steps": 4, "pretrain_steps": 2, "eval_steps": 1, "save_steps": 1, "agreement_images": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_resume_world(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Twelve images of three sizes, so that batches sorted by size are not in the set's order."""
    return write_world(tmp_path_factory.mktemp("judged"), [(30, 40), (24, 32), (40, 30)] * 4, first=50)


def counts(seed: int, images: int = 20, right: float = 0.6) -> ImageCounts:
    """Predictions of a network with that accuracy, on the same labels for every seed."""
    truth = np.random.default_rng(0).integers(100, 400, (images, 3))
    correct = np.random.default_rng(seed).binomial(truth, right)
    matrices = np.zeros((images, 3, 3), int)
    for c in range(3):
        matrices[:, c, c], matrices[:, c, (c + 1) % 3] = correct[:, c], (truth - correct)[:, c]
    return ImageCounts.of(matrices)


# ---------------------------------------------------------------------------------------------- counts per image


def test_image_counts_are_ordered_and_add_up_to_the_scores(root, tmp_path, judged):
    trainer = make_trainer(root, CPS, tmp_path / "out", per_device_eval_batch_size=5, ema_decay=0.9)
    scores = trainer.evaluator.scores(judged)
    found = trainer.evaluator.image_counts
    assert found.keys() == scores.keys() and len(found["branch_0"]) == 12
    labels = [sample["label"] for batch in EvaluationStream(judged) for sample in batch]
    predicted = dict(trainer.predict(judged, branch=1))
    for i, (name, label) in enumerate(zip(judged["id"], labels, strict=True)):
        one = IoUCounter(3)
        one.add(prediction=predicted[name], reference=label)
        matrix = one.confusion_matrix.numpy()
        row = found["branch_1"]
        assert (row.correct[i] == matrix.diagonal()).all() and (row.truth[i] == matrix.sum(1)).all()
        assert (row.predicted[i] == matrix.sum(0)).all()
    for row, of_images in found.items():
        assert of_images.mean_iou() == pytest.approx(scores[row]["mean_iou"])
        total = trainer.evaluator.confusion_matrices[row].numpy()
        assert (of_images.predicted.sum(0) == total.sum(0)).all()


def test_the_shares_of_processes_are_joined_in_the_sets_order():
    """Process r has the images r, r + 3, r + 6, ... Seven images make the shares unequal, and one leaves some
    empty."""
    counts = np.arange(7 * 3 * 2).reshape(7, 3, 2)
    joined = evaluation._in_order([counts[rank::3] for rank in range(3)], 3)
    assert (np.stack([joined.correct, joined.truth, joined.predicted], 1) == counts).all()
    few = evaluation._in_order([counts[:1], counts[:0]], 2)
    assert len(few) == 1 and (few.truth == counts[:1, 1]).all()


def test_too_many_image_counts_are_dropped_with_a_warning(root, tmp_path, judged, monkeypatch, caplog):
    trainer = make_trainer(root, CPS, tmp_path / "out")
    kept = trainer.evaluator.scores(judged)
    monkeypatch.setattr(evaluation, "MOST_COUNTS", 3 * 3 * 11)
    assert same(trainer.evaluator.scores(judged), kept) and trainer.evaluator.image_counts == {}
    assert "too large to compare networks image by image" in caplog.text


def test_packed_counts_are_restored():
    found = comparison.unpack(json.loads(json.dumps(comparison.pack(counts(1)))))
    for name in ("correct", "truth", "predicted"):
        value, expected = getattr(found, name), getattr(counts(1), name)
        assert (value == expected).all() and value.dtype == np.int64


# ---------------------------------------------------------------------------------------------- two stages


def test_results_say_what_the_second_stage_changed(root, tmp_path, judged):
    with without_cards_and_pictures():
        results = make_trainer(root, CPS, tmp_path / "out", eval_dataset=judged, **TWO_STAGES).train()
    found = results["comparison"]
    assert found["images"] == 12 and list(found["branches"]) == ["branch_0", "branch_1", "mean"]
    for row, one in found["branches"].items():
        before, after = (results["stages"][stage][row] for stage in ("supervised", "final"))
        assert (one["before"], one["after"]) == pytest.approx((before["mean_iou"], after["mean_iou"]))
        difference = one["difference"]
        assert difference["mean_iou"] == pytest.approx(after["mean_iou"] - before["mean_iou"])
        assert difference["low"] <= difference["mean_iou"] <= difference["high"]
        assert [c["name"] for c in one["classes"]] == [*NAMES]
        ious = np.subtract(after["per_category_iou"], before["per_category_iou"])
        assert [c["difference"] for c in one["classes"]] == pytest.approx(ious, nan_ok=True)
    assert "branch 0's mean IoU" in found["sentence"] and "12 validation images): " in found["sentence"]
    assert 0 < results["training"]["supervised_seconds"] < results["training"]["seconds"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["comparison"] == json.loads(json.dumps(without_nan(found)))


def test_without_a_second_stage_or_unlabeled_images_nothing_is_compared(root, tmp_path):
    with without_cards_and_pictures():
        one_stage = make_trainer(root, CPS, tmp_path / "one", max_steps=2, eval_steps=None).train()
        supervised = Case("supervised", "map", workers=0, processes=1)
        two = make_trainer(root, supervised, tmp_path / "two", unlabeled_dataset=None, **TWO_STAGES).train()
    assert "comparison" not in one_stage and "comparison" not in two
    assert "supervised_seconds" not in one_stage["training"]


@pytest.mark.parametrize("step", [3, 4])
def test_an_interrupted_run_has_the_same_comparison(root, tmp_path, step):
    """Interrupted after the border, so that its counts are only in the checkpoint."""
    with without_cards_and_pictures():
        whole = run_whole(root, CPS, tmp_path / "whole", **TWO_STAGES)
        broken = make_trainer(root, CPS, tmp_path / "out", **TWO_STAGES)
        break_off(broken, step=step, micro_batch=1)
        with pytest.raises(BrokenOff):
            broken.train()
        resumed = run_whole(root, CPS, tmp_path / "out", resume_from_checkpoint="auto", **TWO_STAGES)
        again = run_whole(root, CPS, tmp_path / "out", resume_from_checkpoint="auto", **TWO_STAGES)  # nothing to do
    assert whole["results"]["comparison"]["images"] == 3
    assert same(resumed["results"], whole["results"]) and same(again["results"], whole["results"])
    assert same(resumed["exported"], whole["exported"])


def test_a_new_evaluation_set_drops_the_old_counts(root, tmp_path, judged):
    with without_cards_and_pictures():
        broken = make_trainer(root, CPS, tmp_path / "out", **TWO_STAGES)
        break_off(broken, step=4, micro_batch=1)
        with pytest.raises(BrokenOff):
            broken.train()
        fields = {"eval_dataset": judged, "resume_from_checkpoint": "auto", **TWO_STAGES}
        results = make_trainer(root, CPS, tmp_path / "out", **fields).train()
    assert "comparison" not in results


# ---------------------------------------------------------------------------------------------- the choice of best


class Scripted:
    """Replaces the evaluator's `scores`: each evaluation returns the next accuracy of each branch."""

    def __init__(self, trainer, *shares: tuple[float, float], images: int = 20):
        self.trainer, self.shares, self.images = trainer, list(shares), images

    def __call__(self, dataset):
        found = {}
        for i, right in enumerate(self.shares.pop(0)):
            found[f"branch_{i}"] = counts(7 + i, self.images, right)
        self.trainer.evaluator.image_counts = found
        scores = {}
        for row, of_images in found.items():
            counter = IoUCounter(3)
            correct, truth = of_images.correct.sum(0), of_images.truth.sum(0)
            matrix = np.diag(correct)
            matrix[range(3), [1, 2, 0]] = truth - correct
            counter.confusion_matrix = torch.from_numpy(matrix)
            scores[row] = evaluation.plain(counter.compute())
        return scores


def train_scripted(root: Path, out: Path, *shares, images: int = 20, **fields):
    """Evaluated at the steps 1, 2 (the border), 3 and 4."""
    with without_cards_and_pictures():
        trainer = make_trainer(root, CPS, out, **TWO_STAGES | fields)
        trainer.evaluator.scores = Scripted(trainer, *shares, images=images)
        return trainer.train()


def best_is(out: Path, folder: str) -> bool:
    return same(load_file(out / "best" / "model.safetensors"), load_file(out / folder / "model.safetensors"))


def test_best_is_the_second_stages_network_despite_a_lower_score(root, tmp_path):
    out = tmp_path / "out"
    results = train_scripted(root, out, (0.5, 0.5), (0.70, 0.71), (0.6, 0.6), (0.699, 0.705))
    assert (results["best"]["step"], results["best"]["branch"]) == (4, "branch_1") and best_is(out, "branch_1")
    assert results["comparison"]["branches"]["branch_1"]["verdict"] == "within chance"


def test_the_choice_among_the_second_stages_steps_is_by_score(root, tmp_path):
    results = train_scripted(root, tmp_path / "out", (0.5, 0.5), (0.70, 0.71), (0.72, 0.6), (0.6, 0.71))
    assert (results["best"]["step"], results["best"]["branch"]) == (3, "branch_0")


def test_best_is_supervised_if_the_second_stage_is_worse(root, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        results = train_scripted(root, out, (0.5, 0.5), (0.70, 0.71), (0.4, 0.4), (0.5, 0.6))
    assert (results["best"]["step"], results["best"]["branch"]) == (2, "branch_1") and best_is(out, "supervised_1")
    assert results["best"]["branch_1"] == results["stages"]["supervised"]["branch_1"]
    assert results["comparison"]["branches"]["branch_1"]["verdict"] == "worse"
    assert "best/ is branch_1 of the supervised stage" in caplog.text and "branch_1 of step 4, is worse" in caplog.text
    with without_cards_and_pictures():
        again = make_trainer(root, CPS, out, resume_from_checkpoint="auto", **TWO_STAGES).train()
    assert again["best"] == results["best"] and best_is(out, "supervised_1")


def test_with_few_images_best_stays_the_second_stages_network(root, tmp_path):
    results = train_scripted(root, tmp_path / "out", (0.5, 0.5), (0.7, 0.7), (0.4, 0.4), (0.5, 0.6), images=9)
    assert (
        results["best"]["step"] == 4 and results["comparison"]["branches"]["branch_0"]["verdict"] == "too few images"
    )
    said = results["comparison"]["sentence"]
    assert said.startswith("Whether the second stage helped cannot be told from 9 validation images (branch 0's mean ")


def test_best_stays_if_the_supervised_network_cannot_be_copied(root, tmp_path):
    from cps_hf.training.late import AfterTrainingError

    out = tmp_path / "out"
    with without_cards_and_pictures():
        trainer = make_trainer(root, CPS, out, **TWO_STAGES)
        trainer.evaluator.scores = Scripted(trainer, (0.5, 0.5), (0.7, 0.7), (0.4, 0.4), (0.5, 0.6))
        trainer.exporter.copy_supervised = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        with pytest.raises(AfterTrainingError, match="best: .*No space left"):
            trainer.train()
        assert trainer.state.best["step"] == 4 and best_is(out, "branch_1")
        again = make_trainer(root, CPS, out, resume_from_checkpoint="auto", **TWO_STAGES).train()
    assert again["best"]["step"] == 2 and best_is(out, "supervised_0")


def test_best_stays_if_the_supervised_network_is_gone(root, tmp_path, caplog):
    """Its folder was deleted, or the run was resumed from a checkpoint in another folder."""
    out = tmp_path / "out"
    with without_cards_and_pictures(), caplog.at_level(logging.WARNING):
        trainer = make_trainer(root, CPS, out, **TWO_STAGES)
        scripted = Scripted(trainer, (0.5, 0.5), (0.70, 0.71), (0.4, 0.4), (0.5, 0.6))

        def scores(dataset):
            if trainer.state.global_step == 3:
                shutil.rmtree(out / "supervised_1")
            return scripted(dataset)

        trainer.evaluator.scores = scores
        results = trainer.train()
    assert results["best"]["step"] == 4 and best_is(out, "branch_1")
    assert f"is worse beyond chance than branch_1 of the supervised stage, but {out / 'supervised_1'}" in caplog.text


# ---------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize("order, verb", [(1, "raised"), (-1, "lowered")])
def test_the_sentence_has_difference_interval_and_classes(order, verb):
    before, after = [counts(1, 60, 0.60), counts(2, 60, 0.66)][::order]
    found = comparison.describe(before, after, [*ID2LABEL.values()])
    interval = paired_bootstrap(before, after)
    said = comparison.in_words(comparison.second_stage("branch_0"), found)
    low, high = (f"{100 * end:+.1f}" for end in (interval.low, interval.high))
    points = f"{abs(100 * interval.difference):.1f} points"
    first, last = (f"{100 * score:.1f} %" for score in (before.mean_iou(), after.mean_iou()))
    assert said.startswith(f"The second stage {verb} branch 0's mean IoU by {points}, from {first} to {last} (95 % ")
    assert f"interval {low} to {high}, 60 validation images): beyond chance. Beyond chance by class: " in said
    assert said.endswith(").")
    for name in NAMES:
        assert f"{name} {'+' if order == 1 else '-'}" in said
    table = comparison.table(found).splitlines()
    verdict = {1: "better", -1: "worse"}[order]
    assert len(table) == 2 + 3 + 1 and table[-1].split()[0] == "mIoU" and table[-1].endswith(verdict)


def test_the_sentence_says_what_is_not_known():
    words = comparison.second_stage("branch_0")
    chance = comparison.describe(counts(1), counts(2), NAMES)
    assert chance["verdict"] == "within chance"
    said = comparison.in_words(words, chance)
    worse = chance["difference"]["mean_iou"] < 0
    points = f"{abs(100 * chance['difference']['mean_iou']):.1f} points {'lower' if worse else 'higher'} than before"
    assert said.startswith(f"After the second stage, branch 0's mean IoU is {points}, ")
    assert f"): within chance. About {chance['images_needed']} images would tell. No single class changed" in said
    one = comparison.describe(counts(1, 1), counts(2, 1, 0.9), NAMES)
    said = comparison.in_words(words, one, images="images of here")
    assert said.startswith(
        "Whether the second stage helped cannot be told from 1 image of here (branch 0's mean IoU: "
    )
    assert said.endswith("; about 10 would be enough.")
    assert comparison.table(without_nan(one)).count(" - ") == 4
