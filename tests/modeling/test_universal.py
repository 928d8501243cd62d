"""Mask-classification networks as branches, from tiny random configurations."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.architectures import SEGFORMER, UNIVERSAL
from support.universal import BY_TYPE, NAMES, speaking
from transformers import (
    AutoConfig,
    AutoModelForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    OneFormerConfig,
)

from cps_hf.functional import StridedLogits
from cps_hf.inference.windows import predict_each, predict_logits
from cps_hf.modeling import (
    Branch,
    build_branches,
    check_input_size,
    check_train_batch,
    freeze,
    freeze_unused_parameters,
    parameter_groups,
)
from cps_hf.modeling.backbones import backbone_parameters, head_parameters
from cps_hf.modeling.universal import class_scores

every_kind = pytest.mark.parametrize("kind", UNIVERSAL, ids=lambda row: row.model_type)


@every_kind
def test_scores_and_logits_are_those_of_the_library(kind):
    """The library's semantic maps: Mask2Former's post-processing uses masks of 384 x 384, EoMT's uses `size`."""
    model, images = speaking(kind), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(pixel_values=images)
        strided = Branch(model).strided(images)
        logits = Branch(model)(images)
    masks, size = output.masks_queries_logits, (64, 64)
    processor = MaskFormerImageProcessor()
    if kind.model_type == "mask2former":
        processor, masks, size = Mask2FormerImageProcessor(), F.interpolate(masks, size=(384, 384)), (384, 384)
    options = {"target_sizes": [size] * 2, "return_segmentation_scores": True}
    if kind.model_type.startswith("eomt"):
        processor = EomtImageProcessor()
        options["size"] = {"shortest_edge": masks.shape[-2], "longest_edge": masks.shape[-1]}
    shown = SimpleNamespace(
        class_queries_logits=output.class_queries_logits, masks_queries_logits=masks, patch_offsets=None
    )
    found = processor.post_process_semantic_segmentation(shown, **options)
    expected = torch.stack([one["segmentation_scores"] for one in found])
    ours = F.interpolate(class_scores(output.class_queries_logits, masks), size=size, mode="bilinear")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert strided.scores and torch.equal(
        strided.values, class_scores(output.class_queries_logits, output.masks_queries_logits)
    )
    resized = F.interpolate(strided.values, size=(64, 64), mode="bilinear") + 1e-6
    torch.testing.assert_close(logits, (resized / resized.sum(1, keepdim=True)).log())
    if size == (64, 64):
        assert torch.equal(logits.argmax(1), torch.stack([one["segmentation"] for one in found]))
    assert logits.std((2, 3)).max() > 0.02, "one score everywhere shows nothing"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = class_scores(output.class_queries_logits.bfloat16(), output.masks_queries_logits)
    assert half.dtype == torch.float32 and not torch.equal(half, half.bfloat16().float())


@every_kind
def test_a_gradient_reaches_every_parameter_and_training_moves_it(kind):
    torch.manual_seed(0)
    model = build_branches(kind.config(), num_branches=1)[0]
    unused = freeze_unused_parameters(model, kind.size)
    assert all("layernorm" in name for name in unused), unused
    before = copy.deepcopy(dict(model.named_parameters()))
    branch, images = Branch(model).train(), torch.randn(2, 3, *kind.size)
    labels = F.interpolate(F.avg_pool2d(images[:, :1], 8), size=kind.size)[:, 0].gt(0).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(branch(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])} - set(unused)
    # If all queries start at zero, the first self-attention gives the same, whatever it attends to.
    assert all("self_attn" in name and "bias" in name for name in still), still


@every_kind
def test_backbone_head_and_groups_are_separated(kind):
    model = build_branches(kind.config(), num_branches=1)[0]
    backbone, head = backbone_parameters(model), head_parameters(model)
    ours = [name for name in backbone if "predictor" in name or "queries" in name or name == "query.weight"]
    assert "class_predictor.weight" in head and not ours
    assert any("patch_embed" in name for name in backbone) and not any("patch_embed" in name for name in head)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(backbone) + len(head)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["head"] == 1.0 and rates["backbone layer 4"] == 0.5 and rates["backbone layer 0"] == 0.5**5
    assert set(freeze(model, backbone=True)) == backbone
    check_train_batch(model, 1, *kind.size)


@every_kind
def test_input_sizes_are_checked_before_training(kind):
    model = build_branches(kind.config(), num_branches=1)[0]
    check_input_size(model, *kind.size)
    if kind.takes_oblong:
        check_input_size(model, *kind.oblong)
        assert Branch(model).window is None
        return
    with pytest.raises(ValueError, match="positions are those of 64 x 64 pixels, got 32 x 128"):
        Branch(model)(torch.zeros(1, 3, 32, 128))  # equally many patches
    with pytest.raises(ValueError, match=r"75 x 53 pixels.*It accepts, for instance, 64 x 64, no oblong image"):
        check_input_size(model, *kind.oblong)
    assert Branch(model).window == (64, 64)


@every_kind
def test_a_checkpoint_keeps_all_but_its_classes(kind, tmp_path, caplog):
    source = speaking(kind)
    source.save_pretrained(tmp_path)
    kept, drawn = build_branches(str(tmp_path))
    names = backbone_parameters(kept)
    for name, tensor in source.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name
        if name in names or "running" in name or "num_batches" in name:
            assert torch.equal(drawn.state_dict()[name], tensor), name
    assert not torch.equal(drawn.class_predictor.weight, source.class_predictor.weight)
    assert "a new head is drawn" in caplog.text
    more = build_branches(str(tmp_path), num_branches=1, id2label=NAMES | {5: "bus"})[0]
    assert more.class_predictor.weight.shape[0] == 7 and more.config.id2label[5] == "bus"
    others = {name for name in source.state_dict() if "class_predictor" not in name and "criterion" not in name}
    assert all(torch.equal(more.state_dict()[name], source.state_dict()[name]) for name in others)
    renamed = build_branches(str(tmp_path), num_branches=1, id2label=NAMES | {4: "dog"})[0]
    assert not torch.equal(renamed.class_predictor.weight, source.class_predictor.weight)
    assert all(torch.equal(renamed.state_dict()[name], source.state_dict()[name]) for name in others)
    again = build_branches(str(tmp_path), num_branches=1, reinit_heads=True)[0]
    with torch.no_grad():
        assert Branch(again).eval()(torch.randn(1, 3, *kind.size)).std() < 5


