"""Joint geometry of image and label, padding, strong views, normalization."""

import pytest
import torch
import torch.nn.functional as F

from cps_hf.config import AugmentationConfig
from cps_hf.data.transforms import labeled_sample, normalize, random_crop, strong_view, unlabeled_views


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(height, width):
    """An image whose red is the row and green the column, and a label that is a checkerboard of 16-pixel cells."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 200)]).to(torch.uint8)
    label = ((rows // 16 + columns // 16) % 2).to(torch.uint8)
    return image, label


@pytest.mark.parametrize(("height", "width"), [(100, 180), (77, 51), (33, 200)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_image_and_label_move_together(height, width, scale, flip):
    image, label = coordinates(height, width)
    augmentation = AugmentationConfig(crop_size=(40, 64), random_scale=(scale,), horizontal_flip=flip)
    for seed in range(5):
        crop, crop_label, valid = random_crop(image, label, augmentation, gen(seed))
        assert crop.shape == (3, 40, 64) and crop_label.shape == valid.shape == (40, 64)
        assert crop.dtype == crop_label.dtype == torch.uint8 and valid.dtype == torch.bool
        # The colours encode a pixel's origin and thus its label, except at the cells' edges.
        expected = ((crop[0] // 16 + crop[1] // 16) % 2)[valid]
        inner = ((crop[0] % 16 > 2) & (crop[0] % 16 < 13) & (crop[1] % 16 > 2) & (crop[1] % 16 < 13))[valid]
        assert inner.any()
        assert torch.equal(expected[inner], crop_label[valid][inner])
        columns = crop[1][valid.any(1)][0][valid.any(0)].int()
        assert (columns.diff() <= 0).all() if flip else (columns.diff() >= 0).all()


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5, 2.0])
def test_a_crop_equals_resizing_and_cropping_the_whole_image(scale):
    """Up to one source pixel: the box is rounded to whole pixels before it is resized."""
    rows, columns = torch.meshgrid(torch.arange(120.0), torch.arange(200.0), indexing="ij")
    image = torch.stack([rows, columns, rows * 0]).to(torch.uint8)
    augmentation = AugmentationConfig(crop_size=(48, 80), random_scale=(scale,), horizontal_flip=0.0)
    crop, _, valid = random_crop(image, None, augmentation, gen(3))
    assert valid.all()
    whole = F.interpolate(image[None].float(), scale_factor=scale, mode="bilinear", align_corners=False)[0]
    top = (crop[0, 24, 40] - whole[0, :, 0]).abs().argmin() - 24
    left = (crop[1, 24, 40] - whole[1, 0]).abs().argmin() - 40
    top, left = top.clamp(0, whole.shape[1] - 48), left.clamp(0, whole.shape[2] - 80)
    part = whole[:, top : top + 48, left : left + 80]
    assert (crop.float() - part).abs().max() <= 1.0 + 1 / scale


def test_padding_is_centered_black_ignored_and_invalid():
    image = torch.full((3, 10, 21), 99, dtype=torch.uint8)
    label = torch.ones(10, 21, dtype=torch.uint8)
    augmentation = AugmentationConfig(crop_size=(16, 16), random_scale=(1.0,))
    crop, crop_label, valid = random_crop(image, label, augmentation, gen())
    assert valid[3:13].all() and valid.sum() == 10 * 16
    assert (crop[:, ~valid] == 0).all() and (crop_label[~valid] == 255).all()
    assert (crop[:, valid] == 99).all() and (crop_label[valid] == 1).all()


@pytest.mark.parametrize(("size", "scale"), [((9, 11), 1.0), ((18, 22), 0.5)])
def test_an_odd_pixel_of_padding_goes_to_the_bottom_and_the_right(size, scale):
    augmentation = AugmentationConfig(crop_size=(16, 16), random_scale=(scale,))
    valid = random_crop(torch.zeros(3, *size, dtype=torch.uint8), None, augmentation, gen())[2]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[3 : 16 - 4, 2 : 16 - 3] = True  # 7 rows and 5 columns are missing
    assert torch.equal(valid, expected)


def test_an_image_is_flipped_at_every_scale():
    image, _ = coordinates(40, 40)
    augmentation = AugmentationConfig(crop_size=(64, 64), random_scale=(0.5, 1.0))
    seen = set()
    for seed in range(60):
        crop, _, valid = random_crop(image, None, augmentation, gen(seed))
        row = crop[1][valid.any(1)][0][valid.any(0)].int()
        seen.add((len(row), bool(row[0] > row[-1])))
    assert seen == {(20, False), (20, True), (40, False), (40, True)}


def test_scales_are_chosen_or_drawn_from_a_range():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)

    def filled(augmentation):
        return {int(random_crop(image, None, augmentation, gen(s))[2].any(1).sum()) for s in range(200)}

    assert filled(AugmentationConfig(crop_size=(256, 256), random_scale=(0.5, 1.0, 2.0))) == {32, 64, 128}
    ranged = filled(AugmentationConfig(crop_size=(256, 256), random_scale=(0.5, 2.0), random_scale_mode="range"))
    assert min(ranged) >= 32 and max(ranged) <= 128 and len(ranged) > 40


def test_every_position_of_the_crop_can_be_drawn():
    image, _ = coordinates(20, 20)
    augmentation = AugmentationConfig(crop_size=(16, 16), random_scale=(1.0,), horizontal_flip=0.0)
    corners = {tuple(random_crop(image, None, augmentation, gen(s))[0][:2, 0, 0].tolist()) for s in range(400)}
    assert corners == {(r, c) for r in range(5) for c in range(5)}


def test_antialiasing_is_a_switch_that_changes_shrunk_images():
    image = (torch.rand(3, 64, 64, generator=gen()) * 255).to(torch.uint8)
    half = {"crop_size": (32, 32), "random_scale": (0.5,)}
    crops = [
        random_crop(image, None, AugmentationConfig(**half, resize_antialias=a), gen(1))[0].float()
        for a in (False, True)
    ]
    assert crops[1].std() < 0.8 * crops[0].std()


def test_strong_views_share_geometry_and_differ_in_color():
    image, _ = coordinates(90, 120)
    augmentation = AugmentationConfig(crop_size=(64, 64), color_jitter=1.0, grayscale=0.0, gaussian_blur=0.0)
    sample = unlabeled_views(image, ("weak", "strong", "strong_2", "cutmix_mask"), augmentation, gen(4))
    assert set(sample) == {"weak", "strong", "strong_2", "cutmix_mask", "valid"}
    assert not torch.equal(sample["weak"], sample["strong"])
    assert not torch.equal(sample["strong"], sample["strong_2"])
    assert torch.equal(sample["weak"][0].argmax(0)[:1], sample["weak"][0].argmax(0)[:1])
    assert sample["cutmix_mask"].dtype == torch.bool and sample["cutmix_mask"].shape == (64, 64)


@pytest.mark.parametrize("field", ["color_jitter", "grayscale", "gaussian_blur"])
def test_each_strong_switch_changes_the_view(field):
    image = (torch.rand(3, 32, 32, generator=gen()) * 255).to(torch.uint8)
    off = {"color_jitter": 0.0, "grayscale": 0.0, "gaussian_blur": 0.0}
    same = strong_view(image, AugmentationConfig(crop_size=(32, 32), **off), gen(1))
    assert torch.equal(same, image)
    changed = strong_view(image, AugmentationConfig(crop_size=(32, 32), **(off | {field: 1.0})), gen(1))
    assert not torch.equal(changed, image)
    if field == "grayscale":
        assert torch.equal(changed[0], changed[1])


def test_a_sample_uses_only_its_own_generator():
    image, label = coordinates(90, 120)
    augmentation = AugmentationConfig(crop_size=(64, 64))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = unlabeled_views(image, ("weak", "strong", "cutmix_mask"), augmentation, gen(9))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    again = unlabeled_views(image, ("weak", "strong", "cutmix_mask"), augmentation, gen(9))
    assert all(torch.equal(first[k], again[k]) for k in first)
    a, b = (labeled_sample(image, label, augmentation, gen(s)) for s in (1, 2))
    assert not torch.equal(a["pixel_values"], b["pixel_values"])


def test_normalization_follows_the_formula_with_zero_padding():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    valid[1, 2:] = False
    out = normalize(images, mean, std, valid)
    expected = [(0 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (255 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor(expected))
    assert (out[1, :, 2:] == 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop_size", (0, 4)), ("random_scale", ()), ("random_scale_mode", "uniform"), ("horizontal_flip", 1.5)],
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        AugmentationConfig(**{"crop_size": (8, 8), field: value})


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_this_share_of_labeled_images_gets_strong_views(share):
    """The crop and its label are the same as without the option."""
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=gen())
    label = (image[0] % 3).to(torch.uint8)
    options = {"crop_size": (40, 64), "color_jitter": 1.0, "random_scale": (1.0,)}
    changed = 0
    for seed in range(40):
        plain = labeled_sample(image, label, AugmentationConfig(**options), gen(seed))
        found = labeled_sample(image, label, AugmentationConfig(labeled_color_jitter=share, **options), gen(seed))
        assert torch.equal(found["labels"], plain["labels"]) and torch.equal(found["valid"], plain["valid"])
        changed += not torch.equal(found["pixel_values"], plain["pixel_values"])
    assert changed == {0.0: 0, 1.0: 40}.get(share, changed) and (share != 0.5 or 10 <= changed <= 30)
