"""Pseudo labels are what helps: real ones beat shuffled ones and are not worse than supervised training.

A small version of benchmarks/results: a noisy world with two labeled images, and the objectives in a plain loop.
"""

import numpy as np
import pytest
import torch
from support.by_hand import C
from support.toy import draw
from torch import nn

from cps_hf.objectives import CrossPseudoSupervision, LabeledBatch, Supervised, UnlabeledBatch

COLORS = np.array([[60, 120, 60], [200, 60, 60], [60, 60, 200]])
SEEDS = (1, 2, 3)  # each with its own images, networks and order


class ShuffledPseudoLabels(CrossPseudoSupervision):
    """As many pixels of each class, at other positions."""

    def _pseudo_labels(self, logits, batch):
        maps, agreed = super()._pseudo_labels(logits, batch)
        return [labels.flatten(1)[:, torch.randperm(labels[0].numel())].view_as(labels) for labels in maps], agreed


class Network(nn.Sequential):
    def __init__(self, width=16):
        first, second = nn.Conv2d(3, width, 5, padding=2), nn.Conv2d(width, width, 3, padding=1)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, C, 3, padding=1))


def world(first, count, noise=120.0, side=32):
    """Discs and bars under heavy noise: images (count, 3, side, side) and labels (count, side, side)."""
    images, labels = [], []
    for index in range(first, first + count):
        _, label = draw(index, side, side)
        pixels = COLORS[np.where(label == 255, 0, label)]
        pixels = pixels + np.random.default_rng([5, index]).normal(0, noise, pixels.shape)
        images.append(torch.from_numpy((pixels - 110) / 80).float().permute(2, 0, 1))
        labels.append(torch.from_numpy(label).long())
    return torch.stack(images), torch.stack(labels)


def score(objective, seed, steps=300, learning_rate=5e-3):
    """The mean IoU on other images at the last step, averaged over both branches."""
    (labeled, labels), (unlabeled, _) = world(1000 * seed, 2), world(1000 * seed + 100, 40)
    torch.manual_seed(seed)
    branches = [Network(), Network()]
    optimizer = torch.optim.AdamW([p for branch in branches for p in branch.parameters()], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps) ** 0.9
        flips = torch.rand(2, generator=generator) < 0.5
        x, y = (t.flip(-1) if flips[0] else t for t in (labeled, labels))
        chosen = unlabeled[torch.randperm(40, generator=generator)[:4]]
        batch = UnlabeledBatch(weak=chosen.flip(-1) if flips[1] else chosen)
        out = objective(branches, LabeledBatch(pixel_values=x, labels=y), batch, progress=step / steps)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return np.mean([mean_iou(branch, *world(1000 * seed + 200, 20)) for branch in branches])


@torch.no_grad()
def mean_iou(branch, images, labels):
    said, known = branch(images).argmax(1), labels != 255
    classes = [(said == c, labels == c) for c in range(C)]
    return np.mean([((a & b).sum() / ((a | b) & known).sum()).item() for a, b in classes])


@pytest.mark.slow
def test_real_pseudo_labels_beat_shuffled_ones():
    options = {"weight": 0.5, "ramp_up": 0.3, "class_balance": 0.5}  # as in the demonstration
    objectives = (CrossPseudoSupervision(**options), ShuffledPseudoLabels(**options), Supervised())
    real, shuffled, supervised = (np.mean([score(objective, seed) for seed in SEEDS]) for objective in objectives)
    assert real > shuffled + 0.1 and real >= supervised
