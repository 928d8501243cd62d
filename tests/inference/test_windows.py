"""Whole images, windows, scales and flips against brute-force loops."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.toy import tiny_upernet
from transformers import AutoModelForSemanticSegmentation

from cps_hf.inference import windows as inference
from cps_hf.inference.windows import add_probabilities, as_logits_fn, class_ids, predict, predict_each, predict_logits


def blur_net(seed=0, channels=4):
    """Depends on its neighbourhood, so a window's border differs from the same pixels inside the whole image."""
    weight = torch.randn(channels, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return lambda pixel_values: F.conv2d(pixel_values, weight, padding=2)


def images(batch=2, height=37, width=53, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(37, 53), (20, 20), (12, 70), (64, 9), (5, 7)])
@pytest.mark.parametrize(("crop", "stride"), [((20, 24), (13, 16)), ((16, 16), (16, 16)), ((20, 20), (1, 19))])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("strip", [64, 3])
def test_windows_are_stitched_as_a_loop_over_all_windows_does(
    height, width, crop, stride, average, strip, monkeypatch
):
    monkeypatch.setattr(inference, "STRIP", strip)
    blur, pixels = blur_net(), images(height=height, width=width)
    position = torch.randn(1, 4, *crop, generator=torch.Generator().manual_seed(2))

    def net(windows):  # depends on a pixel's position in its window, so on where the padding is
        return blur(windows) + position

    top_pad, left_pad = max(0, crop[0] - height) // 2, max(0, crop[1] - width) // 2
    padded = torch.zeros(2, 3, max(crop[0], height), max(crop[1], width))
    padded[:, :, top_pad : top_pad + height, left_pad : left_pad + width] = pixels
    total, seen = torch.zeros(2, 4, *padded.shape[-2:]), torch.zeros(padded.shape[-2:])
    tops, lefts = set(), set()
    for starts, side, c, s in (
        (tops, padded.shape[-2], crop[0], stride[0]),
        (lefts, padded.shape[-1], crop[1], stride[1]),
    ):
        at = 0
        while at + c < side:
            starts.add(at)
            at += s
        starts.add(side - c)
    for top in tops:
        for left in lefts:
            window = net(padded[:, :, top : top + crop[0], left : left + crop[1]])
            total[:, :, top : top + crop[0], left : left + crop[1]] += window
            seen[top : top + crop[0], left : left + crop[1]] += 1
    assert (seen > 0).all()
    expected = (total / seen if average else total)[:, :, top_pad : top_pad + height, left_pad : left_pad + width]
    ours = predict_logits(
        net, pixels, mode="sliding", crop_size=crop, stride=stride, average=average, window_batch_size=3
    )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_summing_differs_from_averaging_only_across_scales():
    """With one scale, the arg max of a sum and of a mean is the same, so `average` only changes values."""
    net, pixels = blur_net(), images()
    options = {"mode": "sliding", "crop_size": (20, 24), "stride": (13, 16)}
    mean, total = (predict_logits(net, pixels, average=a, **options) for a in (True, False))
    assert not torch.allclose(mean, total)
    assert torch.equal(mean.argmax(1), total.argmax(1))


def test_a_model_without_a_neighbourhood_does_not_notice_windows():
    weight = torch.randn(4, 3, 1, 1)

    def net(pixel_values):
        return F.conv2d(pixel_values, weight)

    pixels = images()
    ours = predict_logits(net, pixels, mode="sliding", crop_size=(16, 16), stride=(11, 10))
    torch.testing.assert_close(ours, net(pixels))


def test_flip_and_scales_average_probabilities():
    net, pixels = blur_net(), images()
    expected = 0
    for scale in (0.5, 1.0):
        scaled = pixels if scale == 1 else F.interpolate(pixels, size=(18, 26), mode="bilinear", align_corners=False)
        for mirror in (False, True):
            logits = net(scaled.flip(-1) if mirror else scaled)
            logits = logits.flip(-1) if mirror else logits
            logits = F.interpolate(logits, size=(37, 53), mode="bilinear", align_corners=False)
            expected = expected + logits.softmax(1) / 4
    ours = predict_logits(net, pixels, scales=(0.5, 1.0), flip=True)
    torch.testing.assert_close(ours.exp(), expected)


def test_with_flip_a_mirrored_image_gives_the_mirrored_prediction():
    net, pixels = blur_net(), images()
    a, b = (predict_logits(net, p, flip=True) for p in (pixels, pixels.flip(-1)))
    torch.testing.assert_close(a, b.flip(-1), atol=1e-4, rtol=1e-4)


