"""Shared by the tests of objectives: a branch that loops can reproduce, batches, and log-probabilities."""

import itertools
import math

import torch
from torch import nn

from cps_hf.objectives import LabeledBatch, UnlabeledBatch

C, H, W = 3, 4, 5


class TinyBranch(nn.Module):
    """A 1x1 convolution: each pixel's logits depend on that pixel alone, so loops can reproduce them."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, C, 1)
        self.calls = []  # (batch size, whether with gradient, feature dropout) of each forward

    def forward(self, pixel_values, *, feature_dropout=0.0, complementary_dropout=0.0):
        self.calls.append((pixel_values.shape[0], torch.is_grad_enabled(), feature_dropout))
        return self.conv(pixel_values)


def averaged_for(objective):
    """The arguments of an objective for averaged networks, for at most two branches."""
    averages = {"averages": [TinyBranch(7), TinyBranch(8)]} if objective.averages else {}
    return {"teacher": TinyBranch(9), **averages}


def batches(views=("weak",), labeled_size=2, unlabeled_size=4, seed=0):
    """A labeled batch with ignored labels and padding, and an unlabeled one with padding and the given views."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (labeled_size, H, W), generator=g)
    labels[0, 0, :3] = 255
    labeled = LabeledBatch(
        pixel_values=torch.randn(labeled_size, 3, H, W, generator=g),
        labels=labels,
        valid=torch.rand(labeled_size, H, W, generator=g) > 0.2,
    )
    unlabeled = {"valid": torch.rand(unlabeled_size, H, W, generator=g) > 0.3}
    for view in views:
        if "mask" in view:
            unlabeled[view] = torch.rand(unlabeled_size, H, W, generator=g) > 0.5
        elif view == "pseudo_labels":
            unlabeled[view] = torch.randint(0, C, (unlabeled_size, H, W), generator=g)
        else:
            unlabeled[view] = torch.randn(unlabeled_size, 3, H, W, generator=g)
        if view == "second_crop":
            unlabeled["second_valid"] = torch.rand(unlabeled_size, H, W, generator=g) > 0.3
    return labeled, UnlabeledBatch(**unlabeled) if views else None


def mapped(batch, function, **others):
    """A batch with the function applied to its tensors, and pixels counted again.

    Args:
        function: takes an image or map (B, ..., H, W). others: more fields.
    """
    maps = {name: function(value) for name, value in batch.tensors().items() if value.dim() > 0}
    return type(batch)(**maps | others)


def log_softmax(branch, image, y, x):
    """The log-probabilities of one pixel of an image (3, H, W), in plain Python."""
    weight, bias = branch.conv.weight.detach()[:, :, 0, 0].tolist(), branch.conv.bias.tolist()
    pixel = image[:, y, x].tolist()
    logits = [bias[c] + sum(w * v for w, v in zip(weight[c], pixel, strict=True)) for c in range(C)]
    top = max(logits)
    log_total = top + math.log(sum(math.exp(v - top) for v in logits))
    return [v - log_total for v in logits]


def arg_max(values):
    return max(range(len(values)), key=values.__getitem__)


def pixels(batch):
    return itertools.product(range(len(batch)), range(H), range(W))


def supervised_by_hand(branches, labeled):
    """The sum over branches of the mean cross entropy over labeled pixels."""
    total = 0.0
    for branch in branches:
        losses = [
            -log_softmax(branch, labeled.pixel_values[i], y, x)[int(labeled.labels[i, y, x])]
            for i, y, x in pixels(labeled.labels)
            if labeled.labels[i, y, x] != 255
        ]
        total += sum(losses) / len(losses)
    return total
