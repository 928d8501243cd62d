"""The losses against written-out formulas, and a sorted reference for OHEM."""

import pytest
import torch
import torch.nn.functional as F
from support.by_hand import TinyBranch, averaged_for, batches
from torchvision.ops import sigmoid_focal_loss

from cps_hf.functional.losses import (
    balanced_class_weights,
    class_counts,
    dice_loss,
    focal_loss,
    frequency_weights,
    ohem_cross_entropy,
    pixel_cross_entropy,
    pseudo_label,
)
from cps_hf.objectives import OBJECTIVES


def random_case(batch=2, classes=5, height=7, width=3, seed=0, ignored=0.3):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, height, width, generator=g, dtype=torch.float32) * 2
    labels = torch.randint(0, classes, (batch, height, width), generator=g)
    labels[torch.rand(labels.shape, generator=g) < ignored] = 255
    return logits.requires_grad_(), labels


def ohem_by_sorting(logits, labels, threshold, min_kept):
    """Sort all pixels by the probability of the true class (ignored ones last), then apply the definition."""
    probs = logits.softmax(1)
    rows = []
    for i, y, x in labels.new_ones(labels.shape).nonzero().tolist():
        label = labels[i, y, x].item()
        rows.append((1.0, None) if label == 255 else (probs[i, label, y, x].item(), probs[i, label, y, x]))
    labeled = [row for row in rows if row[1] is not None]
    if not labeled:
        return torch.tensor(0.0)
    if len(labeled) < min_kept:
        kept = labeled
    else:
        kth = sorted(p for p, _ in rows)[min(min_kept, len(rows)) - 1]
        kept = [row for row in labeled if row[0] <= max(threshold, kth) + 1e-7]
    return torch.stack([-row[1].log() for row in kept]).mean()


@pytest.mark.parametrize("min_kept", [1, 5, 20, 25, 42, 1000])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.8])
def test_ohem_equals_a_sorted_reference(threshold, min_kept, ignored):
    logits, labels = random_case(ignored=ignored)
    ours = ohem_cross_entropy(logits, labels, threshold=threshold, min_kept=min_kept)
    (grad,) = torch.autograd.grad(ours, logits)
    reference = ohem_by_sorting(logits, labels, threshold, min_kept)
    (reference_grad,) = torch.autograd.grad(reference, logits)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(grad, reference_grad)


def test_ohem_skips_easy_pixels_and_is_zero_without_labels():
    logits, labels = random_case(ignored=0.0)
    hard = ohem_cross_entropy(logits, labels, threshold=0.3, min_kept=1)
    assert hard > F.cross_entropy(logits, labels)
    none = ohem_cross_entropy(logits, torch.full_like(labels, 255), threshold=0.7, min_kept=10)
    none.backward()
    assert none.item() == 0 and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_counts_ohem_pixels_per_image(name):
    objective = OBJECTIVES[name](labeled_loss="ohem", ohem_threshold=0.2, ohem_min_kept=4)
    branches = [TinyBranch(seed) for seed in range(max(2, objective.min_branches) if not objective.teacher else 1)]
    labeled, unlabeled = batches(views=objective.views)
    averaged = averaged_for(objective)
    output = objective(branches, labeled, unlabeled, progress=1.0, **averaged)
    expected = sum(
        ohem_by_sorting(branch(labeled.pixel_values), labeled.labels, 0.2, min_kept=4 * 2) for branch in branches
    )
    torch.testing.assert_close(output.logs["supervised_loss"], expected.detach() / len(branches))
    plain = OBJECTIVES[name]()(branches, labeled, unlabeled, progress=1.0, **averaged)
    assert plain.logs["supervised_loss"] != output.logs["supervised_loss"] and plain.loss != output.loss


def test_pixel_cross_entropy_is_a_sum_over_a_given_count():
    logits, labels = random_case()
    valid = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    expected = -sum(
        logits[i, :, y, x].log_softmax(0)[labels[i, y, x]] for i, y, x in (valid & (labels != 255)).nonzero().tolist()
    )
    torch.testing.assert_close(pixel_cross_entropy(logits, labels, valid=valid, count=11.5), expected / 11.5)
    mean = expected / (valid & (labels != 255)).sum()
    torch.testing.assert_close(pixel_cross_entropy(logits, labels, valid=valid), mean)


def test_bfloat16_logits_give_a_float32_loss():
    logits, labels = random_case()
    loss = pixel_cross_entropy(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pixel_cross_entropy(logits.bfloat16().float(), labels), rtol=0, atol=0)


def test_a_pseudo_label_is_the_argmax_without_gradient():
    logits, _ = random_case()
    labels = pseudo_label(logits)
    assert labels.dtype == torch.long and labels.shape == (2, 7, 3) and not labels.requires_grad
    for i, y, x in labels.new_ones(labels.shape).nonzero().tolist():
        assert logits[i, labels[i, y, x], y, x] == logits[i, :, y, x].max()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_balanced_weights_fall_with_frequency_and_average_to_one(power):
    labels = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 1, 2, 2]]])
    valid = torch.tensor([[[True] * 9 + [False]]])  # 6, 2 and 1 pixels; class 3 has none
    weights = balanced_class_weights(labels, valid, 4, power=power)
    raw = torch.tensor([6.0, 2.0, 1.0, 1.0]) ** -power
    expected = raw * 9 / (6 * raw[0] + 2 * raw[1] + raw[2])
    torch.testing.assert_close(weights, expected)
    logits = torch.randn(1, 4, 1, 10, generator=torch.Generator().manual_seed(0))
    by_hand = (
        sum(-expected[c] * logits[0, :, 0, i].log_softmax(0)[c] for i, c in enumerate(labels[0, 0, :9].tolist())) / 9
    )
    torch.testing.assert_close(pixel_cross_entropy(logits, labels, valid=valid, class_weights=weights), by_hand)
    assert torch.isfinite(balanced_class_weights(labels, torch.zeros_like(valid), 4, power=power)).all()


