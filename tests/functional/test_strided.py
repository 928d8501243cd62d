"""Losses from strided logits equal the plain losses of the resized logits, without full-size tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cps_hf.functional import losses, resize, strided
from cps_hf.functional.losses import (
    ohem_cross_entropy,
    pixel_cross_entropy,
    pseudo_label,
    soft_cross_entropy,
    soft_target,
)
from cps_hf.functional.strided import StridedLogits, full_size, mirrored, split_images

SIZES = {"4x": ((6, 8), (24, 32)), "odd": ((7, 5), (25, 18)), "same": ((9, 6), (9, 6)), "one row": ((1, 3), (5, 9))}


@pytest.fixture(params=[40, 300, 2**19], ids=["rows", "images", "at once"])
def piece(request, monkeypatch):
    monkeypatch.setitem(strided.PIECE, "cpu", request.param)
    return request.param


@pytest.fixture(params=[True, False], ids=["as on CPUs", "as on GPUs"])
def by_lines(request, monkeypatch):
    monkeypatch.setitem(resize.BY_LINES, "cpu", request.param)


def case(sizes, classes=5, batch=3, dtype=torch.float32, seed=0):
    (h, w), size = sizes
    g = torch.Generator().manual_seed(seed)
    values = (torch.randn(batch, classes, h, w, generator=g, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (batch, *size), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.3] = 255
    valid = torch.rand(labels.shape, generator=g) > 0.2
    return values, labels, valid, size


def resized(values, size, align_corners):
    """The reference, by torch."""
    return F.interpolate(values, size=size, mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_loss_and_its_gradient_are_those_of_the_resized_logits(piece, by_lines, sizes, align_corners):
    values, labels, valid, size = case(sizes)
    other = case(sizes, seed=1)[0].detach()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])

    def all_of(logits, target):
        kwargs = {"valid": valid, "count": 7.5}
        yield pixel_cross_entropy(logits, labels)
        yield pixel_cross_entropy(logits, labels, class_weights=weights, **kwargs)
        yield ohem_cross_entropy(logits, labels, threshold=0.2, min_kept=20)
        yield ohem_cross_entropy(logits, labels, threshold=0.2, min_kept=20, class_weights=weights)
        yield losses.focal_loss(logits, labels, gamma=2.0, count=7.5, class_weights=weights)
        yield losses.dice_loss(logits, labels, class_weights=weights)
        yield soft_cross_entropy(logits, soft_target(target, temperature=0.5), **kwargs)
        yield losses.squared_difference(logits, soft_target(target), **kwargs)
        yield losses.squared_difference(logits, losses.probabilities(target), **kwargs)

    lean = all_of(StridedLogits(values, size, align_corners), StridedLogits(other, size, align_corners))
    plain = all_of(resized(values, size, align_corners), resized(other, size, align_corners))
    for ours, reference in zip(lean, plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(3 * loss, values, retain_graph=True)[0] for loss in (ours, reference)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def logits_of_scores(scores, size):
    """The written-out reference for scores: they are resized, and the logits are the logarithm of their shares."""
    scores = resized(scores, size, False) + 1e-6
    return torch.log(scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_loss_supports_class_scores(piece, by_lines, sizes):
    """A network with scores and one with logits teach each other, in both directions."""
    logits, labels, valid, size = case(sizes)
    scores = case(sizes, seed=1)[0].detach().exp().requires_grad_()
    with torch.no_grad():
        scores[:, :2, 0] = 0.0  # a pixel without any query
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])

    def all_of(taught, teacher):
        kwargs = {"valid": valid, "count": 7.5}
        yield pixel_cross_entropy(taught, labels)
        yield pixel_cross_entropy(taught, pseudo_label(teacher), class_weights=weights, **kwargs)
        yield ohem_cross_entropy(taught, labels, threshold=0.2, min_kept=20)
        yield losses.focal_loss(taught, labels, gamma=2.0, count=7.5)
        yield losses.dice_loss(taught, labels)
        yield soft_cross_entropy(taught, soft_target(teacher, temperature=0.5), **kwargs)
        yield losses.squared_difference(taught, soft_target(teacher, temperature=2.0), **kwargs)

    lean = StridedLogits(logits, size), StridedLogits(scores, size, scores=True)
    plain = resized(logits, size, False), logits_of_scores(scores, size)
    for first, second, values in ((0, 1, logits), (1, 0, scores)):
        for ours, reference in zip(
            all_of(lean[first], lean[second]), all_of(plain[first], plain[second]), strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
            gradients = [torch.autograd.grad(loss, values, retain_graph=True)[0] for loss in (ours, reference)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full_size(lean[1]), plain[1])
    torch.testing.assert_close(full_size(mirrored(lean[1])), plain[1].flip(-1))
    first, rest = split_images(lean[1], [1, 2])
    torch.testing.assert_close(full_size(rest), plain[1][1:])
    assert first.shape == (1, 5, *size)
    torch.testing.assert_close(losses.probabilities(*lean), sum(one.softmax(1) for one in plain) / 2)
    assert torch.equal(
        pseudo_label(lean[1], confidence_threshold=0.5), pseudo_label(plain[1], confidence_threshold=0.5)
    )
    torch.testing.assert_close(lean[1].coarse(), logits_of_scores(scores, scores.shape[-2:]))
    assert losses.probabilities(lean[1]).sum(1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("target_align_corners", [False, True])
@pytest.mark.parametrize("target_size", [(2, 3), (7, 16), (14, 9), (25, 18)])
def test_a_target_of_another_stride_is_resized_by_its_own(piece, by_lines, target_size, target_align_corners):
    """Two networks that teach each other, one at a quarter of the image's size, the other at an eighth."""
    values, _, valid, size = case(SIZES["odd"])
    other = case((target_size, size), seed=1)[0].detach()
    lean = StridedLogits(values, size), StridedLogits(other, size, target_align_corners)
    plain = resized(values, size, False), resized(other, size, target_align_corners)
    ours, reference = (
        losses.squared_difference(logits, soft_target(target), valid=valid, count=2.0)
        for logits, target in (lean, plain)
    )
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, values)[0] for loss in (ours, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_pseudo_labels_are_those_of_the_resized_logits(piece, threshold):
    values, _, _, size = case(SIZES["odd"])
    ours = pseudo_label(StridedLogits(values, size, True), confidence_threshold=threshold)
    assert torch.equal(ours, pseudo_label(resized(values, size, True), confidence_threshold=threshold))
    assert not ours.requires_grad and (ours == 255).any() == (threshold > 0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", ["4x", "odd"])
def test_the_gradient_is_the_derivative(monkeypatch, sizes, align_corners):
    monkeypatch.setitem(strided.PIECE, "cpu", 40)
    values, labels, valid, size = case(((3, 2), (12, 8)) if sizes == "4x" else ((3, 4), (7, 9)), 3, 2, torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    probabilities = torch.rand(2, 3, *size, dtype=torch.float64)

    def all_of(values):
        logits = StridedLogits(values, size, align_corners)
        yield pixel_cross_entropy(logits, labels, valid=valid, count=3.0, class_weights=weights)
        yield soft_cross_entropy(logits, probabilities, valid=valid, count=2.0)
        yield losses.squared_difference(logits, probabilities, valid=valid, count=2.0)

    assert torch.autograd.gradcheck(lambda values: tuple(all_of(values)), values, fast_mode=True)


def test_there_is_no_second_derivative_and_no_pixel_gives_zero():
    values, labels, _, size = case(SIZES["4x"])
    none = pixel_cross_entropy(StridedLogits(values, size), torch.full_like(labels, 255))
    assert none == 0 and (torch.autograd.grad(none, values)[0] == 0).all()
    loss = pixel_cross_entropy(StridedLogits(values, size), labels).square()
    (gradient,) = torch.autograd.grad(loss, values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_half_precision_logits_give_the_float32_loss_also_under_autocast(piece):
    values, labels, _, size = case(SIZES["4x"], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pixel_cross_entropy(StridedLogits(values, size), labels)
    expected = pixel_cross_entropy(resized(values.float(), size, False), labels)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, values)[0].dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


class Made(TorchDispatchMode):
    """The number of elements that each operation allocates; views allocate none."""

    VIEWS = ("detach", "view", "slice", "alias", "expand", "unsqueeze", "squeeze")

    def __init__(self):
        super().__init__()
        self.numbers, self.operations = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.operations += name not in self.VIEWS
        if name not in self.VIEWS and not name.endswith("_"):
            made = result if isinstance(result, tuple | list) else [result]
            self.numbers += [one.numel() for one in made if isinstance(one, torch.Tensor)]
        return result


def made_by(loss, values):
    values.grad = None
    with Made() as made:
        loss().backward()
    return made


def test_nothing_full_size_is_made_and_no_more_is_computed(monkeypatch):
    """Counts instead of times: the largest tensor, and all elements that are written."""
    monkeypatch.setitem(strided.PIECE, "cpu", 2**14)
    values, labels, _, size = case(((16, 16), (64, 64)), classes=30, batch=2)
    full = labels.numel() * 30
    plain = made_by(lambda: pixel_cross_entropy(resized(values, size, False), labels), values).numbers
    lean = made_by(lambda: pixel_cross_entropy(StridedLogits(values, size), labels), values).numbers
    assert max(plain) == full and max(lean) <= 2**14
    # Rows that two pieces share are read twice, and rows are resized before columns.
    assert sum(lean) <= 1.6 * sum(plain)
    labeling = made_by(lambda: pseudo_label(StridedLogits(values, size)).float().requires_grad_().sum(), values)
    assert max(labeling.numbers) <= 2**14


def test_whole_images_on_a_gpu_need_few_extra_operations(monkeypatch):
    """Each operation is a launch, which dominates small losses. Measured on a CPU, with the code path of GPUs."""
    monkeypatch.setitem(strided.PIECE, "cpu", 2**27)
    monkeypatch.setitem(resize.BY_LINES, "cpu", False)
    values, labels, _, size = case(SIZES["4x"])
    plain = made_by(lambda: pixel_cross_entropy(resized(values, size, False), labels), values)
    lean = made_by(lambda: pixel_cross_entropy(StridedLogits(values, size), labels), values)
    assert lean.operations <= plain.operations + 6
