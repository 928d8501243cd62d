"""A branch returns full-size logits; branches are built from configurations, checkpoints and backbones."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    DPTConfig,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
    SwinConfig,
    UperNetConfig,
)

from cps_hf.modeling import Branch, DeepLabV3PlusConfig, HRNetConfig, build_branches, load_backbone_weights

NAMES = {0: "road", 1: "car", 2: "sky"}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}


def segformer(num_labels=3, **arguments):
    return SegformerConfig(
        num_labels=num_labels,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
        **arguments,
    )


def upernet(**arguments):
    backbone = ResNetConfig(**RESNET, out_features=STAGES)
    return UperNetConfig(hidden_size=16, auxiliary_channels=8, backbone_config=backbone, num_labels=3, **arguments)


def deeplab(**arguments):
    return DeepLabV3PlusConfig(backbone="test_resnet", aspp_channels=16, num_labels=3, **arguments)


def same(a, b, part):
    """Whether all weights of two models whose names start with `part` are equal; None: only some are."""
    equal = {torch.equal(p, q) for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True) if part in n}
    return equal.pop() if len(equal) == 1 else None


def said(caplog):
    """The messages of our own logger; transformers has its own reports."""
    return [record.message for record in caplog.records if record.name == "cps_hf"]


# --- Branch


@pytest.mark.parametrize("config", [segformer, deeplab])
def test_logits_are_resized_to_the_input_with_the_models_own_corners(config):
    model = build_branches(config(), num_branches=1)[0].eval()
    images = torch.randn(2, 3, 50, 70)
    logits = Branch(model)(images)
    raw = model(images).logits
    align_corners = config is deeplab  # its original head
    assert raw.shape[-2:] != (50, 70)
    assert torch.equal(logits, F.interpolate(raw, size=(50, 70), mode="bilinear", align_corners=align_corners))
    other = F.interpolate(raw, size=(50, 70), mode="bilinear", align_corners=not align_corners)
    assert not torch.allclose(logits, other, atol=1e-5)


def test_half_precision_is_raised_before_resizing(monkeypatch):
    model = build_branches(upernet(), num_branches=1)[0].eval()
    images = torch.randn(1, 3, 32, 64)
    expected = model(images).logits
    branch = Branch(model)
    half = Branch(build_branches(segformer(), num_branches=1, dtype=torch.bfloat16)[0].eval())
    assert half(images.bfloat16()).dtype == torch.float32
    real = F.interpolate
    monkeypatch.setattr("cps_hf.modeling.branches.F", None)  # any use of it would fail
    assert torch.equal(branch(images), expected)
    assert F.interpolate is real


def maps_entering_the_head(model, name, images, **how):
    """The tensors that reach the head, after the branch's own hook."""
    seen = []
    branch = Branch(model)
    handle = getattr(model, name).register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(flat([*args, *kwargs.values()])), with_kwargs=True
    )
    branch(images, **how)
    handle.remove()
    return [tensor.clone() for tensor in seen]


