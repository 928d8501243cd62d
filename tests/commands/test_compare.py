"""`cps-hf compare` on drawn images: its output files, resuming, and its error messages."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.resume_cases import BrokenOff, without_cards_and_pictures
from support.toy import NAMES, draw, tiny_upernet

from cps_hf.commands import compare, evaluate, train
from cps_hf.commands.comparison_report import CONTROL, EQUAL_TIME, METHOD, Part, plain, write
from cps_hf.commands.datasets import TrainingSets
from cps_hf.data.folder import load_folder
from cps_hf.metrics.bootstrap import ImageCounts
from cps_hf.objectives import Supervised
from cps_hf.training.export import BranchExporter
from cps_hf.training.trainer import CPSTrainer

STEPS, BORDER = 6, 4
SIZE = (32, 40)
COLORS = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 200]], np.uint8)
SMALL = (
    "--max_steps",
    str(STEPS),
    "--pretrain_steps",
    str(BORDER),
    "--crop_size",
    "32",
    "32",
    "--per_device_train_batch_size",
    "2",
)
SMALL += ("--dataloader_num_workers", "0", "--disable_tqdm", "--num_pictures", "0", "--agreement_images", "0")
KEYS = {"mean_iou", "seconds", "steps"}


def write_images(folder: Path, indices, *, masked=0, images="images", masks="masks", colored=False) -> None:
    """Drawn images, of which the first `masked` have a mask."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    for count, index in enumerate(indices):
        image, label = draw(index, *SIZE)
        Image.fromarray(image).save(folder / images / f"{index:03}.png")
        if count < masked:
            (folder / masks).mkdir(parents=True, exist_ok=True)
            if colored:
                label = np.where((label == 255)[..., None], np.uint8(255), COLORS[label % 3])
            Image.fromarray(label).save(folder / masks / f"{index:03}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """own/: 14 images, 8 of them with a mask; judged/: 12 others with masks; model.json: a tiny network."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "own", range(14), masked=8)
    write_images(root / "judged", range(60, 72), masked=12)
    (root / "own" / "classes.txt").write_text("\n".join(NAMES))
    tiny_upernet().to_json_file(root / "model.json")
    return root


def words_of(world: Path, out: Path, *more: str) -> list[str]:
    words = [str(world / "own"), "--output_dir", str(out), "--eval_dir", str(world / "judged")]
    return [*words, "--models", str(world / "model.json"), *SMALL, *more]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    with without_cards_and_pictures():
        return out, compare.main(words_of(world, out, "--save_steps", "100"))


@pytest.mark.slow
def test_comparison_json_has_exactly_the_documented_keys(compared):
    out, found = compared
    assert found == json.loads((out / "comparison.json").read_text())
    assert list(found) == ["supervised", "supervised_equal_time", "semi_supervised", "difference", "images"]
    assert found["supervised"].keys() == found["supervised_equal_time"].keys() == KEYS
    assert found["semi_supervised"].keys() == KEYS | {"method"} and found["semi_supervised"]["method"] == "cps"
    assert found["difference"].keys() == {"mean_iou", "low", "high"} and found["images"] == 12
    gained = found["semi_supervised"]["mean_iou"] - found["supervised_equal_time"]["mean_iou"]
    assert found["difference"]["mean_iou"] == pytest.approx(gained)
    assert found["difference"]["low"] <= gained <= found["difference"]["high"]


@pytest.mark.slow
def test_the_networks_of_the_last_step_are_compared_with_their_cost(compared):
    out, found = compared
    runs = {name: json.loads((out / name / "results.json").read_text()) for name in (METHOD, EQUAL_TIME)}
    assert (found[METHOD]["steps"], found[CONTROL]["steps"]) == (STEPS, BORDER)
    assert found[METHOD]["seconds"] == runs[METHOD]["training"]["seconds"]
    assert found[CONTROL]["seconds"] == runs[METHOD]["training"]["supervised_seconds"] < found[METHOD]["seconds"]
    timing = json.loads((out / "timing.json").read_text())
    assert timing["seconds"] == found[METHOD]["seconds"]
    assert (
        found[EQUAL_TIME]["steps"] == timing["steps"] == max(1, round(timing["seconds"] / timing["seconds_per_step"]))
    )
    control = runs[EQUAL_TIME]
    assert control["objective"]["name"] == "Supervised" and control["training"]["num_networks"] == 1
    assert control["num_labeled"] == runs[METHOD]["num_labeled"] and control["num_unlabeled"] is None
    assert control["steps"] == timing["steps"]


@pytest.mark.slow
def test_scores_equal_cps_hf_evaluate_on_the_exported_networks(compared, world, tmp_path):
    out, found = compared
    folders = {CONTROL: f"{METHOD}/supervised_0", METHOD: f"{METHOD}/branch_0", EQUAL_TIME: f"{EQUAL_TIME}/branch_0"}
    for name, folder in folders.items():
        options = json.dumps({"class_names": [*NAMES]})
        words = ["--dataset", "folder", "--data_root", str(world / "judged"), "--load_options", options]
        words += ["--output_dir", str(tmp_path / name), "--num_pictures", "0", "--num_workers", "0"]
        scores = evaluate.main(["--branches", str(out / folder), *words])["scores"]["branch_0"]
        assert found[name]["mean_iou"] == pytest.approx(scores["mean_iou"], abs=1e-9)


@pytest.mark.slow
def test_the_answer_is_printed_and_saved_as_text(compared, world, capsys, monkeypatch):
    out, found = compared
    monkeypatch.setenv("COLUMNS", "118")
    again = compare.main(words_of(world, out, "--save_steps", "100"))
    said = capsys.readouterr().out
    assert again == found and plain((out / "comparison.md").read_text(), 118) in said
    assert said.startswith("\nDid the unlabeled images help?\n\n")
    for part in ("nlabeled images", "mean IoU", "12 images of", *NAMES):
        assert part in said
    assert "#" not in said and "```" not in said


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_and_repeats_nothing(world, tmp_path, monkeypatch):
    """Interrupted in the second stage, in the equal-time run, and before scoring."""
    out, steps = tmp_path / "out", []

    def stopping(after: int):
        taken = []

        def forward(self, batch):
            if len(taken) == after:
                raise BrokenOff
            taken.append(self.state.global_step)
            steps.append((Path(self.args.output_dir).name, self.state.global_step))
            return CPSTrainer_forward(self, batch)

        return forward

    CPSTrainer_forward = CPSTrainer._forward_backward
    monkeypatch.setattr(compare, "time_steps", lambda *_, **__: compare.Timings(first_stage=1e9, second_stage=1e9))
    words = words_of(world, out, "--save_steps", "1")
    monkeypatch.setattr(BranchExporter, "_card", lambda *_: None)
    for after in (5, 1, 0):  # interrupt after: 5 of 6 steps; the 6th; the single step of the equal-time run
        with monkeypatch.context() as patched, pytest.raises(BrokenOff):
            patched.setattr(CPSTrainer, "_forward_backward", stopping(after))
            compare.main(words)
    monkeypatch.setattr(CPSTrainer, "_forward_backward", stopping(100))
    with monkeypatch.context() as patched, pytest.raises(BrokenOff):
        patched.setattr(compare, "score", lambda *_: (_ for _ in ()).throw(BrokenOff))
        compare.main(words)
    found = compare.main(words)
    assert steps == [*((METHOD, step) for step in range(STEPS)), (EQUAL_TIME, 0)]
    assert found[EQUAL_TIME]["steps"] == 1 and found["images"] == 12
    assert (out / "timing.json").is_file()


@pytest.mark.slow
def test_hub_sets_and_streams_are_compared(world, tmp_path):
    """Parquet shards of labeled and unlabeled images, read as streams, scored on their own validation split."""
    for split, indices in (("train", range(8)), ("val", range(30, 34))):
        folder = tmp_path / split
        write_images(folder, indices, masked=len(indices))
        dataset = load_folder(folder, class_names=[*NAMES])
        (tmp_path / "hub").mkdir(exist_ok=True)
        _embedded(dataset).to_parquet(str(tmp_path / "hub" / f"{split}-00000-of-00001.parquet"))
    write_images(tmp_path / "more", range(40, 48))
    (tmp_path / "unlabeled").mkdir()
    unlabeled = _embedded(load_folder(tmp_path / "more", with_labels=False))
    unlabeled.to_parquet(str(tmp_path / "unlabeled" / "train-00000-of-00001.parquet"))
    words = ["--dataset", "hub", "--data_root", str(tmp_path / "hub"), "--unlabeled_root", str(tmp_path / "unlabeled")]
    words += ["--streaming", "--models", str(world / "model.json"), *SMALL]
    with without_cards_and_pictures():
        found = compare.main([*words, "--save_steps", "100", "--output_dir", str(tmp_path / "out")])
    assert found["images"] == 4 and found["supervised"]["steps"] == BORDER
    said = (tmp_path / "out" / "comparison.md").read_text()
    assert "Whether the unlabeled images helped cannot be told from 4 validation images (mean IoU: " in said
    assert re.search(r"; about \d\d+ would be enough\.", said) and "too few" not in said


def _embedded(dataset):
    from datasets.table import embed_table_storage

    return dataset.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)


