"""Supervised training: each branch independently, on the labels alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cps_hf.objectives import LabeledBatch, Supervised


def test_the_loss_is_the_sum_of_the_branches_own_cross_entropies():
    torch.manual_seed(0)
    branches = [nn.Conv2d(3, 4, 3, padding=1) for _ in range(2)]
    labels = torch.randint(0, 4, (3, 6, 5))
    labels[:, :2] = 255
    batch = LabeledBatch(pixel_values=torch.randn(3, 3, 6, 5), labels=labels)
    out = Supervised()(branches, batch)
    expected = [F.cross_entropy(branch(batch.pixel_values), labels, ignore_index=255) for branch in branches]
    assert out.loss.item() == pytest.approx(sum(e.item() for e in expected), rel=1e-6)
    out.loss.backward()
    for branch, alone in zip(branches, expected, strict=True):
        (grad,) = torch.autograd.grad(alone, branch.weight)
        torch.testing.assert_close(branch.weight.grad, grad)


def test_it_needs_no_views():
    assert Supervised().views == () and Supervised.min_branches == 1
