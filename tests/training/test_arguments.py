"""Common mistakes in Python calls: each has its own message, before anything is built."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.toy import NAMES, settings, toy_models, write_world
from transformers import TrainingArguments

from cps_hf import CPSConfig, CPSTrainer, Supervised
from cps_hf.config import AugmentationConfig, ModelConfig
from cps_hf.objectives import CrossPseudoSupervision, MeanTeacher
from cps_hf.training.arguments import models_given, objective_given


def error_of(*positional, **arguments):
    with pytest.raises((TypeError, ValueError)) as error:
        CPSTrainer(*positional, **({"train_dataset": None} | arguments))
    return str(error.value)


def test_model_is_an_alias_of_models():
    assert models_given(None, "an/id") == models_given("an/id", None) == "an/id"
    assert "another name for `models`" in error_of("an/id", model="an/id")
    assert "`models` is missing" in error_of()
    assert "is the class Linear" in error_of(torch.nn.Linear)


def test_objectives_may_be_named():
    assert objective_given(None) == objective_given("cps") == CrossPseudoSupervision()
    assert isinstance(objective_given("mean_teacher"), MeanTeacher)
    assert "Did you mean 'supervised'?" in error_of("an/id", objective="supervisd")
    assert "`objective` is the class Supervised: pass an instance, `Supervised()`" in error_of(
        "an/id", objective=Supervised
    )
    assert "must be an object of `cps_hf.objectives` or a name, got 3" in error_of("an/id", objective=3)


def test_transformers_settings_are_rejected_with_the_right_class(tmp_path):
    said = error_of("an/id", TrainingArguments(output_dir=str(tmp_path), report_to=[]))
    assert "must be a CPSConfig" in said and "CPSConfig(output_dir=..., max_steps=..., learning_rate=...)" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"args": CPSConfig}, "`args` is the class CPSConfig: pass an instance, `CPSConfig(...)`."),
        ({"args": {"max_steps": 3}}, "`args` is a mapping; pass a CPSConfig: `CPSConfig(**args)`."),
        (
            {"augmentation": ModelConfig()},
            "`augmentation` must be a AugmentationConfig, got an object of ModelConfig.",
        ),
        ({"learning_rate": 1e-3}, "it is a setting, `args=CPSConfig(learning_rate=...)`."),
        ({"crop_size": 32}, "`augmentation=AugmentationConfig(crop_size=...)`."),
        ({"unlabelled_dataset": 1}, "Did you mean `unlabeled_dataset`?"),
        ({"tokenizer": 1}, "no argument `tokenizer`: give the image processor as `processing_class`."),
        ({"zzz": 1}, "CPSTrainer has no argument `zzz`."),
    ],
)
def test_each_mistake_has_its_own_message(arguments, said):
    assert said in error_of("an/id", **arguments)


@pytest.mark.parametrize(
    "cls, values, said",
    [
        (CPSConfig, {"learning_rate": "1e-3"}, "`learning_rate` must be a number, got '1e-3' of type str. Remove"),
        (CPSConfig, {"max_steps": "100"}, "`max_steps` must be an integer, got '100'"),
        (CPSConfig, {"max_steps": 1e4}, "`max_steps` must be an integer, got 10000.0"),
        (CPSConfig, {"max_grad_norm": "five"}, "`max_grad_norm` must be a number or None, got 'five'"),
        (CPSConfig, {"overwrite_output_dir": "false"}, "`overwrite_output_dir` must be true or false, got 'false'"),
        (CPSConfig, {"seed": True}, "`seed` must be an integer, got True"),
        (CPSConfig, {"lr_scheduler_kwargs": "power"}, "must be a mapping"),
        (AugmentationConfig, {"crop_size": "512"}, "`crop_size` must be a list, got '512'"),
        (AugmentationConfig, {"crop_size": [512, "512"]}, "`crop_size` must be a list"),
        (ModelConfig, {"dtype": torch.float32}, "`dtype` must be text, got torch.float32"),
    ],
)
def test_numbers_given_as_text_are_rejected(cls, values, said):
    with pytest.raises(TypeError) as error:
        cls(**values)
    assert said in str(error.value)


def test_equivalents_of_numbers_and_lists_are_accepted():
    config = CPSConfig(learning_rate=1, max_steps=np.int64(5), output_dir=Path("out"), weight_decay=np.float32(0.1))
    assert config.max_steps == 5
    assert AugmentationConfig(crop_size=32).crop_size == [32, 32]
    assert AugmentationConfig(crop_size=(32, 48), random_scale=[1, 2.0]).random_scale == [1, 2.0]
    assert ModelConfig(backbone=["none", None]).backbone == ["none", "none"]
    assert replace(config, mixed_precision=None).resume_from_checkpoint is None


# ---------------------------------------------------------------------------------------------- a finished run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after a run of two evaluations, at a rate that makes its last step worse than its first."""
    root = tmp_path_factory.mktemp("trained")
    trainer = CPSTrainer(
        model=toy_models(),
        objective="cps",
        train_dataset=write_world(root / "labeled", [(40, 56)] * 4),
        unlabeled_dataset=write_world(root / "unlabeled", [(40, 56)] * 4, first=50, labels=False),
        eval_dataset=write_world(root / "eval", [(40, 56)] * 2, first=90),
        **settings(
            output_dir=str(root / "out"),
            overwrite_output_dir=True,
            max_steps=4,
            eval_steps=2,
            per_device_train_batch_size=2,
            crop_size=[32, 32],
            optim="adamw",
            learning_rate=1e-2,
            dataloader_num_workers=0,
            disable_tqdm=True,
            num_pictures=0,
        ),
    )
    trainer.train()
    return trainer, root / "out"


