"""Mean Teacher against loops, and its teacher: an average that gets no gradient."""

import math

import pytest
import torch
from support.by_hand import C, TinyBranch, batches, log_softmax, pixels, supervised_by_hand

from cps_hf.objectives import MeanTeacher
from cps_hf.training.ema import make_teacher, update_teacher


def consistency(student, teacher, student_images, teacher_images, valid):
    """The sum over valid pixels of the class-averaged squared difference."""
    total = 0.0
    for i, y, x in pixels(student_images):
        if valid[i, y, x]:
            p = [math.exp(v) for v in log_softmax(student, student_images[i], y, x)]
            q = [math.exp(v) for v in log_softmax(teacher, teacher_images[i], y, x)]
            total += sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / C
    return total


def test_without_noise_it_is_the_mean_squared_difference_on_labeled_and_unlabeled_images():
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, unlabeled = batches()
    out = MeanTeacher(weight=7.0, noise_std=0.0)([student], labeled, unlabeled, teacher=teacher)
    total = consistency(student, teacher, labeled.pixel_values, labeled.pixel_values, labeled.valid)
    total += consistency(student, teacher, unlabeled.weak, unlabeled.weak, unlabeled.valid)
    mean = total / (labeled.valid.sum() + unlabeled.valid.sum()).item()
    assert out.logs["consistency_loss"].item() == pytest.approx(mean, rel=1e-4)
    assert out.loss.item() == pytest.approx(supervised_by_hand([student], labeled) + 7 * mean, rel=1e-5)


def test_with_jitter_student_and_teacher_see_two_strong_views_of_the_unlabeled_images_alone():
    objective = MeanTeacher(perturbation="jitter")
    assert objective.views == ("strong", "strong_2")
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, unlabeled = batches(objective.views)
    out = objective([student], labeled, unlabeled, teacher=teacher)
    total = consistency(student, teacher, unlabeled.strong, unlabeled.strong_2, unlabeled.valid)
    mean = total / unlabeled.valid.sum().item()
    assert out.logs["consistency_loss"].item() == pytest.approx(mean, rel=1e-4)


def test_noise_is_drawn_anew_for_student_and_teacher_with_the_given_deviation():
    seen = {}

    class Watching(TinyBranch):
        def forward(self, pixel_values, *, feature_dropout=0.0):
            seen.setdefault(self, []).append(pixel_values.detach().clone())
            return super().forward(pixel_values)

    student, teacher = Watching(1), Watching(1)
    labeled, unlabeled = batches(unlabeled_size=400)
    MeanTeacher(noise_std=0.5)([student], labeled, unlabeled, teacher=teacher)
    own, other = seen[student][1] - unlabeled.weak, seen[teacher][1] - unlabeled.weak
    for noise in (own, other):
        assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(0.5, abs=0.02)
    assert (own * other).mean().abs() < 0.02


def test_the_teacher_gets_no_gradient():
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, unlabeled = batches()
    MeanTeacher()([student], labeled, unlabeled, teacher=teacher).loss.backward()
    assert teacher.conv.weight.grad is None
    assert [with_gradient for _, with_gradient, _ in teacher.calls] == [False, False]
    assert student.conv.weight.grad.abs().sum() > 0


def test_the_decay_is_that_of_a_true_mean_at_first():
    objective = MeanTeacher(decay=0.99)
    assert [objective.ema_decay(t) for t in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert objective.ema_decay(98) == pytest.approx(98 / 99) and objective.ema_decay(10_000) == 0.99
    # Averaging the parameters 0, 1, 2, 3 with these decays gives their mean, the initial ones included.
    branch = TinyBranch(1)
    values = [0.0, 1.0, 2.0, 3.0]
    for step, value in enumerate(values):
        with torch.no_grad():
            branch.conv.weight.fill_(value)
        if step == 0:
            teacher = make_teacher(branch)
        else:
            update_teacher(teacher, branch, objective.ema_decay(step))
    torch.testing.assert_close(teacher.conv.weight, torch.full_like(teacher.conv.weight, 1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_teacher_goes_the_way_of_the_formula_in_any_precision(dtype):
    branch = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).to(dtype)
    branch[1].running_mean.fill_(1)
    teacher = make_teacher(branch)
    start = teacher[0].weight.clone()
    with torch.no_grad():
        branch[0].weight.mul_(1.1)
        branch[1].running_mean.fill_(2)
    for _ in range(200):
        update_teacher(teacher, branch, 0.99)
    way = (teacher[0].weight - start).norm() / (branch[0].weight - start).norm()
    assert way.item() == pytest.approx(1 - 0.99**200, rel=1e-3)
    torch.testing.assert_close(teacher[1].running_mean, torch.full((8,), 2 - 0.99**200), rtol=1e-3, atol=0)
    assert branch[0].weight.dtype == dtype


def test_a_tied_parameter_is_averaged_once():
    branch = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    branch[1].weight = branch[0].weight
    teacher = make_teacher(branch)
    start = teacher[0].weight.clone()
    with torch.no_grad():
        branch[0].weight.add_(1)
    update_teacher(teacher, branch, 0.9)
    torch.testing.assert_close(teacher[0].weight, start + 0.1)
    assert teacher[1].weight is teacher[0].weight


@pytest.mark.parametrize(
    ("field", "value"), [("weight", -1.0), ("decay", 1.5), ("noise_std", -0.1), ("perturbation", "blur")]
)
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        MeanTeacher(**{field: value})
