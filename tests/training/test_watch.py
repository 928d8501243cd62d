"""Monitoring of pseudo labels: its numbers, against written-out ones, and its warnings."""

import json
import math

import pytest
import torch
from support.by_hand import C, TinyBranch, batches, log_softmax
from support.resume_cases import Case, make_trainer, without_cards_and_pictures, write_resume_world
from support.toy import toy_models

from cps_hf.objectives import (
    AveragedCPS,
    CrossPseudoSupervision,
    FixedTeacher,
    FixMatch,
    MeanTeacher,
    ObjectiveOutput,
)
from cps_hf.training import health
from cps_hf.training.module import TrainingModule
from cps_hf.training.state import RunState
from cps_hf.training.watch import Level, Watch, watched

CPS = Case("cps", "map", workers=0, processes=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_resume_world(tmp_path_factory.mktemp("resume"))


# ------------------------------------------------------------------------------------------------ classes


def pixels_by_class(branches, images, threshold=0.0):
    """The pixels that are counted, here (0, 0) and (0, 4) of each image."""
    counts = [0.0] * C
    for branch in branches:
        for image in images:
            for x in (0, 4):
                p = [math.exp(v) for v in log_softmax(branch, image, 0, x)]
                if image[:, 0, x].any() and max(p) >= threshold:  # a pixel of zeros is padding
                    counts[max(range(C), key=p.__getitem__)] += 1
    return counts


def watched_call(objective, branches, unlabeled_size=4, teacher=None):
    labeled, unlabeled = batches(objective.views, unlabeled_size=unlabeled_size)
    for name, tensor in unlabeled.tensors().items():
        if tensor.dim() == 4:
            getattr(unlabeled, name)[1, :, 0] = 0.0  # the second image's first row is padding
    branches, teachers = (health.watch(some, labeled, objective) for some in (branches, [teacher] if teacher else []))
    output = objective(branches, labeled, unlabeled, teacher=teachers[0] if teachers else None)
    output = health.with_class_pixels(output, [*branches, *teachers], labeled.labels)
    return labeled, unlabeled, output.logs


@pytest.mark.parametrize("cutmix", [False, True])
def test_the_pseudo_labels_of_a_pair_are_counted_by_class(cutmix):
    """Those of the unmixed images: with CutMix, the passes with gradient see others."""
    branches = [TinyBranch(1), TinyBranch(3)]
    labeled, unlabeled, logs = watched_call(CrossPseudoSupervision(cutmix=cutmix), branches)
    expected = pixels_by_class(branches, unlabeled.weak)
    assert logs["class_pixels_pseudo_labels"].tolist() == expected and sum(expected) == 2 * (4 - 1) * 2
    labels = labeled.labels[:, 0, [0, 4]].flatten().tolist()
    assert logs["class_pixels_labels"].tolist() == [labels.count(c) for c in range(C)] and 255 in labels


def test_only_confident_predictions_are_pseudo_labels():
    branches = [TinyBranch(1), TinyBranch(3)]
    _, unlabeled, logs = watched_call(FixMatch(confidence_threshold=0.5), branches)
    expected = pixels_by_class(branches, unlabeled.weak, threshold=0.5)
    assert logs["class_pixels_pseudo_labels"].tolist() == expected
    assert 0 < sum(expected) < sum(pixels_by_class(branches, unlabeled.weak))


def test_a_teachers_pseudo_labels_ignore_its_threshold():
    student, teacher = TinyBranch(1), TinyBranch(3)
    _, unlabeled, logs = watched_call(MeanTeacher(), [student], teacher=teacher)
    expected = pixels_by_class([teacher], unlabeled.weak)
    assert logs["class_pixels_pseudo_labels"].tolist() == expected
    assert expected != pixels_by_class([student], unlabeled.weak)


def test_labels_that_were_made_before_are_counted_as_they_are():
    """And not the predictions of the network that learns from them."""
    labeled, unlabeled = batches(FixedTeacher().views)
    logs = TrainingModule(toy_models(1), FixedTeacher())(labeled, unlabeled, torch.zeros(())).logs
    given = unlabeled.pseudo_labels[:, ::4, ::4].flatten().tolist()
    assert logs["class_pixels_pseudo_labels"].tolist() == [given.count(c) for c in range(C)] and len({*given}) > 1


@pytest.mark.parametrize("teachers", ["averages", "own_average", "branches"])
def test_averages_make_labels_if_they_teach(teachers):
    names = TrainingModule(toy_models(2), AveragedCPS(teachers=teachers), averages=True).labeling
    assert names == (["branch_0", "branch_1"] if teachers == "branches" else ["branch_0_average", "branch_1_average"])


def test_without_an_unlabeled_pass_nothing_is_counted():
    labeled, _ = batches()
    output = ObjectiveOutput(torch.zeros(()), {})
    assert health.with_class_pixels(output, health.watch([TinyBranch(1)], labeled), labeled.labels) == output


# ------------------------------------------------------------------------------------------------ the run


@pytest.mark.parametrize(
    "objective", [CrossPseudoSupervision(), AveragedCPS(), MeanTeacher()], ids=lambda o: type(o).__name__
)
def test_a_run_logs_agreed_accuracy_and_class_shares(root, tmp_path, objective):
    case = Case("mean_teacher" if objective.teacher else "cps", "map", workers=0, processes=1)
    fields = {"max_steps": 4, "eval_steps": 2, "logging_steps": 3, "objective": objective}
    seen = []
    with without_cards_and_pictures():
        trainer = make_trainer(root, case, tmp_path / "out", ema_decay=0.9 if objective.averages else None, **fields)
        trainer.module.register_forward_hook(lambda module, words, output: seen.append(output.logs))
        results = trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_mean_iou" in line]
    # Each class's share since the last evaluation, and of the labels since the first step.
    for line, first, last in zip(lines, (0, 4), (4, 8), strict=True):
        pseudo = sum(logs["class_pixels_pseudo_labels"] for logs in seen[first:last])
        labels = sum(logs["class_pixels_labels"] for logs in seen[:last])
        for index, name in enumerate(trainer.id2label.values()):
            if pseudo.sum():
                share = (pseudo[index] / pseudo.sum()).item()
                assert line[f"pseudo_label_share/{name}"] == pytest.approx(share, abs=1e-6)
                share = (labels[index] / labels.sum()).item()
                assert line[f"label_share/{name}"] == pytest.approx(share, abs=1e-6)
            else:  # with a threshold, perhaps no prediction is confident
                assert f"pseudo_label_share/{name}" not in line and objective.averages
    assert not any("class_pixels" in key for line in trainer.state.log_history for key in line)
    # Where all labelers agree, how often they are correct, with the last step's networks.
    labelers = {"teacher": ["teacher"], "averages": ["0_average", "1_average"]}
    kind = "teacher" if objective.teacher else "averages" if objective.averages else "branches"
    agreed, right = 0, 0
    predictions = [dict(trainer.predict(trainer.eval_dataset, branch=b)) for b in labelers.get(kind, [0, 1])]
    for batch in trainer.evaluator.stream(trainer.eval_dataset):
        for sample in batch:
            maps = [found[sample["id"]].long() for found in predictions]
            same = (maps[0] == maps[-1]) & (sample["label"] != 255)
            agreed, right = agreed + same.sum().item(), right + (same & (maps[0] == sample["label"])).sum().item()
    assert ("eval_agreed_accuracy" in lines[-1]) == (kind != "teacher")
    found = lines[-1].get("eval_agreed_accuracy", lines[-1].get("eval_teacher_overall_accuracy"))
    assert found == pytest.approx(right / agreed) == results["pseudo_labels"]["right"]["last"]
    assert 0 < right < agreed
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["pseudo_labels"]
    if not objective.averages:  # its threshold keeps nearly nothing here, so two classes have vanished
        assert saved["warnings"] == [] and saved["shares"]["disc"]["labels"] == lines[-1]["label_share/disc"]


def test_a_supervised_run_only_logs_agreed_accuracy(root, tmp_path):
    with without_cards_and_pictures():
        case = Case("supervised", "map", workers=0, processes=1)
        trainer = make_trainer(root, case, tmp_path / "out", max_steps=2)
        results = trainer.train()
    line = [line for line in trainer.state.log_history if "eval_mean_iou" in line][-1]
    assert 0 < line["eval_agreed_accuracy"] < 1
    assert "pseudo_labels" not in results and not any("share" in key for key in line)


# ------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(
    ("supervised", "scores", "fallen"),
    [
        (0.50, [0.4, 0.4, 0.4], [False, True, True]),  # the first may be chance
        (0.50, [0.4, 0.6, 0.4, 0.4], [False, False, False, True]),
        (0.50, [0.6, 0.7, 0.52, 0.52], [False] * 4),  # still above the supervised stage
        (0.50, [0.491, 0.491, 0.489, 0.489], [False, False, False, True]),  # 0.01 is tolerated
        (None, [0.3, 0.4, 0.5, 0.5, 0.45, 0.45], [False] * 5 + [True]),
        (None, [0.3, 0.9, 0.3, 0.4, 0.3, 0.295], [False] * 6),  # 0.9 was reached once: it is no reference
        (None, [0.3], [False]),
    ],
)
def test_a_score_falls_after_two_low_evaluations(supervised, scores, fallen):
    memory = {}
    if supervised is not None:
        Level(memory).begin(supervised)
    found = []
    for score in scores:
        found.append(Level(memory).has_fallen(score))
        memory = json.loads(json.dumps(memory))  # as in a checkpoint
    assert found == fallen


