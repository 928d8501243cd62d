"""Failures after the last optimizer step cost no training: the checkpoint is complete, the branches are exported, the
failure is reported, and running again does what is missing, once."""

import errno
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.resume_cases import same, without_cards_and_pictures
from support.toy import SUPPORT, run_python, settings, toy_models, write_world
from transformers import TrainerCallback

from cps_hf import files
from cps_hf.checkpointing import checkpoints
from cps_hf.checkpointing.checkpoints import problem_of
from cps_hf.hub.background import BackgroundPushes
from cps_hf.metrics.mean_iou import IoUCounter
from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training import export, results
from cps_hf.training import trainer as trainer_module
from cps_hf.training.callbacks import PushCallback, pictures
from cps_hf.training.evaluation import Evaluator
from cps_hf.training.late import AfterTrainingError, EvaluationError
from cps_hf.training.trainer import CPSTrainer

LAST = 4
FULL = OSError(errno.ENOSPC, "No space left on device")


def trainer_for(root, out, *callbacks, **fields):
    values = {"output_dir": str(out), "max_steps": LAST, "save_steps": 2, "logging_steps": 2, "eval_steps": 2}
    values |= {"per_device_train_batch_size": 2, "crop_size": [16, 16], "dataloader_num_workers": 0, "seed": 3}
    values |= {"disable_tqdm": True, "num_pictures": 0, "agreement_images": 2, "learning_rate": 0.05} | fields
    return CPSTrainer(
        toy_models(dropout=0.2, norm=True),
        **settings(**values),
        objective=CrossPseudoSupervision(),
        train_dataset=write_world(root / "labeled", [(20, 20)] * 4),
        unlabeled_dataset=write_world(root / "unlabeled", [(20, 20)] * 4, first=9, labels=False),
        eval_dataset=write_world(root / "eval", [(20, 20)] * 3, first=20),
        callbacks=[*callbacks],
    )


def outcome(out):
    """The outcome to compare: exported weights, results, the log."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((out / "results.json").read_text())
    return {
        "weights": {name: load_file(out / name / "model.safetensors") for name in ("branch_0", "branch_1", "best")},
        "log": [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines],
        "results": {k: v for k, v in found.items() if k not in ("training", "versions")},
        "state": {
            k: v
            for k, v in checkpoints.read_state(out / f"checkpoint-{LAST}").items()
            if k not in ("fingerprint", "settings", "stopwatch")
        },
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The outcome of a run in which nothing fails."""
    root = tmp_path_factory.mktemp("sound")
    with without_cards_and_pictures():
        trainer_for(root, root / "out").train()
    return outcome(root / "out")


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def at_the_end(original, fail, *, when=lambda *a, **k: True):
    """Call `original`, but raise in the last step or after it."""

    def either(*args, **kwargs):
        late = trainer_of_now.state.global_step == LAST and when(*args, **kwargs)
        return fail(*args, **kwargs) if late else original(*args, **kwargs)

    return either


class Fails(TrainerCallback):
    """Raises at one event of the last step."""

    def __init__(self, event):
        def fail(args, state, control, **kwargs):
            if state.global_step == LAST:
                raise TypeError("a fault of the user's own")

        setattr(self, event, fail)


def spoil(owner, name, error, when=lambda *a, **k: True):
    def apply(monkeypatch):
        monkeypatch.setattr(owner, name, at_the_end(getattr(owner, name), raising(error), when=when))

    return apply


def to(name):
    """Whether a folder or file of that name is written."""
    return lambda *args, **kwargs: any(Path(str(a)).name == name for a in args)


