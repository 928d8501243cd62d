"""What is made of the settings before the first step."""

from types import SimpleNamespace

import pytest
import torch
from support.toy import ID2LABEL, settings, toy_models

from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training.setup import build_models


@pytest.mark.parametrize(
    ("wanted", "device", "processes", "synced"),
    [(True, "cuda", 2, True), (False, "cuda", 2, False), (True, "cpu", 2, False), (True, "cuda", 1, False)],
)
def test_batch_norm_is_synchronised_on_several_gpus_alone_and_where_it_is_wanted(wanted, device, processes, synced):
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
