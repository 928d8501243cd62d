"""What takes seconds to import, or is an extra, is imported when it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

import cps_hf

LATE = {"matplotlib", "gradio", "onnx", "onnxruntime"}
SUBPACKAGES = sorted(path.parent.name for path in Path(cps_hf.__file__).parent.glob("*/__init__.py"))


@pytest.mark.slow
def test_importing_every_room_brings_no_heavy_library_along():
    assert {"app", "inference", "visualization"} <= set(SUBPACKAGES)
    code = f"import sys, {', '.join(f'cps_hf.{name}' for name in SUBPACKAGES)}; print(*sys.modules)"
    environment = {"PYTHONPATH": str(Path(cps_hf.__file__).parents[1]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & LATE