# What fails -> (how, what the run raises, its message, what is missing afterwards)
POINTS = {
    "the metric": (spoil(IoUCounter, "compute", ZeroDivisionError("by the user")), EvaluationError, "the evaluation"),
    "memory in the evaluation": (
        spoil(Evaluator, "scores", torch.OutOfMemoryError("CUDA out of memory.")),
        EvaluationError,
        "out of memory .*`per_device_eval_batch_size`",
    ),
    "a worker in the evaluation": (
        spoil(Evaluator, "scores", RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. ")),
        EvaluationError,
        "when memory runs out",
    ),
    "the export of one branch": (
        spoil(export, "export_branch", FULL, when=to("branch_1")),
        AfterTrainingError,
        "checkpoint-4, branch_0 of step 4 are kept .* branch_1: OSError: .*No space left",
    ),
    "the export of all": (
        spoil(export, "export_branch", FULL, when=lambda model, folder, **_: folder.name != "best"),
        AfterTrainingError,
        "checkpoint-4 of step 4 is kept .* branch_0: .*branch_1: ",
    ),
    "the best branch": (spoil(export, "export_branch", FULL, when=to("best")), AfterTrainingError, "best: OSError"),
    "results.json": (
        spoil(trainer_module, "write_atomically", FULL, when=to("results.json")),
        AfterTrainingError,
        "results.json: OSError: .*No space left",
    ),
    "amending": (spoil(checkpoints, "amend_checkpoint", FULL), None, "stays as it was"),
    "amending by a fault of ours": (spoil(checkpoints, "amend_checkpoint", KeyError("x")), None, "stays as it was"),
    "the removal of an old checkpoint": (
        spoil(checkpoints.shutil, "rmtree", FULL, when=to("tmp-old-checkpoint-2")),
        None,
        "checkpoint-2 could not be deleted",
    ),
    "the agreement": (
        spoil(Evaluator, "agreement", ValueError("unlabeled-3 cannot be read")),
        None,
        "The branches' agreement is not measured: unlabeled-3 cannot be read",
    ),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_failing_part_affects_no_other_and_is_done_on_restart(tmp_path, monkeypatch, caplog, expected, point):
    global trainer_of_now
    how, raised, says = POINTS[point]
    out = tmp_path / "out"
    more = {"save_total_limit": 1} if "removal" in point else {}
    with without_cards_and_pictures():
        trainer_of_now = trainer_for(tmp_path, out, **more)
        with monkeypatch.context() as injected:
            how(injected)
            if raised is None:
                trainer_of_now.train()
                said = caplog.text
            else:
                with pytest.raises(raised) as error:
                    trainer_of_now.train()
                assert type(error.value) is raised
                said = str(error.value)
                assert "Training is done" in said and "`--resume_from_checkpoint auto`" in said
        assert re.search(says, said), said
        assert problem_of(out / f"checkpoint-{LAST}") is None and not (out / "run.lock").exists()
        for name in {"branch_0", "branch_1"} - ({"branch_1"} if "one branch" in point else set()):
            if point != "the export of all":
                assert same(load_file(out / name / "model.safetensors"), expected["weights"][name])
        trainer_for(tmp_path, out, resume_from_checkpoint="auto", **more).train()
    found = outcome(out)
    if point == "the agreement":  # its last measurement was not repeated
        assert found["results"]["final"] == expected["results"]["final"]
        return
    assert [name for name in expected if not same(found[name], expected[name])] == []


EVENTS = ("on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")


@pytest.mark.parametrize("event", EVENTS)
def test_a_failing_callback_costs_nothing_and_is_reported_at_the_end(tmp_path, expected, event):
    later = []

    class Later(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            later.append(state.global_step)

    out = tmp_path / "out"
    with without_cards_and_pictures():
        with pytest.raises(
            AfterTrainingError, match=rf"kept in .* Fails.{event}: TypeError: a fault of the user's own"
        ):
            trainer_for(tmp_path, out, Fails(event), Later()).train()
    assert later == [LAST]
    assert [name for name, value in outcome(out).items() if not same(value, expected[name])] == []


def test_a_callback_failing_in_a_later_evaluation_raises(tmp_path):
    class FailsAfterwards(TrainerCallback):
        ended = False

        def on_train_end(self, args, state, control, **kwargs):
            self.ended = True

        def on_evaluate(self, args, state, control, **kwargs):
            if self.ended:
                raise TypeError("a fault of the user's own")

    with without_cards_and_pictures():
        trainer = trainer_for(tmp_path, tmp_path / "out", FailsAfterwards(), max_steps=1)
        trainer.train()
        with pytest.raises(TypeError, match="a fault of the user's own"):
            trainer.evaluate()


def test_a_callback_failing_before_the_last_step_ends_the_run(tmp_path):
    class FailsEarly(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise TypeError("a fault of the user's own")

    with without_cards_and_pictures(), pytest.raises(TypeError, match="user's own"):
        trainer_for(tmp_path, tmp_path / "out", FailsEarly()).train()
    assert problem_of(tmp_path / "out" / "checkpoint-2") is None


BROKEN = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "2.png", "eval-2"),
    "a label of no class": (
        lambda path: Image.new("L", (20, 20), 7).save(path),
        "2_label.png",
        r"The label of 'eval-2' .* holds 7 \(400 pixels\)",
    ),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_evaluation_image_only_costs_the_evaluation(tmp_path, expected, caplog, how, skip):
    damage, name, says = BROKEN[how]
    out = tmp_path / "out"
    with without_cards_and_pictures():
        trainer = trainer_for(tmp_path, out, skip_bad_samples=skip, check_labels_seconds=0)  # or it is found early
        sound = (tmp_path / "eval" / name).read_bytes()
        damage(tmp_path / "eval" / name)
        with pytest.raises(EvaluationError, match=rf"checkpoint-4, branch_0, branch_1 .*{says}.*cps-hf evaluate"):
            trainer.train()
        assert caplog.text.count("the evaluation failed") == 2  # also at step 2, where it stopped nothing
        assert json.loads((out / "results.json").read_text())["final"] == {}
        (tmp_path / "eval" / name).write_bytes(sound)
        caplog.set_level(logging.INFO)
        trainer_for(tmp_path, out, resume_from_checkpoint="auto", skip_bad_samples=skip).train()
    assert "lists as pending" in caplog.text
    found = outcome(out)
    assert same(found["results"]["final"], expected["results"]["final"])
    assert same({**found["weights"], "best": 0}, {**expected["weights"], "best": 0})
    assert [line["step"] for line in found["log"] if "eval_mean_iou" in line] == [LAST]


def test_a_checkpoint_that_cannot_be_written_leaves_the_branches(tmp_path, monkeypatch, expected):
    global trainer_of_now
    out = tmp_path / "out"
    with without_cards_and_pictures():
        trainer_of_now = trainer_for(tmp_path, out)
        with monkeypatch.context() as injected:
            spoil(checkpoints, "seal", FULL)(injected)
            with pytest.raises(AfterTrainingError, match="branch_0, branch_1 of step 4 .* resumes from checkpoint-2"):
                trainer_of_now.train()
        assert [path.name for path in checkpoints.checkpoints_in(out)] == ["checkpoint-2"]
        for name in ("branch_0", "branch_1", "best"):
            assert same(load_file(out / name / "model.safetensors"), expected["weights"][name])
        assert json.loads((out / "results.json").read_text())["final"] == expected["results"]["final"]
        trainer_for(tmp_path, out, resume_from_checkpoint="auto").train()
    assert [name for name, value in outcome(out).items() if not same(value, expected[name])] == []


def test_failing_pictures_and_cards_are_warnings(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pictures.visualization, "panel", raising(FULL))
    monkeypatch.setattr(pictures.visualization, "write_curves", raising(TypeError("of matplotlib")))
    monkeypatch.setattr(export, "render_card", raising(KeyError("a name")))
    trainer_for(tmp_path, tmp_path / "out", num_pictures=1).train()
    for what in ("the pictures of the predictions", "the pictures of the run", "a model card"):
        assert f"Without {what}" in caplog.text, what
    assert problem_of(tmp_path / "out" / "checkpoint-4") is None and (tmp_path / "out" / "best").is_dir()


def test_an_unwritable_log_is_written_later_without_partial_lines(tmp_path, monkeypatch, caplog, expected):
    """The disk is full after the first bytes of a line, and later has space again."""
    out = tmp_path / "out"

    class Room(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            room.update(left=5 if state.global_step < 4 else 10**6)

    room = {"left": 10**6}
    monkeypatch.setattr("cps_hf.training.reporting.open", lambda *a, **k: SmallDisk(*a, room=room, **k), raising=False)
    with without_cards_and_pictures():
        trainer_for(tmp_path, out, Room()).train()
    assert "metrics.jsonl could not be written; this will be tried again (reported once): OSError" in caplog.text
    assert same(outcome(out)["log"], expected["log"])


class SmallDisk:
    """A file on a disk that accepts `room["left"]` bytes of one write."""

    def __init__(self, path, mode, *, room, **options):
        self.file, self.room = open(path, mode, **options), room

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def fileno(self):
        return self.file.fileno()

    def truncate(self, size):
        return self.file.truncate(size)

    def write(self, data):
        return self.file.write(data[: self.room["left"]])


class Tracker:
    name, main_process_only = "mine", True

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("the server is gone")

    def finish(self):
        raise RuntimeError("it was never there")


def test_a_failing_tracker_stops_neither_the_run_nor_others(tmp_path, monkeypatch, caplog):
    taken = []

    class Other(Tracker):
        name = "other"

        def log(self, values, step=None, **kwargs):
            taken.append(step)

        def finish(self):
            taken.append("end")

    def two_trackers(accelerator, *_):
        accelerator.trackers = [Tracker(), Other()]

    monkeypatch.setattr(trainer_module.setup, "init_trackers", two_trackers)
    with without_cards_and_pictures():
        trainer_for(tmp_path, tmp_path / "out").train()
    assert taken == [0, 1, 2, 2, 4, 4, "end"]
    assert (
        caplog.text.count("The tracker mine did not accept the record of step 0 (reported once): ConnectionError") == 1
    )
    assert "The tracker mine failed to close: RuntimeError: it was never there" in caplog.text


def test_a_closed_terminal_does_not_stop_the_run(tmp_path, monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = isatty = fileno = write

    bar = trainer_module.RunLog.__init__.__globals__["tqdm"]

    class Eager(bar):
        """Draws at each step, even without a terminal."""

        def __init__(self, **options):
            super().__init__(**{**options, "mininterval": 0, "file": None, "disable": False})

    monkeypatch.setitem(trainer_module.RunLog.__init__.__globals__, "tqdm", Eager)
    trainer = trainer_for(tmp_path, tmp_path / "out", disable_tqdm=False)

    class Leave(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.run_log.bar.fp = trainer.run_log.bar.sp = Gone()

            def gone(*_, **__):
                raise OSError(errno.EIO, "Input/output error")

            trainer.run_log.bar.display = gone

    trainer.add_callback(Leave())
    with without_cards_and_pictures():
        assert trainer.train()["steps"] == LAST


def test_a_push_that_fails_costs_nothing(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(BackgroundPushes, "__init__", lambda *_: None)
    monkeypatch.setattr(BackgroundPushes, "submit", lambda *_, **__: None)
    monkeypatch.setattr(BackgroundPushes, "finish", raising(RuntimeError("no thread")))
    out = tmp_path / "out"
    with without_cards_and_pictures():
        trainer = trainer_for(tmp_path, out, push_to_hub=True, hub_model_id="me/toy")
        assert any(isinstance(callback, PushCallback) for callback in trainer.callback_handler.callbacks)
        with pytest.raises(AfterTrainingError, match="PushCallback.on_train_end: RuntimeError: no thread"):
            trainer.train()
    assert [name for name, value in outcome(out).items() if not same(value, expected[name])] == []


def test_a_run_stopped_by_a_callback_at_a_save_has_branches(tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    with without_cards_and_pictures():
        found = trainer_for(tmp_path, tmp_path / "out", Stop()).train()
    assert found["steps"] == 2
    for name in ("branch_0", "branch_1", "best", "checkpoint-2"):
        assert (tmp_path / "out" / name / "model.safetensors").is_file(), name


def test_a_deleted_best_branch_costs_no_checkpoint(tmp_path):
    class Take(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                shutil.move(tmp_path / "out" / "best", tmp_path / "mine")

    with without_cards_and_pictures():
        trainer_for(tmp_path, tmp_path / "out", Take(), eval_steps=2, metric_for_best_model="mean_accuracy").train()
    assert problem_of(tmp_path / "out" / "checkpoint-4") is None


# ------------------------------------------------------------------------------------------------ killed in between


class Killed(BaseException):
    """Not caught by `except Exception`, like SIGKILL."""


def kill_before(owner, name, when=lambda *a, **k: True):
    return spoil(owner, name, Killed(), when=when)


def kill_after(owner, name):
    def apply(monkeypatch):
        original = getattr(owner, name)

        def then_kill(*args, **kwargs):
            original(*args, **kwargs)
            raise Killed

        monkeypatch.setattr(owner, name, at_the_end(original, then_kill))

    return apply


def kill_between_the_renames(monkeypatch):
    """The checkpoint then has its other name, and nothing can be undone."""
    replace, calls = files.os.replace, []

    def fail(source, target):
        name = Path(target).name
        if name == f"tmp-old-checkpoint-{LAST}":
            calls.append(name)
            return replace(source, target)
        if calls:
            raise Killed
        return replace(source, target)

    monkeypatch.setattr(files.os, "replace", at_the_end(replace, fail))


KILLS = {
    "after the save, before the exports": kill_before(export, "export_branch"),
    "between two exports": kill_before(export, "export_branch", when=to("branch_1")),
    "after the exports, before the log": kill_before(CPSTrainer, "log"),
    "after the log, before the evaluation": kill_before(Evaluator, "scores"),
    "after the scores, before they are logged": kill_after(Evaluator, "scores"),
    "after all is logged, before the best is kept": kill_before(export, "export_branch", when=to("best")),
    "before amending": kill_before(checkpoints, "amend_checkpoint"),
    "while amending": kill_before(checkpoints, "seal", when=lambda *_, known=None: known is not None),
    "between amending's two renames": kill_between_the_renames,
    "after amending": kill_after(checkpoints, "amend_checkpoint"),
    "before results.json": kill_before(results, "summary"),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_run_killed_after_the_last_step_resumes_to_the_same_end(tmp_path, monkeypatch, expected, point):
    global trainer_of_now
    out = tmp_path / "out"
    with without_cards_and_pictures():
        trainer_of_now = trainer_for(tmp_path, out)
        with monkeypatch.context() as injected:
            KILLS[point](injected)
            with pytest.raises(Killed):
                trainer_of_now.train()
        trainer_for(tmp_path, out, resume_from_checkpoint="auto").train()
    assert [name for name, value in outcome(out).items() if not same(value, expected[name])] == []
    assert not [*out.glob("*tmp-*"), *out.glob("aside-*")]


# ------------------------------------------------------------------------------------------------ on one process of
# two


@pytest.mark.slow
def test_a_failure_on_one_process_is_raised_on_both(tmp_path):
    done = run_python(str(SUPPORT / "run_late_failures.py"), str(tmp_path), processes=2, timeout=550)
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert done.returncode == 0 and len(found[0]) == len(found[1]) == 16, done.stderr[-3000:]
    for name, mine, other in ((name, found[0][name], found[1][name]) for name in found[0]):
        assert mine["same"] and other["same"], name
        begins = name.startswith(("the lock", "the folder", "the first", "a tracker"))
        assert mine["whole"] is other["whole"] is not begins, name
        if name.startswith("amending"):
            assert mine["raised"] is other["raised"] is None
            continue
        process = name[-1]
        for raised in (mine["raised"], other["raised"]):
            assert f"No space left on process {process}" in raised or f"own fault on process {process}" in raised, name
            if not begins:
                kind = "EvaluationError" if name.startswith(("reading", "the metric")) else "AfterTrainingError"
                assert raised.startswith(f"{kind}: Training is done, and checkpoint-2"), name


# ------------------------------------------------------------------------------------------------ before step 1

IN_THE_WAY = {
    "results.json": (lambda path: path.mkdir(), "must be a file of the run, but there is a folder"),
    "pictures": (lambda path: path.write_text("mine"), "must be a folder of the run, but there is a file"),
    "best": (lambda path: (path / ".git").mkdir(parents=True), "contains files that are not of an exported model"),
    "branch_1": (lambda path: path.write_text("mine"), "contains files that are not of an exported model"),
    "metrics.jsonl": (lambda path: path.mkdir(), "must be a file of the run, but there is a folder"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_obstacles_to_the_runs_end_are_found_before_the_first_step(tmp_path, name):
    out = tmp_path / "out"
    with without_cards_and_pictures():
        trainer_for(tmp_path, out, max_steps=2).train()
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        IN_THE_WAY[name][0](path)
        longer = trainer_for(tmp_path, out, resume_from_checkpoint="auto")
        longer.module.register_forward_pre_hook(raising(AssertionError("a step was taken")))
        with pytest.raises(ValueError, match=f"{name} {IN_THE_WAY[name][1]}"):
            longer.train()
        assert (path / ".git").is_dir() if name == "best" else path.exists()


def test_too_little_disk_space_for_a_checkpoint_is_a_warning(tmp_path, monkeypatch, caplog):
    usage = trainer_module.setup.shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(trainer_module.setup.shutil, "disk_usage", lambda _: usage)
    with without_cards_and_pictures():
        trainer_for(tmp_path, tmp_path / "out", max_steps=1).train()
    assert "has 0.0 GB free, and a checkpoint with the branches takes about 0.0 GB: free some" in caplog.text


def test_a_tracker_that_cannot_start_fails_before_the_first_step(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, tmp_path / "out", report_to=["tensorboard"])
    monkeypatch.setattr(trainer.accelerator, "init_trackers", raising(PermissionError(13, "Permission denied", "/x")))
    with pytest.raises(ValueError, match="`report_to` tensorboard: a tracker cannot start .*Permission denied"):
        trainer.train()
