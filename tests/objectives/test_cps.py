"""CPS against loops written from the paper: section 3.1, equations 1 to 4, and the CutMix paragraph of section 3.2."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from support.by_hand import C, TinyBranch, arg_max, log_softmax, mapped, pixels, supervised_by_hand
from support.by_hand import batches as all_batches
from torch import nn

from cps_hf.functional.cutmix import mix, swap_neighbours
from cps_hf.objectives import CrossPseudoSupervision, LabeledBatch, Supervised, UnlabeledBatch

batches = functools.partial(all_batches, ("weak", "cutmix_mask"))


def test_plain_cps_equals_the_papers_equations():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    out = CrossPseudoSupervision(weight=1.5, cutmix=False)(branches, labeled, unlabeled)

    losses, count, agree = 0.0, 0, 0
    for images, valid, is_unlabeled in (
        (labeled.pixel_values, labeled.valid, False),
        (unlabeled.weak, unlabeled.valid, True),
    ):
        for i, y, x in pixels(images):
            if not valid[i, y, x]:
                continue
            p1, p2 = (log_softmax(b, images[i], y, x) for b in branches)
            y1, y2 = arg_max(p1), arg_max(p2)
            losses += -p1[y2] - p2[y1]
            count += 1
            agree += is_unlabeled and y1 == y2
    expected = supervised_by_hand(branches, labeled) + 1.5 * losses / count
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.logs["cps_loss"].item() == pytest.approx(losses / count / 2, rel=1e-5)  # a mean over branches
    assert out.logs["agreement"].item() == pytest.approx(agree / unlabeled.valid.sum().item(), rel=1e-5)


@pytest.mark.parametrize("odd", [False, True], ids=["neighbours in the batch", "partners sent along"])
def test_cutmix_cps_equals_the_papers_equations_with_given_masks(odd):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches(unlabeled_size=4)
    all_weak, all_valid = unlabeled.weak, unlabeled.valid
    if odd:  # three images of the stream; the partner of the third is in the next batch
        partner = torch.tensor([1, 0, 3])
        sources = {i: int(partner[i]) for i in range(3)}
        sent = {"partner_weak": all_weak[partner], "partner_valid": all_valid[partner]}
        unlabeled = mapped(unlabeled, lambda t: t[:3], **sent)
    else:
        sources = {0: 1, 1: 0, 2: 3, 3: 2}
    out = CrossPseudoSupervision(weight=5.0, cutmix=True)(branches, labeled, unlabeled)

    losses = 0.0
    for i, y, x in pixels(unlabeled.weak):
        source = sources[i] if unlabeled.cutmix_mask[i, y, x] else i
        if not all_valid[source, y, x]:
            continue
        # A 1x1 convolution cannot see the neighbourhood, so the mixed pixel's prediction is the source pixel's own.
        p1, p2 = (log_softmax(b, all_weak[source], y, x) for b in branches)
        losses += -p1[arg_max(p2)] - p2[arg_max(p1)]
    expected = supervised_by_hand(branches, labeled) + 5.0 * losses / unlabeled.valid.sum().item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_those_of_cross_entropy_with_constant_targets():
    """d loss / d bias of branch 1 is mean(softmax - one-hot) over labels and over branch 2's pseudo labels."""
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    weight = 2.0
    CrossPseudoSupervision(weight=weight, cutmix=False)(branches, labeled, unlabeled).loss.backward()
    for student, other in (branches, branches[::-1]):
        grad = torch.zeros(C, dtype=torch.float64)
        terms = []
        n_labels = int((labeled.labels != 255).sum())
        n_valid = int(labeled.valid.sum() + unlabeled.valid.sum())
        for i, y, x in pixels(labeled.labels):
            if labeled.labels[i, y, x] != 255:
                terms.append((labeled.pixel_values[i], y, x, int(labeled.labels[i, y, x]), 1 / n_labels))
        for images, valid in ((labeled.pixel_values, labeled.valid), (unlabeled.weak, unlabeled.valid)):
            for i, y, x in pixels(images):
                if valid[i, y, x]:
                    target = arg_max(log_softmax(other, images[i], y, x))
                    terms.append((images[i], y, x, target, weight / n_valid))
        for image, y, x, target, share in terms:
            probs = torch.tensor(log_softmax(student, image, y, x), dtype=torch.float64).exp()
            probs[target] -= 1
            grad += share * probs
        torch.testing.assert_close(student.conv.bias.grad.double(), grad, rtol=1e-4, atol=1e-6)


