"""The classes that models name, compared with each other and with the data's."""

import pytest
import torch
from support.architectures import ARCHITECTURES
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerModel,
)

from cps_hf.modeling import build_branches
from cps_hf.modeling.branches import _adapted_config, _parameters_by_class
from cps_hf.modeling.classes import classes_of

SIZES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}


def segformer(**arguments):
    return SegformerConfig(**SIZES, decoder_hidden_size=16, **arguments)


def model_with(id2label, count=2):
    model = AutoModelForSemanticSegmentation.from_config(segformer(num_labels=count))
    model.config.id2label = id2label
    return model


def test_text_keys_become_numbers():
    models = [model_with({"1": "disc", "0": "bg"}) for _ in "ab"]
    branches = build_branches(models)
    assert branches == models and [b.config.id2label for b in branches] == [{0: "bg", 1: "disc"}] * 2
    (built,) = build_branches(segformer(), num_branches=1, id2label={"0": "bg", "1": "disc"})
    assert built.config.id2label == {0: "bg", 1: "disc"}


@pytest.mark.parametrize(
    ("id2label", "found"),
    [
        ({1: "bg", 2: "disc"}, r"got the indices \[1, 2\]"),
        ({0: "bg", 2: "disc"}, r"got the indices \[0, 2\]"),
        ({"bg": 0, "disc": 1}, r"got \{'bg': 0, 'disc': 1\}"),  # label2id
    ],
)
def test_a_table_with_gaps_is_rejected(id2label, found):
    with pytest.raises(ValueError, match=rf"`id2label` of branch 0 must name the classes 0, 1, .*{found}"):
        build_branches([model_with(id2label), model_with({0: "bg", 1: "disc"})])
    with pytest.raises(ValueError, match=rf"^`id2label` must name the classes 0, 1, .*{found}"):
        build_branches(segformer(), id2label=id2label)


def test_a_single_class_is_rejected_with_advice():
    for models, id2label in (
        (segformer(num_labels=1), None),
        ([model_with({0: "crack"}, count=1) for _ in "ab"], None),
        (segformer(), {0: "crack"}),
    ):
        with pytest.raises(
            ValueError,
            match=r"A single class cannot be learned.*\[\"background\", \"crack\"\].*`--load_options '.\"values\": ",
        ) as error:
            build_branches(models, id2label=id2label)
    assert "Here 'crack' is the only one" in str(error.value)


def test_branches_without_names_have_those_of_the_others():
    named, unnamed = model_with({0: "bg", 1: "disc"}), model_with({0: "LABEL_0", 1: "LABEL_1"})
    for pair in ([unnamed, named], [named, unnamed]):
        assert classes_of(build_branches(pair)) == {0: "bg", 1: "disc"}
    assert build_branches([unnamed], id2label={0: "a", 1: "b"}) == [unnamed]


@pytest.mark.parametrize(("kind", "count"), [(SegformerForImageClassification, 1000), (SegformerModel, 2)])
def test_a_classifiers_classes_are_not_used_for_masks(tmp_path, kind, count):
    names = {i: f"fish {i}" for i in range(count)} if count > 2 else None
    kind(segformer(**({"id2label": names} if names else {}))).save_pretrained(tmp_path)
    message = rf"is a {kind.__name__}: its {count} classes.*are not those of the masks.*`classes.json`.*`class_names`"
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        with pytest.raises(ValueError, match=message):
            build_branches(source)
    assert len(build_branches(tmp_path, id2label={0: "a", 1: "b", 2: "c"})) == 2
    config = AutoConfig.from_pretrained(tmp_path)
    if names:
        with pytest.raises(ValueError, match=message):
            build_branches(config)
    three = AutoConfig.from_pretrained(tmp_path, num_labels=3)
    assert build_branches(three)[0].config.num_labels == 3  # counted in Python, though not named


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_class_weights_are_found_for_every_architecture(architecture):
    config = _adapted_config(architecture.config(), "", None)
    torch.manual_seed(1)
    found = _parameters_by_class(config, {"trust_remote_code": False})
    assert torch.initial_seed() == 1 and torch.equal(torch.rand(1), torch.rand(1, generator=seeded(1)))
    assert sorted(name.rsplit(".", 1)[1] for name in found) == ["bias", "weight"], found
    assert not any(name.startswith("backbone") for name in found)


def seeded(seed):
    return torch.Generator().manual_seed(seed)
