"""Every architecture that AutoModelForSemanticSegmentation knows, from a tiny configuration. One row each."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from cps_hf.modeling import (
    Branch,
    build_branches,
    check_input_size,
    freeze_unused_parameters,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
DINOV2 = {**VIT, "image_size": 56, "patch_size": 14, "out_features": STAGES}
VIT = {**VIT, "image_size": 64, "patch_size": 16}
DINOV3 = {**VIT, "num_register_tokens": 4, "out_features": STAGES}
DPT = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 16}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 2, 2], "window_size": 4}


def upernet(model_type, **backbone):
    config = AutoConfig.for_model(model_type, **backbone)
    return {"hidden_size": 16, "auxiliary_channels": 8, "backbone_config": config}


def swin(**arguments):
    return AutoConfig.for_model("swin", **SWIN, **arguments)


def dinov2_with_registers():
    """With the DPT head of TIPSv2: transformers' own DPT ignores a backbone of one's choice."""
    return AutoConfig.for_model("dinov2_with_registers", **DINOV2, reshape_hidden_states=False)


def row(name, model_type, arguments, size=(64, 64), oblong=(75, 53), takes_oblong=True):
    """A size (H, W) that the model takes, an oblong one, and whether it takes that too."""
    return pytest.param(model_type, arguments, size, oblong, takes_oblong, id=name)


SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}
MOBILEVIT = {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 12, 32], "num_attention_heads": 2}
ASPP = {"image_size": 64, "output_stride": 16, "aspp_out_channels": 8}
SAPIENS2_HEAD = {"upsample_out_channels": [8, 8], "conv_out_channels": [8], "conv_kernel_sizes": [1]}
DEEPLAB = {"aspp_channels": 16, "low_level_channels": 8}

ROWS = [
    row("segformer", "segformer", lambda: {**SEGFORMER, "decoder_hidden_size": 16}),
    row("upernet-resnet", "upernet", lambda: upernet("resnet", **RESNET, out_features=STAGES)),
    row("upernet-convnext", "upernet", lambda: upernet("convnext", **CONVNEXT, out_features=STAGES)),
    row("upernet-swin", "upernet", lambda: upernet("swin", **SWIN, out_features=STAGES)),
    row("upernet-swinv2", "upernet", lambda: upernet("swinv2", **SWIN, out_features=STAGES)),
    row("upernet-dinov2", "upernet", lambda: upernet("dinov2", **DINOV2), (56, 56), (84, 70)),
    row("upernet-dinov3", "upernet", lambda: upernet("dinov3_vit", **DINOV3), oblong=(96, 64)),
    row(
        "upernet-timm-resnet", "upernet", lambda: upernet("timm_backbone", backbone="test_resnet", out_indices=[1, 4])
    ),
    row(
        "upernet-timm-hrnet",
        "upernet",
        lambda: upernet("timm_backbone", backbone="hrnet_w18_small", out_indices=[1, 2, 3, 4]),
        takes_oblong=False,
    ),
    row("mobilenet_v2", "mobilenet_v2", lambda: {"depth_multiplier": 0.25, "output_stride": 16}),
    row("mobilevit", "mobilevit", lambda: {**MOBILEVIT, **ASPP}),
    row("mobilevitv2", "mobilevitv2", lambda: {"width_multiplier": 0.25, **ASPP}),
    row("dpt", "dpt", lambda: {**VIT, **DPT, "backbone_out_indices": [0, 1, 2, 3]}, (64, 64), (96, 64), False),
    row("beit", "beit", lambda: {**VIT, "out_indices": [1, 2, 3, 4]}, oblong=(96, 64)),
    row("data2vec", "data2vec-vision", lambda: {**VIT, "out_indices": [1, 2, 3, 4]}, (64, 64), (96, 64), False),
    row("sapiens2", "sapiens2", lambda: {**VIT, "head_config": SAPIENS2_HEAD}, oblong=(96, 64)),
    row("dpt-dinov2", "tipsv2_dpt", lambda: {**DPT, "backbone_config": dinov2_with_registers()}, (56, 56), (84, 70)),
    row("deeplabv3_plus-timm", "deeplabv3_plus", lambda: {**DEEPLAB, "backbone": "test_resnet"}),
    row(
        "deeplabv3_plus-textbook-swin",
        "deeplabv3_plus",
        lambda: {**DEEPLAB, "head": "textbook", "backbone_config": swin(out_features=["stage1", "stage4"])},
    ),
    row("hrnet", "cps_hrnet", lambda: {"backbone": "hrnet_w18_small"}, takes_oblong=False),
]
KNOWN = set(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES) | {"deeplabv3_plus", "cps_hrnet"}
ROWS = [row for row in ROWS if row.values[0] in KNOWN]  # an older transformers knows fewer
every_architecture = pytest.mark.parametrize("model_type, arguments, size, oblong, takes_oblong", ROWS)


def tiny(model_type, arguments, num_labels=5):
    return AutoConfig.for_model(model_type, num_labels=num_labels, **arguments())


def test_no_architecture_of_the_installed_transformers_is_left_out():
    assert KNOWN == {row.values[0] for row in ROWS}


@every_architecture
def test_a_training_step_gives_every_trainable_parameter_a_gradient(model_type, arguments, size, oblong, takes_oblong):
    torch.manual_seed(0)
    models = build_branches(tiny(model_type, arguments), num_branches=1)
    branch = Branch(models[0]).train()
    unused = freeze_unused_parameters(models[0], size)
    trainable = {name: parameter for name, parameter in models[0].named_parameters() if parameter.requires_grad}
    assert len(trainable) + len(unused) == len(list(models[0].parameters())) and len(trainable) > len(unused)
    labels = torch.randint(0, 5, (2, *size))
    logits = branch(torch.randn(2, 3, *size), feature_dropout=0.1)
    assert logits.shape == (2, 5, *size) and logits.dtype == torch.float32
    F.cross_entropy(logits, labels).backward()
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())


@every_architecture
def test_an_oblong_image_is_taken_or_refused_before_training(model_type, arguments, size, oblong, takes_oblong):
    model = build_branches(tiny(model_type, arguments), num_branches=1)[0]
    branch = Branch(model).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_input_size(model, *size)
    if takes_oblong:
        check_input_size(model, *oblong)
        assert branch(torch.zeros(1, 3, *oblong)).shape == (1, 5, *oblong)
    else:
        with pytest.raises(ValueError, match=rf"{oblong[0]} x {oblong[1]} pixels.*It takes, for instance, .*64 x 64"):
            check_input_size(model, *oblong)
        with pytest.raises((RuntimeError, ValueError)):  # and it was right to
            branch(torch.zeros(1, 3, *oblong))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@every_architecture
def test_a_saved_branch_loads_as_any_model_of_transformers(
    model_type, arguments, size, oblong, takes_oblong, tmp_path
):
    names = {0: "road", 1: "car", 2: "tree", 3: "sky", 4: "person"}
    model = build_branches(tiny(model_type, arguments), num_branches=1, id2label=names)[0].eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.id2label == names
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert torch.allclose(loaded(image).logits, model(image).logits, atol=1e-4)
