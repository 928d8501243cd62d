"""Supervised training: each branch independently, on the labels alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cps_hf.objectives import CrossPseudoSupervision, LabeledBatch, Supervised


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


class Weighted(CrossPseudoSupervision):
    """A method with its own labeled loss."""

    def supervised_loss(self, logits, labeled):
        return self.focal_gamma * super().supervised_loss(logits, labeled)


def test_the_labeled_part_of_a_method_has_the_methods_loss():
    """It is the first of two stages."""
    torch.manual_seed(0)
    batch = LabeledBatch(pixel_values=torch.randn(2, 3, 6, 5), labels=torch.randint(0, 4, (2, 6, 5)))
    branches = [nn.Conv2d(3, 4, 3, padding=1) for _ in range(2)]
    plain, own = (
        Supervised.of(cls(labeled_loss="focal", focal_gamma=3.0))(branches, batch).loss
        for cls in (CrossPseudoSupervision, Weighted)
    )
    torch.testing.assert_close(own, 3 * plain)
    torch.testing.assert_close(plain, Supervised(labeled_loss="focal", focal_gamma=3.0)(branches, batch).loss)
