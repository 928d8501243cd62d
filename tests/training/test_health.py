"""Non-finite numbers, labels that are all ignored, collapsed branches, skipped steps."""

import json
import logging
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.toy import settings, tiny_upernet, toy_models, write_world
from transformers import TrainerCallback

import cps_hf.training.trainer
from cps_hf.functional import full_size
from cps_hf.objectives import CrossPseudoSupervision, LabeledBatch, MeanTeacher, ObjectiveOutput, Supervised
from cps_hf.training import health
from cps_hf.training.callbacks import collapse
from cps_hf.training.state import RunState
from cps_hf.training.trainer import CPSTrainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {
        "train_dataset": write_world(root / "labeled", [(24, 24)] * 8),
        "unlabeled_dataset": write_world(root / "unlabeled", [(24, 24)] * 8, first=50, labels=False),
    }


def trainer_for(world, tmp_path, *, models=None, objective=None, callbacks=None, **fields):
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 2}
    values |= {"crop_size": [16, 16], "dataloader_num_workers": 0, "agreement_images": 0, "logging_steps": 1}
    args = settings(**(values | {"disable_tqdm": True, "num_pictures": 0, "learning_rate": 0.1} | fields))
    objective = objective or CrossPseudoSupervision(cutmix=False)
    return CPSTrainer(models or toy_models(), **args, objective=objective, callbacks=callbacks, **world)


def log_lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def state(trainer):
    return {name: value.clone() for name, value in trainer.module.state_dict().items()}


# ------------------------------------------------------------------------------------------------ bad numbers


BAD_STEPS = {3}


@dataclass(frozen=True, kw_only=True)
class BadAt(CrossPseudoSupervision):
    """The part `cps_loss` becomes NaN for branch 1 only, at the steps (counted from 1, of 4) in `BAD_STEPS`."""

    cutmix: bool = False

    def __call__(self, branches, labeled, unlabeled, *, teacher=None, progress=0.0):
        output = super().__call__(branches, labeled, unlabeled, teacher=teacher, progress=progress)
        if round(float(progress) * 4) + 1 not in BAD_STEPS:
            return output
        poison = full_size(branches[1](unlabeled.weak * float("nan"))).mean()  # also enters batch norm's statistics
        return output._replace(loss=output.loss + poison, logs={**output.logs, "cps_loss": poison.detach()})


def test_a_bad_number_is_explained_and_its_batch_is_saved(world, tmp_path):
    trainer = trainer_for(world, tmp_path, objective=BadAt(), save_steps=2, gradient_accumulation_steps=2)
    before = {}
    trainer.callback_handler.add_callback(Keep(trainer, before, step=3))
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    said = str(error.value)
    assert said.startswith("Step 3: the gradient of branch 1 is not finite; loss and cps_loss are not finite")
    assert "checkpoint-2" in said and "bad_batch-3" in said and "`max_skipped_steps`" in said
    assert "supervised_loss" in said.split("(", 1)[1]  # the finite parts' values are reported too
    assert all(torch.equal(value, before[name]) for name, value in trainer.module.named_parameters())
    folder = tmp_path / "out" / "bad_batch-3"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # all have the same permissions
    facts = json.loads((folder / "process_0.json").read_text())
    assert facts["step"] == 3 and facts["norms"][1] == "nan" and facts["norms"][0] > 0
    tensors = load_file(folder / "process_0.safetensors")
    ids = [name for batch in facts["batches"] for names in batch["ids"].values() for name in names]
    assert len(facts["batches"]) == 2 and len(ids) == 8 and all(name in said for name in ids)
    for index, batch in enumerate(facts["batches"]):
        assert batch["values"]["cps_loss"] == "nan" and batch["values"]["supervised_loss"] > 0
        assert set(batch["ids"]) == {"labeled", "unlabeled"}
        # The images belong to the ids: the crop that was used is in the file.
        position = {f"labeled-{i}": i for i in range(8)}
        row = world["train_dataset"][position[batch["ids"]["labeled"][0]]]
        labels = tensors[f"{index}.labeled.labels"][0]
        assert set(labels.unique().tolist()) <= {*np.unique(np.array(row["label"])).tolist(), 255}
        assert tensors[f"{index}.unlabeled.weak"].shape == (2, 3, 16, 16)


class Keep(TrainerCallback):
    """The parameters at the beginning of a step."""

    def __init__(self, trainer, kept, step):
        self.trainer, self.kept, self.step = trainer, kept, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.kept |= {name: p.detach().clone() for name, p in self.trainer.module.named_parameters()}


