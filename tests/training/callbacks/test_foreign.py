"""transformers' own callbacks in this loop: each works, or is rejected before the first step.

The services that they report to are replaced by modules that accept any call, except TensorBoard, which is real.
"""

import importlib.abc
import importlib.machinery
import inspect
import json
import os
import sys
from unittest.mock import MagicMock, patch

import pytest
import transformers.trainer_callback
from support.toy import settings, toy_models, write_world
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, integration_utils
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from cps_hf.config import CPSConfig
from cps_hf.objectives import Supervised
from cps_hf.training.callbacks.foreign import check_callbacks
from cps_hf.training.trainer import CPSTrainer

UNSUPPORTED = {"trackio"}


class Services(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for any module of the services, and accepts any call."""

    NAMES = {"wandb", "trackio", "comet_ml", "azureml", "mlflow", "dagshub", "neptune", "codecarbon", "clearml"}
    NAMES |= {"flytekit", "flytekitplugins", "dvclive", "swanlab", "pandas"}

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(__path__=[], __name__=spec.name, __spec__=spec, __version__="99.0")
        if spec.name == "comet_ml":  # a mock rejects names that look like Python's special names
            module.start.return_value = AnyCall()
        if spec.name == "dvclive":
            module.Live = AnyCall
        if spec.name == "mlflow":
            limits = module.utils.validation
            limits.MAX_PARAM_VAL_LENGTH, limits.MAX_PARAMS_TAGS_PER_BATCH = 250, 100
        return module

    def exec_module(self, module):
        pass


class AnyCall:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def services(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in Services.NAMES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Services(), *sys.meta_path])
    for name, _ in inspect.getmembers(integration_utils, inspect.isfunction):
        if name.startswith("is_") and name.endswith("_available") and "torch" not in name:
            monkeypatch.setattr(integration_utils, name, lambda *args: True)
    monkeypatch.setattr(integration_utils, "_is_comet_installed", True)
    monkeypatch.setattr(integration_utils, "_is_comet_recent_enough", True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://localhost/me/repo.mlflow")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1:9")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in Services.NAMES]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    dataset = write_world(tmp_path_factory.mktemp("world"), [(40, 56)] * 3)
    return {"train_dataset": dataset, "eval_dataset": dataset}


def trainer_for(world, tmp_path, callbacks):
    fields = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2}
    fields |= {"crop_size": [32, 32], "dataloader_num_workers": 0, "num_pictures": 0, "disable_tqdm": True}
    fields |= {"logging_steps": 1, "save_steps": 1, "eval_steps": 1, "run_name": "a run"}
    return CPSTrainer(toy_models(1), **settings(**fields), objective=Supervised(), callbacks=callbacks, **world)


@pytest.mark.parametrize("name", integration_utils.INTEGRATION_TO_CALLBACK)
@pytest.mark.filterwarnings("ignore:The NeptuneCallback is deprecated")
def test_transformers_reporting_callbacks_work_or_are_rejected(world, tmp_path, name, services):
    callback = integration_utils.INTEGRATION_TO_CALLBACK[name]()
    if name in UNSUPPORTED:
        with pytest.raises(ValueError, match=rf'{type(callback).__name__} .*`report_to=\["{name}"\]`'):
            trainer_for(world, tmp_path, [callback])
        assert not (tmp_path / "out").exists()
        return
    logged = []
    on_log = type(callback).on_log

    def noted(*args, **kwargs):
        logged.append(kwargs["logs"])
        return on_log(callback, *args, **kwargs)

    callback.on_log = noted
    assert trainer_for(world, tmp_path, [callback]).train()["steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(logged) == 4  # two steps, each with its evaluation
    assert all("loss" in record or "eval_mean_iou" in record for record in logged)


def test_tensorboards_callback_writes_every_number_and_the_settings(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_for(world, tmp_path, [TensorBoardCallback]).train()
    (folder,) = {path.parent for path in (tmp_path / "out" / "runs").rglob("events.*")}
    events = EventAccumulator(str(folder)).Reload()
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            assert {e.step: e.value for e in events.Scalars(tag)}[step] == pytest.approx(value, rel=1e-6), tag
    (text,) = events.Tensors("args/text_summary")
    assert json.loads(text.tensor_proto.string_val[0])["run_name"] == "a run"


@pytest.mark.parametrize(
    ("name", "variable", "value", "said"),
    [
        ("wandb", "WANDB_LOG_MODEL", "end", 'WANDB_LOG_MODEL is set.*`report_to=\\["wandb"\\]`'),
        ("wandb", "WANDB_LOG_MODEL", "checkpoint", 'WANDB_LOG_MODEL is set.*`report_to=\\["wandb"\\]`'),
        ("dvclive", "HF_DVCLIVE_LOG_MODEL", "true", 'HF_DVCLIVE_LOG_MODEL is set.*`report_to=\\["dvclive"\\]`'),
    ],
)
def test_callbacks_that_would_upload_models_are_rejected(
    world, tmp_path, name, variable, value, said, services, monkeypatch
):
    monkeypatch.setenv(variable, value)
    cls = integration_utils.INTEGRATION_TO_CALLBACK[name]

    class Derived(cls):
        pass

    for made in (cls(), Derived()):
        with pytest.raises(ValueError, match=f"{cls.__name__} would upload the model.*{said}"):
            trainer_for(world, tmp_path, [made])
    trainer = trainer_for(world, tmp_path, [])
    with pytest.raises(ValueError, match="would upload"):
        trainer.add_callback(cls)
    monkeypatch.setenv(variable, "false")
    trainer.add_callback(cls)
    trainer.train()


def test_other_library_callbacks_work_or_are_rejected(world, tmp_path):
    stay = {"EarlyStoppingCallback": {"early_stopping_patience": 1}}
    for name, cls in inspect.getmembers(transformers.trainer_callback, inspect.isclass):
        if issubclass(cls, TrainerCallback) and cls is not TrainerCallback and name != "CallbackHandler":
            trainer_for(world, tmp_path / name, [cls(**stay.get(name, {}))]).train()
    with pytest.raises(ValueError, match="JITCheckpointCallback saves with transformers' Trainer.*saves by itself"):
        trainer_for(world, tmp_path, [JITCheckpointCallback()])
    namesake = type("JITCheckpointCallback", (TrainerCallback,), {})
    check_callbacks([namesake()])  # a user's own class


def test_the_notebook_progress_bar_is_shown(world, tmp_path, services):
    with patch.dict(sys.modules, {"IPython": MagicMock(), "IPython.display": MagicMock()}):
        from transformers.utils.notebook import NotebookProgressCallback

        trainer_for(world, tmp_path, [NotebookProgressCallback]).train()


def test_settings_serialize_like_transformers_arguments():
    args = CPSConfig(max_steps=7, lr_scheduler_kwargs={"power": 2.0}, report_to=["tensorboard"])
    assert json.loads(args.to_json_string()) == args.to_dict() and args.to_dict()["max_steps"] == 7
    plain = args.to_sanitized_dict()
    assert plain["lr_scheduler_kwargs"] == "{'power': 2.0}" and plain["report_to"] == "['tensorboard']"
    assert plain["max_steps"] == 7 and plain["run_name"] == "None" and os.linesep not in plain["report_to"]
