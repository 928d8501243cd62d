"""The set loss of Mask2Former, MaskFormer and EoMT on label maps; ignored pixels have no effect.

The library's criteria have no ignored pixels: a pixel outside of all target masks counts as outside of every object.
So this module combines the terms itself, with the functions, weights and numbers of points of the network's module.
Ignored pixels enter neither the matching nor the mask terms. Without ignored pixels, the loss of one image equals the
library's.

Mask2Former and EoMT compare masks at random points. Here these only depend on the image, so resuming needs no random
state, and an image has the same loss in any process and micro-batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import IGNORE_INDEX, SetLossSums, present_classes

FAR_BELOW_ZERO = -1e4
"""The logit of an ignored point: with a target of 0 its losses and their gradients are exactly zero."""


class Layer(NamedTuple):
    """A layer's predictions: class_logits (B, Q, C + 1), the last for no object, and mask_logits (B, Q, h, w)."""

    class_logits: Tensor
    mask_logits: Tensor


class LayerQueries:
    """Each layer's predictions and their set loss (`cps_hf.functional.Queries`).

    Args:
        model: the model whose criterion and loss weights are used.
        layers: the layers that the library's own loss trains.
        seeds: long (B,), the seed of each image's points (`seeds_of`).
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer], seeds: Tensor):
        self.model, self.layers, self.seeds = model, layers, seeds

    def split(self, sizes: Sequence[int]) -> list[LayerQueries]:
        """Split into consecutive groups of images of these sizes."""
        layers = [zip(*(tensor.split(sizes) for tensor in layer), strict=True) for layer in self.layers]
        parts = zip(self.seeds.split(sizes), *layers, strict=True)
        return [LayerQueries(self.model, [Layer(*one) for one in part], seeds) for seeds, *part in parts]

    def set_loss_sums(self, labels: Tensor) -> SetLossSums:
        """The terms of the network's own loss, with the weights of its configuration, summed over layers.

        Args:
            labels: long (B, H, W) at any size, 255 where ignored.

        Returns:
            The sums per image; zero if all pixels of an image are ignored.
        """
        terms = (_Everywhere if self.model.config.model_type == "maskformer" else _AtPoints)(self.model)
        device = labels.device.type
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            layers = [Layer(*(t if t.dtype == torch.float64 else t.float() for t in layer)) for layer in self.layers]
            present = present_classes(labels)
            images = _images_of(labels, present, self.seeds, layers[0].mask_logits.dtype)
            matched = _match(terms, layers, images)
            masks = torch.stack([_mask_terms(terms, *one, images) for one in zip(layers, matched, strict=True)])
            classes = torch.stack([_class_terms(terms, *one, images) for one in zip(layers, matched, strict=True)])
        targets = present.sum(1)
        classes = classes.masked_fill(targets == 0, 0)  # an image without a label teaches nothing, not "no object"
        queries = self.layers[0].class_logits.shape[1]
        return SetLossSums(masks.sum(0), classes.sum(0), targets, queries, terms.criterion.eos_coef)


def seeds_of(pixel_values: Tensor) -> Tensor:
    """A seed for each image (B, 3, H, W), long (B,): a sum of integers, independent of the rest of the batch."""
    return pixel_values.detach().float().contiguous().view(torch.int32).flatten(1).sum(1)


class _Image(NamedTuple):
    """One image's targets.

    Args:
        classes: long (T,). masks: (T, H, W), 1 inside. ignored: (H, W), 1 where ignored. generator: draws the points.
    """

    classes: Tensor
    masks: Tensor
    ignored: Tensor
    generator: torch.Generator


def _images_of(labels: Tensor, present: Tensor, seeds: Tensor, dtype: torch.dtype) -> list[_Image]:
    """The host waits for the device once here: shapes depend on the number of targets."""
    known = torch.cat([present.long(), seeds.to(labels.device).unsqueeze(1)], 1).tolist()
    images = []
    for label, (*there, seed) in zip(labels, known, strict=True):
        classes = torch.tensor([index for index, one in enumerate(there) if one], dtype=torch.long)
        classes = classes.to(labels.device, non_blocking=True)
        masks, ignored = label == classes.view(-1, 1, 1), label == IGNORE_INDEX
        generator = torch.Generator(device=labels.device).manual_seed(seed % 2**31)
        images.append(_Image(classes, masks.to(dtype), ignored.to(dtype), generator))
    return images


@torch.no_grad()
def _match(terms: Any, layers: Sequence[Layer], images: Sequence[_Image]) -> list[list[tuple[Tensor, Tensor]]]:
    """The matched queries and targets of each layer and image: two tensors of min(Q, T) indices.

    The costs are the library's, without ignored pixels. The host waits once for all of them.
    """
    from scipy.optimize import linear_sum_assignment  # an extra, which such networks cannot be built without

    costs = []
    for layer in layers:
        for class_logits, mask_logits, image in zip(*layer, images, strict=True):
            logits, labels, counts = terms.to_match(mask_logits, image)
            logits, labels = _without_ignored(logits, labels, counts)
            share = counts.to(logits).mean().clamp(min=1e-9)
            cost = terms.matcher.cost_mask * terms.pair_wise_mask_loss(logits, labels) / share
            cost = cost - terms.matcher.cost_class * class_logits.softmax(-1)[:, image.classes]
            cost = cost + terms.matcher.cost_dice * terms.library.pair_wise_dice_loss(logits, labels)
            most = torch.finfo(cost.dtype).max
            costs.append(cost.nan_to_num(nan=most, posinf=most, neginf=most))
    on_host = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
    device = images[0].classes.device
    matched = [
        tuple(torch.as_tensor(found).to(device, non_blocking=True) for found in linear_sum_assignment(one))
        for one in (numbers.view(cost.shape) for numbers, cost in zip(on_host, costs, strict=True))
    ]
    return [matched[first : first + len(images)] for first in range(0, len(matched), len(images))]


def _mask_terms(terms: Any, layer: Layer, matched: Sequence[tuple[Tensor, Tensor]], images: Sequence[_Image]):
    """The mask terms of matched queries, summed over an image's targets, (B,)."""
    found = []
    for mask_logits, (queries, targets), image in zip(layer.mask_logits, matched, images, strict=True):
        if len(queries) == 0:
            found.append(mask_logits[:0].sum())  # a gradient of zero, as DDP requires one
            continue
        logits, labels, counts = terms.to_compare(mask_logits[queries], image.masks[targets], image)
        logits, labels = _without_ignored(logits, labels, counts)
        dice = terms.library.dice_loss(logits, labels, 1)
        weights = terms.model.weight_dict
        found.append(weights["loss_mask"] * terms.mask_loss(logits, labels, counts) + weights["loss_dice"] * dice)
    return torch.stack(found)


