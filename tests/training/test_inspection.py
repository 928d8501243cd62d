"""Checks of labels before the first step, and reports of classes that never occur."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from support.exported import facts
from support.toy import NAMES, settings, toy_models, write_world

from cps_hf.data.labels import LabelEncoding
from cps_hf.hub import render_card
from cps_hf.objectives import Supervised
from cps_hf.training.inspection import absent_line, check_labels
from cps_hf.training.reporting import class_table, mean_iou_in_words, scores_table
from cps_hf.training.trainer import CPSTrainer

SIZES = [(33, 40), (40, 33), (36, 36), (37, 41)]


def rewritten(dataset, change, rows=None):
    """Change the set's label files: `change(ids) -> ids`."""
    for row in dataset.with_format("arrow")[:].to_pylist() if rows is None else rows:
        path = row["label"]["path"]
        Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)
    return dataset


def coded(dataset, names=NAMES, **coding):
    return dataset.cast_column("label", LabelEncoding(names, **coding).to_feature())


@pytest.fixture
def sets(tmp_path):
    return {
        "train_dataset": write_world(tmp_path / "labeled", SIZES),
        "eval_dataset": write_world(tmp_path / "eval", SIZES, first=90),
    }


def trainer_for(tmp_path, sets, names=NAMES, **fields):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "crop_size": [32, 32],
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "num_pictures": 0,
    }
    models = toy_models(1, num_labels=len(names))
    return CPSTrainer(models, **settings(**(values | fields)), objective=Supervised(), **sets)


def rejected(tmp_path, sets, said, **options):
    """Before step 1, and before anything is written."""
    with pytest.raises(ValueError, match=said):
        trainer_for(tmp_path, sets, **options).train()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_bad_label_of_a_later_batch_is_found_before_step_1(tmp_path, sets, which):
    last = sets[which].with_format("arrow")[:].to_pylist()[-1:]
    rewritten(sets[which], lambda ids: ids * 0 + 7, last)
    skip = " To train without such samples: `skip_bad_samples`." if which == "train_dataset" else ""
    rejected(tmp_path, sets, rf"-3.* contains 7 \(1517 pixels\).*{skip}$")


def test_unreadable_training_labels_can_be_skipped(tmp_path, sets, caplog):
    last = sets["train_dataset"].with_format("arrow")[:].to_pylist()[-1:]
    rewritten(sets["train_dataset"], lambda ids: ids * 0 + 7, last)
    trainer_for(tmp_path, sets, skip_bad_samples=True, max_bad_sample_share=1.0).train()
    assert "`train_dataset`: samples that cannot be read will be replaced" in caplog.text
    rewritten(sets["eval_dataset"], lambda ids: ids * 0 + 7)
    with pytest.raises(ValueError, match="4 of 4 samples cannot be used: 'eval-0', 'eval-1', 'eval-2', 'eval-3'"):
        trainer_for(tmp_path, sets, skip_bad_samples=True, overwrite_output_dir=True).train()


@pytest.mark.parametrize("skips", [False, True])
def test_skipping_is_not_advised_if_no_label_can_be_read(tmp_path, sets, skips):
    rewritten(sets["train_dataset"], lambda ids: ids * 0 + 7)
    rejected(tmp_path, sets, r"4 of 4 samples cannot be used: [-', \w]+\.$", skip_bad_samples=skips)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_set_without_labeled_pixels_is_rejected(tmp_path, sets, which):
    rewritten(sets[which], lambda ids: ids * 0 + 255)
    rejected(tmp_path, sets, f"No pixel of `{which}` is labeled")


def test_black_and_white_masks_need_a_meaning_of_white(tmp_path, sets):
    for dataset in sets.values():
        rewritten(dataset, lambda ids: np.where(ids == 1, 255, 0))
    two = {name: coded(dataset, NAMES[:2]) for name, dataset in sets.items()}
    rejected(tmp_path, two, r"contain only 0 and 255.*`values={0: 0, 255: 1}`", names=NAMES[:2])
    uncoded = {name: dataset.cast_column("label", type(dataset.features["label"])()) for name, dataset in sets.items()}
    rejected(tmp_path, uncoded, "contain only 0 and 255", names=NAMES[:2])
    told = {name: coded(dataset, NAMES[:2], values={0: 0, 255: 1}) for name, dataset in sets.items()}
    results = trainer_for(tmp_path, told, names=NAMES[:2]).train()
    assert results["classes"]["absent"] == {"training": [], "evaluation": []}


