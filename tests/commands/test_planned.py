"""`cps-hf train DIR`: the plan is printed, respects the given options and is saved; and what a run starts from."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from datasets import Dataset
from PIL import Image
from support.toy import NAMES, tiny_upernet
from transformers import PreTrainedConfig

from cps_hf.commands import planned, timing, train
from cps_hf.commands.datasets import load_data, warn_of_earlier_training
from cps_hf.commands.models import branches_of, chosen_models
from cps_hf.commands.planned import seconds_of, with_choices
from cps_hf.commands.timing import TimeLimit, time_steps
from cps_hf.objectives import CrossPseudoSupervision, Supervised
from cps_hf.planning import FIRST_STAGE_SHARE
from cps_hf.planning.plan import Choice, Plan

WORDS = ("--crop_size", "32", "--dataloader_num_workers", "0", "--disable_tqdm", "true", "--num_pictures", "0")
WORDS += ("--per_device_train_batch_size", "2", "--ema_decay", "none", "--agreement_images", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 images, the first 8 with a mask; and the configuration of a tiny network."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / "set" / name).mkdir(parents=True)
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(root / f"set/images/{index}.png")
        mask = rng.choice(3, (40, 48), p=[0.8, 0.15, 0.05]).astype(np.uint8)
        if index < 8:
            Image.fromarray(mask).save(root / f"set/masks/{index}.png")
    (root / "set" / "classes.json").write_text(json.dumps(list(NAMES)))
    tiny_upernet().save_pretrained(root / "tiny")
    return root


def parsed(*words):
    return train.parse([*words])


# ---------------------------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """A two-stage run, its standard output and its folder."""
    out = tmp_path_factory.mktemp("ran") / "out"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        train.main(
            [
                str(folder / "set"),
                "--models",
                str(folder / "tiny"),
                "--output_dir",
                str(out),
                "--max_steps",
                "3",
                *WORDS,
            ]
        )
    return "\n".join(printed), out


@pytest.mark.slow
def test_the_plan_is_printed_and_saved_and_keeps_given_options(ran):
    printed, out = ran
    config = yaml.safe_load((out / "config.yaml").read_text())
    reason = r"class_weights 0\.5 rare classes get more weight: [^()]* \(bar\) to [^()]* \(ground\)"
    assert re.search(reason, " ".join(printed.split()))
    assert (config["objective"], config["class_weights"], config["optim"]) == ("cps", 0.5, "adamw")
    assert (config["max_steps"], config["pretrain_steps"]) == (3, 2)
    assert config["crop_size"] == [32, 32] and config["ema_decay"] is None
    assert not re.search(r"^  (crop_size|max_steps|ema_decay|backbone) ", printed, flags=re.M)
    assert (out / "supervised_0").is_dir() and (out / "branch_1").is_dir()


@pytest.mark.slow
def test_an_earlier_run_is_the_start_of_the_next_one(ran, folder, tmp_path, caplog):
    _, first = ran
    words = [str(folder / "set"), "--output_dir", str(tmp_path / "out"), "--init_from", str(first), "--max_steps", "1"]
    settings = parsed(*words, "--pretrain_steps", "0", *WORDS)
    sets = load_data(settings.data)
    with caplog.at_level("INFO", logger="cps_hf"):
        trainer, _ = train.build(settings, sets)
    assert f"all weights from {first / 'branch_0'}" in caplog.text and "branch_1" in caplog.text
    assert "random weights" not in caplog.text
    # another class: its heads are trained from scratch, which is logged
    (folder / "more.json").write_text(json.dumps([*NAMES, "kerb"]))
    settings = parsed(*words, "--class_names", str(folder / "more.json"), *WORDS)
    caplog.clear()
    with caplog.at_level("INFO", logger="cps_hf"):
        train.build(settings, load_data(settings.data))
    assert "except for the class count (now 4)" in caplog.text


@pytest.mark.parametrize("a_branch", [False, True])
def test_validation_images_of_an_earlier_training_give_a_warning(folder, tmp_path, caplog, a_branch):
    def warned(*words):
        caplog.clear()
        settings = parsed(
            str(folder / "set"), "--init_from", str(tmp_path / "branch_0" if a_branch else tmp_path), *words
        )
        warn_of_earlier_training(load_data(settings.data), settings.plan.init_from)
        return "were not held out in" in caplog.text and caplog.text

    listed = tmp_path / "validation.txt"
    assert not warned()  # nothing is known about it
    held = load_data(parsed(str(folder / "set")).data).found.held_out
    others = [str(index) for index in range(8) if str(index) not in held]
    listed.write_text("\n".join(others[:2]))
    said = warned()
    assert f"{len(held)} of the {len(held)} validation images" in said and f"`--validation {listed}` keeps" in said
    assert not warned("--validation", str(listed)) and not warned("--validation", "none")
    listed.write_text("\n".join(held))
    assert not warned()
    listed.write_text("other_1\nother_2")  # from another data set
    assert not warned()


@pytest.mark.slow
def test_a_trial_run_times_steps_and_leaves_nothing_behind(folder, tmp_path):
    settings = parsed(
        str(folder / "set"), "--models", str(folder / "tiny"), "--output_dir", str(tmp_path / "o"), *WORDS
    )
    sets, made = load_data(settings.data), []

    def make(clock, **others):
        made.append(others["output_dir"])
        return planned.make_trainer(settings.with_values(**others), sets, planned.models_of(settings), [clock])

    timings = time_steps(make, True, timed=2)
    assert 0 < timings.first_stage < timings.spent and 0 < timings.second_stage < timings.spent
    assert timings.evaluation > 0 and timings.start > 0 and timings.end > 0
    assert not (tmp_path / "o").exists() and not any(tmp_path.joinpath(folder).exists() for folder in made)


@pytest.mark.parametrize("images", [1, 2, 4, 30])
def test_starting_an_evaluation_is_not_counted_for_each_image(monkeypatch, images):
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    def scores(dataset):
        now[0] += 8.0 + 0.5 * len(dataset)

    found = timing.evaluation_times(SimpleNamespace(scores=scores), Dataset.from_dict({"id": [*range(images)]}))
    assert found == ((0.0, 8.5) if images == 1 else (8.0, 0.5))
    assert timing.evaluation_times(None, None) == (0.0, 0.0)


def test_the_length_fits_the_remaining_time(folder, tmp_path, monkeypatch):
    timings = planned.Timings(first_stage=0.5, second_stage=1.0, evaluation=1.0, start=5.0, end=5.0, spent=10.0)
    seen = []

    def time_nothing(make, two_stages, **_):
        seen.append(two_stages)
        return timings

    monkeypatch.setattr(planned, "time_steps", time_nothing)
    words = [str(folder / "set"), "--models", str(folder / "tiny"), "--output_dir", str(tmp_path), "--time", "5m"]
    settings = parsed(*words)
    sets = load_data(settings.data)
    typed = {"time", "models", "output_dir", "dataset", "data_root"}
    began = time.monotonic() - 20  # imports took these
    chosen, plan = planned.complete(settings, sets, typed, began=began)
    assert seen == [True]
    steps, first = chosen.args.max_steps, chosen.args.pretrain_steps
    assert first == round(FIRST_STAGE_SHARE * steps)
    assert 0.8 * 300 < 20 + 10 + 10 + first * 0.5 + (steps - first) * 1.0 < 300
    (limit,) = planned.time_limit(chosen, plan, began=began)
    assert (limit.time, limit.timings, limit.given) == ("5m", timings, False)
    assert (limit.end, limit.reserve) == (pytest.approx(began + 300), 6.0)
    without = parsed(*words[:-2])
    assert planned.time_limit(*planned.complete(without, sets, typed - {"time"}, began=began), began=began) == []


def test_a_time_also_limits_a_run_whose_steps_are_given(folder, tmp_path, monkeypatch):
    words = [str(folder / "set"), "--models", str(folder / "tiny"), "--output_dir", str(tmp_path)]
    settings = parsed(*words, "--time", "5m", "--max_steps", "1000000")
    typed = {"time", "max_steps", "models", "output_dir", "dataset", "data_root"}
    chosen, plan = planned.complete(settings, load_data(settings.data), typed, began=time.monotonic())
    assert chosen.args.max_steps == 1_000_000 and plan.timings is None
    (limit,) = planned.time_limit(chosen, plan, began=50.0)
    assert limit.given and limit.timings is None
    assert (limit.end, limit.reserve) == (350, 10)
    (limit,) = planned.time_limit(chosen.with_values(time="20s"), plan, began=50.0)
    assert (limit.end, limit.reserve) == (70, 2)
    monkeypatch.setattr(planned, "PartialState", lambda: SimpleNamespace(num_processes=2))
    assert planned.time_limit(chosen, plan, began=50.0) == []  # several processes would have to agree


def test_a_time_over_before_the_trial_is_an_immediate_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(planned, "time_steps", lambda *_, **__: pytest.fail("a trial was run"))
    settings = parsed(str(folder / "set"), "--models", str(folder / "tiny"), "--time", "5")
    with pytest.raises(ValueError, match="`--time` 5: starting and reading the images alone took [2-9][0-9] s"):
        planned.complete(
            settings, load_data(settings.data), {"time", "models", "dataset", "data_root"}, began=time.monotonic() - 20
        )


@pytest.mark.parametrize("share, minutes, end", [(1.0, 4, ","), (0.48, 8, " (`compare` trains twice),")])
def test_a_time_for_too_few_steps_says_what_to_type(folder, monkeypatch, capsys, share, minutes, end):
    timings = planned.Timings(first_stage=3.0, second_stage=3.0, evaluation=1.0, start=5.0, end=5.0, spent=10.0)
    monkeypatch.setattr(planned, "make_trainer", lambda *_: pytest.fail("a trial was run"))
    monkeypatch.setattr(planned, "time_steps", lambda *_, **__: timings)
    settings = parsed(str(folder / "set"), "--models", str(folder / "tiny"), "--time", "90s")
    sets, typed = load_data(settings.data), {"time", "models", "dataset", "data_root"}
    with pytest.raises(ValueError, match="teach nothing") as error:
        planned.complete(settings, sets, typed, began=time.monotonic() - 5, share=share)
    said = str(error.value)
    started = re.match(r"`--time 90s`: starting took (\d+) s and timing a few steps 0 s\. In ", said)
    assert 5 <= int(started[1]) < 20
    assert f"Give `--time {minutes}m`{end} a smaller `--crop_size`, or `--max_steps`." in said
    assert "Timing a few steps, to fit the run into `--time 90s` ..." in capsys.readouterr().out
    settings = settings.with_values(time=f"{minutes}m")
    planned.complete(settings, sets, typed, began=time.monotonic() - 5, share=share)


def test_without_unlabeled_images_the_run_is_supervised(folder, tmp_path):
    settings = parsed(str(folder / "set"), "--models", str(folder / "tiny"), "--weight", "2")
    sets = load_data(settings.data)._replace(unlabeled=None)
    typed = {"models", "dataset", "data_root"}
    chosen, _ = planned.complete(settings, sets, typed, began=time.monotonic())
    assert isinstance(chosen.objective, Supervised) and chosen.model_config.num_branches == 1
    assert chosen.objective.class_weights == 0.5
    with pytest.raises(ValueError, match="`weight` is an option of methods with unlabeled images"):
        planned.complete(settings, sets, typed | {"weight"}, began=time.monotonic())


def test_given_options_of_a_method_survive_the_choice_of_another(tmp_path):
    settings = parsed("--dataset", "own", "--data_root", "x", "--labeled_loss", "focal", "--focal_gamma", "3")
    assert isinstance(settings.objective, CrossPseudoSupervision)
    chosen = with_choices(settings, {"objective": "supervised"}, {"labeled_loss", "focal_gamma"})
    assert chosen.objective == Supervised(labeled_loss="focal", focal_gamma=3.0)


def test_options_of_the_plans_optimizer_may_be_given_without_it():
    assert parsed("DIR", "--adam_beta2", "0.95").args.adam_beta2 == 0.95
    assert parsed("DIR", "--optim", "sgd", "--momentum", "0.8").args.momentum == 0.8


# ---------------------------------------------------------------------------------------------- parts of it


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), (" .5 m ", 30)])
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "ten", "10 minutes", "-5m", "0s", "m"])
def test_invalid_times(text):
    with pytest.raises(ValueError, match="`time` must be like 90s, 10m or 1.5h"):
        seconds_of(text)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--time", "10m"], "`time` requires a folder of your own"),
        (["--dataset", "own", "--data_root", "x", "--time", "soon"], "must be like"),
        (["--dataset", "own", "--data_root", "x", "--init_from", "nowhere"], "no such folder"),
    ],
)
def test_plan_errors_are_reported_before_data_is_read(words, said):
    with pytest.raises(ValueError, match=said):
        train.check_before_loading(parsed(*words))


@pytest.mark.parametrize("text, number", [("6", "6"), ("20s", "20"), ("30", None), ("6m", None)])
def test_a_time_in_seconds_that_probably_means_minutes_is_a_warning(text, number, caplog):
    planned.check(parsed("folder", "--time", text))
    said = f"`--time {text}` is {number} seconds, and starting alone may take longer. "
    assert caplog.messages == ([f"{said}{number} minutes are written `--time {number}m`."] if number else [])


def test_a_run_does_not_start_from_its_own_output_folder(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    settings = parsed("--init_from", str(tmp_path), "--output_dir", str(tmp_path))
    with pytest.raises(ValueError, match="are both .*Choose another `output_dir`"):
        planned.check(settings, plans=True)


def test_which_networks_an_earlier_run_gives(tmp_path):
    def exported(name):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
        return str(tmp_path / name)

    with pytest.raises(ValueError, match="neither best/ nor branch_0/"):
        branches_of(str(tmp_path), 2)
    best = exported("best")
    assert branches_of(str(tmp_path), 2) == [best, best] and branches_of(best, 1) == [best]
    pair = [exported("branch_0"), exported("branch_1")]
    assert branches_of(str(tmp_path), 2) == pair and branches_of(str(tmp_path), 1) == [best]
    assert branches_of(str(tmp_path), 3) == [best] * 3
    for models, backbone, other in (["x"], None, "models"), ([], "resnet18", "backbone"):
        with pytest.raises(ValueError, match=f"Remove `{other}`"):
            chosen_models(models, backbone, str(tmp_path), 2)


def test_a_backbone_alone_logs_its_architecture(caplog):
    with caplog.at_level("INFO", logger="cps_hf"):
        config = chosen_models([], "timm/resnet18.a1_in1k", None, 2)
    assert config.model_type == "deeplabv3_plus" and config.backbone_config.backbone == "resnet18"
    assert "DeepLabV3+ (textbook head" in caplog.text
    assert chosen_models(["a"], "resnet18", None, 2) == "a" and chosen_models(["a", "b"], None, None, 2) == ["a", "b"]
    both = chosen_models([], ["resnet18", "convnext_atto"], None, 2)
    assert [config.backbone_config.backbone for config in both] == ["resnet18", "convnext_atto"]
    assert isinstance(chosen_models([], None, None, 2), PreTrainedConfig)


@pytest.mark.parametrize("num_labeled, said", [(20, True), (5000, False), (None, False)])
def test_random_weights_on_few_labels_give_advice(num_labeled, said, caplog):
    from cps_hf.commands.models import warn_of_random_weights

    warn_of_random_weights(tiny_upernet(), None, num_labeled)
    assert ("20 labeled images are few" in caplog.text and "--backbone" in caplog.text) == said
    caplog.clear()
    warn_of_random_weights(tiny_upernet(), "resnet18", 20)
    warn_of_random_weights("some/checkpoint", None, 20)
    assert not caplog.text


TIMED = planned.Timings(first_stage=0.5, second_stage=1.0, evaluation=2.0, end=8.0)


class Running:
    """A time limit of 100 s in a run that is simulated: `now` is the clock."""

    def __init__(self, monkeypatch, *, timings=TIMED, given=False, step=0, max_steps=100, border=0):
        self.now, self.control = 0.0, SimpleNamespace(should_training_stop=False)
        self.args = SimpleNamespace(pretrain_steps=border or None)
        self.state = SimpleNamespace(global_step=step, max_steps=max_steps, eval_steps=10)
        monkeypatch.setattr(timing.time, "monotonic", lambda: self.now)
        self.limit = TimeLimit("100s", 100.0, 10.0, timings, given=given)

    def step(self, seconds, count=1):
        for _ in range(count):
            self.limit.on_step_begin(self.args, self.state, self.control)
            self.now += seconds
            self.state.global_step += 1
            self.limit.on_step_end(self.args, self.state, self.control)
        return self.control.should_training_stop


@pytest.mark.parametrize("given", [False, True])
def test_training_ends_when_the_time_is_over(monkeypatch, caplog, given):
    run = Running(monkeypatch, given=given)
    assert not run.step(0.5, 50)
    run.now = 91.0
    assert run.step(0.5) and "`--time 100s` is nearly over at step 51 of 100, so training ends here: " in caplog.text
    assert ("the machine has become slower" in caplog.text, "--max_steps" in caplog.text) == (not given, given)
    run = Running(monkeypatch, step=99)
    run.now = 91.0
    assert not run.step(0.5)  # the last step: nothing is cut off


def test_a_slow_machine_gets_a_larger_reserve_for_the_end(monkeypatch):
    run = Running(monkeypatch, border=50)
    assert not run.step(9.0)  # the first steps are slow in any run
    run.now = 60.0
    assert not run.step(0.5, 3) and run.step(1.5, 6)  # three times as slow as in the trial: 30 s instead of 10


@pytest.mark.parametrize("slowdown", [0.5, 1.0, 2.0])
def test_the_second_stage_is_fitted_to_the_time_that_is_left(monkeypatch, caplog, slowdown):
    run = Running(monkeypatch, max_steps=60, border=30)
    run.step(0.5 * slowdown, 29)
    with caplog.at_level("INFO", logger="cps_hf"):
        run.limit.on_save(run.args, run.state, run.control)  # a checkpoint within the stage
        assert run.state.max_steps == 60 and not caplog.text
        run.step(0.5 * slowdown)
        run.now += 2.0 * slowdown  # the evaluation
        run.limit.on_save(run.args, run.state, run.control)
    later, began = run.state.max_steps - 30, run.now
    a_step = slowdown * (1.0 + 2.0 / 10)  # with its share of an evaluation every ten steps
    end = began + later * a_step + 10 * max(1.3, slowdown)
    assert 100 - 0.08 * (100 - began) - a_step <= end <= 100
    said = (
        f"The second stage gets {later} steps instead of 30, as many as fit into `--time 100s`. Each will take about "
    )
    assert f"{said}{slowdown:.2g} s." in caplog.text


def test_a_given_length_and_a_run_that_ends_are_not_fitted(monkeypatch):
    for given, ends in ((True, False), (False, True)):
        run = Running(monkeypatch, timings=None if given else TIMED, max_steps=60, border=1)
        run.step(0.1)
        run.control.should_training_stop = ends
        run.limit.on_save(run.args, run.state, run.control)
        assert run.state.max_steps == 60
    run = Running(monkeypatch, max_steps=60, border=1)
    run.step(95.0)  # there is no time left: the second stage exists, and no more
    run.control.should_training_stop = False
    run.limit.on_save(run.args, run.state, run.control)
    assert run.state.max_steps == 2


def test_settings_and_plan_on_disk_follow_the_length(tmp_path):
    settings = parsed("DIR", "--output_dir", str(tmp_path), "--max_steps", "60")
    plan = Plan([Choice("optim", "adamw", "why"), Choice("max_steps", 60, "fits")])
    callbacks = [train.WriteSettings(settings), train.WritePlan(plan)]
    state = SimpleNamespace(is_world_process_zero=True)
    for callback in callbacks:
        callback.on_train_begin(settings.args, state, None)
    settings.args.max_steps = 50
    for callback in callbacks:
        callback.on_step_begin(settings.args, state, None)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["max_steps"] == 50
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert rows[1]["value"] == 50 and rows[1]["reason"].startswith("60 were planned; ") and rows[0]["reason"] == "why"


def test_a_resumed_run_keeps_its_plan(tmp_path):
    words = ["DIR", "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]
    assert train.as_resumed(words) == words  # there is no plan yet
    (tmp_path / "config.yaml").write_text("max_steps: 7\n")
    resumed = train.as_resumed(words)
    assert resumed[-2:] == ["--config", str(tmp_path / "config.yaml")]
    assert train.parser.given_names(resumed) >= {"max_steps", "dataset", "data_root", "resume_from_checkpoint"}
    assert train.as_resumed(words[:3]) == words[:3]
    assert train.as_resumed([*words, "--config", "mine.yaml"])[-1] == "mine.yaml"
