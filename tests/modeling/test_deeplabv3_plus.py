"""DeepLabV3+: both heads against plain torch, strides, dilations, parameters, initialisation, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSemanticSegmentation, ResNetConfig, TimmBackboneConfig

from cps_hf.modeling import DeepLabV3PlusConfig, DeepLabV3PlusForSemanticSegmentation


def tiny(**arguments):
    arguments = {"backbone": "test_resnet", "aspp_channels": 12, "low_level_channels": 6, "num_labels": 4} | arguments
    return DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(**arguments))


def randomise(module):
    """Norm weights, biases and statistics other than 1 and 0, so that a missing norm is noticed."""
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            for tensor in (child.weight.data, child.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (child.bias.data, child.running_mean):
                tensor.normal_(0, 0.2)


def plain_head(weights, low, high, textbook, rates, align_corners):
    def conv(x, name, rate=None):
        weight = weights[f"{name}.weight"]
        padding = 0 if weight.shape[-1] == 1 else (rate or 1)
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=padding, dilation=rate or 1)

    def norm(x, name):
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)

    def block(x, name, rate=None):
        return F.relu(norm(conv(x, f"{name}.0", rate), f"{name}.1"))

    pooled = high.mean((2, 3), keepdim=True)
    if textbook:
        branches = [block(high, "pyramid.branches.0")]
        branches += [block(high, f"pyramid.branches.{i + 1}", rate) for i, rate in enumerate(rates)]
        branches.append(block(pooled, "pyramid.pooled").expand(-1, -1, *high.shape[2:]))
        x = block(torch.cat(branches, 1), "pyramid.projection")
    else:
        maps = [conv(high, "pyramid.convs.0")]
        maps += [conv(high, f"pyramid.convs.{i + 1}", rate) for i, rate in enumerate(rates)]
        x = conv(F.leaky_relu(norm(torch.cat(maps, 1), "pyramid.norm.0"), 0.01), "pyramid.projection")
        pooled = F.leaky_relu(norm(conv(pooled, "pyramid.pooled_conv"), "pyramid.pooled_norm.0"), 0.01)
        x = F.leaky_relu(norm(x + conv(pooled, "pyramid.pooled_projection"), "pyramid.output_norm.0"), 0.01)
    x = F.interpolate(x, size=low.shape[2:], mode="bilinear", align_corners=align_corners)
    x = torch.cat([x, block(low, "low_level")], 1)
    return conv(block(block(x, "decoder.0"), "decoder.1"), "classifier")


@pytest.mark.parametrize(
    "head, rates", [("original", [6, 12, 18]), ("textbook", [6, 12, 18]), ("textbook", [2, 3, 5])]
)
def test_the_head_equals_plain_torch(head, rates):
    torch.manual_seed(0)
    model = tiny(head=head, atrous_rates=rates).double().eval()
    randomise(model.decode_head)
    low_channels, high_channels = model.backbone.channels
    low = torch.randn(2, low_channels, 21, 34, dtype=torch.float64)
    high = torch.randn(2, high_channels, 6, 9, dtype=torch.float64)
    weights = model.decode_head.state_dict()
    expected = plain_head(weights, low, high, head == "textbook", rates, align_corners=head == "original")
    assert torch.allclose(model.decode_head(low, high), expected, atol=1e-10)
    other_corners = plain_head(weights, low, high, head == "textbook", rates, align_corners=head != "original")
    assert not torch.allclose(expected, other_corners, atol=1e-3)


def test_the_release_network_has_its_published_number_of_parameters():
    model = DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(num_labels=21))
    assert sum(parameter.numel() for parameter in model.parameters()) == 40_475_957
    assert model.config.align_corners and model.config.output_stride == 16


@pytest.mark.parametrize("output_stride, stage_3, stage_4", [(16, 1, [2, 4, 8]), (8, 2, [4, 8, 16])])
def test_output_stride_and_dilations_are_those_of_the_release(output_stride, stage_3, stage_4):
    model = DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(num_labels=3, output_stride=output_stride)).eval()
    network = model.backbone._backbone
    assert {block.conv2.dilation for block in network.layer3} == {(stage_3, stage_3)}
    assert [block.conv2.dilation[0] for block in network.layer4] == stage_4
    assert [block.conv2.padding[0] for block in network.layer4] == stage_4
    low, high = model.backbone(torch.zeros(1, 3, 64, 96)).feature_maps
    assert low.shape == (1, 256, 16, 24)
    assert high.shape == (1, 2048, 64 // output_stride, 96 // output_stride)
    assert model(torch.zeros(1, 3, 64, 96)).logits.shape == (1, 3, 16, 24)


def test_deep_stem_and_depth_follow_the_timm_name():
    with torch.device("meta"):
        model = DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(backbone="resnet101s"))
    network = model.backbone._backbone
    assert [m.out_channels for m in network.conv1 if isinstance(m, torch.nn.Conv2d)] == [64, 64, 128]
    assert len(network.layer3) == 23 and model.config.multi_grid == [1, 2, 4]


def test_multi_grid_is_optional():
    def dilations(**arguments):
        with torch.device("meta"):
            model = DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(backbone="resnet50", **arguments))
        return [block.conv2.dilation[0] for block in model.backbone._backbone.layer4]

    assert dilations(head="textbook") == [1, 2, 2]  # timm's own: its first block has half of the others'
    assert dilations(head="textbook", multi_grid=[1, 2, 1]) == [2, 4, 2]
    assert dilations(multi_grid=[1, 1, 1]) == [2, 2, 2]


def test_the_head_is_drawn_kaiming_and_timm_keeps_its_own_initialisation():
    torch.manual_seed(0)
    model = tiny(aspp_channels=128)
    conv = model.decode_head.pyramid.convs[1]
    fan_in = conv.weight[0].numel()
    assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
    bias, bound = model.decode_head.classifier.bias, 128**-0.5
    assert 0 < bias.abs().max() <= bound  # torch's default, neither zero nor kaiming
    stem = model.backbone._backbone.conv1
    stem = stem if isinstance(stem, torch.nn.Conv2d) else stem[0]
    assert stem.weight.std().item() != pytest.approx(0.02, rel=0.1)  # transformers' default draw


def test_the_built_in_loss_is_the_cross_entropy_at_label_size():
    torch.manual_seed(0)
    model = tiny().eval()
    images, labels = torch.randn(2, 3, 48, 64), torch.randint(0, 4, (2, 48, 64))
    labels[0, :20] = 255
    output = model(images, labels=labels)
    logits = F.interpolate(output.logits, size=(48, 64), mode="bilinear", align_corners=True)
    expected = -logits.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0][labels != 255].mean()
    assert torch.allclose(output.loss, expected)
    assert torch.equal(model(images, return_dict=False)[0], output.logits)


def test_a_configuration_survives_saving(tmp_path):
    swin = AutoConfig.for_model("swin", embed_dim=8, out_features=["stage1", "stage4"])
    for config in (
        DeepLabV3PlusConfig(backbone="resnet101s", output_stride=8, num_labels=7),
        DeepLabV3PlusConfig(head="textbook", dropout=0.3, multi_grid=[1, 1, 1]),
        DeepLabV3PlusConfig(backbone_config=swin, align_corners=False),
    ):
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is DeepLabV3PlusConfig
        for name in ("backbone", "output_stride", "head", "multi_grid", "atrous_rates", "dropout", "align_corners"):
            assert getattr(loaded, name) == getattr(config, name), name
        assert loaded.num_labels == config.num_labels
        assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()
        assert copy.deepcopy(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"head": "aspp"}, "`head` must be one of original, textbook, got 'aspp'"),
        ({"output_stride": 4}, "`output_stride` must be 8, 16 or 32, got 4"),
        ({"atrous_rates": [6, 12]}, "`atrous_rates` must be three"),
        ({"dropout": 0.1}, "original head has no dropout"),
        ({"backbone": "convnext_nano", "multi_grid": [1, 2, 4]}, "`multi_grid` is for timm's ResNets"),
        ({"backbone_config": {"model_type": "nothing"}}, "a `model_type` that transformers knows, got 'nothing'"),
        ({"backbone_config": ResNetConfig(), "output_stride": 8}, "are for timm backbones"),
        (
            {"backbone": "resnet50", "backbone_config": TimmBackboneConfig(backbone="resnet18")},
            "`backbone` is 'resnet50', but `backbone_config` says 'resnet18'",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepLabV3PlusConfig(**arguments)


def test_a_backbone_without_the_needed_stages_is_an_error():
    one_stage = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic")
    with pytest.raises(ValueError, match="backbone gives 1. Name two stages in its `out_features`, such as 'stage1'"):
        tiny(backbone=None, backbone_config=one_stage)
    deep = TimmBackboneConfig(backbone="test_resnet", out_indices=[2, 4])
    with pytest.raises(ValueError, match=r"stride 4 first.*strides \[8, 32\]"):
        tiny(backbone=None, backbone_config=deep)
    with torch.device("meta"), pytest.raises(ValueError, match=r"one factor per block of the last stage: 2"):
        DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(backbone="resnet18", multi_grid=[1, 2, 4]))


def test_only_missing_heads_are_drawn(tmp_path):
    model = tiny()
    state = model.state_dict()
    head_only = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    model.save_pretrained(tmp_path / "a", state_dict=head_only)
    with pytest.raises(ValueError, match="lacks weights of the timm backbone 'test_resnet'"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "a")
    backbone_only = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    model.save_pretrained(tmp_path / "b", state_dict=backbone_only)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "b")
    for name, tensor in loaded.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.startswith("backbone."):
            assert torch.equal(tensor, state[name]), name
        elif tensor.ndim == 4:
            assert tensor.std() > 0.01, name