def test_white_must_mean_the_same_in_both_sets(tmp_path, sets):
    rewritten(sets["train_dataset"], lambda ids: np.where(ids == 1, 255, 0))
    rewritten(sets["eval_dataset"], lambda ids: np.where(ids == 2, 255, ids))
    both = {
        "train_dataset": coded(sets["train_dataset"], NAMES[:2], values={0: 0, 255: 1}),
        "eval_dataset": coded(sets["eval_dataset"], NAMES[:2]),
    }
    said = r"`train_dataset` contain only 0 and 255, so 255 means 'disc' there.*`values={0: 0, 1: 1, 255: 1}`"
    rejected(tmp_path, both, said, names=NAMES[:2])


def test_a_set_that_lost_its_encoding_is_rejected(tmp_path, sets):
    sets["train_dataset"] = coded(sets["train_dataset"], values={0: 0, 1: 1, 2: 2, 255: 255})
    sets["eval_dataset"] = coded(sets["eval_dataset"], values={0: 0, 1: 1, 2: 2, 255: 255})
    lost = sets["train_dataset"].cast_column("label", type(sets["train_dataset"].features["label"])())
    said = r"`eval_dataset` says how its labels are encoded and `train_dataset` does not.*features=loaded.features"
    rejected(tmp_path, {**sets, "train_dataset": lost}, said)


def test_absent_classes_are_reported_everywhere(tmp_path, sets, caplog):
    rewritten(sets["train_dataset"], lambda ids: np.where(ids == 2, 0, ids))
    rewritten(sets["eval_dataset"], lambda ids: np.where(ids >= 1, 255, ids))
    trainer = trainer_for(tmp_path, sets)
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        results = trainer.train()
    said = [record.getMessage() for record in caplog.records if "never occur" in record.getMessage()]
    assert said == [
        "1 of 3 classes never occurs in training (all 4 samples): bar.",
        "2 of 3 classes never occur in evaluation (all 4 samples): disc, bar.",
        "1 of 3 classes never occurs in training: bar; 2 of 3 classes never occur in evaluation: disc, bar.",
    ]
    scored = sum(value == value for value in results["final"]["branch_0"]["per_category_iou"])
    assert results["classes"]["absent"] == {"training": ["bar"], "evaluation": ["disc", "bar"]}
    assert results["classes"]["named"] == 3 and results["classes"]["scored"] == {"branch_0": scored}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["classes"] == results["classes"]
    card = (tmp_path / "out" / "branch_0" / "README.md").read_text(encoding="utf-8")
    assert "2 of the 3 classes have no pixel in the labels of evaluation: disc, bar." in card


def test_a_limit_of_zero_seconds_skips_the_check(tmp_path, sets, caplog):
    rewritten(sets["eval_dataset"], lambda ids: ids * 0 + 255)
    trainer = trainer_for(tmp_path, sets, check_labels_seconds=0)
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        assert check_labels(trainer.args, **sets, names=NAMES) == {}
    [said] = caplog.messages
    assert said.startswith("Labels are not checked before step 1 (`check_labels_seconds=0`)")


def test_unchecked_labels_are_reported(tmp_path, sets, caplog):
    trainer = trainer_for(tmp_path, sets, check_labels_seconds=1e-9)
    streamed = {**sets, "train_dataset": sets["train_dataset"].to_iterable_dataset()}
    caplog.set_level(logging.INFO, logger="cps_hf")
    check_labels(trainer.args, **streamed, names=NAMES)
    assert "`train_dataset`: labels were checked before step 1 in the first 1 samples of the stream." in caplog.text
    assert "in 1 of 4 samples within `check_labels_seconds`." in caplog.text