def test_a_second_train_call_raises_and_keeps_the_first_run(trained):
    trainer, out = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert any(path.name == "results.json" for path in before)
    with pytest.raises(ValueError, match="has already trained to step 4 of `max_steps` 4"):
        trainer.train()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_the_length_is_fixed_once_the_trainer_is_created(trained):
    """The schedule was made for it: more steps would have a rate of zero, and end after the first."""
    trainer, _ = trained
    trainer.args.max_steps = 6
    try:
        with pytest.raises(ValueError, match="created for 4 steps, and `max_steps` is now 6. Create another trainer"):
            trainer.train(resume_from_checkpoint=True)
    finally:
        trainer.args.max_steps = 4


def test_evaluate_returns_each_class_by_name(trained):
    trainer, _ = trained
    metrics = trainer.evaluate()
    for row in ("branch_0", "branch_1", "mean"):
        of_row = [metrics[f"eval_{row}_iou_{name}"] for name in NAMES]
        assert of_row == pytest.approx(trainer.state.scores[row]["per_category_iou"], nan_ok=True)
        assert np.nanmean(of_row) == pytest.approx(metrics[f"eval_{row}_mean_iou"])
    best = max(("branch_0", "branch_1"), key=lambda row: metrics[f"eval_{row}_mean_iou"])
    assert metrics["eval_iou_disc"] == pytest.approx(metrics[f"eval_{best}_iou_disc"], nan_ok=True)
    other = trainer.evaluate(trainer.eval_dataset.select([0]), metric_key_prefix="other")
    assert "other_iou_ground" in other and "other_branch_1_iou_ground" in other


def test_predict_uses_the_best_branch_by_default(trained):
    trainer, out = trained
    images = trainer.eval_dataset

    def maps(**branch):
        return torch.stack([ids for _, ids in trainer.predict(images, **branch)])

    row = trainer.state.best["branch"]
    index = int(row.split("_")[1])
    before = maps()
    if trainer.state.best["step"] == 4:
        assert torch.equal(before, maps(branch=index))
    with torch.no_grad():  # the model in memory changes, but `best` does not
        for parameter in trainer.module.branches.parameters():
            parameter.zero_()
    assert torch.equal(maps(), before) and torch.equal(maps(branch="best"), before)
    assert not torch.equal(maps(branch=index), before)
    trainer.state.best = {}
    assert torch.equal(maps(), maps(branch=0))
