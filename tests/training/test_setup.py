"""What is built from the settings before the first step."""

import logging
from types import SimpleNamespace

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.toy import ID2LABEL, settings, toy_models, write_world
from transformers import AutoModelForSemanticSegmentation, SegformerConfig

from cps_hf.config import CPSConfig, ModelConfig
from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training import setup
from cps_hf.training.model_checks import structure_of
from cps_hf.training.setup import build_models, make_optimizer, train_streams


@pytest.mark.parametrize(
    ("wanted", "device", "processes", "synced"),
    [(True, "cuda", 2, True), (False, "cuda", 2, False), (True, "cpu", 2, False), (True, "cuda", 1, False)],
)
def test_batch_norm_is_only_synchronised_on_several_gpus(wanted, device, processes, synced):
    groups = settings(sync_batchnorm=wanted, crop_size=[16, 16], per_device_train_batch_size=2)
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device), is_main_process=True)
    built = build_models(
        toy_models(norm=True),
        groups["model_config"],
        groups["args"],
        groups["augmentation"].crop_size,
        CrossPseudoSupervision(),
        ID2LABEL,
        accelerator,
    )
    for model in built:
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()) is synced


def test_workers_prefetch_the_configured_number_of_batches(tmp_path):
    world = write_world(tmp_path / "world", [(24, 24)] * 4)
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    for factor in (1, 3):
        groups = settings(dataloader_num_workers=2, dataloader_prefetch_factor=factor, crop_size=[16, 16])
        sets = (CrossPseudoSupervision(), world, world, {})
        streams = train_streams(groups["args"], groups["augmentation"], accelerator, *sets, num_labels=3)
        assert [stream._loader.prefetch_factor for stream in streams] == [factor, factor]
        assert [stream.plans_ahead for stream in streams] == [2 * factor, 2 * factor]


@pytest.mark.parametrize("changed", [{}, {"adam_beta1": 0.5}, {"adam_beta2": 0.6}, {"adam_epsilon": 0.25}])
def test_adams_options_follow_its_formula(changed):
    """Two written-out steps (Loshchilov and Hutter 2019, algorithm 2)."""
    fields = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8} | changed
    args = CPSConfig(optim="adamw", learning_rate=0.1, weight_decay=0.0, **changed)
    optimizer = make_optimizer(toy_models(1), args)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = [p.detach().clone() for p in parameters]
    b1, b2, epsilon = fields.values()
    m = v = 0.0
    for t, gradient in ((1, 2.0), (2, -0.5)):
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        change = 0.1 * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + epsilon)
        expected = [p - change for p in expected]
        torch.testing.assert_close([p.detach() for p in parameters], expected)


def test_branches_of_one_structure_are_only_tried_once(monkeypatch):
    """A pass without values takes a large share of a second. All branches are frozen alike."""
    tried, original = [], setup.model_checks.freeze_unused
    monkeypatch.setattr(
        setup.model_checks, "freeze_unused", lambda model, *words: (tried.append(model), original(model, *words))[1]
    )
    groups = settings(crop_size=[64, 64], per_device_train_batch_size=2)
    process = SimpleNamespace(num_processes=1, device=torch.device("cpu"), is_main_process=True)
    how = (groups["model_config"], groups["args"], [64, 64], CrossPseudoSupervision(), None, process)
    models = build_models([network("upernet-swin"), network("upernet-swin"), network("segformer")], *how)
    assert [models.index(one) for one in tried] == [0, 2]
    first, second = ({name: p.requires_grad for name, p in model.named_parameters()} for model in models[:2])
    assert first == second and not all(first.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "other", 1),
        lambda model: setattr(model.decode_head, "classifier", torch.nn.Conv2d(16, 3, 1, bias=False)),
        lambda model: setattr(model.decode_head, "activation", torch.nn.GELU()),
        lambda model: model.decode_head.classifier.bias.requires_grad_(False),
        lambda model: model.register_buffer("attn_mask_probs", torch.ones(2)),
    ],
    ids=["configuration", "parameters", "module", "frozen", "masked attention"],
)
def test_what_affects_a_pass_is_part_of_a_structure(change):
    one, other = network("upernet-swin"), network("upernet-swin")
    assert structure_of(one) == structure_of(other) and one.config is not other.config
    change(other)
    assert structure_of(one) != structure_of(other)


def network(name):
    row = next(row for row in ARCHITECTURES if row.name == name)
    return AutoModelForSemanticSegmentation.from_config(row.config())


def test_conditions_of_a_licence_are_logged_only_if_the_weights_are_found(monkeypatch, caplog):
    def absent(*_, **__):
        raise ValueError("neither a folder here nor a model")

    config = ModelConfig(backbone=["facebook/dinov3-vits16-pretrain-lvd1689m", "none"])
    models, process = ["nvidia/mit-b0", SegformerConfig()], SimpleNamespace(is_main_process=True)
    said = []
    for build, error in ((absent, "neither"), (lambda *_, **__: [], "needs 2 models, got 0")):
        assert said == []
        monkeypatch.setattr(setup.modeling, "build_branches", build)
        with caplog.at_level(logging.WARNING, logger="cps_hf"), pytest.raises(ValueError, match=error):
            build_models(models, config, CPSConfig(), [64, 64], CrossPseudoSupervision(), None, process)
        said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "nvidia/mit-b0" in said[0] and "research or evaluation only" in said[0]
    assert "facebook/dinov3-vits16-pretrain-lvd1689m" in said[1] and "DINOv3 License" in said[1]
