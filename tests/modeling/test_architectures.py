"""Every architecture of AutoModelForSemanticSegmentation, built from the shared tiny configurations."""

import pytest
import torch
import torch.nn.functional as F
from support.architectures import ARCHITECTURES, KNOWN
from transformers import AutoModelForSemanticSegmentation

from cps_hf.modeling import Branch, build_branches, check_input_size, freeze_unused_parameters

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)


def test_every_installed_architecture_is_covered():
    assert KNOWN == {row.model_type for row in ARCHITECTURES}


@every_architecture
def test_logits_start_at_a_sane_scale_however_the_head_was_drawn(architecture):
    torch.manual_seed(0)
    images = torch.randn(2, 3, *architecture.size)
    for reinit_heads in (False, True):  # the library's initialisation, and ours
        model = build_branches(architecture.config(), num_branches=1, reinit_heads=reinit_heads)[0]
        with torch.no_grad():
            logits = Branch(model).train()(images)
        assert logits.std() < 5, (reinit_heads, logits.std())


@every_architecture
def test_a_training_step_gives_every_trainable_parameter_a_gradient(architecture):
    torch.manual_seed(0)
    models = build_branches(architecture.config(), num_branches=1)
    branch = Branch(models[0]).train()
    unused = freeze_unused_parameters(models[0], architecture.size)
    trainable = {name: parameter for name, parameter in models[0].named_parameters() if parameter.requires_grad}
    assert len(trainable) + len(unused) == len(list(models[0].parameters())) and len(trainable) > len(unused)
    labels = torch.randint(0, 5, (2, *architecture.size))
    logits = branch(torch.randn(2, 3, *architecture.size), feature_dropout=0.1)
    assert logits.shape == (2, 5, *architecture.size) and logits.dtype == torch.float32
    F.cross_entropy(logits, labels).backward()
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())


@every_architecture
def test_non_square_images_are_checked_before_training(architecture):
    model = build_branches(architecture.config(), num_branches=1)[0]
    branch = Branch(model).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_input_size(model, *architecture.size)
    if architecture.takes_oblong:
        check_input_size(model, *architecture.oblong)
        assert branch(torch.zeros(1, 3, *architecture.oblong)).shape == (1, 5, *architecture.oblong)
    else:
        height, width = architecture.oblong
        with pytest.raises(ValueError, match=rf"{height} x {width} pixels.*It accepts, for instance, .*64 x 64"):
            check_input_size(model, *architecture.oblong)
        with pytest.raises((RuntimeError, ValueError)):  # and the check was right
            branch(torch.zeros(1, 3, *architecture.oblong))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@every_architecture
def test_a_saved_branch_loads_as_any_model_of_transformers(architecture, tmp_path):
    names = {0: "road", 1: "car", 2: "tree", 3: "sky", 4: "person"}
    model = build_branches(architecture.config(), num_branches=1, id2label=names)[0].eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.id2label == names
    image = torch.randn(1, 3, *architecture.size)
    with torch.no_grad():
        assert torch.allclose(loaded(image).logits, model(image).logits, atol=1e-4)
