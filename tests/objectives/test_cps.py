"""CPS against loops typed from the paper: section 3.1, equations 1 to 4, and the CutMix paragraph of section 3.2."""

import itertools
import math

import pytest
import torch
from torch import nn

from cps_hf.cutmix import mix, swap_neighbours
from cps_hf.objectives import CrossPseudoSupervision, Supervised

C, H, W = 3, 4, 5


class TinyBranch(nn.Module):
    """A 1x1 convolution: each pixel's logits depend on that pixel alone, so loops can follow by hand."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, C, 1)
        self.calls = []

    def forward(self, pixel_values, *, feature_dropout=0.0):
        self.calls.append((pixel_values.shape[0], torch.is_grad_enabled()))
        return self.conv(pixel_values)


def batches(labeled_size=2, unlabeled_size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (labeled_size, H, W), generator=g)
    labels[0, 0, :3] = 255
    labeled = {
        "pixel_values": torch.randn(labeled_size, 3, H, W, generator=g),
        "labels": labels,
        "valid": torch.rand(labeled_size, H, W, generator=g) > 0.2,
    }
    unlabeled = {
        "weak": torch.randn(unlabeled_size, 3, H, W, generator=g),
        "valid": torch.rand(unlabeled_size, H, W, generator=g) > 0.3,
        "cutmix_mask": torch.rand(unlabeled_size, H, W, generator=g) > 0.5,
    }
    return labeled, unlabeled


def log_softmax(branch, image, y, x):
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
    total = 0.0
    for branch in branches:
        losses = [
            -log_softmax(branch, labeled["pixel_values"][i], y, x)[int(labeled["labels"][i, y, x])]
            for i, y, x in pixels(labeled["labels"])
            if labeled["labels"][i, y, x] != 255
        ]
        total += sum(losses) / len(losses)
    return total


def test_plain_cps_equals_the_papers_equations():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    out = CrossPseudoSupervision(weight=1.5, cutmix=False)(branches, labeled, unlabeled)

    losses, count, agree = 0.0, 0, 0
    for images, valid, is_unlabeled in (
        (labeled["pixel_values"], labeled["valid"], False),
        (unlabeled["weak"], unlabeled["valid"], True),
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
    assert out.logs["cps_loss"].item() == pytest.approx(losses / count, rel=1e-5)
    assert out.logs["agreement"].item() == pytest.approx(agree / unlabeled["valid"].sum().item(), rel=1e-5)


@pytest.mark.parametrize("odd", [False, True], ids=["neighbours in the batch", "partners sent along"])
def test_cutmix_cps_equals_the_papers_equations_with_given_masks(odd):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches(unlabeled_size=4)
    if odd:  # three images of the stream; the partner of the third lies in the next batch
        partner = torch.tensor([1, 0, 3])
        unlabeled["partner_weak"], unlabeled["partner_valid"] = unlabeled["weak"][partner], unlabeled["valid"][partner]
        sources = {i: int(partner[i]) for i in range(3)}
        all_weak, all_valid = unlabeled["weak"], unlabeled["valid"]
        unlabeled = {k: v[:3] for k, v in unlabeled.items()}
    else:
        sources = {0: 1, 1: 0, 2: 3, 3: 2}
        all_weak, all_valid = unlabeled["weak"], unlabeled["valid"]
    out = CrossPseudoSupervision(weight=5.0, cutmix=True)(branches, labeled, unlabeled)

    losses = 0.0
    for i, y, x in pixels(unlabeled["weak"]):
        source = sources[i] if unlabeled["cutmix_mask"][i, y, x] else i
        if not all_valid[source, y, x]:
            continue
        # A 1x1 convolution cannot see the neighbourhood, so the mixed pixel's prediction is the source pixel's own.
        p1, p2 = (log_softmax(b, all_weak[source], y, x) for b in branches)
        losses += -p1[arg_max(p2)] - p2[arg_max(p1)]
    expected = supervised_by_hand(branches, labeled) + 5.0 * losses / unlabeled["valid"].sum().item()
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
        n_labels = int((labeled["labels"] != 255).sum())
        n_valid = int(labeled["valid"].sum() + unlabeled["valid"].sum())
        for i, y, x in pixels(labeled["labels"]):
            if labeled["labels"][i, y, x] != 255:
                terms.append((labeled["pixel_values"][i], y, x, int(labeled["labels"][i, y, x]), 1 / n_labels))
        for images, valid in ((labeled["pixel_values"], labeled["valid"]), (unlabeled["weak"], unlabeled["valid"])):
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
    """With its labeled loss and its own student term out of the way, a teacher's parameters get no gradient."""
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    labeled["labels"].fill_(255)
    for p in branches[0].parameters():
        p.requires_grad_(False)  # branch 1 learns nothing; branch 0's loss term alone must not reach branch 1
    out = CrossPseudoSupervision(cutmix=True)(branches, labeled, unlabeled)
    out.loss.backward()
    reference = [TinyBranch(1), TinyBranch(2)]
    with torch.no_grad():
        target = reference[0](unlabeled["weak"]).argmax(1)
    mask = unlabeled["cutmix_mask"]
    mixed_images = mix(unlabeled["weak"], swap_neighbours(unlabeled["weak"]), mask)
    mixed_target = mix(target, swap_neighbours(target), mask)
    mixed_valid = mix(unlabeled["valid"], swap_neighbours(unlabeled["valid"]), mask)
    losses = nn.functional.cross_entropy(reference[1](mixed_images), mixed_target, reduction="none")
    ((losses * mixed_valid).sum() / unlabeled["valid"].sum()).backward()
    torch.testing.assert_close(branches[1].conv.weight.grad, reference[1].conv.weight.grad)
    assert branches[0].conv.weight.grad is None


