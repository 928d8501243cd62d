"""The loop on a small world: what it writes, that it learns, its errors, and that it can be resumed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from support.toy import ID2LABEL, NAMES, run_python, settings, tiny_upernet, toy_models, write_world
from transformers import Dinov2Config, EarlyStoppingCallback, ResNetModel, TrainerCallback, UperNetConfig

from cps_hf.config import CPSConfig
from cps_hf.objectives import CrossPseudoSupervision, MeanTeacher, ObjectiveOutput, Supervised
from cps_hf.training.results import card_facts
from cps_hf.training.setup import make_schedule
from cps_hf.training.trainer import CPSTrainer

SIZES = [(40, 56), (56, 40), (48, 48), (37, 61), (64, 33)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {
        "train_dataset": write_world(root / "labeled", SIZES),
        "unlabeled_dataset": write_world(root / "unlabeled", SIZES * 2, first=50, labels=False),
        "eval_dataset": write_world(root / "eval", SIZES[:4], first=90),
    }


def settings_for(tmp_path, **fields):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "crop_size": [32, 40],
        "optim": "adamw",
        "learning_rate": 1e-2,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
        "num_pictures": 2,
    }
    return settings(**(values | fields))


def trainer_for(world, tmp_path, models=None, objective=None, callbacks=None, datasets=None, **fields):
    args = settings_for(tmp_path, **fields)
    return CPSTrainer(
        toy_models() if models is None else models,
        **args,
        objective=objective or CrossPseudoSupervision(),
        callbacks=callbacks,
        **(world | (datasets or {})),
    )


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.module.named_parameters()}


def log_lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One full run with a real architecture, built from a configuration."""
    tmp_path = tmp_path_factory.mktemp("finished")
    trainer = trainer_for(world, tmp_path, tiny_upernet(), max_steps=5, eval_steps=2, save_steps=3)
    before = parameters(trainer)
    results = trainer.train()
    return trainer, results, before, tmp_path


def test_every_parameter_of_every_branch_is_updated(finished):
    trainer, _, before, _ = finished
    after = parameters(trainer)
    still = [
        n
        for n in after
        if torch.equal(after[n], before[n]) and dict(trainer.module.named_parameters())[n].requires_grad
    ]
    assert not still
    assert any(n.startswith("branches.1.") for n in after)