# ---------------------------------------------------------------------------------------------- what is the same


def parsed(*words: str) -> compare.ComparisonSettings:
    return train.parse([*words], compare.ComparisonSettings, command="compare")


def test_the_single_network_differs_only_in_the_unlabeled_images():
    words = (
        "--dataset",
        "folder",
        "--data_root",
        "x",
        "--partition",
        "3",
        "--class_weights",
        "0.5",
        "--models",
        "a",
        "b",
    )
    settings = parsed(
        *words, "--pretrain_steps", "4", "--max_steps", "9", "--second_stage_learning_rate_factor", "0.5"
    )
    single = compare.single_network(settings)
    assert single.objective == Supervised(class_weights=0.5) and single.data.models == ["a"]
    before, after = settings.flat(), single.flat()
    changed = {name for name in after if name in before and after[name] != before[name]}
    assert changed == {"models", "num_branches", "pretrain_steps", "second_stage_learning_rate_factor"}
    assert single.model_config.num_branches == 1 and single.args.pretrain_steps is None


def test_checkpoints_for_resuming_are_kept_by_default():
    settings = compare.restartable(parsed("--max_steps", "80"))
    assert (settings.args.save_steps, settings.args.save_total_limit) == (10, 1)
    settings = compare.restartable(parsed("--max_steps", "80", "--save_steps", "7", "--save_total_limit", "3"))
    assert (settings.args.save_steps, settings.args.save_total_limit) == (7, 3)
    assert settings.args.resume_from_checkpoint == "auto"


