"""The DPT head on a plain vision transformer: its forward pass is plain torch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.architectures import DINOV2, DPT, STAGES
from transformers import AutoConfig, Dinov2Config, SwinConfig

from cps_hf.modeling import ViTDPTConfig, ViTDPTForSemanticSegmentation


def config(**changes):
    return ViTDPTConfig(
        backbone_config=Dinov2Config(**DINOV2), num_labels=3, **{**DPT, "neck_hidden_sizes": [4, 6, 8, 10], **changes}
    )


def resized(maps, size, align_corners):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_head_equals_plain_torch(align_corners):
    torch.manual_seed(0)
    model = ViTDPTForSemanticSegmentation(config(align_corners=align_corners)).double()
    w = {name.removeprefix("decode_head."): p for name, p in model.named_parameters() if "decode_head" in name}
    used = set()

    def conv(x, name, **how):
        used.update(key for key in w if key.rpartition(".")[0] == name)
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **how)

    def grown(x, name, factor):
        used.update(key for key in w if key.rpartition(".")[0] == name)
        return F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=factor)

    def unit(x, name):
        return x + conv(conv(x.relu(), f"{name}.conv1", padding=1).relu(), f"{name}.conv2", padding=1)

    maps = [torch.randn(2, 16, 3, 5, dtype=torch.float64) for _ in range(4)]
    first, second, third, fourth = (conv(one, f"projections.{level}") for level, one in enumerate(maps))
    levels = [grown(first, "resizes.0", 4), grown(second, "resizes.1", 2), third]
    levels.append(conv(fourth, "resizes.3", stride=2, padding=1))
    a, b, c, d = (conv(one, f"levels.{level}", padding=1) for level, one in enumerate(levels))
    assert [tuple(one.shape[-2:]) for one in (a, b, c, d)] == [(12, 20), (6, 10), (3, 5), (2, 3)]
    x = conv(resized(unit(d, "fusions.3.both"), (3, 5), align_corners), "fusions.3.projection")
    for level, own, size in ((2, c, (6, 10)), (1, b, (12, 20)), (0, a, (24, 40))):
        x = unit(x + unit(own, f"fusions.{level}.own"), f"fusions.{level}.both")
        x = conv(resized(x, size, align_corners), f"fusions.{level}.projection")
    expected = conv(conv(x, "output.0", padding=1).relu(), "classifier")
    assert used == set(w)
    assert torch.allclose(model.decode_head(tuple(maps)), expected, atol=1e-10)


def test_logits_stride_and_the_loss_at_label_size():
    torch.manual_seed(0)
    model = ViTDPTForSemanticSegmentation(config()).eval()
    images, labels = torch.randn(2, 3, 56, 84), torch.randint(0, 3, (2, 56, 84))
    labels[:, :9] = 255
    output = model(images, labels=labels)
    assert output.logits.shape == (2, 3, 32, 48)
    assert torch.allclose(
        output.loss, F.cross_entropy(resized(output.logits, (56, 84), True), labels, ignore_index=255)
    )
    assert torch.equal(model(images, return_dict=False)[0], output.logits)


def test_the_default_is_dinov2_small_with_the_head_of_unimatch_v2():
    plain = ViTDPTConfig()
    backbone = plain.backbone_config
    assert (backbone.model_type, backbone.hidden_size, backbone.patch_size) == ("dinov2", 384, 14)
    assert backbone.out_features == ["stage3", "stage6", "stage9", "stage12"]
    assert (plain.neck_hidden_sizes, plain.fusion_hidden_size) == ([48, 96, 192, 384], 64)


def test_a_configuration_survives_its_file(tmp_path):
    config(align_corners=False).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ViTDPTConfig) and loaded.backbone_config.out_features == STAGES
    assert (loaded.align_corners, loaded.neck_hidden_sizes) == (False, [4, 6, 8, 10])


def test_backbones_that_give_other_maps_are_errors():
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4, out_features=STAGES)
    with pytest.raises(ValueError, match=r"four maps of one width.*'swin' backbone gives \[8, 16, 32, 64\]"):
        ViTDPTForSemanticSegmentation(ViTDPTConfig(backbone_config=swin))
    fewer = Dinov2Config(**{**DINOV2, "out_features": ["stage2", "stage4"]})
    with pytest.raises(
        ValueError, match="four feature maps; `backbone_config`, a 'dinov2', gives 2. Name four stages"
    ):
        ViTDPTConfig(backbone_config=fewer)
    tokens = Dinov2Config(**DINOV2, reshape_hidden_states=False)
    with pytest.raises(ValueError, match="has `reshape_hidden_states` false"):
        ViTDPTConfig(backbone_config=tokens)
    with pytest.raises(ValueError, match=r"`neck_hidden_sizes` must be four numbers, got \[8, 8\]"):
        config(neck_hidden_sizes=[8, 8])
    with pytest.raises(ValueError, match="needs a `model_type` that transformers knows, got 'nothing'"):
        ViTDPTConfig(backbone_config={"model_type": "nothing"})


def test_rows_that_fill_no_patch_are_not_seen():
    torch.manual_seed(0)
    model = ViTDPTForSemanticSegmentation(config()).eval()
    images = torch.randn(1, 3, 60, 60)
    changed = copy.deepcopy(images)
    changed[..., 56:, :] = changed[..., 56:] = 9.0
    with torch.no_grad():
        assert torch.equal(model(images).logits, model(changed).logits)