class Evaluations:
    """A `Watch` that sees one evaluation after the other."""

    def __init__(self, labelers=("branch_0", "branch_1"), **options):
        self.state = RunState(max_steps=100)
        self.watch = Watch(self.state, ["ground", "disc", "bar"], labelers, **options)

    def show(self, mean_iou, right, pseudo_labels, labels=(80, 15, 5), *, begins=False):
        self.state.global_step += 10
        rows = {"branch_0": mean_iou - 0.2, "branch_1": mean_iou, "mean": mean_iou + 0.3}
        self.state.scores = {row: {"mean_iou": iou, "overall_accuracy": right} for row, iou in rows.items()}
        if begins:
            return self.watch.begin(right)
        names = (f"{health.PIXELS}pseudo_labels", f"{health.PIXELS}labels")
        counts = dict(zip(names, ([*map(float, pseudo_labels)], [*map(float, labels)]), strict=True))
        self.state.averages.keep({**counts, "loss": 1.0})
        return self.watch.look(right)


def test_agreement_on_errors_warns_again_after_recovery(caplog):
    run = Evaluations()
    run.show(0.5, 0.9, None, begins=True)
    for right in (0.95, 0.85, 0.84, 0.83, 0.91, 0.85, 0.88):
        run.show(0.5, right, (80, 15, 5))
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == ["Step 40", "Step 80"]
    assert "agree, they are less often right on evaluation images: 84.0 % now and 90.0 % at the end of the" in said[0]
    assert '`unlabeled_weight="auto"`' in said[0]
    assert watched(run.state)["right"] == {"last": 0.88, "reference": 0.9}
    assert [entry["step"] for entry in watched(run.state)["warnings"]] == [40, 80]