def test_cutmix_makes_one_pass_without_gradient_and_two_with_it_a_branch():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    CrossPseudoSupervision(cutmix=True)(branches, labeled, unlabeled)
    for branch in branches:
        assert sorted(branch.calls) == [(2, True), (4, False), (4, True)]


@pytest.mark.parametrize("cutmix", [False, True])
def test_padding_changes_no_loss(cutmix):
    """Padded pixels (not valid, label 255) can hold anything; the loss is that of the images without them."""
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(weight=1.5, cutmix=cutmix)
    before = objective(branches, labeled, unlabeled)

    def pad(name, value, tensor):
        return nn.functional.pad(tensor.float(), (1, 2, 3, 0), value=value).to(tensor.dtype)

    padded_labeled = {
        "pixel_values": pad("image", 7.0, labeled["pixel_values"]),
        "labels": pad("labels", 255, labeled["labels"]),
        "valid": pad("valid", 0, labeled["valid"]),
    }
    padded_unlabeled = {
        "weak": pad("image", -3.0, unlabeled["weak"]),
        "valid": pad("valid", 0, unlabeled["valid"]),
        "cutmix_mask": pad("mask", 1, unlabeled["cutmix_mask"]),
    }
    after = objective(branches, padded_labeled, padded_unlabeled)
    torch.testing.assert_close(after.loss, before.loss)
    torch.testing.assert_close(after.logs["agreement"], before.logs["agreement"])


def test_an_ignored_label_changes_only_the_labeled_loss():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(cutmix=False)
    before = objective(branches, labeled, unlabeled).logs
    labeled["labels"][1] = 255
    after = objective(branches, labeled, unlabeled).logs
    assert after["supervised_loss"] != before["supervised_loss"]
    torch.testing.assert_close(after["cps_loss"], before["cps_loss"], rtol=0, atol=0)


def test_all_labels_ignored_is_zero_loss_and_zero_gradient():
    branch = TinyBranch(1)
    labeled, _ = batches()
    labeled["labels"].fill_(255)
    out = Supervised()([branch], labeled)
    out.loss.backward()
    assert out.loss.item() == 0
    assert branch.conv.weight.grad.abs().sum() == 0


def test_identical_branches_teach_each_other_their_own_argmax_and_agree_everywhere():
    branches = [TinyBranch(1), TinyBranch(1)]
    labeled, unlabeled = batches()
    logs = CrossPseudoSupervision(cutmix=True)(branches, labeled, unlabeled).logs
    assert logs["agreement"].item() == pytest.approx(1.0)