def test_ambiguous_masks_of_rotated_images_are_a_warning(tmp_path, sets, caplog):
    row = sets["train_dataset"].with_format("arrow")[:].to_pylist()[2]
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(row["image"]["path"]).save(row["image"]["path"], exif=exif)
    check_labels(trainer_for(tmp_path, sets).args, **sets, names=NAMES)
    [record] = [record for record in caplog.records if "do not show whether" in record.getMessage()]
    assert record.levelname == "WARNING" and "1 masks of rotated images" in record.getMessage()
    assert "labeled-2" in record.getMessage()


# ------------------------------------------------------------------------------------------------ sentences

NAN = float("nan")
PART = {
    **{"mean_iou": 0.531, "mean_accuracy": 0.6, "overall_accuracy": 0.7, "mean_boundary_iou": 0.4},
    **{"per_category_iou": [0.5, 0.562, NAN], "per_category_accuracy": [0.5, NAN, NAN]},
    **{"per_category_boundary_iou": [0.4, 0.4, NAN]},
}
ALL = {**PART, "per_category_iou": [0.5, 0.562, 0.1], "per_category_accuracy": [0.5, 0.1, 0.1]}
ALL["per_category_boundary_iou"] = [0.4, 0.4, 0.1]


def test_means_over_fewer_classes_state_their_number():
    assert mean_iou_in_words(PART, digits=1) == "mIoU 53.1 % over 2 of 3 classes"
    assert mean_iou_in_words(ALL) == "mIoU 53.10 %"
    assert mean_iou_in_words({"mean_iou": None, "per_category_iou": [None]}) == "mIoU - over 0 of 1 classes"
    lines = scores_table({"branch_0": ALL, "mean": PART}, NAMES).splitlines()
    assert [line.split() for line in lines[-5:]] == [
        ["mIoU", "53.10", "53.10"],
        ["over", "classes", "3", "of", "3", "2", "of", "3"],
        ["mean", "accuracy", "60.00", "60.00"],
        ["over", "classes", "3", "of", "3", "1", "of", "3"],
        ["pixel", "accuracy", "70.00", "70.00"],
    ]
    assert "over classes" not in scores_table({"branch_0": ALL}, NAMES)


def test_columns_of_the_score_table_are_separated():
    lines = scores_table({"branch_0_average": ALL, "branch_1_average": ALL}, NAMES).splitlines()
    assert "branch 0 average  branch 1 average" in lines[0] and len({len(line) for line in lines}) == 1
    rows = ("branch_0", "branch_1", "branch_0_average", "branch_1_average", "mean")
    lines = scores_table(dict.fromkeys(rows, PART), [f"class {i}" for i in range(3)]).splitlines()
    assert {len(line) for line in lines} == {80}  # the width of most terminals
    lines = class_table(PART, NAMES).splitlines()
    assert lines[-2].split() == ["over", "classes", *"2 of 3".split(), *"1 of 3".split(), *"2 of 3".split()]
    assert "over classes" not in class_table(ALL, NAMES)
    card = render_card(facts(scores={"branch_0": PART, "mean": ALL}, best={}))
    assert "| branch 0 | 53.10 over 2 of 3 classes | - | 60.00 over 1 of 3 classes | 70.00 |" in card
    assert "| mean | 53.10 | - | 60.00 | 70.00 |" in card


def test_supervised_scores_state_their_number_of_classes(tmp_path, sets, caplog):
    names = [*NAMES, "class 3"]  # in no label and no prediction
    sets = {name: coded(dataset, names) for name, dataset in sets.items()}
    trainer = trainer_for(tmp_path, sets, names=names, pretrain_steps=1)
    trainer.models[0].decode_head.bias.data[3] = -100
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        trainer.train()
    words = mean_iou_in_words(trainer.state.stages["supervised"]["branch_0"])
    assert words.endswith(" % over 3 of 4 classes")
    assert f"Stage 1 of 2 is done at step 1: branch_0 {words}." in caplog.messages


def test_the_line_on_absent_classes_is_empty_if_all_occur():
    assert absent_line({"training": [], "evaluation": []}, 3) == "" and absent_line({}, 3) == ""
    assert absent_line({"training": ["a"]}, 3, "all 2 samples").startswith(
        "1 of 3 classes never occurs in training (all"
    )


def test_a_negative_time_limit_is_rejected():
    with pytest.raises(ValueError, match="`check_labels_seconds` must be 0 or more"):
        settings(check_labels_seconds=-1)
