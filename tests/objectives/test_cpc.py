"""Cross probability consistency against loops: squared differences of soft-max maps, with constant targets."""

import math

import pytest
import torch
from support.by_hand import C, TinyBranch, arg_max, batches, log_softmax, pixels, supervised_by_hand
from support.toy import tiny_upernet, toy_models
from transformers import AutoModelForSemanticSegmentation

from cps_hf.modeling.branches import Branch
from cps_hf.objectives import CrossProbabilityConsistency, LabeledBatch, UnlabeledBatch


def probabilities(branch, image, y, x):
    return [math.exp(v) for v in log_softmax(branch, image, y, x)]


def difference(p, q):
    return sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / C


@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize("branches", [2, 3])
def test_the_loss_is_the_mean_squared_difference(cutmix, branches):
    branches = [TinyBranch(seed) for seed in range(branches)]
    labeled, unlabeled = batches(("weak", "cutmix_mask"))
    sets = [(unlabeled.weak, unlabeled.valid)]
    if cutmix:  # a 1x1 convolution sees no neighbour: a mixed pixel's prediction is the source pixel's
        partner, mask = [1, 0, 3, 2], unlabeled.cutmix_mask
        sets = [
            (
                torch.where(mask[:, None], unlabeled.weak[partner], unlabeled.weak),
                torch.where(mask, unlabeled.valid[partner], unlabeled.valid),
            )
        ]
    else:
        sets.append((labeled.pixel_values, labeled.valid))
    count = unlabeled.valid.sum().item() + (0 if cutmix else labeled.valid.sum().item())
    total = 0.0
    for images, valid in sets:
        for i, y, x in pixels(images):
            if valid[i, y, x]:
                p = [probabilities(branch, images[i], y, x) for branch in branches]
                total += sum(difference(a, b) for a in p for b in p if a is not b) / (len(branches) - 1)
    out = CrossProbabilityConsistency(weight=30.0, cutmix=cutmix)(branches, labeled, unlabeled)
    assert out.logs["cpc_loss"].item() == pytest.approx(total / count / len(branches), rel=1e-4)
    expected = supervised_by_hand(branches, labeled) + 30 * total / count
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_cutmix_the_gradient_is_of_the_plain_difference():
    """d/dp1 of (p1 - sg p2)^2 + (p2 - sg p1)^2 equals that of (p1 - p2)^2: stopping the gradient loses nothing."""
    labeled, unlabeled = batches()
    labeled.labels.fill_(255)
    branches, reference = [TinyBranch(1), TinyBranch(2)], [TinyBranch(1), TinyBranch(2)]
    CrossProbabilityConsistency(weight=1.0)(branches, labeled, unlabeled).loss.backward()
    images = torch.cat([labeled.pixel_values, unlabeled.weak])
    valid = torch.cat([labeled.valid, unlabeled.valid])
    p1, p2 = (branch(images).softmax(1) for branch in reference)
    ((p1 - p2).square().mean(1) * valid).sum().div(valid.sum()).backward()
    for branch, plain in zip(branches, reference, strict=True):
        torch.testing.assert_close(branch.conv.weight.grad, plain.conv.weight.grad)


@pytest.mark.parametrize("cutmix", [False, True])
def test_networks_of_different_strides_and_corners_teach_each_other(cutmix):
    """The trainer's branches return coarse logits; they are compared at full size."""
    models = [toy_models(1, num_labels=C)[0], AutoModelForSemanticSegmentation.from_config(tiny_upernet())]
    networks = [Branch(model) for model in models]
    networks[0].align_corners = True
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 3, 64, 48, generator=g) for n in (2, 4)]
    labeled = LabeledBatch(pixel_values=images[0], labels=torch.randint(0, C, (2, 64, 48), generator=g))
    unlabeled = UnlabeledBatch(weak=images[1], cutmix_mask=torch.rand(4, 64, 48, generator=g) > 0.5)
    assert len({network.strided(images[0]).values.shape for network in networks}) == 2
    objective, found = CrossProbabilityConsistency(weight=3.0, cutmix=cutmix), []
    for branches in ([network.strided for network in networks], networks):
        loss = objective(branches, labeled, unlabeled).loss
        found.append((loss, *torch.autograd.grad(loss, [next(model.parameters()) for model in models])))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_with_cutmix_the_targets_get_no_gradient():
    labeled, unlabeled = batches(("weak", "cutmix_mask"))
    branches = [TinyBranch(1), TinyBranch(2)]
    CrossProbabilityConsistency(cutmix=True)(branches, labeled, unlabeled).loss.backward()
    for branch in branches:
        assert sorted(branch.calls) == [(2, True, 0.0), (4, False, 0.0), (4, True, 0.0)]


def test_identical_branches_have_no_loss_and_agree():
    labeled, unlabeled = batches()
    logs = CrossProbabilityConsistency()([TinyBranch(1), TinyBranch(1)], labeled, unlabeled).logs
    assert logs["cpc_loss"].item() == 0 and logs["agreement"].item() == pytest.approx(1.0)


def test_the_weight_grows_over_the_ramp_up():
    labeled, unlabeled = batches()
    branches = [TinyBranch(1), TinyBranch(2)]
    out = CrossProbabilityConsistency(ramp_up=0.4)(branches, labeled, unlabeled, progress=torch.tensor(0.1))
    torch.testing.assert_close(out.loss.detach(), 2 * (out.logs["supervised_loss"] + 25 * out.logs["cpc_loss"]))


@pytest.mark.parametrize("cutmix", [False, True])
def test_class_balance_uses_the_targets_most_likely_class(cutmix):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches(("weak", "cutmix_mask"))
    sets = [(labeled.pixel_values, labeled.valid), (unlabeled.weak, unlabeled.valid)]
    count = labeled.valid.sum().item() + unlabeled.valid.sum().item()
    if cutmix:
        partner, mask = [1, 0, 3, 2], unlabeled.cutmix_mask
        images = torch.where(mask[:, None], unlabeled.weak[partner], unlabeled.weak)
        sets = [(images, torch.where(mask, unlabeled.valid[partner], unlabeled.valid))]
        count = unlabeled.valid.sum().item()
    total = 0.0
    for images, valid in sets:  # the frequencies are those of each of the two batches
        for student, other in (branches, branches[::-1]):
            targets = {p: probabilities(other, images[p[0]], *p[1:]) for p in pixels(images) if valid[p]}
            counts = [max(1, [arg_max(t) for t in targets.values()].count(c)) for c in range(C)]
            scale = len(targets) / sum(counts[arg_max(t)] ** -0.5 for t in targets.values())
            for (i, y, x), target in targets.items():
                loss = difference(probabilities(student, images[i], y, x), target)
                total += scale * counts[arg_max(target)] ** -0.5 * loss
    plain = CrossProbabilityConsistency(cutmix=cutmix)(branches, labeled, unlabeled).logs["cpc_loss"]
    loss = CrossProbabilityConsistency(cutmix=cutmix, class_balance=0.5)(branches, labeled, unlabeled).logs["cpc_loss"]
    assert loss.item() == pytest.approx(total / count / 2, rel=1e-4)  # a mean over both branches
    assert loss.item() != pytest.approx(plain.item(), rel=2e-3)


@pytest.mark.parametrize(("field", "value"), [("weight", -1.0), ("ramp_up", 2.0), ("class_balance", 1.5)])
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        CrossProbabilityConsistency(**{field: value})
