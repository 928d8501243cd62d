"""Early stopping: a run ends when its scores no longer improve."""

from types import SimpleNamespace

import pytest
from support.toy import settings, toy_models, write_world
from transformers.trainer_callback import TrainerControl

from cps_hf.config import CPSConfig
from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training.callbacks import EarlyStopping
from cps_hf.training.trainer import CPSTrainer

ARGS = SimpleNamespace(metric_for_best_model="mean_iou")


def stopped_at(callback, scores):
    """The step, counted from 1, after whose score the run should stop."""
    for step, score in scores.items():
        control = TrainerControl()
        callback.on_evaluate(ARGS, SimpleNamespace(global_step=step, max_steps=99), control, {"eval_mean_iou": score})
        if control.should_training_stop:
            return step
    return None


def test_only_the_second_stages_evaluations_are_counted():
    assert stopped_at(EarlyStopping(2), {1: 0.5, 2: 0.6, 3: 0.6, 4: 0.61, 5: 0.5, 6: 0.61, 7: 0.9}) == 6
    first_is_better = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.5, 5: 0.6, 6: 0.55, 7: 0.5}
    assert stopped_at(EarlyStopping(2), first_is_better) == 3
    assert stopped_at(EarlyStopping(2, border=3), first_is_better) == 7


def trainer_for(world, out, scores, eval_dataset=None, **fields):
    values = {"output_dir": str(out), "crop_size": [32, 32], "per_device_train_batch_size": 2, "max_steps": 8}
    values |= {"dataloader_num_workers": 0, "num_pictures": 0, "eval_steps": 1, "agreement_images": 0}
    trainer = CPSTrainer(
        toy_models(),
        **settings(**values | fields),
        objective=CrossPseudoSupervision(),
        train_dataset=world,
        unlabeled_dataset=world.remove_columns("label"),
        eval_dataset=eval_dataset or world,
    )
    found = trainer.evaluator.scores

    def scripted(dataset):
        rows = found(dataset)
        for scored in rows.values():
            scored["mean_iou"] = scores[trainer.state.global_step - 1]
        return rows

    trainer.evaluator.scores = scripted
    return trainer


def test_a_stopped_run_is_complete_and_stays_stopped_on_resuming(tmp_path):
    world = write_world(tmp_path / "world", [(40, 40)] * 4)
    scores = [0.1, 0.3, 0.2, 0.25, 0.2, 0.2, 0.2, 0.2]
    fields = {"early_stopping_patience": 3, "save_steps": 1}
    results = trainer_for(world, tmp_path / "a", scores, **fields).train()
    assert results["steps"] == 5 and results["best"]["step"] == 2
    for name in ("best", "branch_0", "branch_1", "checkpoint-5", "results.json", "report.html"):
        assert (tmp_path / "a" / name).exists(), name
    again = trainer_for(world, tmp_path / "a", scores, **fields, resume_from_checkpoint="auto")
    assert again.train()["steps"] == 5

    cut = trainer_for(world, tmp_path / "b", scores, **fields)  # stopped two evaluations after the best
    cut.add_callback(StopAt(4))
    assert cut.train()["steps"] == 4
    assert trainer_for(world, tmp_path / "b", scores, **fields, resume_from_checkpoint="auto").train()["steps"] == 5
    patient = {**fields, "early_stopping_patience": 5, "resume_from_checkpoint": "auto"}
    assert trainer_for(world, tmp_path / "b", scores, **patient).train()["steps"] == 7


def test_scores_of_another_evaluation_set_are_not_compared(tmp_path):
    """After a change of the set, the best branch is chosen again, and so is the score to beat."""
    world = write_world(tmp_path / "world", [(40, 40)] * 4)
    harder = write_world(tmp_path / "harder", [(40, 40)] * 2, first=20)
    fields = {"early_stopping_patience": 2, "save_steps": 1}
    assert trainer_for(world, tmp_path / "out", [0.8, 0.9], **fields, max_steps=2).train()["steps"] == 2
    resumed = {**fields, "resume_from_checkpoint": "auto", "eval_dataset": harder}
    scores = [0.8, 0.9, 0.5, 0.55, 0.6, 0.58, 0.59, 0.7]
    assert trainer_for(world, tmp_path / "out", scores, **resumed).train()["steps"] == 7


class StopAt(EarlyStopping):
    """Ends a run at a step, without being part of its state."""

    def __init__(self, step):
        super().__init__(99)
        self.step = step

    def on_train_begin(self, args, state, control, **kwargs):
        pass

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_it_needs_evaluations_and_images_to_score(tmp_path):
    with pytest.raises(ValueError, match="`early_stopping_patience` 2 counts evaluations.*Set `eval_steps`"):
        CPSConfig(early_stopping_patience=2)
    world = write_world(tmp_path / "world", [(40, 40)] * 2)
    args = settings(output_dir=str(tmp_path / "out"), crop_size=[32, 32], early_stopping_patience=1, eval_steps=1)
    with pytest.raises(ValueError, match="`early_stopping_patience` needs scores: pass `eval_dataset`"):
        # before a model is loaded
        CPSTrainer("no/model", **args, train_dataset=world, unlabeled_dataset=world.remove_columns("label"))
