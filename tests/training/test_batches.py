"""From bytes to named tensors, and the counts shared within an optimizer step."""

import pytest
import torch
from accelerate import Accelerator

from cps_hf.objectives import LabeledBatch, UnlabeledBatch
from cps_hf.training.batches import MicroBatch, share_counts, to_device

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])


def raw(views, size=2, seed=0):
    """A batch of a stream: a third of each image is padding, at another place in a second crop."""
    g = torch.Generator().manual_seed(seed)
    batch = {view: torch.randint(0, 256, (size, 3, 6, 4), generator=g, dtype=torch.uint8) for view in views}
    batch["valid"] = torch.ones(size, 6, 4, dtype=torch.bool)
    batch["valid"][:, :2] = False
    return {**batch, "ids": ["a"] * size, "bad_samples": []}


def test_images_are_normalised_where_they_are_valid_and_labels_are_long():
    batch = raw(["pixel_values"])
    batch["labels"] = torch.randint(0, 3, (2, 6, 4), dtype=torch.uint8)
    found = to_device(batch, torch.device("cpu"), MEAN, STD)
    assert isinstance(found, LabeledBatch) and found.labels.dtype == torch.long
    assert torch.equal(found.labels, batch["labels"].long()) and found.num_labels == 48 and found.num_pixels == 32
    expected = (batch["pixel_values"] / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(found.pixel_values[:, :, 2:], expected[:, :, 2:])
    assert (found.pixel_values[:, :, :2] == 0).all()


@pytest.mark.parametrize("name", ["second", "partner"])
def test_a_second_crop_is_normalised_by_its_own_valid_map(name):
    view = {"second": "second_crop", "partner": "partner_weak"}[name]
    batch = raw(["weak", view])
    batch[f"{name}_valid"] = batch["valid"].flip(1)
    found = to_device(batch, torch.device("cpu"), MEAN, STD)
    assert isinstance(found, UnlabeledBatch)
    for images, valid in ((found.weak, batch["valid"]), (getattr(found, view), batch["valid"].flip(1))):
        assert torch.equal((images != 0).any(1), valid)


@pytest.mark.parametrize("with_unlabeled", [True, False])
def test_each_micro_batch_divides_by_its_share_of_the_steps_counts(with_unlabeled):
    step = []
    for size in (2, 3):
        labels = torch.zeros(size, 6, 4, dtype=torch.long)
        labels[0] = 255
        valid = torch.ones(size, 6, 4, dtype=torch.bool)
        valid[:, :3] = False
        labeled = LabeledBatch(pixel_values=torch.zeros(size, 3, 6, 4), labels=labels, valid=valid)
        unlabeled = UnlabeledBatch(weak=torch.zeros(size + 1, 3, 6, 4)) if with_unlabeled else None
        step.append(MicroBatch(labeled, unlabeled, {}))
    share_counts(step, Accelerator(cpu=True))
    for batch in step:
        assert batch.labeled.num_labels == (24 + 48) / 2 and batch.labeled.num_pixels == (24 + 36) / 2
        assert not with_unlabeled or batch.unlabeled.num_pixels == (72 + 96) / 2


def test_set_loss_targets_are_counted_per_image_over_the_step():
    def step():
        return [
            MicroBatch(LabeledBatch(pixel_values=torch.zeros(2, 3, 2, 2), labels=torch.tensor(labels)), None, {})
            for labels in ([[[0, 1], [2, 255]], [[0, 0], [0, 0]]], [[[255, 255], [255, 255]], [[4, 4], [5, 255]]])
        ]

    counted, others = step(), step()
    share_counts(counted, Accelerator(cpu=True), with_targets=True)
    share_counts(others, Accelerator(cpu=True))
    assert [batch.labeled.num_targets.item() for batch in counted] == [(3 + 1 + 0 + 2) / 2] * 2
    assert [batch.labeled.num_targets for batch in others] == [None, None]  # no other loss needs them
