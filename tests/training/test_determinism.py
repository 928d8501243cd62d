"""The switch for deterministic algorithms: on during training, off again afterwards, and effective."""

from dataclasses import dataclass

import pytest
import torch
from support.toy import settings, toy_models, write_world

from cps_hf.objectives import Supervised
from cps_hf.training.determinism import deterministic_algorithms
from cps_hf.training.trainer import CPSTrainer

SEEN = []


@dataclass(frozen=True, kw_only=True)
class Look(Supervised):
    def __call__(self, branches, labeled, unlabeled=None, *, teacher=None, progress=0.0):
        cudnn = torch.backends.cudnn
        fresh = torch.empty(4)  # deterministic algorithms fill memory that is otherwise uninitialised
        SEEN.append((torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, fresh.isnan().all().item()))
        return super().__call__(branches, labeled, unlabeled)


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_is_only_switched_on_during_training(tmp_path, wanted):
    SEEN.clear()
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic)
    fields = {"max_steps": 1, "per_device_train_batch_size": 2, "crop_size": [16, 16], "dataloader_num_workers": 0}
    args = settings(output_dir=str(tmp_path / "out"), disable_tqdm=True, full_determinism=wanted, **fields)
    dataset = write_world(tmp_path / "labeled", [(20, 20)] * 2)
    CPSTrainer(toy_models(1), **args, objective=Look(), train_dataset=dataset).train()
    assert SEEN[0][:2] == (wanted, wanted) and (SEEN[0][2] or not wanted)
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before


def test_nondeterministic_operations_raise_under_the_switch():
    unpool, maps, indices = torch.nn.MaxUnpool2d(2), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long)
    unpool(maps, indices)
    with deterministic_algorithms(True), pytest.raises(RuntimeError, match="deterministic"):
        unpool(maps, indices)
    unpool(maps, indices)


def test_on_a_gpu_the_required_variable_is_named(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(True):
        pass
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in caplog.text
    caplog.clear()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with deterministic_algorithms(True):
        pass
    assert not caplog.text