def test_only_vanished_classes_are_named(caplog):
    run = Evaluations(acts=True)
    logs = [
        run.show(0.5, 0.9, seen)[0] for seen in ((80, 15, 5), (900, 96, 4), (80, 15, 5), (900, 96, 4), (900, 97, 3))
    ]
    assert logs[1]["pseudo_label_share/bar"] == 0.004 and logs[1]["label_share/bar"] == 0.05
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        "Step 50: Classes of the labels have vanished from the pseudo labels: bar (0.3 % of pixels instead of 5 %)."
        in said
    )
    assert "auto" not in said and "`class_balance`" in said
    other = Evaluations()
    for _ in range(3):  # half of its share is above a tenth, and a class without labels cannot vanish
        other.show(0.5, 0.9, (975, 25, 0), labels=(950, 50, 0))
    assert len(caplog.records) == 1 and other.show(0.5, 0.9, (0, 0, 0))[0] == {}


def test_a_mean_iou_below_the_supervised_stages_is_a_warning(caplog):
    run = Evaluations(labelers=("branch_0",))
    run.show(0.5, 0.9, None, begins=True)
    assert [run.show(iou, 0.9, (80, 15, 5))[1] for iou in (0.45, 0.48, 0.495)] == [False, True, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "The mean IoU of the best network has fallen: 48.0 % now and 50.0 % at the end of the supervised" in said


def test_agreed_accuracy_handles_edge_cases(caplog):
    run = Evaluations(labelers=("branch_1",))
    for right in (0.9, 0.9, 0.7, 0.7):
        run.state.global_step += 10
        run.state.scores = {"branch_1": {"mean_iou": 0.5, "overall_accuracy": right}}
        run.watch.look(None)
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        "branch_1, is less often right on evaluation images: 70.0 % now and 90.0 % in two evaluations in a row" in said
    )
    for _ in range(3):
        run.watch.look(math.nan)
    assert watched(run.state)["right"]["last"] == 0.7 and len(caplog.records) == 1
