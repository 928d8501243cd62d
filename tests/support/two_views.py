"""References in float64 for methods with two strong views, written from UniMatch V2's formulas."""

import torch
import torch.nn.functional as F

VIEWS = ("weak", "strong", "strong_2", "cutmix_mask", "cutmix_mask_2")
PARTNER = [1, 0, 3, 2]
WIDTH = 8


def logits_by_hand(model, images, factors=None):
    """A toy network at full size; its backbone's channels are multiplied by factors (B, WIDTH)."""
    maps = torch.tanh(model.backbone(images))
    if factors is not None:
        maps = maps * factors[:, :, None, None]
    return F.interpolate(model.decode_head(maps), size=images.shape[-2:], mode="bilinear", align_corners=False)


def factors_by_hand(pairs):
    """The factors for each channel of both views, from the next random numbers."""
    whole = torch.randperm(pairs) < pairs // 2
    kept = torch.rand(pairs, WIDTH) < 0.5
    factors = torch.ones(2 * pairs, WIDTH)
    for i in range(pairs):
        for c in range(WIDTH):
            if not whole[i]:
                factors[i, c] = 2.0 if kept[i, c] else 0.0
                factors[pairs + i, c] = 0.0 if kept[i, c] else 2.0
    return factors.double()


def strong_loss_by_hand(student, teacher, unlabeled, threshold, factors):
    """(s1 + s2) / 2."""
    confidence, label = logits_by_hand(teacher, unlabeled.weak.double()).softmax(1).max(1)
    teaches = unlabeled.valid & (confidence >= threshold)
    views, labels, masks = [], [], []
    for view, box in ((unlabeled.strong, unlabeled.cutmix_mask), (unlabeled.strong_2, unlabeled.cutmix_mask_2)):
        views.append(torch.where(box[:, None], view[PARTNER], view).double())
        labels.append(torch.where(box, label[PARTNER], label))
        masks.append(torch.where(box, teaches[PARTNER], teaches))
    both = logits_by_hand(student, torch.cat(views), factors).log_softmax(1).chunk(2)
    s1, s2 = (
        -(log_p.gather(1, y[:, None])[:, 0] * mask).sum() / unlabeled.valid.sum()
        for log_p, y, mask in zip(both, labels, masks, strict=True)
    )
    return (s1 + s2) / 2


def labeled_loss_by_hand(student, labeled):
    """Ls."""
    log_p = logits_by_hand(student, labeled.pixel_values.double()).log_softmax(1)
    has_label = labeled.labels != 255
    y = labeled.labels.masked_fill(~has_label, 0)
    return -(log_p.gather(1, y[:, None])[:, 0] * has_label).sum() / has_label.sum()


def large(value, side=32):
    """Each pixel as a block."""
    rows, columns = (torch.arange(side) * value.shape[d] // side for d in (-2, -1))
    return value[..., rows, :][..., columns]
