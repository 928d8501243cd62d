"""Runs with the networks' own set loss: what learns, where it resumes, and how EoMT's masked attention is annealed."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.architectures import SEGFORMER
from support.resume_cases import assert_exact_resume, without_cards_and_pictures
from support.toy import ID2LABEL, settings, write_three_sets
from support.universal import BY_TYPE, speaking
from transformers import AutoConfig, AutoModelForUniversalSegmentation

from cps_hf.config import CPSConfig
from cps_hf.modeling import Branch, build_branches
from cps_hf.modeling.universal import anneal_masked_attention
from cps_hf.objectives import OBJECTIVES, CrossPseudoSupervision, FixedTeacher, FixMatch, Supervised
from cps_hf.training.setup import annealed_masked_attention
from cps_hf.training.stages import Stages
from cps_hf.training.state import RunState
from cps_hf.training.trainer import CPSTrainer

SET = {"labeled_loss": "set", "unlabeled_loss": "set"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_three_sets(tmp_path_factory.mktemp("world"), [(64, 90), (70, 64), (80, 80)])


def trainer_for(world, out, names=("mask2former", "eomt"), objective=None, **fields):
    values = {
        **{"output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 2, "crop_size": [64, 64]},
        **{"optim": "adamw", "learning_rate": 1e-2, "dataloader_num_workers": 0, "disable_tqdm": True},
        **{"num_pictures": 0, "agreement_images": 0, "logging_steps": 1},
    }
    configs = [BY_TYPE[name].config(id2label=ID2LABEL) for name in names]
    objective = objective or CrossPseudoSupervision(**SET)
    return CPSTrainer(configs, **settings(**(values | fields)), **world, objective=objective)


def losses(trainer, name="loss"):
    return [line[name] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A trained pair, its weights before, and its output folder."""
    out = tmp_path_factory.mktemp("set") / "out"
    with without_cards_and_pictures():
        trainer = trainer_for(world, out, max_steps=4)
        assert trainer.models[1].attn_mask_probs.tolist() == [1, 1]
        before = {key: p.detach().clone() for key, p in trainer.module.named_parameters()}
        trainer.train()
    return trainer, before, out


def test_a_pair_learns_by_its_own_loss_on_labels_and_pseudo_labels(trained):
    """All parameters move; EoMT is exported with its masked attention off."""
    trainer, before, out = trained
    frozen = {key for key, p in trainer.module.named_parameters() if not p.requires_grad}
    still = {key for key, p in trainer.module.named_parameters() if torch.equal(p, before[key])} - frozen
    assert not still, still
    exported = AutoModelForUniversalSegmentation.from_pretrained(out / "branch_1")
    assert exported.attn_mask_probs.tolist() == [0, 0]
    assert all(0 < one < 1000 for one in losses(trainer))


@pytest.mark.slow
def test_each_term_has_its_own_loss(world, tmp_path, trained):
    others = {}
    with without_cards_and_pictures():
        for fields in ({"labeled_loss": "set"}, {}):
            objective = CrossPseudoSupervision(**fields)
            others[len(fields)] = trainer_for(world, tmp_path / str(len(fields)), objective=objective, max_steps=1)
            others[len(fields)].train()
    runs, terms = (trained[0], *others.values()), ("supervised_loss", "cps_loss")
    first = [losses(run, term)[0] for run in runs for term in terms]
    assert first[0] == first[2] != first[4]  # on labels: set, set, pixels
    assert len({first[1], first[3], first[5]}) == 3  # on pseudo labels: set, pixels, and those of an unmasked EoMT


@pytest.mark.slow
@pytest.mark.parametrize("names", [("mask2former", "maskformer"), ("eomt", "eomt_dinov3")], ids=lambda pair: pair[0])
def test_resuming_is_bit_identical_within_and_across_stages(world, tmp_path, names):
    fields = {"gradient_accumulation_steps": 2, "save_steps": 1, "max_steps": 4, "pretrain_steps": 2}
    with without_cards_and_pictures():
        assert_exact_resume(partial(trainer_for, world, names=names, **fields), tmp_path, step=4)