def flat(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from flat(value)


@pytest.mark.parametrize(
    "config, head", [(segformer, "decode_head"), (upernet, "decode_head"), (deeplab, "decode_head")]
)
def test_feature_dropout_drops_whole_channels(config, head):
    torch.manual_seed(0)
    model = build_branches(config(), num_branches=1)[0].eval()
    images = torch.randn(2, 3, 64, 96)
    clean = maps_entering_the_head(model, head, images)
    dropped = maps_entering_the_head(model, head, images, feature_dropout=0.25)
    shares = []
    for before, after in zip(clean, dropped, strict=True):
        gone = (after == 0).flatten(2).all(2) & (before != 0).flatten(2).any(2)
        kept = ~gone[..., None, None]
        assert torch.allclose(after, before / 0.75 * kept, atol=1e-5)
        shares.append(gone.float().flatten())
    assert 0.1 < torch.cat(shares).mean() < 0.4
    assert not torch.equal(dropped[-1][0] == 0, dropped[-1][1] == 0)  # each image has its own draw
    assert all(torch.equal(a, b) for a, b in zip(clean, maps_entering_the_head(model, head, images), strict=True))


def changes(clean, dropped):
    """The factor on each channel of each image: (B, channels) of each map, as tokens or not."""
    for before, after in zip(clean, dropped, strict=True):
        if before.ndim == 3:  # (B, tokens, channels)
            before, after = before.transpose(1, 2), after.transpose(1, 2)
        before, after = before.flatten(2), after.flatten(2)
        at = before.abs().argmax(2, keepdim=True)
        largest = before.gather(2, at)
        factor = (after.gather(2, at) / largest).squeeze(2)
        assert torch.allclose(after, before * factor[..., None], atol=1e-5)
        yield factor


def test_complementary_dropout_is_complementary():
    torch.manual_seed(0)
    model, head = build_branches(segformer(), num_branches=1)[0].eval(), "decode_head"
    images = torch.randn(10, 3, 64, 64)  # five pairs
    clean = maps_entering_the_head(model, head, images)
    dropped = maps_entering_the_head(model, head, images, complementary_dropout=0.5)
    left_alone = set()
    for factors in changes(clean, dropped):
        first, second = factors.chunk(2)
        torch.testing.assert_close(first + second, torch.full_like(first, 2.0))
        whole = ((first - 1).abs() < 1e-4).all(1)
        assert whole.sum() == 2  # of five pairs half, rounded down
        found = first[~whole].round()
        assert torch.allclose(first[~whole], found, atol=1e-4) and set(found.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(found[0], found[1]) and 0.2 < (found == 0).float().mean() < 0.8
        left_alone.add(tuple(whole.tolist()))
    assert len(left_alone) == 1  # the same pairs in all maps
    assert all(torch.equal(a, b) for a, b in zip(clean, maps_entering_the_head(model, head, images), strict=True))


def test_complementary_dropout_shares_draws_by_channels():
    """Maps of a vision transformer, as tokens (B, tokens, channels) or as maps."""
    seen = []

    class Head(torch.nn.Module):
        def forward(self, maps, *, low_level, size):
            seen.append((*maps, low_level, size))
            return maps[0].new_zeros(8, 3, 4, 4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.weight = Head(), torch.nn.Parameter(torch.ones(1))
            self.config = None

        def forward(self, pixel_values):
            maps = [torch.ones(8, 9, 32), torch.ones(8, 9, 32), torch.ones(8, 32, 2, 2)]
            logits = self.head(maps, low_level=torch.ones(8, 48, 4, 4), size=(2, 2))
            return type("Output", (), {"logits": logits})

    Branch(Model())(torch.zeros(8, 3, 4, 4), complementary_dropout=0.5)
    *maps, size = seen[0]
    first, second, third, low_level = changes([torch.ones_like(one) for one in maps], maps)
    assert size == (2, 2) and torch.equal(first, second) and torch.equal(first, third)
    assert torch.equal((first == 1).all(1), (low_level == 1).all(1)) and (first == 1).all(1).sum() == 4
    assert not torch.equal(first, low_level[:, :32])


@pytest.mark.parametrize("share, dropped", [(0.25, 2), (0.5, 3), (1.0, 5)])
def test_complementary_dropout_drops_the_given_share(share, dropped):
    torch.manual_seed(0)
    model = build_branches(segformer(), num_branches=1)[0].eval()
    images = torch.randn(10, 3, 64, 64)
    clean = maps_entering_the_head(model, "decode_head", images)
    factors = [*changes(clean, maps_entering_the_head(model, "decode_head", images, complementary_dropout=share))]
    assert ((factors[0] - 1).abs() > 0.5).any(1).sum() == 2 * dropped


def test_an_invalid_complementary_dropout_is_named():
    branch = Branch(build_branches(segformer(), num_branches=1)[0].eval())
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"`complementary_dropout` must be a share in \[0, 1\], got 1.5"):
        branch(images, complementary_dropout=1.5)
    with pytest.raises(ValueError, match="an even number, got 1"):
        branch(images[:1], complementary_dropout=0.5)
    with pytest.raises(ValueError, match="cannot be combined"):
        branch(images, complementary_dropout=0.5, feature_dropout=0.5)


def test_feature_dropout_survives_copies():
    model = build_branches(segformer(), num_branches=1)[0].eval()
    branch, images = Branch(model), torch.randn(1, 3, 64, 64)
    clean, expected = branch(images), model(images).logits
    twin = copy.deepcopy(branch)
    torch.manual_seed(1)
    dropped = branch(images, feature_dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(twin(images, feature_dropout=0.5), dropped) and not torch.allclose(dropped, clean)
    assert torch.equal(model(images).logits, expected)
    with pytest.raises(RuntimeError):
        branch(torch.zeros(1, 4, 8, 8), feature_dropout=0.5)  # an error inside leaves nothing switched on
    assert torch.equal(branch(images), clean)


@pytest.mark.slow
def test_a_compiled_branch_drops_features_without_a_graph_break():
    branch = Branch(build_branches(segformer(), num_branches=1)[0].eval())
    compiled, images = torch.compile(branch, backend="eager", fullgraph=True), torch.randn(4, 3, 64, 64)
    for name, dropout in [("feature", 0.0), ("feature", 0.5), ("feature", 0.0), ("complementary", 0.5)]:
        how = {f"{name}_dropout": dropout}
        torch.manual_seed(3)
        expected = branch(images, **how)
        torch.manual_seed(3)
        assert torch.allclose(compiled(images, **how), expected, atol=1e-6)


def test_only_feature_dropout_needs_a_known_head():
    model = build_branches(segformer(), num_branches=1)[0].eval()
    model.my_own, model.decode_head = model.decode_head, None
    del model.decode_head

    class Renamed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.my_own, self.config = model.segformer, model.my_own, model.config

        def forward(self, pixel_values):
            maps = self.backbone(pixel_values, output_hidden_states=True).hidden_states
            return type("Output", (), {"logits": self.my_own(maps)})

    branch = Branch(Renamed().eval())
    assert branch(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="Renamed has backbone, my_own"):
        branch(torch.zeros(1, 3, 64, 64), feature_dropout=0.5)
    with pytest.raises(ValueError, match="complementary_dropout needs a module"):
        branch(torch.zeros(2, 3, 64, 64), complementary_dropout=0.5)
    with pytest.raises(ValueError, match=r"a probability in \[0, 1\), got 1"):
        branch(torch.zeros(1, 3, 64, 64), feature_dropout=1)


# --- build_branches


def test_a_configuration_is_drawn_wholly_for_each_branch_and_reproducibly(caplog):
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        a, b = build_branches(segformer(), seed=1)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))  # no global numbers were used
    weights = [(n, p, q) for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True) if p.ndim > 1]
    assert len(weights) > 20 and not any(torch.equal(p, q) for _, p, q in weights)
    again, third = build_branches([segformer(), segformer()], seed=1), build_branches(segformer(), seed=2)[0]
    assert same(a, again[0], "") and same(b, again[1], "")
    assert not torch.equal(a.decode_head.classifier.weight, third.decode_head.classifier.weight)
    assert said(caplog) == [
        f"branch {i}, SegformerForSemanticSegmentation: everything drawn (seed 1, branch {i})." for i in (0, 1)
    ]
    assert a.training and b.training


