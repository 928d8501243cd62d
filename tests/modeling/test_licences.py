"""Weights with conditions are told by their names, and paths are not taken for names."""

import logging
import re

import pytest

from cps_hf.modeling.licences import conditions, warn_of_conditions


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3 License.*accepted on the Hub first"),
        ("timm/vit_small_patch16_dinov3.lvd1689m", "DINOv3 License"),
        ("timm/convnext_tiny.dinov3_lvd1689m", "DINOv3 License"),
        ("tue-mps/eomt-dinov3-ade-semantic-large-512", "DINOv3 License"),
        ("nvidia/mit-b2", "NVIDIA.*research or evaluation only"),
        ("nvidia/segformer-b0-finetuned-ade-512-512", "NVIDIA.*networks that are trained from these weights"),
        ("facebook/mask2former-swin-tiny-ade-semantic", "CC BY-NC 4.0"),
        ("facebook/maskformer-swin-base-ade", "CC BY-NC 4.0"),
    ],
)
def test_conditions_are_named(name, words, caplog):
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        warn_of_conditions([name, name, "facebook/dinov2-small"])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"The weights {name} have a licence with conditions: ") and said.endswith(".")

    assert re.search(words, said)


@pytest.mark.parametrize(
    "name",
    [
        *("facebook/dinov2-small", "facebook/dinov2-with-registers-small", "timm/resnet50s.gluon_in1k"),
        *("package:efficientnet-lite0", "facebook/convnext-tiny-224", "someone/my-mit-b2"),
    ],
)
def test_free_licences_are_not_warned_of(name):
    assert conditions(name) is None


def test_a_folder_here_is_no_name_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "nvidia" / "mit-b2").mkdir(parents=True)
    assert conditions("nvidia/mit-b2")
    monkeypatch.chdir(tmp_path)
    assert conditions("nvidia/mit-b2") is None
