"""The lines that a run prints on the console."""

import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios

import pytest
from accelerate import Accelerator
from support.toy import settings, toy_models, write_world
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from cps_hf.commands.train import agreement_in_words
from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training import console
from cps_hf.training.reporting import RunLog
from cps_hf.training.trainer import CPSTrainer


def test_without_a_terminal_each_log_is_a_line(tmp_path, capfd):
    world = write_world(tmp_path / "world", [(40, 40)] * 4)
    values = {"output_dir": str(tmp_path / "out"), "crop_size": [32, 32], "per_device_train_batch_size": 2}
    values |= {"dataloader_num_workers": 0, "max_steps": 4, "pretrain_steps": 2, "logging_steps": 2, "eval_steps": 2}
    trainer = CPSTrainer(
        toy_models(),
        **settings(**values, num_pictures=0),
        objective=CrossPseudoSupervision(),
        train_dataset=world,
        unlabeled_dataset=world.remove_columns("label").select([0, 1, 2]),
        eval_dataset=world,
    )
    transformers_logging.disable_progress_bar()  # as `cps-hf train` does; otherwise each export would draw one
    try:
        trainer.train()
    finally:
        transformers_logging.enable_progress_bar()
    said = capfd.readouterr().err
    assert "\r" not in said
    logs = [line for line in said.splitlines() if ": loss " in line]
    assert [re.match(r"step (\d) of 4, stage (\d)/2[,:]", line).groups() for line in logs] == [
        ("1", "1"),
        ("2", "1"),
        ("4", "2"),
    ]
    assert "labeled epoch 2.0, unlabeled epoch 1.3" in logs[-1]  # 4 steps of 2 of 4; 2 steps of 2 of 3
    assert "the branches agree on" in logs[-1] and "of predictions in one class" in logs[-1]
    first, last = (line for line in said.splitlines() if "mean IoU" in line)
    for step, line in ((2, first), (4, last)):
        assert re.match(rf"step {step} of 4, .*: mean IoU branch 0 [\d.]+ %, branch 1 [\d.]+ %, mean [\d.]+ %; ", line)
        assert re.search(r"agree on [\d.]+ % of unlabeled pixels, with [\d.]+ % of predictions in one class$", line)
    score = trainer.state.scores["branch_1"]["mean_iou"]
    assert f"branch 1 {100 * score:.2f} %" in last
    assert trainer.state.epoch == 2
    lines = [record for record in trainer.state.log_history if "loss" in record]
    assert [(line["labeled_epoch"], line["unlabeled_epoch"]) for line in lines] == [
        (0.5, 0.0),
        (1.0, 0.0),
        (2.0, pytest.approx(4 / 3)),
    ]


def test_lines_follow_the_packages_log_level(tmp_path, capfd):
    log = RunLog(Accelerator(), str(tmp_path), max_steps=4, first_step=0, show_bar=True)
    logging.getLogger("cps_hf").setLevel(logging.ERROR)  # a fixture of all tests restores the level
    log.say("one")
    logging.getLogger("cps_hf").setLevel(logging.WARNING)
    log.say("two")
    log.close()
    assert capfd.readouterr().err == "two\n"


@pytest.mark.parametrize("columns, rows", [(200, 24), (80, 24), (60, 24), (0, 24), (80, 0), (0, 0)])
def test_the_bar_is_visible_in_any_terminal(tmp_path, monkeypatch, columns, rows):
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    with open(terminal, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log = RunLog(Accelerator(), str(tmp_path), max_steps=350, first_step=150, show_bar=True)
        log.begin_stage("stage 2/2", 150, 350, 350)
        log.show({"loss": 0.5123, "supervised_loss": 0.25, "cps_loss": 0.125, "learning_rate": 1e-4}, 151)
        log.advance()
        log.close()
        stream.flush()
        shown = _read(main)
    last = shown.replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert re.match(r"stage 2/2:  43%\|.*\| 151/350 \[", last) and len(last) <= (columns or 80)
    assert len(last.split("|")[1]) >= (4 if columns == 60 else 10)
    assert ("loss=0.512" in last, "lr=0.0001" in last) == (columns != 60, columns == 200)


def _read(descriptor: int) -> str:
    """What was written to the terminal."""
    os.set_blocking(descriptor, False)
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 65536):
            parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()


def test_no_time_is_left_after_training(tmp_path, capfd):
    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 2

    world = write_world(tmp_path / "world", [(40, 40)] * 4)
    values = {"output_dir": str(tmp_path / "out"), "crop_size": [32, 32], "per_device_train_batch_size": 2}
    trainer = CPSTrainer(
        toy_models(1),
        **settings(**values, dataloader_num_workers=0, max_steps=4, logging_steps=1, num_pictures=0),
        objective="supervised",
        train_dataset=world,
        eval_dataset=world,
        callbacks=[StopAtTwo()],
    )
    trainer.train()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    first, last, scores = lines
    assert first.startswith("step 1 of 4, ") and " left: loss" in first
    assert last.startswith("step 2 of 4: loss") and scores.startswith("step 2 of 4: mean IoU")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (3540, "59 min"), (3700, "1 h 02 min")]
)
def test_the_time_left_in_words(seconds, said):
    assert console.duration(seconds) == said
    assert console.place(3, 9, "", seconds) == f"step 3 of 9, {said} left"
    assert console.place(3, 9, "stage 1/2", seconds) == f"step 3 of 9, stage 1/2, {said} left in this stage"
    assert console.place(3, 9, "", None) == "step 3 of 9"


def test_a_record_without_a_score_has_no_evaluation_line():
    assert console.evaluation_line({"eval_agreement": 0.5, "eval_commonest_class": 1.0}, "step 0 of 9") == ""
    line = console.evaluation_line({"eval_mean_iou": 0.5, "eval_teacher_mean_iou": float("nan")}, "step 1 of 9")
    assert line == "step 1 of 9: mean IoU teacher -"


def test_agreement_is_shown_with_the_share_of_one_class():
    agreement = {"start": 0.2, "end": 0.993}
    sound = agreement_in_words(agreement, {"start": 0.3, "end": 0.41})
    assert sound.endswith("99.3 % at the end, where 41.0 % of predictions are one class.")
    assert "This is a collapse" in agreement_in_words(agreement, {"start": 0.3, "end": 0.991})
    assert agreement_in_words(agreement, {}).endswith("99.3 % at the end.")  # resumed from an older checkpoint
