"""Modules that take seconds to import, or that belong to an extra, are only imported when used."""

import subprocess
import sys
from pathlib import Path

import pytest

import cps_hf

LATE = {"matplotlib", "gradio", "onnx", "onnxruntime"}
SUBPACKAGES = sorted(path.parent.name for path in Path(cps_hf.__file__).parent.glob("*/__init__.py"))


@pytest.mark.slow
def test_importing_subpackages_imports_no_heavy_library():
    assert {"app", "inference", "visualization"} <= set(SUBPACKAGES)
    code = f"import sys, {', '.join(f'cps_hf.{name}' for name in SUBPACKAGES)}; print(*sys.modules)"
    environment = {"PYTHONPATH": str(Path(cps_hf.__file__).parents[1]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & LATE
