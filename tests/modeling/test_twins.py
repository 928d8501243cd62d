"""Two branches that would be the same network get different heads, or are an error."""

import copy
import logging

import pytest
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cps_hf.modeling import build_branches, twins
from cps_hf.modeling.backbones import head_parameters
from cps_hf.modeling.twins import reject_twins

NAMES = {0: "road", 1: "car", 2: "sky"}


def segformer(id2label=NAMES):
    label2id = {name: index for index, name in id2label.items()}
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    return SegformerConfig(**sizes, decoder_hidden_size=16, id2label=id2label, label2id=label2id)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A model that looks trained: its head is not newly drawn. Returns (folder, model)."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(3)
    model = SegformerForSemanticSegmentation(segformer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder)
    return folder, model


def weights(model, part):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if part in n and p.ndim > 1])


def test_further_branches_of_a_checkpoint_get_new_heads(finished, caplog):
    folder, model = finished
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        branches = build_branches(folder, num_branches=3, seed=5)
    heads, again = [weights(b, "decode_head") for b in branches], build_branches(folder, num_branches=3, seed=5)
    assert torch.equal(heads[0], weights(model, "decode_head"))
    assert all(torch.equal(weights(b, "segformer."), weights(model, "segformer.")) for b in branches)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (heads[i] - heads[j]).abs().mean() > 0.05
    assert all(torch.equal(weights(b, ""), weights(c, "")) for b, c in zip(branches, again, strict=True))
    assert not torch.equal(heads[1], weights(build_branches(folder, seed=6)[1], "decode_head"))
    said = [r.getMessage() for r in caplog.records[:2]]
    assert [text.split(",")[0] for text in said] == ["branch 1", "branch 2"]
    assert all("its head would be that of branch 0" in text and "seed 5" in text for text in said)
    assert "`ramp_up`" in caplog.text


def test_a_rounded_copy_is_the_same_network(finished, tmp_path):
    folder, model = finished
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    copy.deepcopy(model).to(torch.float16).save_pretrained(tmp_path / "half")
    for other in ("copy", "rounded", "half"):
        a, b = build_branches([folder, tmp_path / other])
        assert torch.equal(weights(a, ""), weights(model, ""))
        assert (weights(b, "decode_head") - weights(model, "decode_head")).abs().mean() > 0.05, other


def test_two_checkpoints_of_one_origin_that_differ_are_both_kept(finished, tmp_path, caplog):
    folder, model = finished
    later = copy.deepcopy(model)
    with torch.no_grad():
        later.decode_head.linear_fuse.weight *= 1.02  # a hundred times bfloat16's rounding is not needed
    later.save_pretrained(tmp_path)
    a, b = build_branches([folder, tmp_path])
    assert torch.equal(weights(a, ""), weights(model, "")) and torch.equal(weights(b, ""), weights(later, ""))
    assert not caplog.records


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_next_to_a_passed_model_the_built_one_gets_a_new_head(finished, order):
    folder, model = finished
    sources = [model, folder]
    branches = build_branches([sources[i] for i in order])
    passed, built = branches[order.index(0)], branches[order.index(1)]
    assert passed is model and torch.equal(weights(built, "segformer."), weights(model, "segformer."))
    assert (weights(built, "decode_head") - weights(model, "decode_head")).abs().mean() > 0.05


def test_identical_passed_models_are_rejected(finished):
    folder, model = finished
    twins = build_branches([model, copy.deepcopy(model)])
    with pytest.raises(ValueError, match="branches 0 and 1 have the same weights.*Pass the folder or Hub id"):
        reject_twins(twins)
    reject_twins(build_branches([folder, folder]))  # as the message advises
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.segformer.stages[0].layer_norm.weight[0] += 0.1
    reject_twins([model, other])


def test_models_that_share_weights_are_rejected(finished):
    model, sharing = finished[1], SegformerForSemanticSegmentation(segformer())
    sharing.segformer = model.segformer
    with pytest.raises(ValueError, match=r"Branches 0 and 1 share parameters \(segformer\..*copy.deepcopy"):
        build_branches([model, sharing])
    sharing.segformer = copy.deepcopy(model.segformer)
    assert build_branches([model, sharing]) == [model, sharing]


OTHERS = {"other classes": ["sky", "tumor", "bone"], "another order": ["car", "road", "sky"]}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_weights_of_other_classes_are_not_used(finished, names, caplog):
    folder, model = finished
    a, b = build_branches(folder, id2label=dict(enumerate(names)))
    own = dict(model.named_parameters())
    for branch in (a, b):
        differing = {n for n, p in branch.named_parameters() if not torch.equal(p, own[n])}
        assert differing == {"decode_head.classifier.weight", "decode_head.classifier.bias"}
        assert [*branch.config.id2label.values()] == names
    assert not torch.equal(a.decode_head.classifier.weight, b.decode_head.classifier.weight)
    assert f"road, car, sky; these are {', '.join(names)}" in caplog.text


def test_a_checkpoint_whose_classes_have_our_names_or_none_is_kept(finished, tmp_path, caplog):
    folder, model = finished
    unnamed = copy.deepcopy(model)
    unnamed.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    unnamed.save_pretrained(tmp_path)
    for source, names in ((folder, ["Road", "car ", "SKY"]), (tmp_path, ["sky", "tumor", "bone"])):
        (branch,) = build_branches(source, num_branches=1, id2label=dict(enumerate(names)))
        assert torch.equal(weights(branch, ""), weights(model, ""))
        assert [*branch.config.id2label.values()] == names
    assert not caplog.records


def test_heads_are_looked_up_once_per_model(finished, monkeypatch):
    asked = []
    monkeypatch.setattr(twins, "head_parameters", lambda model: asked.append(model) or head_parameters(model))
    build_branches([finished[1], finished[0]])  # one pair; the new head is looked up once more
    assert len(asked) == 3