@pytest.mark.parametrize("colored", [False, True])
def test_eval_dir_masks_use_the_codes_of_the_training_masks(tmp_path, colored, caplog):
    write_images(tmp_path / "train", range(3), masked=3, colored=colored)
    write_images(tmp_path / "judged", [1, 9], masked=2, images="photos", masks="annotations", colored=colored)
    write_images(tmp_path / "judged", [20], images="photos")  # without a mask: skipped
    table = {"#{:02x}{:02x}{:02x}".format(*color): index for index, color in enumerate(COLORS)} | {"#ffffff": 255}
    labeled = load_folder(tmp_path / "train", class_names=[*NAMES], **({"colors": table} if colored else {}))
    settings = parsed("--dataset", "folder", "--data_root", "x", "--eval_dir", str(tmp_path / "judged"))
    judged = compare.evaluation_set(settings, TrainingSets(labeled, None, None, None))
    assert judged["id"] == ["001", "009"] and judged.features["label"] == labeled.features["label"]


def test_evaluation_images_that_were_trained_on_are_reported(tmp_path, caplog):
    write_images(tmp_path / "set", range(4), masked=4)
    labeled = load_folder(tmp_path / "set", class_names=[*NAMES])
    settings = parsed("--dataset", "folder", "--data_root", "x", "--eval_dir", str(tmp_path / "set"))
    compare.evaluation_set(settings, TrainingSets(labeled, None, None, None))
    assert "4 of the 4 evaluation images are also labeled images" in caplog.text