def test_no_gradient_flows_through_pseudo_labels():
    """Without its labeled loss and its own student term, a teacher's parameters get no gradient."""
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    labeled.labels.fill_(255)
    for p in branches[0].parameters():
        p.requires_grad_(False)  # branch 1 is not trained; branch 0's loss term alone must not reach branch 1
    out = CrossPseudoSupervision(cutmix=True)(branches, labeled, unlabeled)
    out.loss.backward()
    reference = [TinyBranch(1), TinyBranch(2)]
    with torch.no_grad():
        target = reference[0](unlabeled.weak).argmax(1)
    mask = unlabeled.cutmix_mask
    mixed_images = mix(unlabeled.weak, swap_neighbours(unlabeled.weak), mask)
    mixed_target = mix(target, swap_neighbours(target), mask)
    mixed_valid = mix(unlabeled.valid, swap_neighbours(unlabeled.valid), mask)
    losses = nn.functional.cross_entropy(reference[1](mixed_images), mixed_target, reduction="none")
    ((losses * mixed_valid).sum() / unlabeled.valid.sum()).backward()
    torch.testing.assert_close(branches[1].conv.weight.grad, reference[1].conv.weight.grad)
    assert branches[0].conv.weight.grad is None


def test_cutmix_makes_three_passes_per_branch():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    CrossPseudoSupervision(cutmix=True)(branches, labeled, unlabeled)
    for branch in branches:
        assert sorted(branch.calls) == [(2, True, 0.0), (4, False, 0.0), (4, True, 0.0)]


@pytest.mark.parametrize("cutmix", [False, True])
def test_padding_changes_no_loss(cutmix):
    """Padded pixels (not valid, label 255) can have any value; the loss is that of the images without them."""
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(weight=1.5, cutmix=cutmix)
    before = objective(branches, labeled, unlabeled)

    def pad(value, tensor):
        return nn.functional.pad(tensor.float(), (1, 2, 3, 0), value=value).to(tensor.dtype)

    padded_labeled = LabeledBatch(
        pixel_values=pad(7.0, labeled.pixel_values), labels=pad(255, labeled.labels), valid=pad(0, labeled.valid)
    )
    padded_unlabeled = UnlabeledBatch(
        weak=pad(-3.0, unlabeled.weak),
        valid=pad(0, unlabeled.valid),
        cutmix_mask=pad(1, unlabeled.cutmix_mask),
    )
    after = objective(branches, padded_labeled, padded_unlabeled)
    torch.testing.assert_close(after.loss, before.loss)
    torch.testing.assert_close(after.logs["agreement"], before.logs["agreement"])


def test_an_ignored_label_changes_only_the_labeled_loss():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(cutmix=False)
    before = objective(branches, labeled, unlabeled).logs
    labels = labeled.labels.clone()
    labels[1] = 255
    after = objective(branches, replace(labeled, labels=labels, num_labels=None), unlabeled).logs
    assert after["supervised_loss"] != before["supervised_loss"]
    torch.testing.assert_close(after["cps_loss"], before["cps_loss"], rtol=0, atol=0)


def test_all_labels_ignored_is_zero_loss_and_zero_gradient():
    branch = TinyBranch(1)
    labeled, _ = batches()
    labeled.labels.fill_(255)
    out = Supervised()([branch], labeled)
    out.loss.backward()
    assert out.loss.item() == 0
    assert branch.conv.weight.grad.abs().sum() == 0


def test_identical_branches_agree_everywhere():
    branches = [TinyBranch(1), TinyBranch(1)]
    labeled, unlabeled = batches()
    logs = CrossPseudoSupervision(cutmix=True)(branches, labeled, unlabeled).logs
    assert logs["agreement"].item() == pytest.approx(1.0)


def test_three_branches_are_each_taught_by_the_mean_of_the_other_two():
    branches = [TinyBranch(1), TinyBranch(2), TinyBranch(3)]
    labeled, unlabeled = batches()
    images = torch.cat([labeled.pixel_values, unlabeled.weak])
    valid = torch.cat([labeled.valid, unlabeled.valid])
    expected = 0.0
    for i, y, x in pixels(images):
        if valid[i, y, x]:
            probs = [log_softmax(b, images[i], y, x) for b in branches]
            expected += sum(-probs[s][arg_max(probs[t])] for s in range(3) for t in range(3) if s != t) / 2
    logs = CrossPseudoSupervision(cutmix=False)(branches, labeled, unlabeled).logs
    assert logs["cps_loss"].item() == pytest.approx(expected / 3 / valid.sum().item(), rel=1e-5)


