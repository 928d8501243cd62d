"""The labeled side of the loop: class weights from counts, colour jitter, batch norm momentum; and resuming with
them."""

import json
import logging

import pytest
import torch
from support.resume_cases import Case, differences, make_trainer, without_cards_and_pictures, write_resume_world
from support.toy import toy_models
from torch import nn

from cps_hf.checkpointing.checkpoints import newest_checkpoint
from cps_hf.config import ModelConfig
from cps_hf.data.class_counts import count_class_pixels
from cps_hf.modeling import set_norm_momentum
from cps_hf.objectives import Supervised

SUPERVISED = Case("supervised", "map", workers=0, processes=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_resume_world(tmp_path_factory.mktemp("resume"))


def train(root, out, case=SUPERVISED, **fields):
    with without_cards_and_pictures():
        trainer = make_trainer(root, case, out, **{"max_steps": 2, "logging_steps": 1, **fields})
        trainer.train()
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("plain") / "out")


def test_the_labeled_sets_frequencies_reach_the_loss_and_the_checkpoint(root, tmp_path, plain, caplog):
    seen = []

    class Watching(Supervised):
        def __call__(self, branches, labeled, unlabeled=None, **rest):
            seen.append(labeled.class_counts)
            return super().__call__(branches, labeled, unlabeled, **rest)

    with caplog.at_level(logging.INFO):
        trainer, losses = train(root, tmp_path / "out", objective=Watching(class_weights=0.5))
    counts = count_class_pixels(trainer.train_dataset, 3)
    assert len(seen) == 4 and all(torch.equal(one, counts.float()) for one in seen)
    assert losses[0] != plain[1][0] and f"in all {len(trainer.train_dataset)} rows" in caplog.text
    state = json.loads((newest_checkpoint(tmp_path / "out") / "trainer_state.json").read_text())
    assert state["fingerprint"]["run"]["train_dataset, pixels by class"] == counts.tolist()


def test_only_a_streams_first_rows_are_counted(root, tmp_path, caplog):
    stream = Case("supervised", "stream", workers=0, processes=1)
    with caplog.at_level(logging.INFO):
        train(root, tmp_path / "out", stream, max_steps=1, objective=Supervised(class_weights=0.5))
    assert "the first 1000 rows of `train_dataset`" in caplog.text
    trainer = make_trainer(root, SUPERVISED, tmp_path / "none", objective=Supervised(class_weights=0.5))
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"label": row["label"].point(lambda _: 255)})
    with pytest.raises(ValueError, match="`class_weights` by frequency: no label of `train_dataset` has a class"):
        trainer.train()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("fields", [{"labeled_color_jitter": 1.0}, {"norm_momentum": 0.01}], ids=lambda f: [*f][0])
def test_colours_of_labeled_images_and_the_norms_momentum_reach_the_run(root, tmp_path, plain, fields):
    trainer, losses = train(root, tmp_path / "out", **fields)
    before, after = plain[0].module.state_dict(), trainer.module.state_dict()
    assert not torch.equal(before["branches.0.model.norm.running_var"], after["branches.0.model.norm.running_var"])
    assert (losses == plain[1]) == ("norm_momentum" in fields)  # running statistics are only used in evaluation


def test_a_momentum_needs_batch_norms_and_is_a_share():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.GroupNorm(1, 2))
    set_norm_momentum(model, 0.02)
    assert model[0].momentum == 0.02
    with pytest.raises(ValueError, match="`norm_momentum`: ToyForSemanticSegmentation has no batch norm"):
        set_norm_momentum(toy_models(1)[0], 0.02)
    with pytest.raises(ValueError, match="`norm_momentum` must be above 0 and at most 1, or none, got 0"):
        ModelConfig(norm_momentum=0.0)


def test_a_run_with_all_labeled_options_resumes_bit_for_bit(root, tmp_path):
    objective = Supervised(labeled_loss="cross_entropy_dice", class_weights=0.5)
    fields = {"objective": objective, "labeled_color_jitter": 0.5, "norm_momentum": 0.05}
    assert differences(root, SUPERVISED, tmp_path, **fields) == []


def test_weights_for_other_classes_are_rejected_early(root, tmp_path):
    said = "`class_weights` has 2 numbers for 3 classes: give one per class, in the order of their ids"
    with pytest.raises(ValueError, match=said):
        make_trainer(root, SUPERVISED, tmp_path / "out", objective=Supervised(class_weights=[1.0, 2.0]))
    assert not (tmp_path / "out").exists()