def test_what_the_set_loss_does_not_go_with_is_said_before_training(world, tmp_path):
    segformer = AutoConfig.for_model("segformer", decoder_hidden_size=16, **SEGFORMER)
    values = settings(output_dir=str(tmp_path / "out"), crop_size=[64, 64], num_pictures=0)
    said = (
        r'`labeled_loss="set"` is the own loss of mask2former, maskformer, eomt, eomt_dinov3, and branch 1 is a \'segf'
    )
    configs = [BY_TYPE["maskformer"].config(id2label=ID2LABEL), segformer]
    with pytest.raises(ValueError, match=said):
        CPSTrainer(configs, **values, **world, objective=CrossPseudoSupervision(labeled_loss="set"))
    with pytest.raises(ValueError, match='`labeled_loss="set"` does not work with `torch_compile`'):
        trainer_for(world, tmp_path / "out", torch_compile=True)
    with pytest.raises(ValueError, match=r"`class_weights` 0.5 weigh pixels.*Leave `class_weights` out"):
        Supervised(labeled_loss="set", class_weights=0.5)
    with pytest.raises(ValueError, match='`unlabeled_loss="set"` needs `labeled_loss="set"`, got \'cross_entropy\''):
        CrossPseudoSupervision(unlabeled_loss="set")
    with pytest.raises(ValueError, match="`class_balance` 0.5 weighs pixels"):
        FixMatch(**SET, class_balance=0.5)
    with pytest.raises(ValueError, match="makes masks of hard labels: leave `soft` out"):
        FixedTeacher(**SET, labelers=["some/network"], soft=True)
    with pytest.raises(ValueError, match="`unlabeled_loss` must be one of cross_entropy, set, got 'sets'"):
        CrossPseudoSupervision(unlabeled_loss="sets")
    assert {name for name in OBJECTIVES if hasattr(OBJECTIVES[name], "unlabeled_loss")} == {
        *("cps", "cps_averaged", "fixmatch", "unimatch", "unimatch_v2", "fixed_teacher")
    }


# ------------------------------------------------------------------------------------------ EoMT's masked attention


def test_blocks_are_annealed_in_order_except_in_trained_networks():
    def probabilities(done, beginning=(1.0, 1.0, 1.0, 1.0)):
        model = SimpleNamespace(attn_mask_probs=torch.full((4,), 0.7))
        anneal_masked_attention(model, torch.tensor(beginning), done)
        return model.attn_mask_probs.tolist()

    half = 0.5**0.9  # four blocks: six equal parts
    assert probabilities(0) == probabilities(1 / 6) == [1, 1, 1, 1]
    assert probabilities(1.5 / 6) == pytest.approx([half, 1, 1, 1])
    assert probabilities(3.5 / 6) == pytest.approx([0, 0, half, 1])
    assert probabilities(5 / 6) == pytest.approx([0, 0, 0, 0], abs=1e-5) and probabilities(1) == [0, 0, 0, 0]
    assert probabilities(1.5 / 6, (1.0, 0.0, 0.0, 1.0)) == pytest.approx([half, 0, 0, 1])
    new = BY_TYPE["eomt"].config()
    masked = build_branches([new, BY_TYPE["maskformer"].config()], masked_attention=True)
    found = annealed_masked_attention(masked, CrossPseudoSupervision(**SET))
    assert [(model is masked[0], beginning.tolist()) for model, beginning in found] == [(True, [1, 1])]
    assert annealed_masked_attention(masked, CrossPseudoSupervision()) == []
    assert not build_branches(new, num_branches=1)[0].attn_mask_probs.any()


@pytest.mark.parametrize(("pretrain_steps", "expected"), [(None, [0, 0.25, 0.5, 1]), (4, [0, 0.5, 1, 1])])
def test_annealing_ends_with_the_stage_whose_branches_are_kept(pretrain_steps, expected):
    args = CPSConfig(max_steps=8, pretrain_steps=pretrain_steps)
    stages = Stages(args, CrossPseudoSupervision(), RunState())
    assert [stages.masks_annealed(step) for step in (0, 2, 4, 8)] == expected


def test_evaluation_during_annealing_is_deterministic_and_exported(world, tmp_path):
    branch = Branch(speaking(BY_TYPE["eomt"])).eval()
    images, found = torch.randn(1, 3, 64, 64), {}
    with torch.no_grad():
        for values in ([1.0, 0.0], [0.8, 0.3], [0.3, 0.8], [0.0, 0.0]):
            branch.model.attn_mask_probs.copy_(torch.tensor(values))
            state = torch.get_rng_state()
            found[tuple(values)] = branch(images)
            assert torch.equal(torch.get_rng_state(), state)
            assert branch.model.attn_mask_probs.tolist() == pytest.approx(values)
    one, other, swapped, off = found.values()
    assert torch.equal(one, other) and not torch.equal(one, swapped) and not torch.equal(one, off)
    with without_cards_and_pictures():
        trainer = trainer_for(world, tmp_path / "out", ("eomt", "eomt"), max_steps=4, save_steps=2)
        trainer.models[0].attn_mask_probs.copy_(torch.tensor([0.8, 0.3]))
        trainer.exporter.export("branch_0")
    exported = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "out" / "branch_0")
    assert exported.attn_mask_probs.tolist() == [1, 0]
    assert trainer.models[0].attn_mask_probs.tolist() == pytest.approx([0.8, 0.3])
