"""FixMatch against loops: confident predictions for the weak view are the labels of the CutMixed strong view."""

import math
from dataclasses import replace

import pytest
import torch
from support.by_hand import TinyBranch, arg_max, batches, log_softmax, mapped, pixels, supervised_by_hand

from cps_hf.functional.cutmix import draw_cutmix_masks
from cps_hf.objectives import FixMatch, LabeledBatch, UniMatch, UnlabeledBatch

VIEWS = ("weak", "strong", "cutmix_mask")


def by_hand(branch, unlabeled, threshold, *, view="strong", mask="cutmix_mask", partner=(1, 0, 3, 2)):
    """(the sum of the losses over the pixels that are trained on, their number)."""
    total, taught = 0.0, 0
    masks, images = getattr(unlabeled, mask), getattr(unlabeled, view)
    for i, y, x in pixels(masks):
        source = partner[i] if masks[i, y, x] else i
        if not unlabeled.valid[source, y, x]:
            continue
        weak = log_softmax(branch, unlabeled.weak[source], y, x)
        if math.exp(max(weak)) >= threshold:
            total -= log_softmax(branch, images[source], y, x)[arg_max(weak)]
            taught += 1
    return total, taught


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
def test_the_loss_is_the_cross_entropy_where_the_weak_view_is_confident(threshold):
    branches = [TinyBranch(1), TinyBranch(2)]  # each by itself
    labeled, unlabeled = batches(VIEWS)
    sums = [by_hand(branch, unlabeled, threshold) for branch in branches]
    count = unlabeled.valid.sum().item()
    out = FixMatch(weight=3.0, confidence_threshold=threshold)(branches, labeled, unlabeled)
    mean = sum(total for total, _ in sums) / count
    assert out.logs["unsupervised_loss"].item() == pytest.approx(mean / 2, rel=1e-5)
    assert out.logs["mask_ratio"].item() == pytest.approx(sum(taught for _, taught in sums) / (2 * count), rel=1e-5)
    assert out.loss.item() == pytest.approx(supervised_by_hand(branches, labeled) + 3 * mean, rel=1e-5)


def test_partners_of_an_odd_batch_are_used():
    branch = TinyBranch(1)
    labeled, whole = batches(VIEWS)
    sent = {f"partner_{name}": getattr(whole, name)[[1, 0, 3]] for name in ("weak", "strong", "valid")}
    odd = mapped(whole, lambda t: t[:3], **sent)
    cut = replace(whole, cutmix_mask=whole.cutmix_mask[:3])
    total, _ = by_hand(branch, cut, 0.4)
    logs = FixMatch(confidence_threshold=0.4)([branch], labeled, odd).logs
    assert logs["unsupervised_loss"].item() == pytest.approx(total / odd.valid.sum().item(), rel=1e-5)


def test_at_threshold_one_only_labels_are_learned():
    branch, reference = TinyBranch(1), TinyBranch(1)
    labeled, unlabeled = batches(VIEWS)
    out = FixMatch(confidence_threshold=1.0)([branch], labeled, unlabeled)
    out.loss.backward()
    assert out.logs["unsupervised_loss"] == 0 and out.logs["mask_ratio"] == 0
    torch.nn.functional.cross_entropy(reference(labeled.pixel_values), labeled.labels, ignore_index=255).backward()
    torch.testing.assert_close(branch.conv.weight.grad, reference.conv.weight.grad)


def test_the_weak_view_is_predicted_without_gradient():
    branch = TinyBranch(1)
    labeled, unlabeled = batches(VIEWS)
    FixMatch()([branch], labeled, unlabeled)
    assert sorted(branch.calls) == [(2, True, 0.0), (4, False, 0.0), (4, True, 0.0)]


def test_cutmix_draws_one_box_with_the_given_probability():
    generator = torch.Generator().manual_seed(0)
    masks = draw_cutmix_masks(2000, 64, 80, generator=generator, **FixMatch(cutmix=0.3).cutmix_masks)
    areas = masks.float().mean((1, 2))
    assert (areas > 0).float().mean().item() == pytest.approx(0.3, abs=0.04)
    drawn = areas[areas > 0]
    assert 0.015 < drawn.min() and drawn.max() < 0.41
    for mask in masks[areas > 0][:50]:  # a single box fills its bounding box
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns


@pytest.mark.parametrize(("method", "masks"), [(FixMatch, 1), (UniMatch, 2)])
def test_missing_masks_are_drawn_with_the_objectives_options(method, masks):
    """One box in all images or in none, unlike CPS's three boxes."""
    seen = []

    def branch(images, **_):
        seen.append(images)
        return images.clone().requires_grad_()

    views = UnlabeledBatch(**{view: torch.full((64, 3, 24, 24), 0.0) for view in ("weak", "strong", "strong_2")})
    for view in (views.strong, views.strong_2):
        view[1::2] = 1  # makes visible what is mixed into an image
    labeled = LabeledBatch(pixel_values=torch.zeros(1, 3, 24, 24), labels=torch.zeros(1, 24, 24, dtype=torch.long))
    for cutmix in (0.0, 1.0):
        seen.clear()
        method(cutmix=cutmix)([branch], labeled, views)
        mixed = [images[:, 0] != views.strong[:, 0] for images in seen[2 : 2 + masks]]
        assert len(mixed) == masks
        for mask in torch.cat(mixed):
            assert mask.any().item() == (cutmix == 1)
            assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()


@pytest.mark.parametrize(
    ("field", "value"), [("weight", -1.0), ("confidence_threshold", 1.1), ("cutmix", 2.0), ("ramp_up", -0.5)]
)
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        FixMatch(**{field: value})
