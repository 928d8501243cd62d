"""Images are normalised as for the pretrained network, unless the user says otherwise; the choice is logged."""

import json
import logging

import pytest
import timm
import torch
import yaml
from support.toy import ID2LABEL, MEAN, NAMES, STD, settings, tiny_branch, tiny_upernet, toy_models, write_world
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BeitImageProcessor,
    MobileViTImageProcessor,
    ResNetModel,
    SegformerImageProcessor,
    TimmBackboneConfig,
    UperNetConfig,
)

from cps_hf.config import ModelConfig
from cps_hf.hub.export import export_branch
from cps_hf.modeling import build_branches
from cps_hf.objectives import Supervised
from cps_hf.training.normalization import settle
from cps_hf.training.trainer import CPSTrainer

IMAGENET, HALF, OWN = (list(MEAN), list(STD)), ([0.5] * 3, [0.5] * 3), ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="cps_hf.training.normalization")
    return caplog


def settled(models, processing_class=None, **fields):
    model_config = ModelConfig(**fields)
    given = [model_config.backbone_source(i) for i in (0, 1)] if fields.get("backbone") else None
    built = build_branches(models, id2label=ID2LABEL, backbone=given)
    found = settle(model_config, models, built, processing_class)
    assert model_config == ModelConfig(**fields)  # the user's own object does not change
    return found.image_mean, found.image_std


def branch(folder, numbers, seed=0):
    tiny_branch(folder, 3, seed=seed, names=NAMES)
    SegformerImageProcessor(do_resize=False, image_mean=numbers[0], image_std=numbers[1]).save_pretrained(folder)
    return str(folder)


def said(log, level=logging.WARNING):
    return [r.getMessage() for r in log.records if r.levelno == level and r.name.endswith("normalization")]


def test_a_checkpoints_own_normalisation_is_used_and_logged(tmp_path, log):
    source = branch(tmp_path / "own", OWN)
    assert settled(source) == OWN and not said(log)
    assert said(log, logging.INFO) == [
        f"Images are normalised with mean {OWN[0]} and std {OWN[1]} (the image processor of {source})."
    ]


def test_the_default_normalisation_is_imagenets(tmp_path, log):
    tiny_branch(tmp_path / "bare", 3, names=NAMES)
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    for models in (tiny_upernet(), str(tmp_path / "bare"), toy_models()):
        assert settled(models) == IMAGENET
    assert not said(log) and all("ImageNet's, since no pretrained" in text for text in said(log, logging.INFO))


def test_the_users_normalisation_wins_with_a_warning(tmp_path, log):
    source = branch(tmp_path / "own", OWN)
    mean, std = HALF
    assert settled(source, image_mean=mean, image_std=std) == HALF
    (text,) = said(log)
    assert f"mean {mean} and std {std} (from `image_mean` and `image_std`)" in text
    assert f"mean {OWN[0]} and std {OWN[1]} (the image processor of {source})" in text
    log.clear()
    assert settled(source, image_mean=OWN[0], image_std=OWN[1]) == OWN and not said(log)
    assert settled(source, image_std=std) == (OWN[0], std)


def test_branches_with_different_normalisation_are_reported(tmp_path, log):
    one, other = branch(tmp_path / "one", OWN), branch(tmp_path / "other", HALF, seed=1)
    assert settled([one, other]) == OWN
    (text,) = said(log)
    assert f"(the image processor of {one})" in text and f"(the image processor of {other})" in text
    log.clear()
    assert settled([tiny_upernet(), other]) == HALF and not said(log)  # the first one is not pretrained


def test_a_passed_model_uses_its_checkpoints_normalisation(tmp_path):
    model = AutoModelForSemanticSegmentation.from_pretrained(branch(tmp_path / "own", OWN))
    assert settled([model, toy_models(1)[0]]) == OWN


def test_a_backbones_normalisation_precedes_its_models(tmp_path, log):
    source = branch(tmp_path / "model", OWN)
    config = tiny_upernet().backbone_config
    ResNetModel(config).save_pretrained(tmp_path / "backbone")
    BeitImageProcessor().save_pretrained(tmp_path / "backbone")  # mean and deviation 0.5
    for models in (source, tiny_upernet()):
        assert settled(models, backbone=str(tmp_path / "backbone")) == HALF
    assert settled([source, tiny_upernet()], backbone=["none", str(tmp_path / "backbone")]) == OWN
    assert "(the image processor of" in said(log)[0]


def test_timms_normalisation_is_that_of_its_weights(tmp_path, monkeypatch):
    backbone = TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, id2label=ID2LABEL)
    assert settled(config) == IMAGENET  # trained from scratch
    torch.manual_seed(0)
    network = timm.create_model("test_resnet")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    (tmp_path / "timm").mkdir()
    weights = tmp_path / "timm" / "weights.pth"
    torch.save(network.state_dict(), weights)
    assert settled(config, backbone=str(weights)) == HALF  # timm's for this network
    pretrained = {"pretrained_cfg": {"mean": OWN[0], "std": OWN[1]}}  # as in timm's repositories
    (tmp_path / "timm" / "config.json").write_text(json.dumps(pretrained))
    assert settled(config, backbone=str(weights)) == OWN


