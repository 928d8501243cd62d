"""UniMatch V2: one step against a float64 reference, written from the paper's formulas."""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.by_hand import TinyBranch, arg_max, batches, log_softmax, mapped, pixels, supervised_by_hand
from support.toy import toy_models
from support.two_views import VIEWS, WIDTH, factors_by_hand, labeled_loss_by_hand, large, strong_loss_by_hand

from cps_hf.objectives import UniMatchV2
from cps_hf.training.ema import update_teacher
from cps_hf.training.module import TrainingModule

SEED = 5


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_one_step_follows_the_papers_formulas(threshold):
    """The loss, the gradient, the student after a step and the teacher after it, to 1e-6."""
    module = TrainingModule(toy_models(1, width=WIDTH), UniMatchV2(confidence_threshold=threshold)).train()
    with torch.no_grad():
        for parameter in module.teacher.parameters():  # so that it differs from the student
            parameter.mul_(1.3)
    labeled, unlabeled = (mapped(batch, large) for batch in batches(VIEWS))
    student, teacher = (copy.deepcopy(one.model).double() for one in (module.branches[0], module.teacher))

    torch.manual_seed(SEED)
    output = module(labeled, unlabeled, torch.tensor(1.0))
    output.loss.backward()
    torch.manual_seed(SEED)
    factors = factors_by_hand(len(unlabeled.weak))
    strong_loss = strong_loss_by_hand(student, teacher, unlabeled, threshold, factors)
    expected = (labeled_loss_by_hand(student, labeled) + strong_loss) / 2
    expected.backward()
    assert 0.1 < output.logs["mask_ratio"] < 0.9 or threshold == 0
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for (name, ours), reference in zip(module.branches[0].model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=0, atol=1e-6, msg=name)

    with torch.no_grad():
        for parameter in (*module.branches[0].parameters(), *student.parameters()):
            parameter -= 0.1 * parameter.grad
        update_teacher(module.teacher, module.branches[0], module.objective.ema_decay(7))
        for name, reference in teacher.named_parameters():  # 1 - 1 / (7 + 1)
            reference.copy_(7 / 8 * reference + 1 / 8 * student.get_parameter(name))
            ours = module.teacher.model.get_parameter(name)
            torch.testing.assert_close(ours.double(), reference, rtol=0, atol=1e-6, msg=name)


def test_partners_of_an_odd_batch_are_used():
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, whole = batches(VIEWS)
    views = ("weak", "strong", "strong_2", "valid")
    odd = mapped(whole, lambda t: t[:3], **{f"partner_{name}": getattr(whole, name)[[1, 0, 3]] for name in views})
    cut = replace(whole, cutmix_mask=whole.cutmix_mask[:3], cutmix_mask_2=whole.cutmix_mask_2[:3])
    total = 0.0
    for view, mask in ((cut.strong, cut.cutmix_mask), (cut.strong_2, cut.cutmix_mask_2)):
        for i, y, x in pixels(mask):
            source = [1, 0, 3][i] if mask[i, y, x] else i
            weak = log_softmax(teacher, whole.weak[source], y, x)
            if whole.valid[source, y, x] and math.exp(max(weak)) >= 0.4:
                total -= log_softmax(student, view[source], y, x)[arg_max(weak)]
    out = UniMatchV2(confidence_threshold=0.4, weight=3.0)([student], labeled, odd, teacher=teacher, progress=1.0)
    mean = total / (2 * odd.valid.sum().item())
    assert out.logs["strong_loss"].item() == pytest.approx(mean, rel=1e-5)
    assert out.loss.item() == pytest.approx((supervised_by_hand([student], labeled) + 3 * mean) / 2, rel=1e-5)


def test_both_strong_views_share_one_pass():
    seen = {}

    class Watching(TinyBranch):
        def forward(self, pixel_values, **dropout):
            seen.setdefault(self, []).append((len(pixel_values), dropout))
            return super().forward(pixel_values, **dropout)

    student, teacher = Watching(1), Watching(2)
    labeled, unlabeled = batches(VIEWS)
    UniMatchV2()([student], labeled, unlabeled, teacher=teacher).loss.backward()
    assert seen[student] == [(2, {}), (8, {"complementary_dropout": 0.5})] and seen[teacher] == [(4, {})]
    assert teacher.conv.weight.grad is None and student.conv.weight.grad.abs().sum() > 0
    UniMatchV2(complementary_dropout=0.0)([student], labeled, unlabeled, teacher=teacher)
    assert seen[student][2:] == [(2, {}), (8, {})]  # a user's network need not support the argument


def test_rare_pseudo_labels_can_count_more():
    student, teacher = TinyBranch(1), TinyBranch(2)
    labeled, unlabeled = batches(("weak", "strong", "strong_2"))  # without masks nothing is mixed
    how = {"complementary_dropout": 0.0, "confidence_threshold": 0.0, "cutmix": 0.0}
    found = []
    for view in (unlabeled.strong, unlabeled.strong_2):
        for i, y, x in pixels(view):
            if unlabeled.valid[i, y, x]:
                label = arg_max(log_softmax(teacher, unlabeled.weak[i], y, x))
                found.append((label, -log_softmax(student, view[i], y, x)[label]))
    count = Counter(label for label, _ in found)
    scale = len(found) / sum(number**0.5 for number in count.values())
    expected = sum(scale * count[label] ** -0.5 * loss for label, loss in found) / len(found)
    out = UniMatchV2(class_balance=0.5, **how)([student], labeled, unlabeled, teacher=teacher)
    assert out.logs["strong_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_decay_follows_the_paper():
    objective = UniMatchV2()
    assert [objective.ema_decay(t) for t in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert objective.ema_decay(248) == pytest.approx(248 / 249) and objective.ema_decay(10_000) == 0.996


def test_joint_passes_exclude_complementary_dropout():
    with pytest.raises(ValueError, match="`joint_forward`.*`complementary_dropout` to 0"):
        UniMatchV2(joint_forward=True)
    UniMatchV2(joint_forward=True, complementary_dropout=0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", -1.0),
        ("confidence_threshold", 1.1),
        ("complementary_dropout", 1.5),
        ("decay", 2.0),
        ("cutmix", -0.5),
    ],
)
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        UniMatchV2(**{field: value})