def test_branches_share_the_backbone_and_have_own_heads(tmp_path, caplog):
    SegformerForImageClassification(segformer()).save_pretrained(tmp_path)  # the kind of nvidia/mit-b0
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        a, b = build_branches(str(tmp_path), id2label=NAMES)
    source = SegformerModel.from_pretrained(tmp_path)
    assert same(a, b, "segformer.") is True and same(a.segformer, source, "") is True
    for name, parameter in a.decode_head.named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(parameter, b.decode_head.get_parameter(name)), name
    fuse = a.decode_head.linear_fuse.weight
    assert fuse.std().item() == pytest.approx((2 / fuse[0].numel()) ** 0.5, rel=0.15)
    assert a.decode_head.classifier.bias.abs().max() > 0  # torch's default
    assert (a.decode_head.batch_norm.weight == 1).all() and (a.decode_head.batch_norm.bias == 0).all()
    assert said(caplog)[1].startswith("branch 1, SegformerForSemanticSegmentation: backbone from")
    assert a.config.id2label == NAMES and a.config.label2id == {name: index for index, name in NAMES.items()}


def test_a_full_checkpoint_is_kept_or_gets_a_new_head(tmp_path, caplog):
    model = SegformerForSemanticSegmentation(segformer())
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        a, b = build_branches(tmp_path)
        c, d = build_branches(tmp_path, reinit_heads=True)
    assert same(a, model, "")
    assert same(c, model, "segformer.") and same(d, model, "segformer.")
    assert same(b, model, "segformer.")  # otherwise the second branch would equal the first
    for one, other in ((b, model), (c, model), (d, model), (c, d)):
        for name, parameter in one.decode_head.named_parameters():
            if parameter.ndim > 1:  # convolutions, and SegFormer's linear projections
                assert not torch.equal(parameter, other.decode_head.get_parameter(name)), name
    messages = said(caplog)
    assert messages[0].endswith(f"all weights from {tmp_path}.")
    assert "branch 1, SegformerForSemanticSegmentation: its head would be that of branch 0" in messages[2]
    assert messages[4].endswith("head drawn by kaiming normal (seed 0, branch 1).")