def test_any_model_of_transformers_is_a_logits_function():
    model = AutoModelForSemanticSegmentation.from_config(tiny_upernet())
    logits = predict_logits(as_logits_fn(model), images(height=41, width=67))
    assert logits.shape == (2, 3, 41, 67) and not logits.requires_grad and not model.training


@pytest.mark.parametrize("options", [{}, {"flip": True, "scales": (0.75, 1.0)}])
@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_an_image_is_predicted_the_same_alone_and_in_a_batch(mode, options):
    net, pixels = blur_net(), images(batch=3)
    if mode == "sliding":
        options = options | {"mode": mode, "crop_size": (20, 24), "stride": (13, 16), "window_batch_size": 4}
    together = predict_logits(net, pixels, **options)
    alone = torch.cat([predict_logits(net, one[None], **options) for one in pixels])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_window_batches_are_limited_and_complete():
    seen = []

    def net(pixel_values):
        seen.append(pixel_values)
        return pixel_values

    pixels = images(batch=3, height=37, width=53)
    predict_logits(net, pixels, mode="sliding", crop_size=(20, 24), stride=(17, 16), window_batch_size=5)
    # rows start at 0 and 17, columns at 0, 16 and 29: 9 windows of the three images at each row
    assert [len(windows) for windows in seen] == [5, 4, 5, 4]
    assert {tuple(windows.shape[1:]) for windows in seen} == {(3, 20, 24)}
    assert len({w.double().sum().item() for windows in seen for w in windows}) == 18


def test_several_networks_are_the_mean_of_their_probabilities():
    nets, pixels = [blur_net(0), blur_net(5)], images()
    expected = (nets[0](pixels).softmax(1) + nets[1](pixels).softmax(1)) / 2
    torch.testing.assert_close(predict_logits(nets, pixels).softmax(1), expected)
    mean_of_logits = (nets[0](pixels) + nets[1](pixels)) / 2
    assert not torch.equal(predict(nets, pixels), mean_of_logits.argmax(1)), "the test cannot tell the two apart"
    assert torch.equal(predict(nets, pixels), expected.argmax(1))


def test_a_list_of_modules_is_several_networks():
    modules = torch.nn.ModuleList(torch.nn.Conv2d(3, 4, 1) for _ in range(2))
    pixels = images()
    assert torch.equal(predict_logits(modules, pixels), predict_logits([*modules], pixels))


def test_maps_are_predicted_at_the_target_size_from_resized_logits():
    net, pixels = blur_net(), images()
    ids = predict(net, pixels, target_size=(61, 90))
    expected = F.interpolate(net(pixels), size=(61, 90), mode="bilinear", align_corners=False).argmax(1)
    assert ids.dtype == torch.long and torch.equal(ids, expected)
    nearest = F.interpolate(net(pixels).argmax(1, keepdim=True).float(), size=(61, 90)).long()[:, 0]
    assert not torch.equal(ids, nearest), "resizing after the arg max would look the same"
    assert torch.equal(predict(net, pixels), net(pixels).argmax(1))


@pytest.mark.parametrize("strip", [1, 7, 64])
@pytest.mark.parametrize("target", [(61, 90), (19, 200), (37, 20), (90, 53), (1, 1), (37, 53)])
@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_rows_are_resized_in_strips_as_interpolate_resizes_the_whole(target, strip, mode, monkeypatch):
    monkeypatch.setattr(inference, "STRIP", strip)
    net, pixels = blur_net(), images()
    options = {"mode": mode, "crop_size": (20, 24), "stride": (13, 16)} if mode == "sliding" else {}
    expected = F.interpolate(predict_logits(net, pixels, **options), size=target, mode="bilinear")
    found = predict_logits(net, pixels, target_size=target, **options)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(predict(net, pixels, target_size=target, **options), found.argmax(1))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("options", [{"target_size": (61, 90)}, {"scales": (1.5,)}, {"target_size": (20, 200)}])
