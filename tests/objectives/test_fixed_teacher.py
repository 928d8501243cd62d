"""The fixed teacher against loops in plain Python: whose labels are learned on the CutMixed strong view, and where."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.by_hand import C, TinyBranch, arg_max, batches, log_softmax, mapped, pixels, supervised_by_hand

from cps_hf.objectives import FixedTeacher

VIEWS = ("weak", "strong", "cutmix_mask")
NEIGHBOURS = (1, 0, 3, 2)


def probs_by_hand(labelers, image, y, x, flip):
    """The mean of the labelers' probabilities of a pixel. A 1x1 convolution predicts the same for a mirrored image."""
    seen = [(image, x)] + ([(image.flip(-1), image.shape[-1] - 1 - x)] if flip else [])
    all_probs = [[math.exp(v) for v in log_softmax(one, i, y, at)] for one in labelers for i, at in seen]
    return [sum(column) / len(all_probs) for column in zip(*all_probs, strict=True)]


def by_hand(student, labelers, unlabeled, *, threshold=0.0, soft=False, flip=True, partner=NEIGHBOURS, source=None):
    """The loss and label of each pixel that is trained on."""
    source = unlabeled if source is None else source
    found = []
    for i, y, x in pixels(unlabeled.cutmix_mask):
        j = partner[i] if unlabeled.cutmix_mask[i, y, x] else i
        if not source.valid[j, y, x]:
            continue
        probs = probs_by_hand(labelers, source.weak[j], y, x, flip)
        if max(probs) < threshold:
            continue
        target = probs if soft else [float(k == arg_max(probs)) for k in range(C)]
        logs = log_softmax(student, source.strong[j], y, x)
        found.append((-sum(t * v for t, v in zip(target, logs, strict=True)), arg_max(probs)))
    return found


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("count", "flip"), [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("confident_alone", [False, True])
def test_the_loss_follows_the_formula(soft, count, flip, confident_alone):
    students, labelers = [TinyBranch(1), TinyBranch(2)], [TinyBranch(seed) for seed in range(7, 7 + count)]
    labeled, unlabeled = (mapped(batch, as_double) for batch in batches(VIEWS))
    students, labelers = ([one.double() for one in some] for some in (students, labelers))
    valid, threshold = unlabeled.valid.sum().item(), 0.0
    if confident_alone:
        tops = [max(probs_by_hand(labelers, unlabeled.weak[i], y, x, flip)) for i, y, x in pixels(unlabeled.valid)]
        threshold = sorted(tops)[len(tops) // 2] + 1e-4
    losses = [by_hand(one, labelers, unlabeled, threshold=threshold, soft=soft, flip=flip) for one in students]
    mean = sum(loss for some in losses for loss, _ in some) / valid
    objective = FixedTeacher(labelers=["a"] * count, weight=3.0, soft=soft, flip=flip, confidence_threshold=threshold)
    out = objective(students, labeled, unlabeled, labelers=labelers, progress=1.0)
    assert 0.2 < len(losses[0]) / valid < 0.8 or not confident_alone
    assert out.logs["unsupervised_loss"].item() == pytest.approx(mean / 2, abs=1e-6)  # a mean over both students
    assert out.logs["mask_ratio"].item() == pytest.approx(len(losses[0]) / valid, abs=1e-6)
    assert out.loss.item() == pytest.approx(supervised_by_hand(students, labeled) + 3 * mean, abs=1e-6)


def as_double(value):
    return value.double() if value.is_floating_point() else value


def test_flip_averages_with_the_mirrored_image():
    """With a network that looks at its right neighbour, so at its left one if mirrored."""

    class Neighbour(TinyBranch):
        def forward(self, pixel_values, **dropout):
            return super().forward(pixel_values.roll(-1, dims=-1))

    student, labeler = TinyBranch(1).double(), Neighbour(2).double()
    labeled, unlabeled = (mapped(batch, as_double) for batch in batches(VIEWS))
    total = 0.0
    for i, y, x in pixels(unlabeled.valid):
        j = NEIGHBOURS[i] if unlabeled.cutmix_mask[i, y, x] else i
        if unlabeled.valid[j, y, x]:
            plain, image, width = TinyBranch(2).double(), unlabeled.weak[j], unlabeled.weak.shape[-1]
            right, left = (log_softmax(plain, image, y, at % width) for at in (x + 1, x - 1))
            target = [(math.exp(a) + math.exp(b)) / 2 for a, b in zip(right, left, strict=True)]
            total -= log_softmax(student, unlabeled.strong[j], y, x)[arg_max(target)]
    objective = FixedTeacher(labelers=["a"])
    found = objective([student], labeled, unlabeled, labelers=[labeler]).logs["unsupervised_loss"].item()
    assert found == pytest.approx(total / unlabeled.valid.sum().item(), abs=1e-6)
    unflipped = replace(objective, flip=False)([student], labeled, unlabeled, labelers=[labeler])
    assert unflipped.logs["unsupervised_loss"].item() != pytest.approx(found, abs=1e-3)


def test_only_the_student_gets_a_gradient():
    student, labelers = TinyBranch(1).double(), [TinyBranch(7).double(), TinyBranch(8).double()]
    labeled, unlabeled = (mapped(batch, as_double) for batch in batches(VIEWS))
    objective = FixedTeacher(labelers=["a", "b"], weight=2.0)
    out = objective([student], labeled, unlabeled, labelers=labelers)
    out.loss.backward()
    assert all(one.conv.weight.grad is None for one in labelers)
    assert {gradient for _, gradient, _ in labelers[0].calls} == {False}
    step, gradient = 1e-6, student.conv.weight.grad[1, 2, 0, 0].item()
    ends = []
    for sign in (1, -1):
        other = TinyBranch(1).double()
        with torch.no_grad():
            other.conv.weight[1, 2] += sign * step
        losses = by_hand(other, labelers, unlabeled)
        mean = sum(loss for loss, _ in losses) / unlabeled.valid.sum().item()
        ends.append(supervised_by_hand([other], labeled) + 2 * mean)
    assert gradient == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_stored_labels_are_learned_in_the_same_way():
    """Pixels of 255 are ignored, but the sum is still divided by the valid ones. With and without an odd batch."""
    student = TinyBranch(1).double()
    labeled, whole = (mapped(batch, as_double) for batch in batches(("pseudo_labels", "strong", "cutmix_mask")))
    whole.pseudo_labels[1, :2] = 255
    names = ("strong", "pseudo_labels", "valid")
    odd = mapped(whole, lambda t: t[:3], **{f"partner_{name}": getattr(whole, name)[[1, 0, 3]] for name in names})
    for unlabeled, size in ((whole, 4), (odd, 3)):
        total = taught = 0
        for i, y, x in pixels(whole.cutmix_mask[:size]):
            j = NEIGHBOURS[i] if whole.cutmix_mask[i, y, x] else i
            label = int(whole.pseudo_labels[j, y, x])
            if whole.valid[j, y, x] and label != 255:
                total -= log_softmax(student, whole.strong[j], y, x)[label]
                taught += 1
        count = unlabeled.valid.sum().item()
        logs = FixedTeacher()([student], labeled, unlabeled).logs
        assert logs["unsupervised_loss"].item() == pytest.approx(total / count, abs=1e-6)
        assert logs["mask_ratio"].item() == pytest.approx(taught / count, abs=1e-6)


def test_partners_of_an_odd_batch_are_labeled_separately():
    student, labelers = TinyBranch(1).double(), [TinyBranch(7).double()]
    labeled, whole = (mapped(batch, as_double) for batch in batches(VIEWS))
    sent = {f"partner_{name}": getattr(whole, name)[[1, 0, 3]] for name in ("weak", "strong", "valid")}
    odd = mapped(whole, lambda t: t[:3], **sent)
    cut = replace(whole, cutmix_mask=whole.cutmix_mask[:3])
    losses = by_hand(student, labelers, cut, source=whole)
    out = FixedTeacher(labelers=["a"])([student], labeled, odd, labelers=labelers)
    mean = sum(loss for loss, _ in losses) / odd.valid.sum().item()
    assert out.logs["unsupervised_loss"].item() == pytest.approx(mean, abs=1e-6)


def test_class_weights_and_class_balance_are_separate():
    student, labelers = TinyBranch(1), [TinyBranch(7)]
    labeled, unlabeled = batches(VIEWS)

    def logs(**fields):
        return FixedTeacher(labelers=["a"], **fields)([student], labeled, unlabeled, labelers=labelers).logs

    plain, weighted = logs(), logs(class_weights=[0.5, 2.0, 3.0])
    assert weighted["unsupervised_loss"] == plain["unsupervised_loss"]
    assert weighted["supervised_loss"] != plain["supervised_loss"]
    losses = by_hand(student, labelers, unlabeled)
    count = Counter(label for _, label in losses)
    scale = len(losses) / sum(number**0.5 for number in count.values())
    expected = sum(scale * count[label] ** -0.5 * loss for loss, label in losses) / unlabeled.valid.sum().item()
    balanced = logs(class_balance=0.5)
    assert balanced["unsupervised_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert balanced["supervised_loss"] == plain["supervised_loss"]


def test_the_weight_can_grow():
    labeled, unlabeled = batches(VIEWS)
    objective = FixedTeacher(labelers=["a"], ramp_up=0.5, weight=2.0)
    outs = [objective([TinyBranch(1)], labeled, unlabeled, labelers=[TinyBranch(2)], progress=p) for p in (0, 0.25, 1)]
    shares = [(out.loss - out.logs["supervised_loss"]) / out.logs["unsupervised_loss"] for out in outs]
    assert [share.item() for share in shares] == pytest.approx([0, 1, 2], abs=1e-5)


def test_the_views_depend_on_who_makes_labels():
    assert FixedTeacher(labelers=["a"]).views == ("weak", "strong", "cutmix_mask")
    assert FixedTeacher().views == ("pseudo_labels", "strong", "cutmix_mask")
    assert FixedTeacher(cutmix=0.25).cutmix_masks["probability"] == 0.25


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weight": -1.0}, "`weight`.*-1.0"),
        ({"confidence_threshold": 1.1}, "`confidence_threshold`.*1.1"),
        ({"cutmix": -0.5}, "`cutmix`.*-0.5"),
        ({"soft": True, "class_balance": 0.5}, "`class_balance` counts hard labels"),
        ({"labelers": [], "soft": True}, "name these networks with `labelers`"),
        ({"labelers": [], "confidence_threshold": 0.9}, "name these networks with `labelers`"),
    ],
)
def test_bad_hyper_parameters_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        FixedTeacher(**{"labelers": ["a"], **fields})
