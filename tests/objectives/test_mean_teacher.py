"""Mean Teacher against loops, and its teacher: a moving average without gradient."""

import math
from dataclasses import replace

import pytest
import torch
from support.by_hand import C, TinyBranch, arg_max, batches, log_softmax, mapped, pixels, supervised_by_hand

from cps_hf.functional.cutmix import draw_cutmix_masks
from cps_hf.objectives import MeanTeacher
from cps_hf.training.ema import make_teacher, update_teacher


def consistency(student, teacher, seen, unlabeled, *, threshold, masks=None):
    """(the sum over valid pixels of the class-averaged squared difference, the share of confident ones among them).

    `seen` is the student's input. Where masks are true, a pixel comes from the neighbouring image.
    """
    total, taught, confident, partner = 0.0, 0, 0, [1, 0, 3, 2]
    for i, y, x in pixels(unlabeled.weak):
        source = partner[i] if masks is not None and masks[i, y, x] else i
        if unlabeled.valid[source, y, x]:
            p = [math.exp(v) for v in log_softmax(student, seen[source], y, x)]
            q = [math.exp(v) for v in log_softmax(teacher, unlabeled.weak[source], y, x)]
            total += sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / C
            taught += 1
            confident += max(q) >= threshold
    return total, confident / taught


@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("perturbation", ["cutmix", "jitter", "noise"])
def test_the_loss_is_scaled_by_the_confident_share(perturbation, threshold):
    objective = MeanTeacher(weight=7.0, perturbation=perturbation, confidence_threshold=threshold, noise_std=0.0)
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, unlabeled = batches(objective.views)
    out = objective([student], labeled, unlabeled, teacher=teacher, progress=1.0)
    seen = unlabeled.strong if perturbation == "jitter" else unlabeled.weak
    masks = unlabeled.cutmix_mask if perturbation == "cutmix" else None
    total, share = consistency(student, teacher, seen, unlabeled, threshold=threshold, masks=masks)
    mean = total / unlabeled.valid.sum().item()
    assert out.logs["consistency_loss"].item() == pytest.approx(mean, rel=1e-4)
    assert out.logs["mask_ratio"].item() == pytest.approx(share, rel=1e-6)
    assert 0 < share < 1 or threshold == 0 and share == 1
    expected = supervised_by_hand([student], labeled) + 7 * share * mean
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_partners_of_an_odd_batch_are_used():
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, whole = batches(("weak", "cutmix_mask"))
    sent = {f"partner_{name}": getattr(whole, name)[[1, 0, 3]] for name in ("weak", "valid")}
    odd = mapped(whole, lambda t: t[:3], **sent)
    cut = replace(whole, cutmix_mask=whole.cutmix_mask[:3])
    objective = MeanTeacher(confidence_threshold=0.0)
    total = 0.0
    for i, y, x in pixels(cut.cutmix_mask):
        source = [1, 0, 3][i] if cut.cutmix_mask[i, y, x] else i
        if whole.valid[source, y, x]:
            p, q = (log_softmax(network, whole.weak[source], y, x) for network in (student, teacher))
            total += sum((math.exp(a) - math.exp(b)) ** 2 for a, b in zip(p, q, strict=True)) / C
    found = objective([student], labeled, odd, teacher=teacher).logs["consistency_loss"].item()
    assert found == pytest.approx(total / odd.valid.sum().item(), rel=1e-4)


@pytest.mark.parametrize("perturbation", ["cutmix", "jitter", "noise"])
def test_class_balance_uses_the_teachers_most_likely_class(perturbation):
    how = {"perturbation": perturbation, "noise_std": 0.0, "confidence_threshold": 0.0}
    student, teacher = TinyBranch(1), TinyBranch(3)
    labeled, unlabeled = batches(MeanTeacher(**how).views)
    seen = unlabeled.strong if perturbation == "jitter" else unlabeled.weak
    targets = {}  # of each pixel: which one the student sees, the teacher's and the student's probabilities
    for i, y, x in pixels(unlabeled.weak):
        source = [1, 0, 3, 2][i] if perturbation == "cutmix" and unlabeled.cutmix_mask[i, y, x] else i
        if unlabeled.valid[source, y, x]:
            q = [math.exp(v) for v in log_softmax(teacher, unlabeled.weak[source], y, x)]
            targets[i, y, x] = (q, [math.exp(v) for v in log_softmax(student, seen[source], y, x)])
    counts = [max(1, [arg_max(q) for q, _ in targets.values()].count(c)) for c in range(C)]
    scale = len(targets) / sum(counts[arg_max(q)] ** -0.5 for q, _ in targets.values())
    total = sum(
        scale * counts[arg_max(q)] ** -0.5 * sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / C
        for q, p in targets.values()
    )
    plain, found = (
        MeanTeacher(class_balance=power, **how)([student], labeled, unlabeled, teacher=teacher).logs
        for power in (0.0, 0.5)
    )
    assert found["consistency_loss"].item() == pytest.approx(total / unlabeled.valid.sum().item(), rel=1e-4)
    assert found["consistency_loss"].item() != pytest.approx(plain["consistency_loss"].item(), rel=2e-3)
    assert found["supervised_loss"] == plain["supervised_loss"]