@pytest.mark.slow
def test_a_skipped_step_leaves_no_trace_and_is_counted(world, tmp_path, caplog, monkeypatch):
    """The third of four steps is skipped: weights, momentum and batch norm equal those of a run without it."""
    fields = {"models": tiny_upernet(), "lr_scheduler_type": "constant", "max_skipped_steps": 1}
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(world, tmp_path / "a", objective=BadAt(), save_steps=3, **fields)
        after_two = {}
        trainer.callback_handler.add_callback(KeepState(trainer, after_two, step=3))
        trainer.train()
    assert "Step 3: " in caplog.text and "skipped, 1 of at most 1" in caplog.text
    lines = [line for line in log_lines(tmp_path / "a") if "learning_rate" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1]
    assert "loss" not in lines[2] and all(np.isfinite(lines[i]["loss"]) for i in (0, 1, 3))
    assert any("running_mean" in name for name in after_two["before"])
    assert all(torch.equal(after_two["before"][name], value) for name, value in after_two["after"].items())
    assert (tmp_path / "a" / "out" / "bad_batch-3" / "process_0.json").is_file()
    # The count continues in a resumed run: one more is one too many.
    monkeypatch.setattr(sys.modules[__name__], "BAD_STEPS", {4})
    again = trainer_for(world, tmp_path / "a", objective=BadAt(), **fields)
    with pytest.raises(FloatingPointError, match="Step 4: .*1 steps were skipped before"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-3"))


class KeepState(Keep):
    """The module's state before and after a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.kept["before"] = {k: v.clone() for k, v in self.trainer.module.state_dict().items()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.kept["after"] = {k: v.clone() for k, v in self.trainer.module.state_dict().items()}


def test_a_skipped_step_moves_no_teacher(world, tmp_path, monkeypatch):
    class Poisoned(MeanTeacher):
        def __call__(self, *words, progress=0.0, **options):
            output = super().__call__(*words, progress=progress, **options)
            return output._replace(loss=output.loss * (float("nan") if round(float(progress) * 4) == 2 else 1.0))

    fields = {"models": toy_models(1), "objective": Poisoned(), "max_skipped_steps": 1}
    trainer = trainer_for(world, tmp_path, **fields)
    kept = {}
    trainer.callback_handler.add_callback(KeepState(trainer, kept, step=3))
    trainer.train()
    before, after = kept["before"], kept["after"]
    names = [name for name in before if name.startswith("teacher.")]
    assert any(not torch.equal(before[n], before[n.replace("teacher.", "branches.0.")]) for n in names)  # would move
    assert all(torch.equal(before[name], after[name]) for name in names)


@pytest.fixture
def fp16(monkeypatch):
    """Trainers with the scaler and the autocast that Accelerate only sets up for fp16 on GPUs."""
    accelerator_of = cps_hf.training.trainer._accelerator

    def with_scaler(args):
        accelerator = accelerator_of(args)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**16)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")  # all accelerators share it
        return accelerator

    monkeypatch.setattr(cps_hf.training.trainer, "_accelerator", with_scaler)


@pytest.mark.parametrize("max_skipped_steps", [0, 1])
def test_fp16_gradients_that_are_never_finite_end_the_run(world, tmp_path, fp16, max_skipped_steps):
    """The scaler skips a step that overflows; here it would skip all, and nothing would be learned."""
    fields = {"objective": Supervised(), "max_steps": 40, "max_skipped_steps": max_skipped_steps}
    trainer = trainer_for(world, tmp_path, **fields)
    trainer.models[1].decode_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    last = health.MAX_OVERFLOWS + max_skipped_steps
    assert str(error.value).startswith(f"Step {last}: the gradient of branch 1 is not finite")
    assert f"so it was in {last} steps in a row, at every loss scale" in str(error.value)


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_the_scaler_skips_fp16_overflows_but_not_a_bad_loss(world, tmp_path, fp16, optim):
    """Steps 1 and 2 overflow, step 3 has a bad loss: each halves the scale, and only the third is counted."""

    class Poisoned(Supervised):
        def __call__(self, *words, progress=0.0, **options):
            output = super().__call__(*words, progress=progress, **options)
            return output._replace(loss=output.loss * (float("nan") if round(float(progress) * 6) == 2 else 1.0))

    fields = {"optim": optim, "learning_rate": 0.01, "max_steps": 6, "max_skipped_steps": 1}
    trainer = trainer_for(world, tmp_path, objective=Poisoned(), **fields)
    steps = []
    trainer.models[0].decode_head.weight.register_hook(
        lambda gradient: steps.append(1) or (gradient * float("inf") if len(steps) <= 2 else gradient)
    )
    kept = {}
    trainer.callback_handler.add_callback(Keep(trainer, kept, step=4))
    before = state(trainer)
    trainer.train()
    assert trainer.state.skipped_steps == 1 and trainer.accelerator.scaler.get_scale() == 2.0**13
    assert all(torch.equal(before[name], value) for name, value in kept.items())
    assert all((value - before[name]).abs().max() < 0.5 for name, value in trainer.module.named_parameters())
    assert any(not torch.equal(before[name], value) for name, value in trainer.module.named_parameters())


@pytest.mark.parametrize("labeled_loss", ["cross_entropy", "ohem"])
def test_ignored_labels_give_no_loss_and_move_nothing(world, tmp_path, labeled_loss):
    dataset = write_world(tmp_path / "void", [(24, 24)] * 4)
    for path in (tmp_path / "void").glob("*_label.png"):
        Image.new("L", (24, 24), 255).save(path)
    objective = Supervised(labeled_loss=labeled_loss)
    fields = {"weight_decay": 0.0, "check_labels_seconds": 0}  # otherwise it is an error before step 1
    trainer = trainer_for({"train_dataset": dataset}, tmp_path, objective=objective, **fields)
    before = state(trainer)
    trainer.train()
    assert [line["loss"] for line in log_lines(tmp_path)] == [0.0] * 4
    assert all(torch.equal(value, before[name]) for name, value in trainer.module.state_dict().items())


# ------------------------------------------------------------------------------------------------ collapse


@pytest.mark.parametrize(
    "objective",
    [CrossPseudoSupervision(), MeanTeacher()],
    ids=["cutmix", "mean teacher"],
)
def test_a_branch_predicting_one_class_is_one_warning(world, tmp_path, caplog, monkeypatch, objective):
    monkeypatch.setattr(collapse, "COLLAPSE_STEPS", 4)
    models = toy_models(2 if objective.min_branches == 2 else 1)
    with torch.no_grad():
        models[-1].decode_head.bias[1] = 1000.0  # the last branch predicts discs everywhere
    with caplog.at_level(logging.WARNING, "cps_hf.training.callbacks.collapse"):
        trainer_for(world, tmp_path, models=models, objective=objective, max_steps=9, learning_rate=1e-9).train()
    said = [record.message for record in caplog.records if record.name == "cps_hf.training.callbacks.collapse"]
    assert len(said) == 1
    assert f"Branch {len(models) - 1} has predicted one single class" in said[0] and "for 4 steps" in said[0]
    assert not any("one_class" in name for line in log_lines(tmp_path) for name in line)


def test_one_different_prediction_is_no_collapse():
    logits, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    images, labeled = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    (watched,) = health.watch([lambda x: logits], LabeledBatch(pixel_values=labeled, labels=labels))
    watched(labeled)
    assert watched.one_class() is None  # labeled images do not count
    watched(images)
    assert watched.one_class() == 1
    logits[1, 2, 4, 4] = 1
    watched(images)
    assert watched.one_class() == 0


def test_collapse_warnings_come_late_and_again_after_recovery(caplog):
    watch, state = collapse.CollapseCallback(), RunState(max_steps=4000)  # patience: 200 steps
    watch.on_train_begin(None, state, None)
    for share, steps in ((1.0, 150), (0.9, 50), (1.0, 150), (1.0, 50), (1.0, 500), (0.0, 50), (1.0, 200)):
        state.global_step += steps
        state.one_class = {"0": share}
        watch.on_log(None, state, None, {"loss": 1.0})
        watch.on_log(None, state, None, {"eval_mean_iou": 1.0})  # scores of the same step do not count
    assert [record.args for record in caplog.records] == [("0", 200), ("0", 200)]


def test_an_evaluation_with_one_class_is_one_warning(caplog):
    watch, state = collapse.CollapseCallback(), RunState(max_steps=4000)
    watch.on_train_begin(None, state, None)
    nan = float("nan")
    for step, recalls in enumerate(
        ([0.99, 0.0, nan], [1.0, 0.005, nan], [0.5, 0.4, nan], [0.0, 0.0, nan], [1.0, nan, nan]), start=1
    ):
        state.global_step = step
        state.scores = {name: {"per_category_accuracy": recalls} for name in ("branch_1", "teacher", "mean")}
        watch.on_evaluate(None, state, None)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == ["Step 1", "Step 4"]
    assert "branch 1 finds only one of the 2 classes" in said[0] and "finds none of the 2 classes" in said[1]


def test_commonest_class_is_the_largest_share_of_any_branch():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labeled, images = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    mixed, sure = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    mixed[0, 1] = 1  # half of the pixels; the other branch predicts class 0 except at one pixel that is looked at
    sure[1, 2, 4, 4] = 1
    watched = health.watch([lambda x: mixed, lambda x: sure], LabeledBatch(pixel_values=labeled, labels=labels))
    output = health.with_one_class(ObjectiveOutput(torch.zeros(()), {}), watched)
    assert output.logs == {}  # they saw no unlabeled image
    for branch in watched:
        branch(labeled), branch(images)
    assert [branch.commonest_class().item() for branch in watched] == [0.5, 7 / 8]
    assert health.with_one_class(output, watched).logs["commonest_class"] == 7 / 8