def test_unsupported_models_are_named():
    with pytest.raises(ValueError, match=r"'oneformer', which needs a task text.*mask2former, maskformer, eomt"):
        build_branches(OneFormerConfig(), num_branches=1)
    with pytest.raises(ValueError, match="`backbone` 'some/vit': a vision transformer's weights cannot be loaded"):
        build_branches(BY_TYPE["eomt"].config(), num_branches=1, backbone="some/vit")
    four = BY_TYPE["mask2former"].config(num_labels=4)
    with pytest.raises(ValueError, match="Branches can only teach each other the same classes"):
        build_branches([BY_TYPE["maskformer"].config(), four])
    branch = Branch(build_branches(BY_TYPE["eomt"].config(), num_branches=1)[0])
    with pytest.raises(ValueError, match="needs a module that takes the backbone's feature maps"):
        branch(torch.zeros(2, 3, 64, 64), feature_dropout=0.5)
    branch = Branch(build_branches(BY_TYPE["mask2former"].config(), num_branches=1)[0]).eval()
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(branch(images, feature_dropout=0.5), branch(images))


@pytest.mark.parametrize("name", ["eomt", "eomt_dinov3"])
def test_eomt_trains_without_masked_attention_which_a_checkpoint_may_have(name):
    kind = BY_TYPE[name]
    config = kind.config()
    if name == "eomt_dinov3":
        config.pos_embed_rescale = None  # the positions' random scale in training
    model = build_branches(config, num_branches=1)[0]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        training, expected = Branch(model).train()(images), Branch(model).eval()(images)
        assert model.train().training and torch.equal(training, expected) and not model.attn_mask_probs.any()
        model.attn_mask_probs.fill_(1.0)
        masked = Branch(model).train()(images)
        scores = (model.train()(images), model.eval()(images))
    assert not torch.equal(masked, expected)
    assert torch.equal(*(one.masks_queries_logits for one in scores))
    assert AutoConfig.for_model(name).model_type == name  # known to the installed transformers


@pytest.mark.parametrize("name", ["mask2former", "eomt"])
@pytest.mark.parametrize("size", [(64, 64), (64, 100), (150, 90)])
def test_predictions_follow_the_formula_whole_and_in_windows(name, size):
    branch = Branch(speaking(BY_TYPE[name])).eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    window = {"mode": "sliding", "crop_size": (64, 64), "stride": (43, 43)}
    target = (size[0] + 7, size[1] * 2)

    def plain(x):
        """Any callable: full-size logits."""
        return branch(x)

    options = window if name == "eomt" else {}  # it only accepts 64 x 64
    with torch.no_grad():
        expected = predict_logits(plain, images, **options)
        torch.testing.assert_close(predict_logits(branch, images).exp(), expected.exp(), rtol=1e-3, atol=1e-5)
        if name == "mask2former" or size == (64, 64):
            scores = F.interpolate(branch.strided(images).values, size=target, mode="bilinear") + 1e-6
            ours = predict_logits(branch, images, target_size=target)
            torch.testing.assert_close(ours.exp(), scores / scores.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            predict_logits(branch, images, **window), predict_logits(plain, images, **window), rtol=1e-4, atol=1e-5
        )
        if name == "mask2former":
            total = 0
            for scale, flipped in itertools.product((1.0, 1.25), (False, True)):
                seen = F.interpolate(images, size=[round(side * scale) for side in size], mode="bilinear")
                values = branch.strided(seen.flip(-1) if flipped else seen).values
                scores = F.interpolate(values, size=size, mode="bilinear") + 1e-6
                scores = scores / scores.sum(1, keepdim=True)
                total = total + (scores.flip(-1) if flipped else scores) / 4
            found = predict_logits([branch, branch], images, scales=(1.0, 1.25), flip=True)
            torch.testing.assert_close(found.exp(), total, rtol=1e-3, atol=1e-5)
        else:
            two = {"scales": (1.0, 1.25), "flip": True}
            found, expected_of_two = (predict_logits([one, one], images, **two, **options) for one in (branch, plain))
            torch.testing.assert_close(found, expected_of_two, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(predict_logits(branch, images, **two), found, rtol=1e-4, atol=1e-5)
        several = predict_each([branch, branch], images, num_labels=5)
        assert len(several) == 3 and torch.equal(several[0].long(), expected.argmax(1))


def test_a_mixed_pair_has_the_same_interface():
    """SegFormer returns logits, Mask2Former scores; both are `StridedLogits` of the same size."""
    segformer = AutoConfig.for_model("segformer", num_labels=5, decoder_hidden_size=16, **SEGFORMER)
    models = build_branches([segformer, BY_TYPE["mask2former"].config()])
    said = [Branch(model).strided(torch.randn(2, 3, 64, 96)) for model in models]
    assert all(isinstance(one, StridedLogits) and one.shape == (2, 5, 64, 96) for one in said)
    assert [one.scores for one in said] == [False, True]
    assert isinstance(models[1], AutoModelForUniversalSegmentation._model_mapping[type(models[1].config)])
