"""Synchronised batch norms."""

import copy

import torch
from support.tiny_models import build
from torch import nn
from transformers import TimmBackboneConfig

from cps_hf.modeling import DeepLabV3PlusConfig, convert_sync_batchnorm, freeze


def test_synchronised_norms_keep_activations_and_weights():
    model = build(
        DeepLabV3PlusConfig(
            backbone_config=TimmBackboneConfig(backbone="efficientnet_b0", out_indices=[1, 4]), aspp_channels=16
        )
    ).eval()
    expected, state = model(torch.ones(1, 3, 64, 64)).logits, copy.deepcopy(model.state_dict())
    freeze(model, norms=True)
    model = convert_sync_batchnorm(model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.decode_head.modules())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.backbone.modules())
    whole = convert_sync_batchnorm(build(model.config)).eval()
    whole.load_state_dict(state)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in whole.backbone.modules())
    assert torch.allclose(whole(torch.ones(1, 3, 64, 64)).logits, expected, atol=1e-4)