def test_other_rescaling_and_swapped_colours_are_handled(tmp_path, log):
    source = branch(tmp_path / "own", OWN)
    SegformerImageProcessor(do_resize=False, rescale_factor=1 / 127.5).save_pretrained(source)
    mean, std = settled(source)
    assert mean == pytest.approx([m / 2 for m in MEAN]) and std == pytest.approx([s / 2 for s in STD])
    MobileViTImageProcessor(do_center_crop=False).save_pretrained(source)
    assert settled(source) == ([0.0] * 3, [1.0] * 3)
    assert "swaps red and blue" in said(log)[0]


def test_the_given_processor_sets_the_normalisation(log):
    half = SegformerImageProcessor(do_resize=False, image_mean=HALF[0], image_std=HALF[1])
    assert settled(tiny_upernet(), half) == HALF
    assert "(`processing_class`)" in said(log, logging.INFO)[0]
    with pytest.raises(ValueError, match="black and white into -2.118 and 1136"):
        settled(tiny_upernet(), SegformerImageProcessor(do_resize=False, do_rescale=False))


# ------------------------------------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {
        "train_dataset": write_world(root / "a", [(40, 56)] * 3),
        "eval_dataset": write_world(root / "b", [(40, 44)]),
    }


def trainer_for(world, tmp_path, models, processing_class=None, **fields):
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2}
    values |= {"crop_size": [32, 32], "optim": "adamw", "dataloader_num_workers": 0, "num_pictures": 0}
    groups = settings(**(values | {"disable_tqdm": True, "save_steps": 1} | fields))
    return CPSTrainer(models, **groups, objective=Supervised(), processing_class=processing_class, **world)


def test_a_run_uses_one_normalisation_throughout(world, tmp_path):
    trainer = trainer_for(world, tmp_path, branch(tmp_path / "own", OWN), num_branches=1)
    trainer.train()
    out = tmp_path / "out"
    for mean, std in ((trainer.image_mean, trainer.image_std), (trainer.evaluator.mean, trainer.evaluator.std)):
        assert torch.equal(mean, torch.tensor(OWN[0])) and torch.equal(std, torch.tensor(OWN[1]))
    for folder in ("branch_0", "best"):
        processor = AutoImageProcessor.from_pretrained(out / folder)
        assert (list(processor.image_mean), list(processor.image_std)) == OWN and not processor.do_resize
    written = yaml.safe_load((out / "config.yaml").read_text())
    state = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    for group in (written, state["settings"], state["fingerprint"]["run"]):
        assert (group["image_mean"], group["image_std"]) == OWN


def test_resuming_needs_the_checkpoints_normalisation(world, tmp_path):
    """A run from before checkpoints' normalisation was used has ImageNet's."""
    source, imagenet = branch(tmp_path / "own", OWN), {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}
    trainer_for(world, tmp_path, source, num_branches=1, max_steps=1, **imagenet).train()
    with pytest.raises(ValueError, match=r"image_mean: \[0.485, 0.456, 0.406\] -> \[0.4, 0.5, 0.6\]"):
        trainer_for(world, tmp_path, source, num_branches=1).train(resume_from_checkpoint=True)
    resumed = trainer_for(world, tmp_path, source, num_branches=1, **imagenet).train(resume_from_checkpoint=True)
    assert resumed["steps"] == 2


def test_an_unsuitable_processor_is_rejected_early(world, tmp_path):
    for wrong in ({"do_rescale": False}, {"do_reduce_labels": True}):
        with pytest.raises(ValueError, match="`processing_class`"):
            trainer_for(world, tmp_path, toy_models(1), SegformerImageProcessor(do_resize=False, **wrong))
    half = SegformerImageProcessor(do_resize=False, image_mean=HALF[0], image_std=HALF[1])
    with pytest.raises(ValueError, match="normalises images differently"):
        trainer_for(world, tmp_path, toy_models(1), half, image_mean=OWN[0], image_std=OWN[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{}, {"rescale_factor": 1 / 127.5}, {"do_normalize": False}], ids=str)
def test_an_exported_branch_sees_what_training_saw(world, tmp_path, fields):
    processor = SegformerImageProcessor(do_resize=False, **fields)
    trainer = trainer_for(world, tmp_path, toy_models(1), processor)
    directory = export_branch(
        build_branches(tiny_upernet(), num_branches=1)[0],
        tmp_path / "b",
        image_mean=trainer.model_config.image_mean,
        image_std=trainer.model_config.image_std,
        processing_class=processor,
    )
    (sample,) = next(iter(trainer.evaluator.stream(world["eval_dataset"])))
    seen = []
    trainer.models[0].backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.evaluator.logits(trainer.module.branches[0], sample["image"][None])
    made = AutoImageProcessor.from_pretrained(directory)(images=sample["image"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen[0], made, atol=1e-4, rtol=1e-4)