def test_a_run_writes_what_the_readme_says(finished):
    trainer, results, _, tmp_path = finished
    out = tmp_path / "out"
    found = {p.name for p in out.iterdir()}
    assert found == {
        *("config.yaml", "metrics.jsonl", "results.json", "branch_0", "branch_1", "best", "pictures"),
        *("checkpoint-3", "checkpoint-5", "evaluation.json", "report.html"),
    }
    for branch in ("branch_0", "branch_1", "best"):
        files = {p.name for p in (out / branch).iterdir()}
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files
        assert json.loads((out / branch / "config.json").read_text())["id2label"] == {
            str(k): v for k, v in ID2LABEL.items()
        }
    assert [p for p in (out / "pictures").iterdir() if p.stat().st_size > 1000]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["objective"] == "cps" and config["weight"] == 1.0 and config["max_steps"] == 5
    written = json.loads((out / "results.json").read_text())
    assert set(written["final"]) == {"branch_0", "branch_1", "mean"}
    assert written["final"]["branch_0"]["mean_iou"] == results["final"]["branch_0"]["mean_iou"]
    assert len(written["final"]["mean"]["per_category_iou"]) == len(NAMES)
    assert written["best"]["step"] in (2, 4, 5) and written["best"]["branch"] in ("branch_0", "branch_1")
    best_value = written["best"][written["best"]["branch"]]["mean_iou"]
    evaluations = [line for line in log_lines(tmp_path) if "eval_mean_iou" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    assert best_value == max(line["eval_mean_iou"] for line in evaluations)
    assert set(written["agreement"]) == set(written["commonest_class"]) == {"start", "end"}
    assert written["steps"] == 5 and written["versions"]["torch"]


def test_the_log_has_loss_parts_rate_speed_and_norms(finished):
    _, _, _, tmp_path = finished
    lines = [line for line in log_lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["loss"] == pytest.approx(line["supervised_loss"] + line["cps_loss"], rel=1e-5)
        assert 0 <= line["agreement"] <= 1 and line["images_per_second"] > 0
        assert 1 / len(NAMES) <= line["commonest_class"] <= 1
        assert line["grad_norm_branch_0"] > 0 and line["grad_norm_branch_1"] > 0


@pytest.mark.slow
def test_an_exported_branch_works_without_this_package(finished):
    trainer, _, _, tmp_path = finished
    for index in (0, 1):
        torch.manual_seed(0)
        pixel_values = torch.randn(1, 3, 45, 70)
        torch.save(pixel_values, tmp_path / "pixels.pt")
        with torch.no_grad():
            trainer.module.branches[index].eval()
            expected = trainer.module.branches[index].model(pixel_values=pixel_values).logits
        done = run_python(
            "-c",
            "import sys, torch\n"
            "from transformers import AutoModelForSemanticSegmentation, AutoImageProcessor\n"
            f"folder = {str(tmp_path / 'out' / f'branch_{index}')!r}\n"
            "model = AutoModelForSemanticSegmentation.from_pretrained(folder)\n"
            "processor = AutoImageProcessor.from_pretrained(folder)\n"
            "assert 'cps_hf' not in sys.modules and not processor.do_resize\n"
            f"pixels = torch.load({str(tmp_path / 'pixels.pt')!r})\n"
            f"torch.save(model(pixels).logits, {str(tmp_path / 'logits.pt')!r})\n",
            PYTHONPATH="",
        )
        assert done.returncode == 0, done.stderr[-2000:]
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-4)


def mean_iou_by_hand(trainer, dataset, branch):
    """An independent count from the results of `predict`."""
    import numpy as np
    from sklearn.metrics import confusion_matrix

    labels = {row["id"]: np.array(row["label"]) for row in dataset}
    predictions = dict(trainer.predict(dataset.remove_columns("label"), branch=branch))
    assert {k: tuple(v.shape) for k, v in predictions.items()} == {k: v.shape for k, v in labels.items()}
    truth = np.concatenate([labels[k][labels[k] != 255] for k in labels])
    guess = np.concatenate([predictions[k].numpy()[labels[k] != 255] for k in labels])
    matrix = confusion_matrix(truth, guess, labels=range(len(NAMES)))
    return (np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))).mean()


def test_scores_are_those_of_predict_against_the_labels(finished, world):
    trainer, results, _, _ = finished
    for branch, row in ((0, "branch_0"), (1, "branch_1"), ("mean", "mean")):
        expected = mean_iou_by_hand(trainer, world["eval_dataset"], branch)
        assert results["final"][row]["mean_iou"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="`branch` must be one of 0, 1, got 7"):
        next(trainer.predict(world["eval_dataset"], branch=7))


@pytest.mark.slow
def test_training_learns(world, tmp_path):
    fields = {
        "max_steps": 150,
        "logging_steps": 50,
        "agreement_images": 0,
        "random_scale": [1.0],
        "learning_rate": 3e-3,
    }
    results = trainer_for(world, tmp_path, tiny_upernet(), Supervised(), **fields).train()
    assert results["final"]["mean"]["mean_iou"] > 0.4  # always predicting the ground gives 0.26