def focal_by_hand(logits, labels, gamma, weights):
    probs = logits.softmax(1)
    return sum(
        -weights[c] * (1 - probs[i, c, y, x]) ** gamma * probs[i, c, y, x].log()
        for i, y, x in (labels != 255).nonzero().tolist()
        for c in [labels[i, y, x].item()]
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.5])
def test_the_focal_loss_is_lins_formula_summed_over_a_given_count(gamma):
    logits, labels = random_case()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
    ours = focal_loss(logits, labels, gamma=gamma, count=11.5, class_weights=weights)
    reference = focal_by_hand(logits, labels, gamma, weights) / 11.5
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, reference)))
    plain = focal_by_hand(logits, labels, gamma, torch.ones(5)) / (labels != 255).sum()
    torch.testing.assert_close(focal_loss(logits, labels, gamma=gamma), plain)


def test_for_two_classes_the_focal_loss_equals_torchvisions():
    logits, labels = random_case(classes=2, ignored=0.0)
    alone = (logits[:, 1] - logits[:, 0]).detach()
    expected = sigmoid_focal_loss(alone, labels.float(), alpha=0.25, gamma=2.0, reduction="mean")
    ours = focal_loss(logits, labels, gamma=2.0, class_weights=torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(ours.detach(), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_focal_losss_gradient_is_always_finite(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 2).requires_grad_()
    focal_loss(logits, torch.tensor([[[0, 255]]]), gamma=gamma).backward()
    assert torch.isfinite(logits.grad).all()


def dice_by_hand(logits, labels, weights=None):
    """Class by class, pixel by pixel; a class without labels is skipped."""
    probs, terms = logits.softmax(1), []
    labeled = (labels != 255).nonzero().tolist()
    for c in range(logits.shape[1]):
        own = [probs[i, c, y, x] for i, y, x in labeled if labels[i, y, x] == c]
        if own:
            overlap = 2 * sum(own) / (sum(probs[i, c, y, x] for i, y, x in labeled) + len(own))
            terms.append((1.0 if weights is None else weights[c].item(), 1 - overlap))
    return sum(w * term for w, term in terms) / sum(w for w, _ in terms)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0])], ids=["plain", "weighted"])
@pytest.mark.parametrize("absent", [False, True], ids=["all classes", "one without a pixel"])
def test_the_dice_loss_and_its_gradient_follow_the_formula(weights, absent):
    logits, labels = random_case()
    if absent:
        labels[labels == 2] = 1
    ours, reference = dice_loss(logits, labels, class_weights=weights), dice_by_hand(logits, labels, weights)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, reference)))


def test_the_dice_loss_is_the_same_on_two_processes():
    """The shares of labeled pixels are 90 % and 10 %; each process gets the mean of both processes' sums."""
    logits, labels = random_case(ignored=0.0)
    labels[1].flatten()[2:] = 255
    whole = dice_loss(logits, labels)
    (expected,) = torch.autograd.grad(whole, logits)
    sums = []
    for image in range(2):
        dice_loss(logits[image : image + 1], labels[image : image + 1], over_processes=lambda s: sums.append(s) or s)
    losses = [dice_loss(logits[i : i + 1], labels[i : i + 1], over_processes=lambda _: sum(sums) / 2) for i in (0, 1)]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    for loss in losses:
        torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(sum(gradients) / 2, expected)  # as DDP averages them
    alone = [torch.autograd.grad(dice_loss(logits[i : i + 1], labels[i : i + 1]), logits)[0] for i in (0, 1)]
    assert (sum(alone) / 2 - expected).abs().max() > 10 * expected.abs().mean()


def test_the_dice_loss_is_zero_without_labels():
    logits, labels = random_case()
    loss = dice_loss(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_class_weights_multiply_the_losses_of_the_pixels_that_ohem_keeps():
    logits, labels = random_case()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
    keep_all = {"threshold": 1.0, "min_kept": 1}
    expected = F.cross_entropy(logits, labels, weights, ignore_index=255, reduction="none").sum()
    ours = ohem_cross_entropy(logits, labels, class_weights=weights, **keep_all)
    torch.testing.assert_close(ours, expected / (labels != 255).sum())


def test_pixels_are_counted_by_class_without_those_ignored():
    labels = torch.tensor([[[0, 0, 255, 2], [2, 2, 255, 0]]])
    assert class_counts(labels, 4).tolist() == [3, 0, 3, 0]
    assert class_counts(labels, 4, valid=labels == 2).tolist() == [0, 0, 3, 0]
    weights = frequency_weights(torch.tensor([900.0, 0.0, 100.0]), power=0.5)
    raw = [900**-0.5, 1.0, 100**-0.5]
    scale = 1000 / (900 * raw[0] + 100 * raw[2])
    assert weights.tolist() == pytest.approx([scale * one for one in raw])
