"""Batches fill in what is missing, and mix images, validity and targets consistently."""

from dataclasses import replace

import pytest
import torch
from support.by_hand import C, H, W, batches

from cps_hf.functional import mix
from cps_hf.objectives import LabeledBatch, UnlabeledBatch

IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, H, W)


def test_missing_counts_are_filled_in():
    labels = torch.zeros(4, H, W, dtype=torch.long)
    labels[0] = 255
    labeled = LabeledBatch(pixel_values=IMAGES, labels=labels)
    assert labeled.valid.shape == (4, H, W) and labeled.valid.dtype == torch.bool and labeled.valid.all()
    assert labeled.num_pixels == 4 * H * W and labeled.num_labels == 3 * H * W
    unlabeled = UnlabeledBatch(strong=IMAGES)
    assert unlabeled.valid.all() and unlabeled.num_pixels == 4 * H * W
    assert unlabeled.weak is None and set(unlabeled.tensors()) == {"strong", "valid", "num_pixels"}


def test_given_counts_are_kept_by_replace():
    valid = torch.rand(4, H, W) > 0.5
    batch = UnlabeledBatch(weak=IMAGES, valid=valid, num_pixels=torch.tensor(2.5))
    assert batch.valid is valid and batch.num_pixels == 2.5
    assert replace(batch, strong=IMAGES).num_pixels == 2.5
    assert replace(batch, num_pixels=None).num_pixels == valid.sum()


def test_a_batch_without_images_is_an_error():
    with pytest.raises(ValueError, match=r"UnlabeledBatch needs images, got \['cutmix_mask'\]"):
        UnlabeledBatch(cutmix_mask=torch.zeros(2, H, W, dtype=torch.bool))


@pytest.mark.parametrize("sent", [False, True], ids=["neighbours", "sent along"])
def test_images_validity_and_targets_are_mixed_alike(sent):
    partner = [3, 2, 0, 1] if sent else [1, 0, 3, 2]
    _, batch = batches(("strong", "cutmix_mask_2"))
    own = [torch.randint(0, C, (4, H, W)), torch.rand(4, C, H, W)]
    if sent:
        batch = replace(batch, partner_strong=batch.strong[partner], partner_valid=batch.valid[partner])
    images, valid, targets = batch.cutmix("strong", own, [one[partner] for one in own], mask="cutmix_mask_2")
    for mixed, plain in zip((images, valid, *targets), (batch.strong, batch.valid, *own), strict=True):
        assert torch.equal(mixed, mix(plain, plain[partner], batch.cutmix_mask_2))
        assert not torch.equal(mixed, plain)


def test_partner_targets_are_swapped_or_predicted():
    batch, own = UnlabeledBatch(weak=IMAGES), [IMAGES[:, 0]]
    assert batch.partner_targets(own, None)[0][:, 0, 0].tolist() == [1, 0, 3, 2]
    batch.partner_weak = IMAGES + 10
    assert batch.partner_targets(own, lambda images: [images[:, 0]])[0][:, 0, 0].tolist() == [10, 11, 12, 13]