def test_the_rate_follows_the_poly_schedule(world, tmp_path):
    trainer = trainer_for(
        world, tmp_path, max_steps=10, learning_rate=0.25, optim="sgd", head_learning_rate_factor=3.0
    )
    trainer.train()
    rates = [line["learning_rate"] for line in log_lines(tmp_path) if "loss" in line]
    # The rate that is logged after step k is that of the next one.
    assert rates == pytest.approx([0.25 * (1 - k / 10) ** 0.9 for k in range(1, 11)], abs=1e-12)
    factors = {g["name"]: g["initial_lr"] / 0.25 for g in trainer.optimizer.param_groups}
    assert set(factors.values()) == {1.0, 3.0}
    assert all(v == (3.0 if "head" in k else 1.0) for k, v in factors.items())
    decays = {k: g["weight_decay"] for g in trainer.optimizer.param_groups for k in [g["name"]]}
    assert all((v == 0) == ("no decay" in k) for k, v in decays.items())


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_never_stopped(world, tmp_path):
    """A run that ended normally; interrupted ones are in tests/checkpointing/test_resume.py."""
    fields = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "logging_steps": 4}
    whole = trainer_for(world, tmp_path / "a", tiny_upernet(), **fields)
    expected = whole.train()
    # The second run stops after step 4, between the evaluation at 3 and the log at its own last step.
    trainer_for(world, tmp_path / "b", tiny_upernet(), callbacks=[StopAfter(4)], **fields).train()
    resumed = trainer_for(world, tmp_path / "b", tiny_upernet(), **fields)
    results = resumed.train(resume_from_checkpoint=True)
    a, b = parameters(whole), parameters(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert results["final"] == expected["final"] and results["agreement"] == expected["agreement"]
    steps = [line["step"] for line in log_lines(tmp_path / "b") if "loss" in line]
    assert steps == [1, 4, 6]  # the first, every fourth, the last


@pytest.mark.slow
def test_a_run_can_be_resumed_in_another_folder(world, tmp_path):
    trainer_for(world, tmp_path / "a", max_steps=4, save_steps=2, eval_steps=2).train()
    checkpoint = tmp_path / "a" / "out" / "checkpoint-2"
    on = trainer_for(world, tmp_path / "b", max_steps=4, eval_steps=2)
    results = on.train(resume_from_checkpoint=str(checkpoint))
    whole = json.loads((tmp_path / "a" / "out" / "results.json").read_text())
    assert results["best"]["step"] == whole["best"]["step"]
    weights = [(tmp_path / name / "out" / "best" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    done = trainer_for(world, tmp_path / "c", max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert done["steps"] == 2 and (tmp_path / "c" / "out" / "branch_1" / "config.json").is_file()
    with pytest.raises(ValueError, match="does not exist.*checkpoint-2.*checkpoint-4"):
        trainer_for(world, tmp_path / "d").train(resume_from_checkpoint=str(checkpoint.with_name("checkpoint-3")))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = True


class Recorder(TrainerCallback):
    def __init__(self):
        self.events, self.metrics = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("train_begin")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.events.append("step_end")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append("log")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append(metrics)

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("train_end")


def test_transformers_callbacks_are_called_and_can_stop_the_run(world, tmp_path):
    recorder = Recorder()
    patience = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=2.0)  # never satisfied
    trainer = trainer_for(world, tmp_path, callbacks=[recorder, patience], max_steps=50, eval_steps=1)
    results = trainer.train()
    assert results["steps"] < 6 and (tmp_path / "out" / f"checkpoint-{results['steps']}").is_dir()
    assert recorder.events[0] == "train_begin" and recorder.events[-1] == "train_end"
    assert recorder.events.count("step_end") == results["steps"] and "save" in recorder.events
    assert set(recorder.metrics[0]) >= {
        "eval_mean_iou",
        "eval_branch_0_mean_iou",
        "eval_mean_mean_iou",
        "eval_agreement",
        "eval_commonest_class",
    }


def test_trackers_get_every_logged_value(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_for(world, tmp_path, report_to=["tensorboard"], eval_steps=2, run_name="a-run").train()
    (folder,) = {p.parent for p in (tmp_path / "out").rglob("events.*") if p.parent.name == "a-run"}
    events = EventAccumulator(str(folder)).Reload()
    for line in log_lines(tmp_path):
        for name, value in line.items():
            if name == "step":
                continue
            logged = {e.step: e.value for e in events.Scalars(name)}
            assert logged[line["step"]] == pytest.approx(value, rel=1e-6), name


def test_a_tracker_that_is_not_installed_is_an_error(world, tmp_path):
    with pytest.raises(ValueError, match="comet_ml.*pip install"):
        trainer_for(world, tmp_path, report_to=["comet_ml"]).train()
    for name in ("tensorbord", "all"):
        with pytest.raises(ValueError, match=f"`report_to` must list trackers.*tensorboard.*got '{name}'"):
            trainer_for(world, tmp_path, report_to=[name])


def test_supervised_training_reads_no_unlabeled_image(world, tmp_path):
    class Explosive:
        features = world["unlabeled_dataset"].features

    trainer = trainer_for(
        world, tmp_path, objective=Supervised(), datasets={"unlabeled_dataset": Explosive()}, agreement_images=0
    )
    results = trainer.train()
    assert results["steps"] == 4 and results["agreement"] == {}


def test_a_single_model_can_be_trained(world, tmp_path):
    results = trainer_for(world, tmp_path, toy_models(1), objective=Supervised()).train()
    assert set(results["final"]) == {"branch_0"}


@pytest.mark.slow
def test_three_branches_of_one_configuration_teach_each_other(world, tmp_path):
    trainer = trainer_for(world, tmp_path, tiny_upernet(), num_branches=3)
    before = parameters(trainer)
    assert not torch.equal(*[before[f"branches.{i}.model.decode_head.classifier.weight"] for i in (1, 2)])
    results = trainer.train()
    assert set(results["final"]) == {"branch_0", "branch_1", "branch_2", "mean"}
    moved = {n.split(".")[1] for n, p in parameters(trainer).items() if not torch.equal(p, before[n])}
    assert moved == {"0", "1", "2"}


@pytest.mark.slow
def test_models_of_different_architectures_train_each_other(world, tmp_path):
    from transformers import SegformerConfig

    segformer = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    trainer = trainer_for(world, tmp_path, [segformer, tiny_upernet()])
    results = trainer.train()
    assert [type(m).__name__[:4] for m in trainer.models] == ["Segf", "Uper"] and results["steps"] == 4
    assert {m.config.id2label[1] for m in trainer.models} == {"disc"}


@pytest.mark.slow
def test_backbone_weights_are_shared_or_one_per_branch(world, tmp_path):
    source = ResNetModel(tiny_upernet().backbone_config)
    source.save_pretrained(tmp_path / "resnet")
    stem, path = source.embedder.embedder.convolution.weight, str(tmp_path / "resnet")

    def starts(backbone):
        models = trainer_for(world, tmp_path, tiny_upernet(), backbone=backbone).models
        return [torch.equal(model.backbone.embedder.embedder.convolution.weight, stem) for model in models]

    assert starts(path) == [True, True]
    assert starts([path, "none"]) == [True, False]
    assert starts(["none", path]) == starts([None, path]) == [False, True]
    assert starts(None) == starts("none") == [False, False]
    trainer = trainer_for(world, tmp_path, tiny_upernet(), backbone=["none", path])
    run = replace(trainer.run, backbone_sources=[None, "some/backbone"])  # the card names what is on the Hub
    bases = [card_facts(run, trainer.state, name, "x")["base_model"] for name in ("branch_0", "branch_1")]
    assert bases == [None, "some/backbone"]
    with pytest.raises(
        ValueError, match='`backbone` has 1 entries for 2 branches: give one per branch, "none" for none'
    ):
        starts([path])


@dataclass(frozen=True, kw_only=True)
class Broken(Supervised):
    at: int = 2

    def __call__(self, branches, labeled, unlabeled=None, *, teacher=None, progress=0.0):
        output = super().__call__(branches, labeled, unlabeled)
        bad = torch.where(progress * 4 >= self.at, torch.nan, 1.0)
        return ObjectiveOutput(output.loss * bad, output.logs)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(world, tmp_path):
    trainer = trainer_for(world, tmp_path, objective=Broken(), save_steps=2)
    with pytest.raises(
        FloatingPointError, match=r"Step 3: .*branch 0 and branch 1 is not finite.*supervised_loss.*checkpoint-2"
    ):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.module.parameters())


@dataclass(frozen=True, kw_only=True)
class Averaged(Supervised):
    teacher: ClassVar[bool] = True

    def ema_decay(self, step):
        return 0.75


def test_a_teacher_is_averaged_scored_saved_and_exported(world, tmp_path):
    trainer = trainer_for(world, tmp_path, tiny_upernet(), objective=Averaged(), max_steps=1)
    start = {k: v.clone() for k, v in trainer.module.branches[0].state_dict().items()}
    results = trainer.train()
    end = trainer.module.branches[0].state_dict()
    for name, value in trainer.module.teacher.state_dict().items():
        expected = end[name] if not value.is_floating_point() else 0.75 * start[name] + 0.25 * end[name]
        torch.testing.assert_close(value, expected)
    assert any("running_mean" in name for name in start)
    assert not any(p.requires_grad for p in trainer.module.teacher.parameters())
    assert (tmp_path / "out" / "teacher" / "model.safetensors").is_file()
    assert "teacher" in results["final"]
    with torch.no_grad():  # after one step it equals its branch: now it predicts another class everywhere
        trainer.module.teacher.model.decode_head.classifier.bias[1] += 1e4
    trainer.evaluate()
    scores = {row: scores["mean_iou"] for row, scores in trainer.state.scores.items()}
    assert scores["teacher"] == pytest.approx(mean_iou_by_hand(trainer, world["eval_dataset"], "teacher"), rel=1e-6)
    assert scores["teacher"] != scores["branch_0"] == results["final"]["branch_0"]["mean_iou"]


def test_the_teachers_first_value_is_the_mean_of_two_steps(world, tmp_path):
    """1 - 1 / (1 + 1) of the start: the decay belongs to the step that was taken."""
    trainer = trainer_for(world, tmp_path, models=toy_models(1), objective=MeanTeacher(), max_steps=1)
    start = parameters(trainer)
    trainer.train()
    for name, student in trainer.module.branches[0].named_parameters():
        mean = (start[f"branches.0.{name}"] + student.detach()) / 2
        torch.testing.assert_close(trainer.module.teacher.get_parameter(name), mean)
        assert not torch.equal(mean, student)


def test_gradients_are_clipped_per_branch(world, tmp_path):
    trainer = trainer_for(
        world, tmp_path, optim="sgd", momentum=0.0, weight_decay=0.0, max_grad_norm=1e-3, max_steps=1
    )
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    for branch in ("branches.0.", "branches.1."):
        moved = torch.cat([(after[k] - before[k]).flatten() for k in after if k.startswith(branch)])
        assert moved.norm().item() == pytest.approx(1e-2 * 1e-3, rel=1e-3)
        assert log_lines(tmp_path)[1][f"grad_norm_branch_{branch[9]}"] > 1e-3


def test_a_norm_of_zero_clips_nothing(world, tmp_path):
    """As in transformers' Trainer."""
    found = []
    for name, max_grad_norm in (("a", None), ("b", 0.0)):
        trainer = trainer_for(world, tmp_path / name, max_grad_norm=max_grad_norm, max_steps=1)
        before = parameters(trainer)
        trainer.train()
        found.append(parameters(trainer))
        assert any(not torch.equal(before[key], value) for key, value in found[-1].items())
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())


def test_the_logged_rate_is_the_base_rate(world, tmp_path):
    fields = {"backbone_learning_rate_factor": 0.5, "head_learning_rate_factor": 10.0, "logging_steps": 3}
    trainer_for(world, tmp_path, **fields).train()
    rates = {line["step"]: line["learning_rate"] for line in log_lines(tmp_path) if "loss" in line}
    assert rates == pytest.approx({1: 1e-2 * 0.75**0.9, 3: 1e-2 * 0.25**0.9, 4: 0.0}, abs=1e-12)


def test_scores_of_other_sets_are_not_the_runs(world, tmp_path):
    """A callback that evaluates a test set in the middle of a run."""
    other = {}

    class LooksElsewhere(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            other.update(trainer.evaluate(world["eval_dataset"].select([1]), metric_key_prefix="test"))

    trainer = trainer_for(world, tmp_path, callbacks=[LooksElsewhere()], save_steps=4)
    results = trainer.train()
    assert other["test_mean_iou"] == max(other[f"test_branch_{i}_mean_iou"] for i in range(2))
    own = trainer.evaluator.scores(world["eval_dataset"])
    assert results["final"] == trainer.state.scores == own
    assert own["branch_0"]["mean_iou"] != other["test_branch_0_mean_iou"]


def test_a_users_optimizer_and_schedule_are_used(world, tmp_path):
    models = toy_models()
    optimizer = torch.optim.RMSprop([p for m in models for p in m.parameters()], lr=0.125)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    trainer = CPSTrainer(models, **settings_for(tmp_path), optimizers=(optimizer, schedule), **world)
    trainer.train()
    assert [line["learning_rate"] for line in log_lines(tmp_path) if "loss" in line] == [
        0.125,
        0.0625,
        0.0625,
        0.03125,
    ]


@pytest.mark.slow
def test_parameters_can_be_bfloat16(world, tmp_path):
    trainer = trainer_for(world, tmp_path, tiny_upernet(), dtype="bfloat16")
    trainer.train()
    assert {p.dtype for p in trainer.module.parameters()} == {torch.bfloat16}
    saved = json.loads((tmp_path / "out" / "best" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"


@pytest.mark.parametrize(("min_kept", "said"), [(32 * 40, 1), (32 * 40 - 1, 0)])
def test_ohem_without_effect_is_reported_once(world, tmp_path, caplog, min_kept, said):
    objective = Supervised(labeled_loss="ohem", ohem_min_kept=min_kept)
    trainer_for(world, tmp_path, objective=objective, crop_size=[32, 40], max_steps=1).train()
    messages = [message for message in caplog.messages if "plain cross entropy" in message]
    assert len(messages) == said
    assert all(f"`ohem_min_kept={min_kept}`" in m and "32 x 40 has 1280" in m for m in messages)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["freeze_backbone", "freeze_norms"])
def test_frozen_parameters_do_not_move(world, tmp_path, field):
    trainer = trainer_for(world, tmp_path, tiny_upernet(), **{field: True})
    before = {k: v.clone() for k, v in trainer.module.state_dict().items()}
    trainer.train()
    after = trainer.module.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert not [k for k in moved if "backbone" in k and (field == "freeze_backbone" or "normalization" in k)]
    assert [k for k in moved if "decode_head" in k]


@pytest.mark.slow
def test_attention_checkpointing_and_layer_decay_reach_the_models(world, tmp_path):
    layers = {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    vit = Dinov2Config(image_size=56, patch_size=14, hidden_size=16, num_attention_heads=2, **layers)
    config = UperNetConfig(hidden_size=16, use_auxiliary_head=False, backbone_config=vit, id2label=ID2LABEL)
    attention = {"attn_implementation": {"backbone_config": "eager"}}
    fields = {**attention, "gradient_checkpointing": True, "layer_decay": 0.5, "crop_size": [28, 42], "max_steps": 1}
    trainer = trainer_for(world, tmp_path, config, **fields)
    plain = trainer_for(world, tmp_path, config, crop_size=[28, 42])
    for model, other in zip(trainer.models, plain.models, strict=True):
        assert model.backbone.config._attn_implementation == "eager"
        assert other.backbone.config._attn_implementation == "sdpa"
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert [rates[f"branch 1, backbone layer {i}"] for i in range(5)] == [1e-2 * 0.5 ** (5 - i) for i in range(5)]
    assert rates["branch 1, head"] == 1e-2
    trainer.train()


@pytest.mark.slow
def test_sliding_evaluation_is_used_when_set(world, tmp_path):
    scores = []
    for mode in ("whole", "sliding"):
        window = {"eval_crop_size": [16, 16]} if mode == "sliding" else {}
        trainer = trainer_for(world, tmp_path / mode, objective=Supervised(), eval_mode=mode, **window)
        scores.append(trainer.train()["final"]["mean"]["mean_iou"])
    assert scores[0] != scores[1]


def test_checkpoints_are_pruned_to_the_limit(world, tmp_path):
    trainer_for(world, tmp_path, max_steps=4, save_steps=1, save_total_limit=2).train()
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lr_scheduler_type": "polinomial"}, r"`lr_scheduler_type` must be one of linear, .*'polinomial'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "`lr_scheduler_type` must be one of"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"pwer": 2}}, "`lr_scheduler_kwargs`.*'pwer'.*cosine"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_kwargs`.*min_lr"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 3},
            'would ignore `warmup_steps=3`.*"constant_with_warmup"',
        ),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 2}}, "has no arguments.*'power'"),
    ],
)
def test_invalid_schedules_and_ignored_arguments_are_rejected(fields, said):
    optimizer = torch.optim.SGD(toy_models(1)[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=said):
        make_schedule(optimizer, CPSConfig(**fields))


def test_schedule_arguments_and_warm_up_have_an_effect(world, tmp_path):
    fields = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    trainer_for(world, tmp_path, max_steps=4, learning_rate=0.25, warmup_steps=2, optim="sgd", **fields).train()
    rates = [line["learning_rate"] for line in log_lines(tmp_path) if "loss" in line]
    assert rates == pytest.approx([0.125, 0.25, 0.1875, 0.125])  # half way up, up, half way down to a half, there


def test_an_occupied_output_folder_is_rejected(world, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        trainer_for(world, tmp_path).train()
    (tmp_path / "out").unlink()
    trainer_for(world, tmp_path).train()
    keep = tmp_path / "out" / "notes.txt"
    keep.write_text("mine")
    with pytest.raises(ValueError, match=r"contains a run.*checkpoint-4.*--overwrite_output_dir"):
        trainer_for(world, tmp_path).train()
    trainer_for(world, tmp_path, overwrite_output_dir=True, max_steps=2).train()
    assert keep.read_text() == "mine" and not (tmp_path / "out" / "checkpoint-4").exists()


def test_a_missing_checkpoint_is_an_error(world, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        trainer_for(world, tmp_path).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-9"))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer_for(world, tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)  # killed while writing it
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer_for(world, tmp_path, resume_from_checkpoint="true").train()


def test_unsuitable_models_are_rejected(world, tmp_path):
    with pytest.raises(ValueError, match=r"classes"):
        trainer_for(world, tmp_path, [toy_models(1)[0], toy_models(1, num_labels=5)[0]])
    with pytest.raises(ValueError, match=r"5 classes and `train_dataset` has 3 \(ground, disc, bar"):
        trainer_for(world, tmp_path, toy_models(2, num_labels=5))
    with pytest.raises(ValueError, match="CrossPseudoSupervision needs 2 models, got 1"):
        trainer_for(world, tmp_path, toy_models(1))


def test_unsuitable_data_sets_are_rejected(world, tmp_path):
    with pytest.raises(ValueError, match="pass `unlabeled_dataset`"):
        trainer_for(world, tmp_path, datasets={"unlabeled_dataset": None})
    with pytest.raises(ValueError, match="`train_dataset` needs a column 'label'.*found image"):
        trainer_for(world, tmp_path, datasets={"train_dataset": world["unlabeled_dataset"]}).train()
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        trainer_for(world, tmp_path, datasets={"train_dataset": world["train_dataset"].select([])}).train()
    with pytest.raises(ValueError, match="train_dataset.*DatasetDict.*Choose a split"):
        from datasets import DatasetDict

        split = DatasetDict(train=world["train_dataset"])
        trainer_for(world, tmp_path, datasets={"train_dataset": split}).train()


@pytest.mark.parametrize(("labeled", "unlabeled", "batch"), [(1, 1, 2), (3, 2, 4), (1, 3, 1)])
def test_fewer_images_than_a_step_takes_are_enough(world, tmp_path, labeled, unlabeled, batch, caplog):
    few = {"train_dataset": labeled, "unlabeled_dataset": unlabeled}
    few = {name: world[name].select(range(count)) for name, count in few.items()}
    batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2, "eval_steps": 2}
    trainer = trainer_for(world, tmp_path, datasets=few, **batches, save_steps=2)
    results = trainer.train()
    assert results["steps"] == 4 and results["num_labeled"] == labeled
    told = [r.getMessage() for r in caplog.records if "more than once" in r.getMessage()]
    assert len(told) == 1 + (unlabeled < 2 * batch) and f"`train_dataset` has {labeled} image" in told[0]
    assert set(trainer.next_ids(2 * batch)["labeled"]) == set(few["train_dataset"]["id"][: 2 * batch])


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("encoding", [True, False], ids=["class names known", "bare labels"])
def test_a_label_outside_the_classes_names_the_image_and_the_value(world, tmp_path, which, encoding):
    import numpy as np
    from PIL import Image

    bad = write_world(tmp_path / "bad", SIZES[:2], encoding=encoding)
    path = tmp_path / "bad" / "0_label.png"
    label = np.array(Image.open(path))
    label[5, 5:9] = 33
    Image.fromarray(label).save(path)
    with pytest.raises(ValueError, match=r"(?s)bad-0.*33") as error:
        trainer_for(world, tmp_path, datasets={which: bad}, per_device_train_batch_size=2).train()
    assert "4 pixels" in str(error.value)
    assert not list(Path(tmp_path / "out").glob("checkpoint-*"))


def test_skipped_samples_are_listed_in_the_output_folder(world, tmp_path):
    damaged = write_world(tmp_path / "u", SIZES * 2, first=50, labels=False)
    (tmp_path / "u" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Cannot decode 'u-3'.*skip_bad_samples"):
        trainer_for(world, tmp_path, datasets={"unlabeled_dataset": damaged}, agreement_images=0, max_steps=6).train()
    fields = {"skip_bad_samples": True, "agreement_images": 0, "max_steps": 6, "overwrite_output_dir": True}
    trainer_for(world, tmp_path, datasets={"unlabeled_dataset": damaged}, **fields).train()
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["id"] for line in listed} == {"u-3"} and listed[0]["dataset"] == "unlabeled_dataset"
    assert "3.png" in listed[0]["error"] and listed[0]["step"] >= 1


def test_agreement_skips_bad_images_with_a_warning(world, tmp_path, caplog):
    damaged = write_world(tmp_path / "u", SIZES, first=50, labels=False)
    (tmp_path / "u" / "3.png").write_bytes(b"no image")
    trainer = trainer_for(world, tmp_path, datasets={"unlabeled_dataset": damaged}, skip_bad_samples=True)
    whole = damaged.select([i for i in range(len(damaged)) if i != 3])
    assert trainer.evaluator.agreement(damaged) == trainer.evaluator.agreement(whole)
    assert "without an image: Cannot decode 'u-3'" in caplog.text
    with pytest.raises(ValueError, match="None of the unlabeled images.*can be read.*agreement_images=0"):
        trainer.evaluator.agreement(damaged.select([3]))
    strict = trainer_for(world, tmp_path, datasets={"unlabeled_dataset": damaged})
    with pytest.raises(ValueError, match="Cannot decode 'u-3'"):
        strict.evaluator.agreement(damaged)


def test_a_wrong_process_count_prints_the_launch_command(world, tmp_path):
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2"):
        trainer_for(world, tmp_path, num_processes=2)


def test_unconnected_processes_are_rejected(world, tmp_path, monkeypatch):
    trainer = trainer_for(world, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    from cps_hf.training.setup import check_launch

    with pytest.raises(ValueError, match="2 processes.*Accelerate sees 1"):
        check_launch(trainer.accelerator, trainer.args, trainer.model_config)


def test_agreement_comes_with_the_share_of_the_commonest_class(world, tmp_path):
    models = toy_models()
    with torch.no_grad():
        for model in models:
            model.decode_head.bias[1] = 1000.0  # both predict discs everywhere
    trainer = trainer_for(world, tmp_path, models=models)
    assert trainer.evaluator.agreement(world["unlabeled_dataset"]) == (1.0, 1.0)
    trainer = trainer_for(world, tmp_path)
    counts, same, total = torch.zeros(2, len(NAMES)), 0, 0
    for batch in trainer.evaluator.stream(world["unlabeled_dataset"], with_label=False):
        for sample in batch:
            classes = [
                trainer.evaluator.logits(branch.eval(), sample["image"][None]).argmax(1)
                for branch in trainer.module.branches
            ]
            same, total = same + (classes[0] == classes[1]).sum().item(), total + classes[0].numel()
            for row, one in zip(counts, classes, strict=True):
                row += torch.bincount(one.flatten(), minlength=len(NAMES))
    found = trainer.evaluator.agreement(world["unlabeled_dataset"])
    assert found.agreement == same / total and found.commonest_class == counts.max().item() / total