def test_a_branchs_logits_are_resized_once_and_as_its_configuration_says(align_corners, options):
    torch.manual_seed(0)
    model = AutoModelForSemanticSegmentation.from_config(tiny_upernet()).eval()
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(100)  # or all probabilities would be a third, however resized
    model.config.align_corners = align_corners
    pixels = images()
    seen = F.interpolate(pixels, size=(56, 80), mode="bilinear") if "scales" in options else pixels
    with torch.no_grad():
        raw = model(pixel_values=seen).logits
    size = options.get("target_size", (37, 53))
    expected = F.interpolate(raw, size=size, mode="bilinear", align_corners=align_corners)
    found = predict_logits(as_logits_fn(model), pixels, **options)
    found = found.softmax(1) if "scales" in options else found
    torch.testing.assert_close(found, expected.softmax(1) if "scales" in options else expected, atol=1e-5, rtol=1e-4)
    other = F.interpolate(raw, size=size, mode="bilinear", align_corners=not align_corners)
    assert not torch.allclose(found, other.softmax(1) if "scales" in options else other, atol=1e-3)


@pytest.mark.parametrize("strip", [5, 64])
def test_windows_scales_flips_and_several_networks_together(strip, monkeypatch):
    monkeypatch.setattr(inference, "STRIP", strip)
    nets, pixels = [blur_net(0), blur_net(5)], images()
    windows = {"mode": "sliding", "crop_size": (20, 24), "stride": (13, 16)}
    expected = 0
    for net in nets:
        for scale in (0.6, 1.0, 1.3):
            scaled = F.interpolate(pixels, size=(round(37 * scale), round(53 * scale)), mode="bilinear")
            for mirror in (False, True):
                logits = predict_logits(net, scaled.flip(-1) if mirror else scaled, **windows)
                logits = F.interpolate(logits.flip(-1) if mirror else logits, size=(41, 50), mode="bilinear")
                expected = expected + logits.softmax(1) / 12
    found = predict_logits(nets, pixels, target_size=(41, 50), scales=(0.6, 1.0, 1.3), flip=True, **windows)
    torch.testing.assert_close(found.exp(), expected, atol=1e-5, rtol=1e-4)


def test_each_network_can_have_images_of_its_own():
    nets, pixels = [blur_net(0), blur_net(5)], images()
    other = 0.5 * F.interpolate(pixels, size=(30, 40), mode="bilinear")
    expected = nets[0](pixels).softmax(1) + F.interpolate(nets[1](other), size=(37, 53), mode="bilinear").softmax(1)
    torch.testing.assert_close(predict_logits(nets, [pixels, other]).exp(), expected / 2)
    with pytest.raises(ValueError, match="`pixel_values` has 1 entries for 2 networks"):
        predict_logits(nets, [pixels])
    with pytest.raises(ValueError, match="networks have 4 and 5 classes"):
        predict_logits([blur_net(), blur_net(channels=5)], pixels)
    with pytest.raises(ValueError, match="`target_size` must be"):
        predict_logits(nets, pixels, target_size=(0, 4))


def test_probabilities_add_up_in_strips():
    first, second = (5 * torch.randn(2, 4, 150, 9, generator=torch.Generator().manual_seed(i)) for i in range(2))
    expected = first.softmax(1) + second.softmax(1)
    total = add_probabilities(None, first.clone())
    assert torch.equal(class_ids(total), first.argmax(1))
    torch.testing.assert_close(add_probabilities(total, second), expected)


WINDOWS = {"mode": "sliding", "crop_size": (20, 24), "stride": (13, 16)}