def test_three_branches_are_each_taught_by_the_mean_of_the_other_two():
    branches = [TinyBranch(1), TinyBranch(2), TinyBranch(3)]
    labeled, unlabeled = batches()
    images = torch.cat([labeled["pixel_values"], unlabeled["weak"]])
    valid = torch.cat([labeled["valid"], unlabeled["valid"]])
    expected = 0.0
    for i, y, x in pixels(images):
        if valid[i, y, x]:
            probs = [log_softmax(b, images[i], y, x) for b in branches]
            expected += sum(-probs[s][arg_max(probs[t])] for s in range(3) for t in range(3) if s != t) / 2
    logs = CrossPseudoSupervision(cutmix=False)(branches, labeled, unlabeled).logs
    assert logs["cps_loss"].item() == pytest.approx(expected / valid.sum().item(), rel=1e-5)


def test_the_counts_given_by_the_trainer_replace_the_local_ones():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(weight=3.0, cutmix=True)
    local = objective(branches, labeled, unlabeled).logs
    labeled["num_labels"] = (labeled["labels"] != 255).sum() * 2.0
    unlabeled["num_pixels"] = unlabeled["valid"].sum() * 4.0
    given = objective(branches, labeled, unlabeled).logs
    torch.testing.assert_close(given["supervised_loss"], local["supervised_loss"] / 2)
    torch.testing.assert_close(given["cps_loss"], local["cps_loss"] / 4)
    torch.testing.assert_close(given["agreement"], local["agreement"] / 4)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_with_a_confidence_threshold_only_sure_pixels_teach_and_the_count_stays(threshold):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    kept, losses = 0, 0.0
    for i, y, x in pixels(unlabeled["weak"]):
        source = (i ^ 1) if unlabeled["cutmix_mask"][i, y, x] else i
        if unlabeled["valid"][source, y, x]:
            p1, p2 = (log_softmax(b, unlabeled["weak"][source], y, x) for b in branches)
            for student, teacher in ((p1, p2), (p2, p1)):
                if math.exp(max(teacher)) >= threshold:
                    losses, kept = losses - student[arg_max(teacher)], kept + 1
    logs = CrossPseudoSupervision(confidence_threshold=threshold)(branches, labeled, unlabeled).logs
    count = unlabeled["valid"].sum().item()
    assert logs["cps_loss"].item() == pytest.approx(losses / count, rel=1e-5)
    assert kept < 2 * count or threshold == 0.3


def test_class_balance_weighs_each_pixel_by_its_pseudo_labels_frequency():
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    images = torch.cat([labeled["pixel_values"], unlabeled["weak"]])
    valid = torch.cat([labeled["valid"], unlabeled["valid"]])
    expected = 0.0
    for student, other in (branches, branches[::-1]):
        taught = {p: arg_max(log_softmax(other, images[p[0]], *p[1:])) for p in pixels(images) if valid[p]}
        counts = [max(1, list(taught.values()).count(c)) for c in range(C)]
        scale = len(taught) / sum(counts[c] ** -0.5 for c in taught.values())
        for (i, y, x), c in taught.items():
            expected -= scale * counts[c] ** -0.5 * log_softmax(student, images[i], y, x)[c] / len(taught)
    plain = CrossPseudoSupervision(cutmix=False)(branches, labeled, unlabeled).logs["cps_loss"]
    logs = CrossPseudoSupervision(cutmix=False, class_balance=0.5)(branches, labeled, unlabeled).logs
    assert logs["cps_loss"].item() == pytest.approx(expected, rel=1e-5)
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
def test_the_weight_grows_as_asked_for(options, progress, share):
    branches = [TinyBranch(1), TinyBranch(2)]
    labeled, unlabeled = batches()
    objective = CrossPseudoSupervision(weight=3.0, **options)
    out = objective(branches, labeled, unlabeled, progress=torch.tensor(progress))
    expected = out.logs["supervised_loss"] + 3.0 * share * out.logs["cps_loss"]
    torch.testing.assert_close(out.loss.detach(), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warm_up", -0.1),
        ("ramp_up", 1.5),
        ("labeled_loss", "focal"),
        ("ohem_threshold", 1.5),
        ("ohem_min_kept", 0),
        ("weight", -1.0),
    ],
)
def test_a_bad_hyper_parameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        CrossPseudoSupervision(**{field: value})