def test_other_classes_only_replace_class_weights(tmp_path, caplog):
    model = SegformerForSemanticSegmentation(segformer(num_labels=7))
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        a, b = build_branches(tmp_path, id2label=NAMES)
    assert a.config.num_labels == 3 and a.decode_head.classifier.weight.shape[0] == 3
    assert not torch.equal(a.decode_head.classifier.weight, b.decode_head.classifier.weight)
    assert torch.equal(a.decode_head.linear_fuse.weight, model.decode_head.linear_fuse.weight)
    assert same(a, b, "segformer.") and same(a.segformer, model.segformer, "")
    assert "except for the class count (now 3)" in said(caplog)[0]
    assert "decode_head.classifier.bias, decode_head.classifier.weight" in said(caplog)[0]


@pytest.mark.parametrize("config", [deeplab, lambda: HRNetConfig("hrnet_w18_small", num_labels=3)])
def test_a_saved_branch_of_ours_starts_others_with_other_classes(config, tmp_path):
    model = build_branches(config(), num_branches=1)[0]
    model.save_pretrained(tmp_path)
    a, b = build_branches(tmp_path, id2label={0: "sky", 1: "rest"})
    assert same(a, b, "backbone.") is True and a.decode_head.classifier.weight.shape[0] == 2
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in a.named_parameters() if ".classifier." not in n)
    assert not torch.equal(a.decode_head.classifier.weight, b.decode_head.classifier.weight)


