"""CPS with averaged teachers: one step against a float64 reference, and each part switched off."""

import copy
import math
from collections import Counter

import pytest
import torch
from support.by_hand import TinyBranch, arg_max, batches, log_softmax, mapped, pixels, supervised_by_hand
from support.toy import toy_models
from support.two_views import PARTNER, VIEWS, WIDTH, factors_by_hand, labeled_loss_by_hand, large, strong_loss_by_hand

from cps_hf.modeling import Branch
from cps_hf.objectives import AveragedCPS

SEED = 5


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_one_step_follows_the_formula(threshold):
    """Loss and gradients to 1e-6: each branch is taught by the other's average."""
    branches = [Branch(model) for model in toy_models(2, width=WIDTH)]
    averages = [Branch(model).eval() for model in toy_models(2, width=WIDTH, seed=10)]
    labeled, unlabeled = (mapped(batch, large) for batch in batches(VIEWS))
    students, teachers = ([copy.deepcopy(one.model).double() for one in ones] for ones in (branches, averages))

    torch.manual_seed(SEED)
    strided = ([one.strided for one in ones] for ones in (branches, averages))
    objective = AveragedCPS(confidence_threshold=threshold, weight=1.5)
    output = objective(next(strided), labeled, unlabeled, averages=next(strided), progress=1.0)
    output.loss.backward()

    torch.manual_seed(SEED)
    factors = [factors_by_hand(len(unlabeled.weak)) for _ in students]  # each branch draws its own
    expected = sum(labeled_loss_by_hand(student, labeled) for student in students) + 1.5 * (
        strong_loss_by_hand(students[0], teachers[1], unlabeled, threshold, factors[0])
        + strong_loss_by_hand(students[1], teachers[0], unlabeled, threshold, factors[1])
    )
    expected.backward()
    assert 0.1 < output.logs["mask_ratio"] < 0.9 or threshold == 0
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for branch, student in zip(branches, students, strict=True):
        for (name, ours), reference in zip(branch.model.named_parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=0, atol=1e-6, msg=name)
    assert all(parameter.grad is None for average in averages for parameter in average.parameters())


def by_hand(student, teacher, unlabeled, views, threshold=0.0):
    """The mean over views of the cross entropy with the teacher's labels for the weak view."""
    total = 0.0
    for view, mask in views:
        for i, y, x in pixels(unlabeled.weak):
            source = PARTNER[i] if getattr(unlabeled, mask)[i, y, x] else i
            weak = log_softmax(teacher, unlabeled.weak[source], y, x)
            if unlabeled.valid[source, y, x] and math.exp(max(weak)) >= threshold:
                total -= log_softmax(student, getattr(unlabeled, view)[source], y, x)[arg_max(weak)]
    return total / (len(views) * unlabeled.valid.sum().item())


@pytest.mark.parametrize("teachers", ["averages", "branches", "own_average"])
@pytest.mark.parametrize("strong_views", [0, 1, 2])
def test_every_part_can_be_switched_off(teachers, strong_views):
    branches, averages = [TinyBranch(1), TinyBranch(2)], [TinyBranch(3), TinyBranch(4)]
    objective = AveragedCPS(
        teachers=teachers, strong_views=strong_views, complementary_dropout=0.0, confidence_threshold=0.4, weight=3.0
    )
    labeled, unlabeled = batches(objective.views)
    views = {
        0: [("weak", "cutmix_mask")],
        1: [("strong", "cutmix_mask")],
        2: [("strong", "cutmix_mask"), ("strong_2", "cutmix_mask_2")],
    }[strong_views]
    assert {"weak", *(name for pair in views for name in pair)} == {*objective.views}
    first, second = {
        "averages": (averages[1], averages[0]),
        "branches": (branches[1], branches[0]),
        "own_average": (averages[0], averages[1]),
    }[teachers]
    cps = by_hand(branches[0], first, unlabeled, views, 0.4) + by_hand(branches[1], second, unlabeled, views, 0.4)
    out = objective(branches, labeled, unlabeled, averages=averages, progress=1.0)
    assert out.logs["cps_loss"].item() == pytest.approx(cps / 2, rel=1e-5)
    assert out.loss.item() == pytest.approx(supervised_by_hand(branches, labeled) + 3 * cps, rel=1e-5)
    labelling = averages if teachers != "branches" else branches
    assert all((4, False, 0.0) in network.calls for network in labelling)
    for branch in branches:
        assert sorted(size for size, with_gradient, _ in branch.calls if with_gradient) == [2, 4 * len(views)]


