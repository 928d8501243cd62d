"""PseudoSeg against loops: sharpened probabilities of the weak view are the targets of the strong one."""

import math

import pytest
import torch
from support.by_hand import C, TinyBranch, arg_max, batches, log_softmax, pixels, supervised_by_hand

from cps_hf.objectives import PseudoSeg

VIEWS = ("weak", "strong")


def sharpened(log_probs, temperature):
    powers = [math.exp(v) ** (1 / temperature) for v in log_probs]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_loss_is_the_cross_entropy_to_the_sharpened_targets(temperature):
    branches = [TinyBranch(1), TinyBranch(2)]  # each by itself
    labeled, unlabeled = batches(VIEWS)
    total = 0.0
    for branch in branches:
        for i, y, x in pixels(unlabeled.weak):
            if unlabeled.valid[i, y, x]:
                target = sharpened(log_softmax(branch, unlabeled.weak[i], y, x), temperature)
                log_probs = log_softmax(branch, unlabeled.strong[i], y, x)
                total -= sum(q * p for q, p in zip(target, log_probs, strict=True))
    mean = total / unlabeled.valid.sum().item()
    out = PseudoSeg(weight=2.0, temperature=temperature)(branches, labeled, unlabeled)
    assert out.logs["unsupervised_loss"].item() == pytest.approx(mean / 2, rel=1e-5)
    assert out.loss.item() == pytest.approx(supervised_by_hand(branches, labeled) + 2 * mean, rel=1e-5)


def test_towards_temperature_zero_the_targets_are_one_hot():
    branch = TinyBranch(1)
    labeled, unlabeled = batches(VIEWS)
    total = sum(
        -log_softmax(branch, unlabeled.strong[p[0]], *p[1:])[
            arg_max(log_softmax(branch, unlabeled.weak[p[0]], *p[1:]))
        ]
        for p in pixels(unlabeled.weak)
        if unlabeled.valid[p]
    )
    logs = PseudoSeg(temperature=1e-4)([branch], labeled, unlabeled).logs
    expected = total / unlabeled.valid.sum().item()
    assert logs["unsupervised_loss"].item() == pytest.approx(expected, rel=1e-3)


def test_the_weak_view_gets_no_gradient():
    branch = TinyBranch(1)
    labeled, unlabeled = batches(VIEWS)
    labeled.labels.fill_(255)
    PseudoSeg()([branch], labeled, unlabeled).loss.backward()
    reference = TinyBranch(1)
    target = (reference(unlabeled.weak) / 0.5).softmax(1).detach()
    losses = -(target * reference(unlabeled.strong).log_softmax(1)).sum(1)
    ((losses * unlabeled.valid).sum() / unlabeled.valid.sum()).backward()
    torch.testing.assert_close(branch.conv.weight.grad, reference.conv.weight.grad)


def test_class_balance_uses_the_targets_most_likely_class():
    branch = TinyBranch(1)
    labeled, unlabeled = batches(VIEWS)
    targets = {
        p: sharpened(log_softmax(branch, unlabeled.weak[p[0]], *p[1:]), 0.5)
        for p in pixels(unlabeled.weak)
        if unlabeled.valid[p]
    }
    counts = [max(1, [arg_max(t) for t in targets.values()].count(c)) for c in range(C)]
    scale = len(targets) / sum(counts[arg_max(t)] ** -0.5 for t in targets.values())
    total = 0.0
    for (i, y, x), target in targets.items():
        log_probs = log_softmax(branch, unlabeled.strong[i], y, x)
        loss = -sum(q * p for q, p in zip(target, log_probs, strict=True))
        total += scale * counts[arg_max(target)] ** -0.5 * loss
    plain = PseudoSeg()([branch], labeled, unlabeled).logs["unsupervised_loss"].item()
    loss = PseudoSeg(class_balance=0.5)([branch], labeled, unlabeled).logs["unsupervised_loss"].item()
    assert loss == pytest.approx(total / len(targets), rel=1e-5) and loss != pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize(
    ("field", "value"), [("weight", -1.0), ("temperature", 0.0), ("ramp_up", -1.0), ("class_balance", 1.5)]
)
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        PseudoSeg(**{field: value})
