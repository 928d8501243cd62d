"""The labeled loss of every method: its kinds, and its class weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.by_hand import C, TinyBranch, averaged_for, batches

from cps_hf.functional import class_counts, dice_loss, focal_loss, pixel_cross_entropy
from cps_hf.objectives import OBJECTIVES, FixMatch, Supervised, UniMatch
from cps_hf.objectives.base import LABELED_LOSSES

WEIGHTS = [0.5, 2.0, 3.0]


def call(name, labeled=None, **fields):
    objective = OBJECTIVES[name](**fields)
    branches = [TinyBranch(seed) for seed in range(1 if objective.teacher else max(2, objective.min_branches))]
    own, unlabeled = batches(views=objective.views)
    labeled = own if labeled is None else labeled
    return branches, labeled, objective(branches, labeled, unlabeled, progress=1.0, **averaged_for(objective))


@pytest.mark.parametrize("loss", [loss for loss in LABELED_LOSSES if loss != "set"])  # see modeling/test_set_loss.py
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_supports_every_labeled_loss(name, loss):
    found = []
    for given in (None, WEIGHTS):
        branches, labeled, output = call(name, labeled_loss=loss, class_weights=given, ohem_min_kept=1)
        found.append(output.logs["supervised_loss"])
        if loss == "ohem":
            continue  # in tests/functional/test_losses.py
        weights = {"class_weights": None if given is None else torch.tensor(given)}
        expected = 0.0
        for branch in branches:
            logits = branch(labeled.pixel_values)
            if "cross_entropy" in loss:
                expected += (
                    F.cross_entropy(
                        logits, labeled.labels, weights["class_weights"], ignore_index=255, reduction="none"
                    ).sum()
                    / labeled.num_labels
                )
            if "dice" in loss:
                expected += dice_loss(logits, labeled.labels, **weights)
            if loss == "focal":
                expected += focal_loss(logits, labeled.labels, gamma=2.0, **weights)
        torch.testing.assert_close(found[-1], expected.detach() / len(branches))
    assert found[0] != found[1]


def test_the_sum_is_divided_by_the_shared_count_and_gamma_is_an_option():
    _, labeled, output = call("supervised", labeled_loss="focal", class_weights=WEIGHTS)
    twice = dataclasses.replace(labeled, num_labels=labeled.num_labels * 2)
    _, _, half = call("supervised", twice, labeled_loss="focal", class_weights=WEIGHTS)
    assert half.loss.item() == pytest.approx(output.loss.item() / 2)
    _, _, other = call("supervised", labeled_loss="focal", class_weights=WEIGHTS, focal_gamma=1.0)
    assert other.loss > output.loss


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_by_frequency_use_the_whole_labeled_set(power):
    counts = torch.tensor([700.0, 200.0, 100.0])
    raw = [(count / 1000) ** -power for count in counts.tolist()]
    mean = sum(count * weight for count, weight in zip(counts.tolist(), raw, strict=True)) / 1000
    expected = torch.tensor([weight / mean for weight in raw])
    _, labeled, _ = call("supervised")
    _, _, output = call("supervised", dataclasses.replace(labeled, class_counts=counts), class_weights=power)
    by_hand = sum(
        pixel_cross_entropy(TinyBranch(seed)(labeled.pixel_values), labeled.labels, class_weights=expected)
        for seed in (0, 1)
    )
    torch.testing.assert_close(output.loss, by_hand)
    _, _, of_the_batch = call("supervised", labeled, class_weights=power)
    own = dataclasses.replace(labeled, class_counts=class_counts(labeled.labels, C))
    torch.testing.assert_close(of_the_batch.loss, call("supervised", own, class_weights=power)[2].loss)
    assert (of_the_batch.loss != output.loss) == (power > 0)


def test_class_weights_need_one_number_per_class():
    with pytest.raises(ValueError, match="`class_weights` has 2 numbers for 3 classes: give one per class"):
        call("supervised", class_weights=[1.0, 2.0])
    for given in ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0]):
        with pytest.raises(ValueError, match=r"`class_weights` must be numbers >= 0, and at least one > 0, got"):
            Supervised(class_weights=given)
    assert [Supervised(class_weights=given).weighs_by_frequency for given in (None, WEIGHTS, 0.5)] == [0, 0, 1]


@pytest.mark.parametrize(("cls", "number"), [(FixMatch, "unsupervised_loss"), (UniMatch, "strong_loss")])
def test_class_balance_only_affects_the_pseudo_label_term(cls, number):
    name = next(name for name, one in OBJECTIVES.items() if one is cls)
    outputs = [call(name, confidence_threshold=0.0, class_balance=p)[2] for p in (0.0, 0.5)]
    assert outputs[0].logs[number] != outputs[1].logs[number]
    assert outputs[0].logs["supervised_loss"] == outputs[1].logs["supervised_loss"]


@pytest.mark.parametrize("sends", [False, True], ids=["alone", "with 1/4 of the sums elsewhere"])
def test_dice_takes_its_sums_over_processes(sends):
    _, labeled, alone = call("supervised", labeled_loss="dice")
    seen = []
    labeled = dataclasses.replace(labeled, over_processes=lambda sums: seen.append(sums) or sums * (2 if sends else 1))
    _, _, output = call("supervised", labeled, labeled_loss="dice")
    assert len(seen) == 2 and seen[0].shape == (3, C)
    torch.testing.assert_close(output.loss, alone.loss)  # it is the same for sums and their means


@pytest.mark.parametrize("name", [name for name, cls in OBJECTIVES.items() if cls().views])
def test_the_runs_own_factor_scales_the_unlabeled_term_alone(name):
    """The loss is linear in the factor, and at 0 it is the labeled loss (half of it in UniMatch)."""
    options = {"confidence_threshold": 0.0} if "confidence_threshold" in OBJECTIVES[name].__dataclass_fields__ else {}
    losses = []
    for factor in (0.0, 1.0, torch.tensor(0.25)):
        objective = OBJECTIVES[name](**options)
        branches = [TinyBranch(seed) for seed in range(1 if objective.teacher else 2)]
        labeled, unlabeled = batches(objective.views)
        torch.manual_seed(0)
        how = {"progress": 1.0, "unlabeled_weight": factor, **averaged_for(objective)}
        output = objective(branches, labeled, unlabeled, **how)
        losses.append(output.loss.item())
    labeled_part = len(branches) * output.logs["supervised_loss"].item()  # logged as the mean over branches
    labeled_part /= 2 if name.startswith("unimatch") else 1
    assert losses[0] == pytest.approx(labeled_part, rel=1e-6) and losses[1] > losses[0] + 1e-3
    assert losses[2] - losses[0] == pytest.approx(0.25 * (losses[1] - losses[0]), rel=1e-4)
    torch.manual_seed(0)
    unchanged = objective(branches, labeled, unlabeled, progress=1.0, **averaged_for(objective))
    assert unchanged.loss.item() == losses[1]
