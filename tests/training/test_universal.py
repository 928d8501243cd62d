"""A SegFormer and a mask-classification network train each other, and their exports load anywhere."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support.architectures import SEGFORMER, UNIVERSAL
from support.resume_cases import assert_exact_resume, without_cards_and_pictures
from support.toy import ID2LABEL, settings, write_three_sets
from support.universal import BY_TYPE, NAMES, speaking
from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

from cps_hf.hub.export import export_branch
from cps_hf.inference.ensemble import Ensemble
from cps_hf.training.trainer import CPSTrainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_three_sets(tmp_path_factory.mktemp("world"), [(64, 90), (70, 64), (80, 80)])


def trainer_for(world, out, name, **fields):
    segformer = AutoConfig.for_model("segformer", decoder_hidden_size=16, **SEGFORMER)
    values = {
        **{"output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 2, "crop_size": [64, 64]},
        **{"optim": "adamw", "learning_rate": 1e-2, "dataloader_num_workers": 0, "disable_tqdm": True},
        **{"num_pictures": 0, "agreement_images": 2, "logging_steps": 1},
    }
    return CPSTrainer([segformer, BY_TYPE[name].config(id2label=ID2LABEL)], **settings(**(values | fields)), **world)


@pytest.mark.parametrize("name", [pytest.param("mask2former", marks=pytest.mark.slow), "eomt"])
def test_a_mixed_pair_trains_and_loads_without_this_package(world, tmp_path, name, caplog):
    trainer = trainer_for(world, tmp_path / "out", name)
    before = {key: p.detach().clone() for key, p in trainer.module.named_parameters()}
    frozen = {key for key, p in trainer.module.named_parameters() if not p.requires_grad}
    trainer.train()
    still = {key for key, p in trainer.module.named_parameters() if torch.equal(p, before[key])} - frozen
    assert not still, still
    assert len(trainer.state.scores["branch_1"]["per_category_iou"]) == 3  # on images of any size
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 4 and all(np.isfinite(line["cps_loss"]) for line in logs)

    folder = tmp_path / "out" / "branch_1"
    model = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
    for key, tensor in trainer.models[1].state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForUniversalSegmentation" in card and '(image, subtask="semantic")' in card
    assert "SemanticSegmentation" not in card.replace(type(trainer.models[0]).__name__, "")
    assert "AutoModelForSemanticSegmentation" in (tmp_path / "out" / "branch_0" / "README.md").read_text()
    image = np.asarray(world["eval_dataset"][0]["image"])
    ensemble = Ensemble.from_pretrained([str(tmp_path / "out" / "branch_0"), str(folder)], device="cpu")
    found = ensemble.predict_each(torch.from_numpy(image.copy()).permute(2, 0, 1))
    assert [tuple(ids.shape) for ids in found] == [image.shape[:2]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask2former", "eomt_dinov3"])
def test_resuming_is_bit_identical(world, tmp_path, name):
    fields = {"gradient_accumulation_steps": 2, "save_steps": 1, "max_steps": 3}
    with without_cards_and_pictures():
        assert_exact_resume(partial(trainer_for, world, name=name, **fields), tmp_path, step=3)


def test_a_crop_size_that_eomt_rejects_names_the_option(world, tmp_path):
    with pytest.raises(ValueError, match=r"48 x 64 pixels.*It accepts, for instance, 64 x 64.*`crop_size`"):
        trainer_for(world, tmp_path, "eomt", crop_size=[48, 64])


def test_the_pipelines_semantic_map_equals_ours(tmp_path):
    """MaskFormer's post-processing resizes scores, like ours, so whole images of any size agree to the pixel.
    Mask2Former's and EoMT's resize the masks first, to 384 x 384 and to the input's size, and nearly agree."""

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image[20:50, 10:40] //= 4
    for kind in UNIVERSAL:
        model = speaking(kind)
        folder = export_branch(model, tmp_path / kind.name, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
        shown = image if kind.model_type != "maskformer" else image[:50, :37]
        ours = Ensemble.from_pretrained([str(folder)], device="cpu").predict(
            torch.from_numpy(shown.copy()).permute(2, 0, 1)
        )
        masks = pipeline("image-segmentation", model=str(folder))(Image.fromarray(shown), subtask="semantic")
        theirs = np.full(shown.shape[:2], 255, np.uint8)
        for segment in masks:
            theirs[np.asarray(segment["mask"]) > 0] = [*NAMES.values()].index(segment["label"])
        same = (ours.numpy() == theirs).mean()
        assert same == 1 if kind.model_type == "maskformer" else same > 0.75, (kind.name, same)
        loaded, info = AutoModelForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        processor = AutoImageProcessor.from_pretrained(folder)
        config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        assert config["image_mean"] == [0.1, 0.2, 0.3] and hasattr(processor, "post_process_panoptic_segmentation")