def test_parameters_are_float32_whatever_the_checkpoint_has(tmp_path):
    SegformerForSemanticSegmentation(segformer()).bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in build_branches(tmp_path)[0].parameters()} == {torch.float32}
    assert {p.dtype for p in build_branches(tmp_path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_auxiliary_heads_are_off_and_255_is_ignored_in_both_spellings(tmp_path):
    a, b = build_branches([upernet(loss_ignore_index=0), segformer(semantic_loss_ignore_index=7)])
    assert a.auxiliary_head is None and a.config.use_auxiliary_head is False
    assert a.config.loss_ignore_index == 255 and b.config.semantic_loss_ignore_index == 255
    with_head = AutoModelForSemanticSegmentation.from_config(upernet())
    assert with_head.auxiliary_head is not None
    with_head.save_pretrained(tmp_path)
    assert build_branches(tmp_path)[0].auxiliary_head is None


def test_a_folder_with_a_configuration_only_is_drawn(tmp_path, caplog):
    segformer().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        build_branches([tmp_path, tmp_path / "config.json"])
    assert ["everything drawn" in message for message in said(caplog)] == [True, True]


def test_mixed_pairs_more_than_two_and_given_models():
    given = AutoModelForSemanticSegmentation.from_config(segformer())
    before = copy.deepcopy(given.state_dict())
    branches = build_branches([given, upernet(), deeplab()])
    assert branches[0] is given and len(branches) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert len(build_branches(segformer(), num_branches=3)) == 3


# --- backbone weights


def trained_like(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 1.5)
    return model


def test_both_branches_share_a_backbone_of_transformers(tmp_path):
    source = trained_like(ResNetModel(ResNetConfig(**RESNET)))
    source.save_pretrained(tmp_path)
    a, b = build_branches(upernet(), backbone=tmp_path)
    assert same(a, b, "backbone.") is True and same(a, b, "decode_head.classifier.weight") is False
    assert torch.equal(a.backbone.embedder.embedder.convolution.weight, source.embedder.embedder.convolution.weight)
    assert torch.equal(
        b.backbone.embedder.embedder.normalization.running_mean, source.embedder.embedder.normalization.running_mean
    )


def test_dinov2_weights_fit_the_dpt_head_on_a_backbone_without_registers(tmp_path, caplog):
    vit = {"image_size": 56, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    source = Dinov2Model(Dinov2Config(**vit))
    source.save_pretrained(tmp_path)
    backbone = Dinov2WithRegistersConfig(
        **vit, num_register_tokens=0, out_features=STAGES, reshape_hidden_states=False
    )
    dpt = {"backbone_config": backbone, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 16}
    config = AutoConfig.for_model("tipsv2_dpt", **dpt)
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        a, b = build_branches(config, backbone=tmp_path, id2label=NAMES)
    logits = Branch(a)(torch.randn(1, 3, 56, 84))
    assert logits.shape == (1, 3, 56, 84) and same(a, b, "backbone.") is True
    # A head without norm layers starts with torch's default: uniform in +-1 / sqrt(fan-in)
    weight = a.neck.convs[3].weight
    bound = weight[0].numel() ** -0.5
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert logits.std() < 1 and not torch.equal(weight, b.neck.convs[3].weight)
    assert "head drawn by torch's default, as it has no norm layers (seed 0, branch 1)." in said(caplog)[1]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="cps_hf"):
        drawn = build_branches(config, num_branches=1)[0]
    assert drawn.neck.convs[3].weight.abs().max() <= bound  # from a configuration too
    assert said(caplog) == [
        "branch 0, Tipsv2DptForSemanticSegmentation: everything drawn, head drawn by torch's default, as it has no "
        "norm layers (seed 0, branch 0)."
    ]
    images = torch.randn(1, 3, 56, 56)  # at other sizes the two resize the position embeddings slightly differently
    features = a.backbone.eval()(images).feature_maps[-1]
    assert torch.allclose(features, source.eval()(images).last_hidden_state, atol=1e-4)


def test_attention_can_be_chosen_for_the_backbone_alone():
    vit = {"image_size": 56, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = UperNetConfig(hidden_size=16, backbone_config=Dinov2Config(**vit, out_features=STAGES))
    for chosen in ("eager", "sdpa"):
        model = build_branches(config, num_branches=1, attn_implementation={"backbone_config": chosen})[0]
        assert model.backbone.config._attn_implementation == chosen
    with pytest.raises(ValueError, match="For the backbone alone, pass"):
        build_branches(config, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="For the backbone alone, pass.*nothing_such"):
        build_branches(config, attn_implementation="nothing_such")


@pytest.mark.parametrize(
    "name, config",
    [("test_resnet", deeplab), ("hrnet_w18_small", lambda: HRNetConfig("hrnet_w18_small", num_labels=3))],
)
def test_both_branches_share_timm_weights_and_statistics(name, config, tmp_path):
    source = trained_like(timm.create_model(name)).state_dict()
    torch.save(source, tmp_path / "weights.pth")
    a, b = build_branches(config(), backbone=tmp_path / "weights.pth")
    features = a.backbone._backbone.state_dict()
    shared = [key for key in features if key in source]
    assert len(shared) == len(features) and all(torch.equal(features[key], source[key]) for key in shared)
    assert any(key.endswith("running_mean") and features[key].any() for key in shared)
    assert same(a, b, "backbone.") is True
    assert not torch.equal(a.decode_head.classifier.weight, b.decode_head.classifier.weight)


def test_backbone_weights_for_one_branch_of_two(tmp_path):
    torch.save(trained_like(timm.create_model("test_resnet")).state_dict(), tmp_path / "weights.pth")
    a, b = build_branches([deeplab(), deeplab()], backbone=[None, tmp_path / "weights.pth"])
    means = [m.backbone._backbone.bn1.running_mean.any().item() for m in (a, b)]
    assert means == [False, True]


def test_backbone_weights_that_do_not_fit_are_errors(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "untrained.pth")
    model = build_branches(deeplab(), num_branches=1)[0]
    with pytest.raises(ValueError, match="statistics that are all zero"):
        load_backbone_weights(model, tmp_path / "untrained.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth` lacks \d+ weights of timm's 'test_resnet'"):
        load_backbone_weights(model, tmp_path / "other.pth")
    partly = {k: v for k, v in timm.create_model("test_resnet").state_dict().items() if "layer3.0.conv2" not in k}
    torch.save(partly, tmp_path / "partly.pth")
    with pytest.raises(ValueError, match=r"lacks 1 weights of timm's 'test_resnet': layer3.0.conv2.weight"):
        load_backbone_weights(model, tmp_path / "partly.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="timm cannot load the weights"):
        load_backbone_weights(model, tmp_path / "text.pth")
    with pytest.raises(ValueError, match="a1_in1k` do not belong to the backbone, timm's 'test_resnet'"):
        load_backbone_weights(model, "timm/resnet50.a1_in1k")
    with pytest.raises(ValueError, match="is a folder"):
        load_backbone_weights(model, tmp_path)
    SegformerModel(segformer()).save_pretrained(tmp_path / "segformer")
    transformer = build_branches(upernet(), num_branches=1)[0]
    with pytest.raises(ValueError, match="segformer.*ResNetBackbone"):
        load_backbone_weights(transformer, tmp_path / "segformer")
    ResNetModel(ResNetConfig(**{**RESNET, "hidden_sizes": [4, 8, 8, 8]})).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="narrow.*this kind and size"):
        load_backbone_weights(transformer, tmp_path / "narrow")


# --- errors


def test_sources_that_cannot_be_loaded_say_why(tmp_path):
    with pytest.raises(ValueError, match="`someone/no-such-model` is neither a folder here nor"):
        build_branches("someone/no-such-model")
    with pytest.raises(ValueError, match="has no config.json"):
        build_branches(tmp_path)
    with pytest.raises(ValueError, match="`models` is empty"):
        build_branches([])
    with pytest.raises(ValueError, match="got int"):
        build_branches([3])
    with pytest.raises(ValueError, match="has 2 entries, `num_branches` is 3"):
        build_branches([segformer(), segformer()], num_branches=3)
    with pytest.raises(ValueError, match="indices \\[0, 2\\]"):
        build_branches(segformer(), id2label={0: "a", 2: "b"})


def test_models_without_a_segmentation_head_are_rejected(tmp_path):
    ResNetModel(ResNetConfig(**RESNET)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'resnet', which has no semantic segmentation head.*as `backbone`"):
        build_branches(tmp_path)


def test_a_backbone_in_place_of_a_checkpoint_is_not_silently_dropped(tmp_path):
    model = AutoModelForSemanticSegmentation.from_config(upernet())
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="has no weight of the backbone of UperNetForSemanticSegmentation"):
        build_branches(tmp_path)


def test_a_backbone_without_the_needed_stages_is_rejected():
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 2], out_features=["stage4"])
    with pytest.raises(
        ValueError, match="cannot be built.*stages that the head needs.*DeepLabV3\\+ needs a low-level"
    ):
        build_branches(DeepLabV3PlusConfig(backbone_config=swin))
    with pytest.raises(ValueError, match="DPTForSemanticSegmentation ignores `backbone_config`"):
        build_branches(DPTConfig(backbone_config=ResNetConfig(out_features=STAGES), is_hybrid=False))


def test_branches_with_different_classes_are_rejected():
    with pytest.raises(ValueError, match="branch 0 has 3, branch 1 has 4"):
        build_branches([segformer(), segformer(num_labels=4)])
    with pytest.raises(ValueError, match="first at 0: 'road' against 'sky'"):
        build_branches(
            [build_branches(segformer(), id2label=NAMES)[0], segformer(id2label={0: "sky", 1: "c", 2: "d"})]
        )
    given = AutoModelForSemanticSegmentation.from_config(segformer())
    with pytest.raises(ValueError, match="`id2label` has 2, branch 0 has 3"):
        build_branches([given], id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="same model object"):
        build_branches([given, given])
    with pytest.raises(ValueError, match="a model object is used unchanged"):
        build_branches([given], reinit_heads=True)


def test_names_under_text_keys_are_the_same_classes():
    models = build_branches(segformer(), id2label=NAMES)
    for model in models:
        model.config.id2label = {str(index): name for index, name in NAMES.items()}
    assert build_branches(models) == models


def test_the_ignored_label_cannot_be_a_class():
    names = {index: f"class {index}" for index in range(256)}
    (model,) = build_branches(segformer(), id2label={i: names[i] for i in range(255)}, num_branches=1)
    assert model.config.num_labels == 255
    for models, id2label in ((segformer(), names), (segformer(num_labels=256), None)):
        with pytest.raises(ValueError, match="at most 255 classes, got 256.*Merge classes"):
            build_branches(models, id2label=id2label)
