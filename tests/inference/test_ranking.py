"""What a label would resolve, against written-out formulas, and an order that separates copies."""

import math

import numpy as np
import pytest
import torch

from cps_hf.inference.ranking import descriptor, spread, uncertainty


def test_disagreement_is_the_jensen_shannon_divergence_of_two_networks():
    first, second = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.7])
    mean = (first + second) / 2
    kl = [
        sum(p * math.log(p / m) for p, m in zip(one.tolist(), mean.tolist(), strict=True)) for one in (first, second)
    ]
    maps = uncertainty([first.view(2, 1, 1), second.view(2, 1, 1)])
    assert maps["disagreement"].item() == pytest.approx(sum(kl) / 2 / math.log(2), abs=1e-6)
    entropy = -sum(m * math.log(m) for m in mean.tolist())
    assert maps["entropy"].item() == pytest.approx(entropy / math.log(2), abs=1e-6)


def test_disagreement_ranges_from_equal_to_opposite_networks():
    flat = torch.full((3, 2, 2), 1 / 3)
    assert uncertainty([flat, flat])["disagreement"].abs().max() < 1e-6
    sure = torch.eye(2).view(2, 2, 1, 1)
    assert uncertainty([sure[0], sure[1]])["disagreement"].item() == pytest.approx(1)
    assert "disagreement" not in uncertainty([flat])


def test_copies_come_last_and_other_scenes_keep_their_score():
    rng = np.random.default_rng(0)
    scenes = rng.normal(size=(4, 192))
    descriptors = np.concatenate([scenes, scenes[:1] + 1e-6])  # 4 is a copy of 0
    order = spread([1.0, 0.5, 0.4, 0.3, 0.99], descriptors)
    assert order == [0, 1, 2, 3, 4]
    assert spread([1.0, 0.5, 0.4, 0.3, 0.99], descriptors, count=1)[-1] == 4


@pytest.mark.parametrize("count", [0, 1, 3, None])
def test_every_image_is_ranked_once(count):
    rng = np.random.default_rng(1)
    order = spread(rng.random(7), rng.normal(size=(7, 5)), count)
    assert sorted(order) == list(range(7))


def test_identical_images_keep_the_order_of_their_scores():
    assert spread([0.2, 0.4, 0.3], np.zeros((3, 4))) == [1, 2, 0]


def test_a_descriptor_hardly_sees_noise_and_sees_another_scene():
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 1, 1), generator=rng).expand(3, 40, 60).to(torch.uint8).clone()
    image[:, :20] = 250
    noisy = (image.float() + torch.randn(image.shape, generator=rng) * 5).clamp(0, 255).to(torch.uint8)
    other = image.flip(1)
    near, far = (np.linalg.norm(descriptor(image) - descriptor(one)) for one in (noisy, other))
    assert near < 0.1 * far
