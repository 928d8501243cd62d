"""Two branches with adapters train, resume and average as others do, and are exported without them."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import DINOV2, DPT, SEGFORMER
from support.resume_cases import assert_exact_resume, without_cards_and_pictures
from support.toy import settings, write_three_sets
from transformers import AutoConfig, AutoModelForSemanticSegmentation, Dinov2Config, Dinov2Model

from cps_hf.config import ModelConfig
from cps_hf.modeling import ViTDPTConfig
from cps_hf.modeling.adapters import merged
from cps_hf.training import setup
from cps_hf.training.trainer import CPSTrainer

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_three_sets(tmp_path_factory.mktemp("world"), [(64, 90), (70, 64), (80, 80)])


def segformer():
    return AutoConfig.for_model("segformer", decoder_hidden_size=16, **SEGFORMER)


def upernet():
    return AutoConfig.for_model("upernet", hidden_size=16, backbone_config=Dinov2Config(**DINOV2))


def trainer_for(world, out, models=None, **fields):
    """By default a SegFormer and an UperNet on DINOv2, which both load without this package."""
    values = {
        **{"output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 2, "crop_size": [56, 56]},
        **{"optim": "adamw", "learning_rate": 1e-2, "dataloader_num_workers": 0, "disable_tqdm": True},
        **{"num_pictures": 0, "agreement_images": 2, "logging_steps": 1, "lora_rank": 2, "ema_decay": 0.9},
    }
    return CPSTrainer(models or [segformer(), upernet()], **settings(**(values | fields)), **world)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A trained run, its weights before, and the folders of its branches."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with without_cards_and_pictures():
        trainer = trainer_for(world, out)
        before = {key: p.detach().clone() for key, p in trainer.module.branches.named_parameters()}
        trainer.train()
    return trainer, before, [out / name for name in ("branch_0", "branch_1", "branch_0_average", "branch_1_average")]


def test_adapters_and_heads_learn_and_the_export_is_a_plain_model(finished):
    trainer, before, folders = finished
    trained = {key for key, p in trainer.module.branches.named_parameters() if p.requires_grad}
    moved = {key for key, p in trainer.module.branches.named_parameters() if not torch.equal(p, before[key])}
    assert moved == trained and any(".lora_A" in key for key in moved)
    assert {key for key in trained if ".lora_" not in key} == {key for key in before if "decode_head" in key}
    images = torch.randn(2, 3, 56, 70)
    networks = trainer.module.networks()
    for folder in folders:
        assert not [key for key in load_file(folder / "model.safetensors") if "lora" in key or "base_layer" in key]
        loaded, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            expected = networks[folder.name].model.eval()(images).logits
            torch.testing.assert_close(loaded.eval()(images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_export_loads_without_peft_and_this_package(finished):
    script = (
        "import sys; sys.modules['peft'] = None; sys.modules['cps_hf'] = None\n"
        "from transformers import AutoModelForSemanticSegmentation as Auto\n"
        "for folder in sys.argv[1:]:\n"
        "    _, info = Auto.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, finished[2])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_average_is_that_of_the_two_thin_matrices(world, tmp_path):
    """Not of their products, which no pair of this rank gives."""
    seen = []
    trainer = trainer_for(world, tmp_path / "out", max_steps=3, ema_decay=0.6)
    update = trainer._update_averages

    def branch():
        return {key: p.detach().clone() for key, p in trainer.module.branches[1].named_parameters() if ".lora_" in key}

    average = branch()
    trainer._update_averages = lambda: (seen.append(branch()), update())
    with without_cards_and_pictures():
        trainer.train()
    for share, after in zip((1 / 2, 0.4, 0.4), seen, strict=True):
        average = {key: value + (after[key] - value) * share for key, value in average.items()}
    found = dict(trainer.module.averages[1].named_parameters())
    assert average
    for key, value in average.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    name = "decode_head.classifier.weight"
    assert torch.equal(merged(trainer.module.averages[1].model).get_parameter(name), found[f"model.{name}"])


@pytest.mark.parametrize(
    ("networks", "adapted"),
    [((segformer, segformer), ["q_proj"]), pytest.param((segformer, upernet), None, marks=pytest.mark.slow)],
    ids=["of one kind", "of two kinds"],
)
def test_resuming_is_bit_identical(world, tmp_path, networks, adapted):
    fields = {"gradient_accumulation_steps": 2, "save_steps": 1, "max_steps": 3, "networks": networks}
    fields |= {"lora_dropout": 0.3, "lora_target_modules": adapted}
    with without_cards_and_pictures():
        assert_exact_resume(partial(trainer_for, world, **fields), tmp_path, step=3)


def test_another_rank_is_another_run(world, finished):
    folder = finished[0].args.output_dir
    with without_cards_and_pictures(), pytest.raises(ValueError, match="lora_rank"):
        trainer_for(world, folder, lora_rank=3, networks=(segformer,) * 2, resume_from_checkpoint="auto").train()


def trainer_on_one_backbone(world, weights, out, **fields):
    """Two ViT-DPTs whose backbones start from these weights: a folder, or one per branch."""
    vit_dpt = ViTDPTConfig(backbone_config=Dinov2Config(**DINOV2), **DPT)
    return trainer_for(world, out, models=vit_dpt, backbone=weights, **fields)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(5)
    Dinov2Model(Dinov2Config(**DINOV2)).save_pretrained(folder)
    return str(folder)


def test_branches_and_averages_share_one_backbone_and_take_the_same_steps(
    world, backbone, tmp_path, monkeypatch, caplog
):
    shared = trainer_on_one_backbone(world, backbone, tmp_path / "shared")
    monkeypatch.setattr(setup, "share_frozen_weights", lambda models: 0)
    separate = trainer_on_one_backbone(world, backbone, tmp_path / "separate")
    with without_cards_and_pictures():
        for trainer in (shared, separate):
            trainer.train()
    assert "Removed shared tensor" not in caplog.text
    own = [{id(p) for n, p in network.named_parameters()} for network in shared.module.networks().values()]
    names = [name for name, p in shared.module.branches[0].named_parameters() if not p.requires_grad]
    assert len(own) == 4 and len(set.intersection(*own)) == len(names)
    stored = [sum(p.nbytes for p in trainer.module.parameters()) for trainer in (shared, separate)]
    frozen = sum(shared.module.branches[0].get_parameter(name).nbytes for name in names)
    assert stored[1] - stored[0] == 3 * frozen > 0
    expected = separate.module.state_dict()
    for key, value in shared.module.state_dict().items():
        assert torch.equal(value, expected[key]), key
    for name in shared.module.networks():
        files = [load_file(tmp_path / run / name / "model.safetensors") for run in ("shared", "separate")]
        assert files[0].keys() == files[1].keys() and all(torch.equal(v, files[1][k]) for k, v in files[0].items())
    saved = load_file(tmp_path / "shared" / "checkpoint-4" / "model.safetensors")
    assert len(saved) == len(expected) - 3 * len(names)


def test_resuming_with_a_shared_backbone_is_bit_identical(world, backbone, tmp_path):
    fields = {"save_steps": 1, "max_steps": 3, "lora_dropout": 0.3}
    with without_cards_and_pictures():
        assert_exact_resume(partial(trainer_on_one_backbone, world, backbone, **fields), tmp_path, step=2)


def test_two_checkpoints_are_not_shared(world, backbone, tmp_path):
    """Branches that start from other weights keep their own; those of a bfloat16 branch differ from its average's."""
    torch.manual_seed(6)
    Dinov2Model(Dinov2Config(**DINOV2)).save_pretrained(tmp_path / "other")
    trainer = trainer_on_one_backbone(world, [backbone, str(tmp_path / "other")], tmp_path / "two")
    name = "model.backbone.encoder.layer.0.attention.q_proj.base_layer.weight"
    ids = [id(network.get_parameter(name)) for network in trainer.module.networks().values()]
    assert ids[0] == ids[2] != ids[1] == ids[3]
    halved = trainer_on_one_backbone(world, backbone, tmp_path / "half", dtype="bfloat16")
    ids = [id(network.get_parameter(name)) for network in halved.module.networks().values()]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_what_does_not_go_with_adapters_is_said():
    with pytest.raises(ValueError, match="`lora_alpha` goes with `lora_rank`, which is not set"):
        ModelConfig(lora_alpha=8)
    with pytest.raises(ValueError, match="`lora_rank` freezes the backbone but for its adapters: leave"):
        ModelConfig(lora_rank=4, freeze_backbone=True)
    with pytest.raises(ValueError, match="`lora_rank` must be 1 or more, got 0"):
        ModelConfig(lora_rank=0)
    with pytest.raises(ValueError, match="`lora_dropout` must be 0 or more and less than 1, got 1"):
        ModelConfig(lora_rank=4, lora_dropout=1.0)
    with pytest.raises(ValueError, match="`lora_alpha` must be above 0, got -1"):
        ModelConfig(lora_rank=4, lora_alpha=-1)
    with pytest.raises(ValueError, match="`lora_target_modules` is empty"):
        ModelConfig(lora_rank=4, lora_target_modules=[])
    assert ModelConfig(lora_rank=4, lora_target_modules="q_proj").lora_target_modules == ["q_proj"]