def test_the_counts_given_by_the_trainer_replace_the_local_ones():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(weight=3.0, cutmix=True)
    local = objective(branches, labeled, unlabeled).logs
    labeled.num_labels = (labeled.labels != 255).sum() * 2.0
    unlabeled.num_pixels = unlabeled.valid.sum() * 4.0
    given = objective(branches, labeled, unlabeled).logs
    torch.testing.assert_close(given["supervised_loss"], local["supervised_loss"] / 2)
    torch.testing.assert_close(given["cps_loss"], local["cps_loss"] / 4)
    torch.testing.assert_close(given["agreement"], local["agreement"] / 4)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_a_threshold_selects_pixels_and_keeps_the_count(threshold):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    kept, losses = 0, 0.0
    for i, y, x in pixels(unlabeled.weak):
        source = (i ^ 1) if unlabeled.cutmix_mask[i, y, x] else i
        if unlabeled.valid[source, y, x]:
            p1, p2 = (log_softmax(b, unlabeled.weak[source], y, x) for b in branches)
            for student, teacher in ((p1, p2), (p2, p1)):
                if math.exp(max(teacher)) >= threshold:
                    losses, kept = losses - student[arg_max(teacher)], kept + 1
    logs = CrossPseudoSupervision(confidence_threshold=threshold)(branches, labeled, unlabeled).logs
    count = unlabeled.valid.sum().item()
    assert logs["cps_loss"].item() == pytest.approx(losses / 2 / count, rel=1e-5)
    assert kept < 2 * count or threshold == 0.3


def test_class_balance_uses_the_pseudo_labels_frequency():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    total_count, expected = labeled.valid.sum().item() + unlabeled.valid.sum().item(), 0.0
    both = ((labeled.pixel_values, labeled.valid), (unlabeled.weak, unlabeled.valid))
    for images, valid in both:  # the frequencies are those of each of the two batches
        for student, other in (branches, branches[::-1]):
            taught = {p: arg_max(log_softmax(other, images[p[0]], *p[1:])) for p in pixels(images) if valid[p]}
            counts = [max(1, list(taught.values()).count(c)) for c in range(C)]
            scale = len(taught) / sum(counts[c] ** -0.5 for c in taught.values())
            for (i, y, x), c in taught.items():
                expected -= scale * counts[c] ** -0.5 * log_softmax(student, images[i], y, x)[c] / total_count
    plain = CrossPseudoSupervision(cutmix=False)(branches, labeled, unlabeled).logs["cps_loss"]
    logs = CrossPseudoSupervision(cutmix=False, class_balance=0.5)(branches, labeled, unlabeled).logs
    assert logs["cps_loss"].item() == pytest.approx(expected / 2, rel=1e-5)
    assert abs(logs["cps_loss"] - plain) > 1e-3


@pytest.mark.parametrize(
    ("options", "progress", "share"),
    [
        ({}, 0.0, 1.0),
        ({"warm_up": 0.25}, 0.2, 0.0),
        ({"warm_up": 0.25}, 0.25, 1.0),
        ({"ramp_up": 0.5}, 0.0, 0.0),
        ({"ramp_up": 0.5}, 0.125, 0.25),
        ({"ramp_up": 0.5}, 0.9, 1.0),
        ({"warm_up": 0.25, "ramp_up": 0.5}, 0.5, 0.5),
    ],
)
def test_the_weight_grows_as_configured(options, progress, share):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(weight=3.0, **options)
    out = objective(branches, labeled, unlabeled, progress=torch.tensor(progress))
    expected = out.logs["supervised_loss"] + 3.0 * share * out.logs["cps_loss"]  # means over the two branches
    torch.testing.assert_close(out.loss.detach(), 2 * expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warm_up", -0.1),
        ("ramp_up", 1.5),
        ("labeled_loss", "fokal"),
        ("focal_gamma", -0.5),
        ("class_weights", 1.5),
        ("ohem_threshold", 1.5),
        ("ohem_min_kept", 0),
        ("weight", -1.0),
    ],
)
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        CrossPseudoSupervision(**{field: value})


