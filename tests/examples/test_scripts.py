"""The scripts that only call a command of `cps-hf`."""

import importlib

import pytest
from support.toy import script

SCRIPTS = {
    "app": "app",
    "check_dataset": "check",
    "evaluate_branch": "evaluate",
    "export_onnx": "export",
    "predict": "predict",
    "prepare_dataset": "prepare",
    "push_branch": "push",
    "train_cps": "train",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_its_command(name):
    command = importlib.import_module(f"cps_hf.commands.{SCRIPTS[name]}")
    assert script(name).main is command.main
    assert f"`cps-hf {SCRIPTS[name]}`" in script(name).__doc__
