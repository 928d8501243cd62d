"""What tests of training share."""

from pathlib import Path

import pytest
from PIL import Image

from cps_hf import visualization


@pytest.fixture(autouse=True)
def small_curves(monkeypatch):
    """Drawing the curves takes two fifths of a toy run's time. Here they are a small picture.

    Runs of module fixtures draw them, and so does test_pictures.py, which replaces this fixture.
    """

    def write_curves(records, keys, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 70)).save(path)

    monkeypatch.setattr(visualization, "write_curves", write_curves)