def test_a_weight_that_never_reaches_its_value_is_rejected():
    for warm_up, ramp_up in ((0.8, 0.2), (0.9, 0.1), (0.7, 0.3), (1.0, 0.0)):  # to the end of training
        CrossPseudoSupervision(warm_up=warm_up, ramp_up=ramp_up)
    with pytest.raises(ValueError, match="`warm_up` and `ramp_up`.*got 0.8 and 0.8"):
        CrossPseudoSupervision(warm_up=0.8, ramp_up=0.8)


def cross_entropies(branches, images, target_images=None):
    """Per pixel, the sum of both branches' cross entropies to the other's prediction for the target images."""
    target_images = images if target_images is None else target_images
    return {
        (i, y, x): sum(
            -log_softmax(student, images[i], y, x)[arg_max(log_softmax(other, target_images[i], y, x))]
            for student, other in (branches, branches[::-1])
        )
        for i, y, x in pixels(images)
    }


@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize("on_labeled", [None, False, True])
def test_on_labeled_includes_the_labeled_images(cutmix, on_labeled):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    weak, valid = unlabeled.weak, unlabeled.valid
    if cutmix:
        weak = mix(weak, swap_neighbours(weak), unlabeled.cutmix_mask)
        valid = mix(valid, swap_neighbours(valid), unlabeled.cutmix_mask)
    losses = [loss for p, loss in cross_entropies(branches, weak).items() if valid[p]]
    count = unlabeled.valid.sum().item()
    if on_labeled if on_labeled is not None else not cutmix:
        of_labeled = cross_entropies(branches, labeled.pixel_values)
        losses += [loss for p, loss in of_labeled.items() if labeled.valid[p]]
        count += labeled.valid.sum().item()
    logs = CrossPseudoSupervision(cutmix=cutmix, on_labeled=on_labeled)(branches, labeled, unlabeled).logs
    assert logs["cps_loss"].item() == pytest.approx(sum(losses) / 2 / count, rel=1e-5)


def test_teach_padding_uses_every_pixel():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    losses = cross_entropies(branches, unlabeled.weak)
    objective = CrossPseudoSupervision(cutmix=False, on_labeled=False, teach_padding=True)
    expected = sum(losses.values()) / len(losses) / 2
    assert objective(branches, labeled, unlabeled).logs["cps_loss"].item() == pytest.approx(expected, rel=1e-5)
    skipped = CrossPseudoSupervision(cutmix=False, on_labeled=False)(branches, labeled, unlabeled).logs["cps_loss"]
    assert abs(skipped - expected) > 1e-3


def test_cutmix_partner_itself_mixes_two_crops():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = all_batches(("weak", "second_crop", "cutmix_mask"))
    mask = unlabeled.cutmix_mask
    images = mix(unlabeled.weak, unlabeled.second_crop, mask)
    valid = mix(unlabeled.valid, unlabeled.second_valid, mask)
    losses = [loss for p, loss in cross_entropies(branches, images).items() if valid[p]]
    objective = CrossPseudoSupervision(cutmix_partner="itself")
    assert objective.views == ("weak", "second_crop", "cutmix_mask")
    logs = objective(branches, labeled, unlabeled).logs
    assert logs["cps_loss"].item() == pytest.approx(sum(losses) / 2 / unlabeled.valid.sum().item(), rel=1e-5)


def test_loss_divisor_divides_loss_and_gradient():
    labeled, unlabeled = batches()
    losses, gradients = [], []
    for divisor in (1.0, 8.0):
        branches = [TinyBranch(1), TinyBranch(2)]
        loss = CrossPseudoSupervision(loss_divisor=divisor)(branches, labeled, unlabeled).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(branches[0].conv.weight.grad)
    assert losses[1] == pytest.approx(losses[0] / 8, rel=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0] / 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cutmix_partner": "other"}, '`cutmix_partner` must be "neighbour" or "itself".*other'),
        ({"cutmix_partner": "itself", "cutmix": False}, "needs `cutmix=True`"),
        ({"loss_divisor": 0.0}, "`loss_divisor` must be positive"),
    ],
)
def test_a_bad_switch_is_an_error(options, said):
    with pytest.raises(ValueError, match=said):
        CrossPseudoSupervision(**options)