def test_three_branches_are_taught_by_the_other_two_averages():
    branches, averages = [TinyBranch(s) for s in (1, 2, 3)], [TinyBranch(s) for s in (4, 5, 6)]
    objective = AveragedCPS(strong_views=1, complementary_dropout=0.0, confidence_threshold=0.0)
    labeled, unlabeled = batches(objective.views)
    views = [("strong", "cutmix_mask")]
    expected = sum(
        by_hand(student, teacher, unlabeled, views) / 2
        for i, student in enumerate(branches)
        for j, teacher in enumerate(averages)
        if i != j
    )
    out = objective(branches, labeled, unlabeled, averages=averages, progress=1.0)
    assert out.logs["cps_loss"].item() == pytest.approx(expected / 3, rel=1e-5)


def test_agreement_includes_uncertain_pixels_of_the_teachers():
    branches, averages = [TinyBranch(1), TinyBranch(2)], [TinyBranch(3), TinyBranch(4)]
    labeled, unlabeled = batches(VIEWS)
    same = total = 0
    for i, y, x in pixels(unlabeled.weak):
        if unlabeled.valid[i, y, x]:
            one, other = (arg_max(log_softmax(average, unlabeled.weak[i], y, x)) for average in averages)
            same, total = same + (one == other), total + 1
    out = AveragedCPS(confidence_threshold=0.99)(branches, labeled, unlabeled, averages=averages)
    assert out.logs["agreement"].item() == pytest.approx(same / total)


def test_rare_pseudo_labels_can_count_more():
    """Written-out weights from each teacher's own labels."""
    branches, averages = [TinyBranch(1), TinyBranch(2)], [TinyBranch(3), TinyBranch(4)]
    how = {"strong_views": 1, "complementary_dropout": 0.0, "confidence_threshold": 0.0, "cutmix": 0.0}
    labeled, unlabeled = batches(("weak", "strong"))  # without masks nothing is mixed
    expected = 0.0
    for student, teacher in zip(branches, reversed(averages), strict=True):
        found = []
        for i, y, x in pixels(unlabeled.weak):
            if unlabeled.valid[i, y, x]:
                label = arg_max(log_softmax(teacher, unlabeled.weak[i], y, x))
                found.append((label, -log_softmax(student, unlabeled.strong[i], y, x)[label]))
        count = Counter(label for label, _ in found)
        weight = {label: count[label] ** -0.5 for label in count}
        scale = len(found) / sum(count[label] * weight[label] for label in count)
        expected += sum(scale * weight[label] * loss for label, loss in found) / len(found)
    out = AveragedCPS(class_balance=0.5, **how)(branches, labeled, unlabeled, averages=averages, progress=1.0)
    assert out.logs["cps_loss"].item() == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teachers": "nobody"}, "`teachers` must be one of .* got 'nobody'"),
        ({"strong_views": 3}, "`strong_views` must be 0, 1 or 2, got 3"),
        ({"strong_views": 1}, "`strong_views` is 1: set `complementary_dropout` to 0, or `strong_views` to 2"),
        ({"joint_forward": True}, "`complementary_dropout` to 0, or remove `joint_forward`"),
        ({"confidence_threshold": 1.5}, "`confidence_threshold`.*1.5"),
        ({"weight": -1.0}, "`weight`.*-1.0"),
    ],
)
def test_a_bad_hyper_parameter_is_named(fields, said):
    with pytest.raises(ValueError, match=said):
        AveragedCPS(**fields)
    AveragedCPS(joint_forward=True, complementary_dropout=0.0)
