import math
import random

import pytest
import torch

from cps_hf.functional.cutmix import draw_cutmix_masks, mix, swap_neighbours


@pytest.mark.slow
def test_masks_have_the_statistics_of_the_release():
    """RECIPES: over 10,000 draws at 512 x 512 mean 0.2515, deviation 0.0689, 1 % 0.119, median 0.248, 99 % 0.411."""
    g = torch.Generator().manual_seed(0)
    shares = torch.cat([draw_cutmix_masks(50, 512, 512, generator=g).flatten(1).float().mean(1) for _ in range(40)])
    assert shares.mean().item() == pytest.approx(0.2515, abs=0.006)
    assert shares.std().item() == pytest.approx(0.0689, abs=0.005)
    quantiles = shares.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    assert quantiles == pytest.approx([0.119, 0.248, 0.411], abs=0.012)


def test_a_union_of_the_boxes_would_be_noticed():
    """The union gives 0.308 on average: exclusive or keeps the share at a quarter."""
    g = torch.Generator().manual_seed(1)
    shares = draw_cutmix_masks(400, 128, 128, generator=g).flatten(1).float().mean(1)
    assert abs(shares.mean().item() - 0.308) > 0.03


def test_one_box_has_the_given_area():
    masks = draw_cutmix_masks(64, 333, 200, boxes=1, area=(0.4, 0.4), generator=torch.Generator().manual_seed(2))
    shares = masks.flatten(1).float().mean(1)
    assert (shares - 0.4).abs().max() < 0.01
    for mask in masks:  # one box: as many pixels as its bounding box has
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns


def test_boxes_are_uniform_in_form_and_position():
    """The height share is p**u. Of the space that the box leaves, shares are above and to the left. u and both shares
    are uniform and independent."""
    masks = draw_cutmix_masks(1500, 128, 192, boxes=1, area=(0.1, 0.1), generator=torch.Generator().manual_seed(6))
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    has_room = (heights < 100) & (widths < 150)
    u = (heights / 128).log() / math.log(0.1)
    above = masks.any(2).int().argmax(1) / (128 - heights)
    left = masks.any(1).int().argmax(1) / (192 - widths)
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(u.quantile(levels), levels, rtol=0, atol=0.05)
    for part in (above, left):
        torch.testing.assert_close(part[has_room].quantile(levels), levels, rtol=0, atol=0.05)
    correlations = torch.corrcoef(torch.stack([u, above, left])[:, has_room])
    assert (correlations - torch.eye(3)).abs().max() < 0.1


def test_aspect_boxes_match_rejection_sampling():
    """UniMatch's release draws ratio and position until the box is inside; written out here on a unit square."""
    random.seed(3)
    expected = []
    while len(expected) < 4000:
        area = random.uniform(0.02, 0.4)
        while True:
            ratio = random.uniform(0.3, 1 / 0.3)
            width, height = math.sqrt(area / ratio), math.sqrt(area * ratio)
            if random.random() + width <= 1 and random.random() + height <= 1:
                break
        expected.append((height / width, height))
    options = {"boxes": 1, "area": (0.02, 0.4), "aspect": (0.3, 1 / 0.3)}
    masks = draw_cutmix_masks(1500, 128, 192, **options, generator=torch.Generator().manual_seed(4))
    heights, widths = masks.any(2).sum(1) / 128, masks.any(1).sum(1) / 192
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    ratios, sides = (torch.tensor(column).quantile(levels) for column in zip(*expected, strict=True))
    torch.testing.assert_close((heights / widths).quantile(levels), ratios, rtol=0.06, atol=0.03)
    torch.testing.assert_close(heights.quantile(levels), sides, rtol=0.06, atol=0.01)


def test_masks_have_the_given_shape_and_are_reproducible():
    a = draw_cutmix_masks(3, 17, 40, generator=torch.Generator().manual_seed(5))
    b = draw_cutmix_masks(3, 17, 40, generator=torch.Generator().manual_seed(5))
    assert a.shape == (3, 17, 40) and a.dtype == torch.bool
    assert torch.equal(a, b)
    assert not torch.equal(a[0], a[1])


def test_image_and_label_are_mixed_alike():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    labels = torch.arange(4).view(4, 1, 1).expand(4, 2, 2)
    mask = torch.tensor([[[True, False], [False, False]]]).expand(4, 2, 2)
    mixed = mix(images, swap_neighbours(images), mask)
    assert mixed[:, 0, 0, 0].tolist() == [1, 0, 3, 2] and mixed[:, 0, 1, 1].tolist() == [0, 1, 2, 3]
    assert torch.equal(mix(labels, swap_neighbours(labels), mask), mixed[:, 0].long())


def test_the_odd_image_out_is_paired_with_the_first():
    assert swap_neighbours(torch.arange(5)).tolist() == [1, 0, 3, 2, 0]


@pytest.mark.parametrize("area", [(0.0, 0.5), (0.5, 0.25), (0.5, 1.5)])
def test_an_impossible_area_is_an_error(area):
    with pytest.raises(ValueError, match="area"):
        draw_cutmix_masks(1, 8, 8, area=area)


@pytest.mark.parametrize("aspect", [(0.0, 1.0), (2.0, 1.0)])
def test_an_impossible_aspect_is_an_error(aspect):
    with pytest.raises(ValueError, match="aspect"):
        draw_cutmix_masks(1, 8, 8, boxes=1, aspect=aspect)


def test_a_box_without_a_fitting_ratio_uses_the_nearest():
    masks = draw_cutmix_masks(1, 100, 100, boxes=1, area=(0.5, 0.5), aspect=(9.0, 10.0))
    assert masks.any(2).sum() == 100 and masks.any(1).sum() == 50