def test_the_windows_are_those_of_the_runs_evaluation():
    whole = compare.prediction_options(parsed())
    assert whole == {"mode": "whole"}
    sliding = parsed("--eval_mode", "sliding", "--crop_size", "48", "96", "--per_device_eval_batch_size", "3")
    assert compare.prediction_options(sliding) == {
        "mode": "sliding",
        "crop_size": (48, 96),
        "stride": (32, 64),
        "window_batch_size": 3,
    }


def test_a_run_gets_a_share_of_the_remaining_time(monkeypatch):
    settings = parsed("--time", "100s", "--data_root", "x", "--dataset", "own")
    monkeypatch.setattr(compare.time, "monotonic", lambda: 1040.0)
    clock = compare.Clock(settings, 1000.0)
    (first,), (second,) = clock.limit(0.5), clock.limit(1.0)
    assert (first.end, first.reserve, first.time) == (1070.0, 10.0, "100s") and second.end == 1100.0
    timings = compare.Timings(first_stage=1.0, second_stage=2.0, evaluation=4.0, end=6.0)
    (timed,) = clock.limit(1.0, timings, scoring=5.0)
    assert timed.timings == timings and timed.reserve == 10.0 + 5.0
    assert not timed.given and compare.Clock(settings, 1000.0, given=True).limit(1.0)[0].given
    assert compare.Clock(parsed(), 1000.0).limit(1.0) == []


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--smoke",), "`compare` has no option `--smoke`"),
        (("--push_to_hub", "true"), "`compare` has no option `--push_to_hub`"),
        (("--time", "soon"), "`--time` must be like 90s"),
        (("--eval_dir", "nowhere"), "`--eval_dir nowhere`: no such folder"),
        (("--objective", "supervised"), "needs an objective that learns from unlabeled images, got Supervised"),
        (("--pretrain_steps", "0"), "`--baseline` needs the supervised stage, but `--pretrain_steps` is 0"),
    ],
)
def test_a_mistake_ends_with_one_line_and_no_traceback(world, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(world / "own"), "--output_dir", str(tmp_path / "out"), *words])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_content_is_left_alone(tmp_path):
    out = tmp_path / "out"
    assert compare.begin(out, ["--seed", "3"]) is None  # a failed start: nothing was trained
    assert compare.begin(out, ["--seed", "1", "--output_dir", str(out)]) is None
    (out / "plan.yaml").touch()
    assert compare.begin(out, ["--output_dir", "elsewhere", "--seed", "1"]) is None
    with pytest.raises(ValueError, match="`--seed` was '1', and is '2' now"):
        compare.begin(out, ["--seed", "2"])
    with pytest.raises(ValueError, match="`--seed` was '1', and is not given now"):
        compare.begin(out, [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and contains no comparison"):
        compare.begin(tmp_path / "other", [])
    assert not (tmp_path / "other" / "command.json").exists()


def test_nothing_to_score_on_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no validation images to score the networks on.*--eval_dir"):
        compare.evaluation_set(parsed(), TrainingSets(None, None, None, None))
    write_images(tmp_path / "judged" / "images", range(2), images=".")
    settings = parsed("--eval_dir", str(tmp_path / "judged"))
    with pytest.raises(ValueError, match="Nothing in .*judged looks like masks"):
        compare.evaluation_set(settings, TrainingSets(None, None, None, None))


# ---------------------------------------------------------------------------------------------- the answer


def counts(right: float, images: int = 20) -> ImageCounts:
    matrices = np.zeros((images, 2, 2), int)
    matrices[:, 0, 0] = np.random.default_rng(0).binomial(1000, right, images)
    matrices[:, 0, 1] = 1000 - matrices[:, 0, 0]
    matrices[:, 1, 1] = 500
    return ImageCounts.of(matrices)


def test_the_difference_is_to_the_equal_time_run_on_labels(tmp_path):
    parts = {CONTROL: Part(tmp_path, 10.0, 5), EQUAL_TIME: Part(tmp_path, 31.0, 20), METHOD: Part(tmp_path, 30.0, 9)}
    of_parts = {CONTROL: counts(0.5), EQUAL_TIME: counts(0.8), METHOD: counts(0.7)}
    found = write(tmp_path, parts, of_parts, ["a", "b"], method="cps", images="validation images")
    expected = found[METHOD]["mean_iou"] - found[EQUAL_TIME]["mean_iou"]
    assert found["difference"]["mean_iou"] == pytest.approx(expected) and found["difference"]["high"] < 0
    said = (tmp_path / "comparison.md").read_text()
    gained = 100 * (found[METHOD]["mean_iou"] - found[CONTROL]["mean_iou"])
    assert f"mean IoU is {gained:.1f} points higher; that includes the effect of more training" in said
    assert "The unlabeled images lowered mean IoU by " in said and "): beyond chance. " in said
    assert found[CONTROL] == {"mean_iou": pytest.approx(found[CONTROL]["mean_iou"]), "seconds": 10.0, "steps": 5}


def test_a_single_image_has_no_interval_and_the_file_stays_json(tmp_path):
    parts = {name: Part(tmp_path, 1.0, 1) for name in (CONTROL, EQUAL_TIME, METHOD)}
    write(tmp_path, parts, {name: counts(0.6, 1) for name in parts}, ["a", "b"], method="cps", images="images")
    text = (tmp_path / "comparison.json").read_text()
    assert json.loads(text)["difference"] == {"mean_iou": 0.0, "low": None, "high": None} and "NaN" not in text


def test_the_console_shows_the_answer_without_markdown(tmp_path):
    parts = {name: Part(tmp_path, 1.0, 1) for name in (CONTROL, EQUAL_TIME, METHOD)}
    for images in (9, 10):
        of_parts = {CONTROL: counts(0.5, images), EQUAL_TIME: counts(0.6, images), METHOD: counts(0.6, images)}
        write(tmp_path, parts, of_parts, ["a", "b"], method="cps", images="validation images")
        text = (tmp_path / "comparison.md").read_text()
        shown = plain(text, 60)
        assert "#" not in shown and "```" not in shown and shown.startswith("Did the unlabeled images help?\n\n")
        verbatim = text.split("```\n")[1].splitlines()
        assert shown.splitlines()[-len(verbatim) :] == verbatim  # aligned columns are not wrapped
        assert max(map(len, shown.splitlines()[: -len(verbatim)])) <= 60 and max(map(len, verbatim)) <= 80
        one_line = " ".join(shown.split())
        # with few images: one sentence, and no table of classes that have no verdict
        assert ("95 % interval" in shown) == (images == 10) == ("within chance" in shown)
        assert ("cannot be told from 9 validation images" in one_line) == (images == 9)
    assert "With the unlabeled images, mean IoU is 0.0 points higher than that of the control, which " in one_line


def test_with_a_recipe_no_plan_is_made(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 40\nlearning_rate: 0.05\n")
    words = ["DIR", "--output_dir", str(tmp_path / "out"), "--config", str(recipe)]
    settings = compare.parse(words, compare.ComparisonSettings)
    sets = SimpleNamespace(found=None, unlabeled=object())  # a plan would need labels too
    planned, timings = compare.plan(settings, sets, compare.typed_names(words), 0.0)
    assert timings is None
    assert planned.args.learning_rate == 0.05 and planned.args.pretrain_steps == 20
    assert "config" not in compare.typed_names(words[:-2])