def test_the_default_weight_is_the_number_of_classes():
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, unlabeled = batches(MeanTeacher().views)
    for progress, factor in ((0.0, 0.0), (0.125, 0.5), (0.25, 1.0), (1.0, 1.0)):
        objective = MeanTeacher(confidence_threshold=0.5)
        out = objective([student], labeled, unlabeled, teacher=teacher, progress=torch.tensor(progress))
        logs = out.logs
        expected = logs["supervised_loss"] + factor * C * logs["mask_ratio"] * logs["consistency_loss"]
        assert logs["mask_ratio"] > 0
        torch.testing.assert_close(out.loss.detach(), expected)


class Watching(TinyBranch):
    """Records its inputs."""

    def forward(self, pixel_values, *, feature_dropout=0.0):
        vars(self).setdefault("seen", []).append(pixel_values.detach().clone())
        return super().forward(pixel_values)


@pytest.mark.parametrize("perturbation", ["cutmix", "jitter", "noise"])
def test_labeled_images_and_the_teachers_are_not_perturbed(perturbation):
    objective = MeanTeacher(perturbation=perturbation)
    student, teacher = Watching(1), Watching(1)
    labeled, unlabeled = batches(objective.views)
    objective([student], labeled, unlabeled, teacher=teacher)
    assert len(student.seen) == 2 and torch.equal(student.seen[0], labeled.pixel_values)
    assert not torch.equal(student.seen[1], unlabeled.weak)
    assert len(teacher.seen) == 1 and torch.equal(teacher.seen[0], unlabeled.weak)


def test_noise_has_the_given_deviation():
    student = Watching(1)
    labeled, unlabeled = batches(unlabeled_size=400)
    MeanTeacher(perturbation="noise", noise_std=0.5)([student], labeled, unlabeled, teacher=TinyBranch(2))
    noise = student.seen[1] - unlabeled.weak
    assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(0.5, abs=0.02)


def test_the_confident_share_is_over_all_processes():
    labeled, unlabeled = batches(("weak",))
    objective = MeanTeacher(weight=7.0, perturbation="noise", confidence_threshold=0.6)
    torch.manual_seed(0)
    alone = objective([TinyBranch(1)], labeled, unlabeled, teacher=TinyBranch(2), progress=1.0)
    others = torch.tensor([2.0, 30.0])  # what another process has: confident ones, and all
    both = replace(labeled, over_processes=lambda sums: (sums + others) / 2)
    torch.manual_seed(0)
    out = objective([TinyBranch(1)], both, unlabeled, teacher=TinyBranch(2), progress=1.0)
    taught = unlabeled.valid.sum()
    share = (alone.logs["mask_ratio"] * taught + 2) / (taught + 30)
    assert out.logs["mask_ratio"].item() == pytest.approx(share.item(), rel=1e-5) != alone.logs["mask_ratio"].item()
    expected = out.logs["supervised_loss"] + 7 * share * out.logs["consistency_loss"]
    torch.testing.assert_close(out.loss.detach(), expected)


def test_cutmix_is_one_box_of_half_the_image():
    masks = draw_cutmix_masks(50, 64, 80, generator=torch.Generator().manual_seed(0), **MeanTeacher().cutmix_masks)
    assert masks.float().mean((1, 2)).sub(0.5).abs().max() < 0.02
    for mask in masks:  # a single box fills its bounding box
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()
    assert MeanTeacher(perturbation="noise").cutmix_masks == {}


def test_the_teacher_gets_no_gradient():
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, unlabeled = batches(MeanTeacher().views)
    MeanTeacher()([student], labeled, unlabeled, teacher=teacher).loss.backward()
    assert teacher.conv.weight.grad is None
    assert [with_gradient for _, with_gradient, _ in teacher.calls] == [False]
    assert student.conv.weight.grad.abs().sum() > 0


def test_the_decay_starts_as_a_true_mean():
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
def test_the_teacher_follows_the_formula_in_any_precision(dtype):
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
    ("field", "value"),
    [
        *(("weight", -1.0), ("decay", 1.5), ("noise_std", -0.1), ("perturbation", "blur")),
        *(("confidence_threshold", 1.1), ("ramp_up", -0.5), ("class_balance", 1.5)),
    ],
)
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        MeanTeacher(**{field: value})