def _class_terms(terms: Any, layer: Layer, matched: Sequence[tuple[Tensor, Tensor]], images: Sequence[_Image]):
    """The class terms, summed over an image's queries, (B,). Queries without a target learn to predict no object, with
    weight `no_object_weight`."""
    class_logits, criterion = layer.class_logits, terms.criterion
    wanted = torch.full(class_logits.shape[:2], criterion.num_labels, device=class_logits.device)
    for row, (queries, targets), image in zip(wanted, matched, images, strict=True):
        row[queries] = image.classes[targets]
    weights = torch.ones(criterion.num_labels + 1, dtype=class_logits.dtype, device=class_logits.device)
    weights[-1] = criterion.eos_coef
    losses = F.cross_entropy(class_logits.flatten(0, 1), wanted.flatten(), weights, reduction="none")
    return terms.model.weight_dict["loss_cross_entropy"] * losses.view_as(wanted).sum(1)


def _without_ignored(logits: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return logits.masked_fill(~counts, FAR_BELOW_ZERO), labels.masked_fill(~counts, 0)


class _AtPoints:
    """Mask2Former and EoMT compare masks at points: uniform ones for the matching, and mostly uncertain ones for the
    loss. A point counts if it is not interpolated from an ignored pixel."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.criterion, self.matcher = model, model.criterion, model.criterion.matcher
        self.library: Any = sys.modules[type(model.criterion).__module__]
        self.pair_wise_mask_loss = self.library.pair_wise_sigmoid_cross_entropy_loss

    def to_match(self, mask_logits: Tensor, image: _Image) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (Q, P) and labels (T, P) at points, and which of them count, bool (P,)."""
        points = self._draw(1, self.criterion.num_points, image)
        return self._at(points, mask_logits), self._at(points, image.masks), self._count(points, image)[0]

    def to_compare(self, mask_logits: Tensor, masks: Tensor, image: _Image) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and labels of matched masks (T, ., .) at separate points, and which count, all (T, P)."""
        criterion, count = self.criterion, len(masks)
        with torch.no_grad():
            points = self._draw(count, int(criterion.num_points * criterion.oversample_ratio), image)
            uncertainty = criterion.calculate_uncertainty(self._at(points, mask_logits))
            uncertainty = uncertainty.masked_fill(~self._count(points, image), -torch.inf)
            num_uncertain = int(criterion.importance_sample_ratio * criterion.num_points)
            chosen = uncertainty.topk(num_uncertain, dim=1).indices
            points = points.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
            points = torch.cat([points, self._draw(count, criterion.num_points - num_uncertain, image)], 1)
            labels, counts = self._at(points, masks), self._count(points, image)
        return self._at(points, mask_logits), labels, counts

    def mask_loss(self, logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        """The mean over the points that count, summed over masks."""
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return F.binary_cross_entropy_with_logits(logits, labels, shares.to(logits), reduction="sum")

    def _draw(self, masks: int, points: int, image: _Image) -> Tensor:
        """(masks, points, 2) in [0, 1)."""
        like = {"dtype": image.masks.dtype, "device": image.masks.device}
        return torch.rand(masks, points, 2, generator=image.generator, **like)

    def _at(self, points: Tensor, maps: Tensor) -> Tensor:
        """Maps (N, h, w) at points (N, P, 2), or at the same ones (1, P, 2): (N, P)."""
        points = points.expand(len(maps), -1, -1)
        return self.library.sample_point(maps.unsqueeze(1), points, align_corners=False).squeeze(1)

    def _count(self, points: Tensor, image: _Image) -> Tensor:
        """Which points (N, P, 2) are not interpolated from an ignored pixel."""
        return self._at(points.flatten(0, 1).unsqueeze(0), image.ignored.unsqueeze(0)).view(points.shape[:2]) == 0


class _Everywhere:
    """MaskFormer compares masks at all pixels: at the predictions' size for matching, at the labels' for the loss."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.criterion, self.matcher = model, model.criterion, model.criterion.matcher
        self.library: Any = sys.modules[type(model.criterion).__module__]
        self.pair_wise_mask_loss = self.library.pair_wise_sigmoid_focal_loss

    def to_match(self, mask_logits: Tensor, image: _Image) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (Q, h * w), labels (T, h * w), and which count, bool (h * w,)."""
        maps = torch.cat([image.masks, image.ignored.unsqueeze(0)]).unsqueeze(1)
        *masks, ignored = F.interpolate(maps, size=mask_logits.shape[-2:], mode="nearest").flatten(1)
        masks = torch.stack(masks) if masks else maps.new_zeros(0, ignored.numel())
        return mask_logits.flatten(1), masks, ignored == 0

    def to_compare(self, mask_logits: Tensor, masks: Tensor, image: _Image) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and labels of matched masks, (T, H * W), and which count, bool (H * W,)."""
        size = masks.shape[-2:]
        logits = F.interpolate(mask_logits.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
        return logits.flatten(1), masks.flatten(1), image.ignored.flatten() == 0

    def mask_loss(self, logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        """The mean over the pixels that count, summed over masks."""
        return self.library.sigmoid_focal_loss(logits, labels, 1) / counts.to(logits).mean()
