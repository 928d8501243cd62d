"""The set loss against the library's and against formulas written out; ignored pixels; batches that are split."""

import itertools
import math

import pytest
import torch
from support.architectures import UNIVERSAL
from support.universal import BY_TYPE, speaking

from cps_hf.functional import StridedLogits, labeled_set_loss, present_classes, pseudo_labeled_set_loss, split_images
from cps_hf.modeling import Branch, build_branches
from cps_hf.modeling.set_loss import Layer, LayerQueries, seeds_of

every_kind = pytest.mark.parametrize("kind", UNIVERSAL, ids=lambda row: row.model_type)
both_kinds = pytest.mark.parametrize("name", ["maskformer", "mask2former"])
C, QUERIES, POINTS = 3, 4, 40


def block_labels(images, classes, seed=0):
    """Labels (images, 64, 64) of 8 x 8 blocks."""
    blocks = torch.randint(0, classes, (images, 8, 8), generator=torch.Generator().manual_seed(seed))
    return blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)


def branch_of(kind):
    """In training mode, with auxiliary losses and masked attention, and nothing random outside of the loss."""
    model = speaking(kind).train()
    model.config.pos_embed_rescale = None
    if hasattr(model, "attn_mask_probs"):
        model.attn_mask_probs.fill_(1.0)
    branch = Branch(model)
    branch.keep_queries = True
    return branch


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_kind
def test_of_one_image_without_ignored_pixels_it_is_the_librarys_loss(kind, monkeypatch):
    real = torch.rand

    def by_shape(*shape, generator=None, **options):
        """The library draws from the global generator: let both draw the same."""
        sizes = shape[0] if shape and isinstance(shape[0], list) else shape  # older transformers draw `rand([])`
        return real(*shape, generator=torch.Generator().manual_seed(sum(sizes)), **options)

    branch, labels = branch_of(kind), block_labels(1, 3)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "rand", by_shape)
    loss = labeled_set_loss(branch.strided(images), labels)
    ours = gradients(branch.model, loss)
    classes = labels.unique()
    masks = (labels == classes.view(-1, 1, 1)).float()
    library = branch.model(pixel_values=images, mask_labels=[masks], class_labels=[classes]).loss
    expected = gradients(branch.model, library)
    torch.testing.assert_close(loss, library, rtol=1e-5, atol=0)
    assert ours.keys() == expected.keys() and len(ours) > 30
    largest = max(gradient.abs().max() for gradient in expected.values()).item()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)
    pseudo = pseudo_labeled_set_loss(branch.strided(images), labels)
    torch.testing.assert_close(pseudo, loss)  # of one image it is that image's loss, too


# ------------------------------------------------------------------------------------------ formulas written out


def queries_of(name, images=2, layers=2, seed=0, **fields):
    """A model for its weights, and random predictions (float64) of two layers: masks of 4 x 4."""
    model = build_branches(BY_TYPE[name].config(), num_branches=1, id2label=dict(enumerate("abc")))[0]
    model.criterion.num_points = model.criterion.matcher.num_points = POINTS
    g = torch.Generator().manual_seed(seed)
    found = [
        Layer(*(torch.randn(images, QUERIES, *size, generator=g, dtype=torch.float64) for size in ((C + 1,), (4, 4))))
        for _ in range(layers)
    ]
    for tensor in itertools.chain(*found):
        tensor.requires_grad_()
    return model, LayerQueries(model, found, torch.arange(images) + 5)


def logits_of(queries):
    images = queries.layers[0].class_logits.shape[0]
    return StridedLogits(torch.zeros(images, C, 4, 4), (8, 8), scores=True, queries=queries)


def labels_with_ignored():
    """(2, 8, 8): a class missing in each image, and an ignored corner in the first."""
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, :4], labels[0, 2:, 4:], labels[0, 5:, :3] = 1, 2, 255
    labels[1, :, 5:] = 2
    return labels


