"""UniMatch against loops: (x + s1 / 4 + s2 / 4 + fp / 2) / 2, with labels from the weak view."""

import math

import pytest
import torch
from support.by_hand import TinyBranch, arg_max, batches, log_softmax, pixels, supervised_by_hand

from cps_hf.objectives import UniMatch

VIEWS = ("weak", "strong", "strong_2", "cutmix_mask", "cutmix_mask_2")


class Scaling(TinyBranch):
    """A feature dropout that loops can reproduce: the image is multiplied by 1 - p."""

    def forward(self, pixel_values, *, feature_dropout=0.0):
        return super().forward(pixel_values * (1 - feature_dropout), feature_dropout=feature_dropout)


def term(branch, unlabeled, threshold, view, mask, factor=1.0):
    partner, total, images = [1, 0, 3, 2], 0.0, getattr(unlabeled, view)
    for i, y, x in pixels(unlabeled.weak):
        source = partner[i] if mask is not None and getattr(unlabeled, mask)[i, y, x] else i
        weak = log_softmax(branch, unlabeled.weak[source], y, x)
        if unlabeled.valid[source, y, x] and math.exp(max(weak)) >= threshold:
            total -= log_softmax(branch, images[source] * factor, y, x)[arg_max(weak)]
    return total / unlabeled.valid.sum().item()


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_the_loss_has_the_papers_four_terms_and_weights(threshold):
    branch = Scaling(1)
    labeled, unlabeled = batches(VIEWS)
    s1 = term(branch, unlabeled, threshold, "strong", "cutmix_mask")
    s2 = term(branch, unlabeled, threshold, "strong_2", "cutmix_mask_2")
    fp = term(branch, unlabeled, threshold, "weak", None, factor=0.7)
    x = supervised_by_hand([branch], labeled)
    objective = UniMatch(confidence_threshold=threshold, feature_dropout=0.3)
    out = objective([branch], labeled, unlabeled)
    assert out.loss.item() == pytest.approx((x + 0.25 * s1 + 0.25 * s2 + 0.5 * fp) / 2, rel=1e-5)
    assert out.logs["strong_loss"].item() == pytest.approx((s1 + s2) / 2, rel=1e-5)
    assert out.logs["feature_loss"].item() == pytest.approx(fp, rel=1e-5)
    sure = sum(
        math.exp(max(log_softmax(branch, unlabeled.weak[p[0]], *p[1:]))) >= threshold
        for p in pixels(unlabeled.weak)
        if unlabeled.valid[p]
    )
    assert out.logs["mask_ratio"].item() == pytest.approx(sure / unlabeled.valid.sum().item(), rel=1e-5)


def test_two_branches_are_trained_independently():
    labeled, unlabeled = batches(VIEWS)
    alone = [UniMatch(confidence_threshold=0.4)([TinyBranch(s)], labeled, unlabeled).loss for s in (1, 2)]
    both = UniMatch(confidence_threshold=0.4)([TinyBranch(1), TinyBranch(2)], labeled, unlabeled).loss
    torch.testing.assert_close(both, sum(alone))


def test_there_are_four_passes_with_gradient_and_one_without():
    branch = TinyBranch(1)
    labeled, unlabeled = batches(VIEWS)
    UniMatch(feature_dropout=0.5)([branch], labeled, unlabeled)
    passes = [(2, True, 0.0), (4, False, 0.0), (4, True, 0.0), (4, True, 0.0), (4, True, 0.5)]
    assert sorted(branch.calls) == passes


def test_the_weight_and_its_ramp_up_leave_the_labeled_loss_alone():
    branch = TinyBranch(1)
    labeled, unlabeled = batches(VIEWS)
    objective = UniMatch(weight=3.0, confidence_threshold=0.0, ramp_up=0.5)
    out = objective([branch], labeled, unlabeled, progress=torch.tensor(0.25))
    unsupervised = 0.5 * out.logs["strong_loss"] + 0.5 * out.logs["feature_loss"]
    torch.testing.assert_close(out.loss.detach(), (out.logs["supervised_loss"] + 1.5 * unsupervised) / 2)


@pytest.mark.parametrize(("field", "value"), [("weight", -1.0), ("feature_dropout", 1.0), ("cutmix", -0.5)])
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        UniMatch(**{field: value})
