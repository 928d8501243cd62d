"""HRNet: its streams are timm's, its head is plain torch's, its size the published one."""

import pytest
import timm
import torch
import torch.nn.functional as F

from cps_hf.modeling import HRNetConfig, HRNetForSemanticSegmentation


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HRNetForSemanticSegmentation(HRNetConfig(backbone="hrnet_w18_small", num_labels=4)).eval()


def test_the_streams_are_timms(model):
    reference = timm.create_model("hrnet_w18_small", features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    reference.load_state_dict(model.backbone._backbone.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        streams, expected = model.backbone(images).feature_maps, reference.eval()(images)
    assert [tuple(stream.shape[2:]) for stream in streams] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(streams, expected, strict=True))


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_head_equals_plain_torch(align_corners):
    torch.manual_seed(0)
    config = HRNetConfig(backbone="hrnet_w18_small", num_labels=4, align_corners=align_corners)
    head = HRNetForSemanticSegmentation(config).decode_head.double().eval()
    norm = head.fuse[1]
    norm.weight.data.uniform_(0.5, 1.5), norm.bias.data.normal_(), norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    channels = [16, 32, 64, 128]
    assert head.fuse[0].in_channels == sum(channels)
    streams = [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes, strict=True)]
    joined = torch.cat(
        [F.interpolate(s, size=(16, 24), mode="bilinear", align_corners=align_corners) for s in streams], 1
    )
    x = torch.einsum("oc,bchw->bohw", head.fuse[0].weight[:, :, 0, 0], joined)
    x = x + head.fuse[0].bias[:, None, None]
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    weight, bias = head.classifier.weight[:, :, 0, 0], head.classifier.bias
    expected = torch.einsum("oc,bchw->bohw", weight, x.clamp(min=0)) + bias[:, None, None]
    assert torch.allclose(head(streams), expected, atol=1e-10)


def test_hrnet_w48_has_the_published_streams_and_parameters():
    with torch.device("meta"):
        model = HRNetForSemanticSegmentation(HRNetConfig(num_labels=19))
    assert model.decode_head.fuse[0].in_channels == 48 + 96 + 192 + 384
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(65.86, abs=0.01)


def test_the_built_in_loss_is_the_cross_entropy_at_label_size(model):
    images, labels = torch.randn(1, 3, 32, 64), torch.randint(0, 4, (1, 32, 64))
    output = model(images, labels=labels)
    logits = F.interpolate(output.logits, size=(32, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(output.loss, F.cross_entropy(logits, labels))
    assert output.logits.shape == (1, 4, 8, 16)


def test_an_unsupported_size_says_what_to_pad_to(model):
    with pytest.raises(ValueError, match="multiples of 32, got 100 x 64: pad to 128 x 64"):
        model(torch.zeros(1, 3, 100, 64))


def test_another_backbone_is_an_error():
    with pytest.raises(ValueError, match="must be one of timm's HRNets"):
        HRNetConfig(backbone="resnet50")