@pytest.mark.parametrize("passes", [{}, {"scales": (0.6, 1.3), "flip": True}])
@pytest.mark.parametrize("mode", [{}, WINDOWS])
@pytest.mark.parametrize("target", [None, (61, 90), (7, 11)])
def test_predicting_each_equals_predicting_one_by_one(passes, mode, target, monkeypatch):
    if target:  # a large image: three bands
        monkeypatch.setattr(inference, "STRIP", 3)
        monkeypatch.setattr(inference, "BAND", target[0] * target[1] + 3)
    torch.manual_seed(0)
    model = AutoModelForSemanticSegmentation.from_config(tiny_upernet())
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(100)
    nets, pixels = [blur_net(0, 3), as_logits_fn(model)], images()
    options = {"target_size": target, **passes, **mode}
    logits = [predict_logits(net, pixels, **options) for net in nets]
    mean = sum(maps.softmax(1) for maps in logits)
    found = predict_each(nets, pixels, num_labels=3, **options)
    for ids, maps in zip(found, [*logits, mean], strict=True):
        best = maps.topk(2, dim=1).values
        sure = best[:, 0] - best[:, 1] > 1e-4  # rounding of sums may swap nearly equal ones
        assert sure.float().mean() > 0.98 and ids.dtype == torch.uint8 and ids.unique().numel() > 1
        assert torch.equal(ids[sure].long(), maps.argmax(1)[sure])
    assert not torch.equal(found[0], found[2])
    (alone,) = predict_each(nets[:1], pixels, num_labels=3, **options)
    assert torch.equal(alone, found[0])


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """The tensors that operations allocate: the operation, and the number of elements."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor._base is None
                and not re.search(r"_\.|alias", str(function))
            ):
                self.made.append((str(function), tensor.numel()))
        return result

    def of_at_least(self, numbers):
        return [entry for entry in self.made if entry[1] >= numbers]


@pytest.mark.parametrize("passes", [{"flip": True}, {"scales": (0.5, 1.2), "flip": True}])
def test_a_large_image_costs_one_set_of_maps_and_no_more(passes, monkeypatch):
    monkeypatch.setattr(inference, "STRIP", 8)
    nets, pixels = [blur_net(0, 9), blur_net(1, 9)], images(batch=1, height=200, width=60)
    with Count() as count:
        predict_logits(
            nets, pixels, mode="sliding", crop_size=(40, 60), stride=(27, 40), window_batch_size=1, **passes
        )
    assert len(count.of_at_least(9 * 200 * 60)) == 1, count.of_at_least(9 * 200 * 60)
    # There is no copy of the images either, scaled or mirrored, except for a window's rows.
    assert len(count.of_at_least(3 * 200 * 60)) == 1, count.of_at_least(3 * 200 * 60)


@pytest.mark.parametrize("passes", [{}, {"scales": (0.5, 1.2), "flip": True}])
def test_scoring_each_network_costs_one_set_of_maps_for_all_together(passes, monkeypatch):
    monkeypatch.setattr(inference, "STRIP", 8)
    whole = 9 * 200 * 60
    monkeypatch.setattr(inference, "BAND", whole // 2)
    nets, pixels = [blur_net(seed, 9) for seed in range(3)], images(batch=1, height=200, width=60)
    with Count() as count:
        options = {"mode": "sliding", "crop_size": (40, 60), "stride": (27, 40)}
        predict_each(nets, pixels, num_labels=9, **options, **passes)
    if not passes:
        assert [numbers for _, numbers in count.of_at_least(whole // 2)] == [whole]
    else:  # two bands, in each the sum and, one after the other, the maps of each network
        assert [numbers for _, numbers in count.of_at_least(whole // 2)] == [whole // 2] * 8


def test_certain_predictions_stay_finite_and_can_be_resized():
    def certain(pixel_values):
        return 1000 * torch.stack([pixel_values[:, 0], -pixel_values[:, 0]], 1)

    pixels = images()
    assert predict_logits(certain, pixels, flip=True).isfinite().all()
    ids = predict(certain, pixels, flip=True, target_size=(74, 106))
    assert 0.3 < ids.float().mean() < 0.7


def test_an_unwrapped_model_is_rejected_with_advice():
    model = AutoModelForSemanticSegmentation.from_config(tiny_upernet()).eval()
    with pytest.raises(ValueError, match=r"size \(37, 53\), got SemanticSegmenterOutput. Wrap.*as_logits_fn"):
        predict_logits(model, images())
    with pytest.raises(ValueError, match=r"size \(37, 53\), got \(2, 3, 9, 13\)"):
        predict_logits(lambda x: F.avg_pool2d(x, 4), images())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "tiles"}, '"whole" or "sliding".*tiles'),
        ({"mode": "sliding"}, "`crop_size` must be .height, width."),
        ({"mode": "sliding", "crop_size": (8, 8)}, "`stride` must be"),
        ({"mode": "sliding", "crop_size": (8, 8), "stride": (8, 9)}, "must not exceed.*missed"),
        ({"mode": "sliding", "crop_size": (8, 8), "stride": (0, 4)}, "`stride` must be"),
        ({"mode": "sliding", "crop_size": (8, 8), "stride": (8, 8), "window_batch_size": 0}, "`window_batch_size`.*0"),
        ({"scales": ()}, "`scales` must be one or more"),
        ({"scales": (1.0, 0.0)}, "`scales` must be one or more"),
    ],
)
def test_invalid_windows_are_rejected(options, said):
    with pytest.raises(ValueError, match=said):
        predict_logits(blur_net(), images(), **options)


def test_an_empty_list_of_networks_is_rejected():
    with pytest.raises(ValueError, match="`logits_fn` is an empty list"):
        predict_logits([], images())