def at(image, x, y):
    """Bilinear at (x, y) in [0, 1], pixels' centres at (i + 0.5) / n, zero outside."""
    height, width = len(image), len(image[0])
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for i, j in itertools.product(
        (math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)
    ):
        if 0 <= i < height and 0 <= j < width:
            total = total + image[i][j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def cross_entropy(logit, label):
    return torch.log1p(torch.exp(logit)) - logit * label


def focal(logit, label):
    p = torch.sigmoid(logit)
    return 0.25 * (1 - p) ** 2 * -p.log() if label == 1 else 0.75 * p**2 * -(1 - p).log()


def dice(logits, labels):
    p = [torch.sigmoid(logit) for logit in logits]
    inside = sum(a * b for a, b in zip(p, labels, strict=True))
    return 1 - (2 * inside + 1) / (sum(p) + sum(labels) + 1)


def by_hand(name, model, queries, labels):
    """For each image: the sum of its mask terms, of its class terms, and its number of targets."""
    config, found = model.config, []
    if name == "maskformer":
        weights = {"class": config.cross_entropy_weight, "mask": config.mask_weight, "dice": config.dice_weight}
        costs, mask_loss = {**weights, "class": 1.0}, focal
    else:
        weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
        costs, mask_loss = weights, cross_entropy
    for index, label in enumerate(labels.tolist()):
        classes = sorted({value for row in label for value in row} - {255})
        targets = [[[float(value == c) for value in row] for row in label] for c in classes]
        ignored = [[float(value == 255) for value in row] for row in label]
        g = torch.Generator().manual_seed(int(queries.seeds[index]))
        matched = []
        for layer in queries.layers:  # all layers are matched before any is compared
            masks = layer.mask_logits[index]
            if name == "maskformer":
                places = [(i, j) for i in range(4) for j in range(4) if not ignored[2 * i][2 * j]]
                values = [[mask[i][j] for i, j in places] for mask in masks]
                truth = [[target[2 * i][2 * j] for i, j in places] for target in targets]
            else:
                points = torch.rand(1, POINTS, 2, generator=g, dtype=torch.float64)[0].tolist()
                points = [p for p in points if at(ignored, *p) == 0]
                values = [[at(mask, *p) for p in points] for mask in masks]
                truth = [[at(target, *p) for p in points] for target in targets]
            share = layer.class_logits[index].softmax(-1)
            cost = [
                [
                    costs["mask"] * sum(map(mask_loss, value, wanted)) / len(wanted)
                    + costs["dice"] * dice(value, wanted)
                    - costs["class"] * share[q, c]
                    for c, wanted in zip(classes, truth, strict=True)
                ]
                for q, value in enumerate(values)
            ]
            matched.append(
                min(
                    itertools.permutations(range(QUERIES), len(classes)),
                    key=lambda order, cost=cost: sum(cost[q][t].item() for t, q in enumerate(order)),
                )
            )
        mask_sum = class_sum = 0.0
        for layer, order in zip(queries.layers, matched, strict=True):
            by_query = sorted(zip(order, range(len(classes)), strict=True))  # points are drawn in the queries' order
            if name == "maskformer":
                sets = [[(i, j) for i in range(8) for j in range(8) if not ignored[i][j]]] * len(classes)
                sets = [[((j + 0.5) / 8, (i + 0.5) / 8) for i, j in one] for one in sets]
            else:
                drawn = torch.rand(len(classes), 3 * POINTS, 2, generator=g, dtype=torch.float64).tolist()
                rest = torch.rand(len(classes), POINTS - 30, 2, generator=g, dtype=torch.float64).tolist()
                sets = []
                for (q, _), candidates, others in zip(by_query, drawn, rest, strict=True):
                    known = [p for p in candidates if at(ignored, *p) == 0]
                    known.sort(key=lambda p, q=q, layer=layer: abs(float(at(layer.mask_logits[index, q], *p))))
                    sets.append(known[:30] + [p for p in others if at(ignored, *p) == 0])
            for (q, t), points in zip(by_query, sets, strict=True):
                mask = layer.mask_logits[index, q]
                if name == "maskformer":  # the resized masks repeat their outermost values
                    mask = torch.nn.functional.interpolate(mask[None, None], size=(8, 8), mode="bilinear")[0, 0]
                value, wanted = [at(mask, *p) for p in points], [at(targets[t], *p) for p in points]
                mask_sum = mask_sum + weights["mask"] * sum(map(mask_loss, value, wanted)) / len(points)
                mask_sum = mask_sum + weights["dice"] * dice(value, wanted)
            spoken = dict(zip(order, classes, strict=True))
            for q, log_share in enumerate(layer.class_logits[index].log_softmax(-1)):
                weight = 1.0 if q in spoken else config.no_object_weight
                class_sum = class_sum - weights["class"] * weight * log_share[spoken.get(q, C)]
        found.append((mask_sum, class_sum, len(classes)))
    return found


@both_kinds
def test_with_ignored_pixels_it_is_the_formula_written_out(name):
    model, queries = queries_of(name)
    labels = labels_with_ignored()
    leaves = [tensor for layer in queries.layers for tensor in layer]
    images, eos = by_hand(name, model, queries, labels), model.config.no_object_weight
    assert [targets for *_, targets in images] == [3, 2] == present_classes(labels).sum(1).tolist()
    masks, classes, targets = (sum(one) for one in zip(*images, strict=True))
    expected = masks / targets + classes / (targets + eos * (2 * QUERIES - targets))
    taught = [(labels[i] != 255).sum().item() for i in range(2)]
    pseudo = sum(
        n * (mask / t + one / (t + eos * (QUERIES - t))) for n, (mask, one, t) in zip(taught, images, strict=True)
    ) / sum(taught)
    ours = (labeled_set_loss(logits_of(queries), labels), pseudo_labeled_set_loss(logits_of(queries), labels))
    for found, wanted in zip(ours, (expected, pseudo), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)
        for a, b in zip(
            *(torch.autograd.grad(one, leaves, retain_graph=True) for one in (found, wanted)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert not torch.equal(*ours)


@both_kinds
def test_predictions_at_ignored_pixels_have_no_effect_and_get_no_gradient(name):
    labels = block_labels(2, 3)
    labels[:, :, 32:] = 255
    labels[1] = 255  # nothing of this image teaches
    model, queries = queries_of(name)
    leaves = [tensor for layer in queries.layers for tensor in layer]
    loss = labeled_set_loss(logits_of(queries), labels)
    found = torch.autograd.grad(loss, leaves)
    for tensor in found:
        assert tensor[0].any() and not tensor[1].any()
    assert not any(tensor[..., 3].any() for tensor in found[1::2])  # of masks of 4 x 4, the last column
    changed = [Layer(a, b.detach().clone()) for a, b in queries.layers]
    for _, masks in changed:
        masks[0, ..., 3], masks[1] = 100.0, -100.0
    assert labeled_set_loss(logits_of(LayerQueries(model, changed, queries.seeds)), labels) == loss
    other = labels.clone()
    other[0, :8, :8] = (labels[0, 0, 0] + 1) % 3
    assert labeled_set_loss(logits_of(queries), other) != loss
    valid = labels != 255
    anything = labels.masked_fill(~valid, 1)  # what pseudo labels have on padding
    pseudo = [pseudo_labeled_set_loss(logits_of(queries), *given, count=100.0) for given in ((labels,), (anything,))]
    assert pseudo_labeled_set_loss(logits_of(queries), anything, valid=valid, count=100.0) == pseudo[0] != pseudo[1]


@pytest.mark.parametrize("name", ["maskformer", "mask2former", "eomt"])
def test_a_split_batch_has_the_same_loss_whatever_its_parts_contain(name):
    _, queries = queries_of(name, images=4)
    labels = torch.cat([labels_with_ignored(), torch.full((1, 8, 8), 255), torch.zeros(1, 8, 8).long()])
    whole, pixels = logits_of(queries), (labels != 255).sum()
    total = labeled_set_loss(whole, labels), pseudo_labeled_set_loss(whole, labels)
    share = present_classes(labels).sum() / 2
    parts = [
        (labeled_set_loss(a, b, num_targets=share), pseudo_labeled_set_loss(a, b, count=pixels / 2))
        for a, b in zip(split_images(whole, [2, 2]), labels.split(2), strict=True)
    ]
    for one, *split in zip(total, *parts, strict=True):
        torch.testing.assert_close(sum(split) / 2, one, rtol=1e-12, atol=0)
    own = [labeled_set_loss(a, b) for a, b in zip(split_images(whole, [2, 2]), labels.split(2), strict=True)]
    assert abs(sum(own) / 2 - total[0]) > 1e-3  # what each part's own count would give


@every_kind
def test_points_are_a_function_of_the_image_and_labels_teach_every_layer(kind):
    branch, labels = branch_of(kind), block_labels(2, 4)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    logits = branch.strided(images)
    first = labeled_set_loss(logits, labels)
    torch.manual_seed(1)
    assert labeled_set_loss(logits, labels) == first
    moved = logits._replace(queries=LayerQueries(branch.model, logits.queries.layers, logits.queries.seeds + 1))
    assert (labeled_set_loss(moved, labels) == first) == (kind.model_type == "maskformer")
    assert seeds_of(images[1:]) == seeds_of(images)[1]
    assert len(logits.queries.layers) == {"maskformer": 1}.get(kind.model_type, 3)
    found = labeled_set_loss(logits, torch.full_like(labels, 255))
    assert found == 0 and not any(gradient.any() for gradient in gradients(branch.model, found).values())
    with torch.no_grad():
        assert branch.strided(images).queries is None
    branch.keep_queries = False
    with pytest.raises(TypeError, match="these logits have no queries"):
        labeled_set_loss(branch.strided(images), labels)


def test_more_classes_than_queries_match_as_many_as_there_are():
    model, queries = queries_of("mask2former", images=1)
    few = LayerQueries(model, [Layer(a[:, :2], b[:, :2]) for a, b in queries.layers], queries.seeds)
    assert labeled_set_loss(logits_of(few), labels_with_ignored()[:1]).isfinite()
