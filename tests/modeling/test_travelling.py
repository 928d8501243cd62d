"""A pushed DeepLabV3+, HRNet or ViT-DPT includes its code: it loads where this package is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.architectures import DINOV2, DPT
from transformers import Dinov2Config, pipeline

from cps_hf.modeling import (
    DeepLabV3PlusConfig,
    DeepLabV3PlusForSemanticSegmentation,
    HRNetConfig,
    HRNetForSemanticSegmentation,
    ViTDPTConfig,
    ViTDPTForSemanticSegmentation,
)

NAMES = {0: "road", 1: "car", 2: "sky"}
LABELS = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
LOAD = """
import json, sys
sys.modules["cps_hf"] = None  # importing it fails, as where it is not installed
import pytest
import torch
from transformers import AutoModelForSemanticSegmentation
sums = {}
for folder in sys.argv[1:]:
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    images = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)
    with torch.no_grad():
        sums[folder] = model(images).logits.double().flatten()[::37].tolist()
print(json.dumps(sums))
"""


@pytest.mark.slow
def test_saved_models_load_in_a_process_without_the_package(tmp_path):
    torch.manual_seed(0)
    models = {
        "deeplab": DeepLabV3PlusForSemanticSegmentation(
            DeepLabV3PlusConfig(backbone="test_resnet", aspp_channels=16, **LABELS)
        ),
        "hrnet": HRNetForSemanticSegmentation(HRNetConfig(backbone="hrnet_w18_small", **LABELS)),
    }
    vit = Dinov2Config(**DINOV2)
    models["vit_dpt"] = ViTDPTForSemanticSegmentation(ViTDPTConfig(backbone_config=vit, **DPT, **LABELS))
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
    folders = [str(tmp_path / name) for name in models]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    images = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)
    for folder, model in zip(folders, models.values(), strict=True):
        with torch.no_grad():
            expected = model(images).logits.double().flatten()[::37]
        assert torch.allclose(torch.tensor(found[folder], dtype=torch.float64), expected, atol=1e-4)


def test_a_saved_model_runs_in_the_segmentation_pipeline(tmp_path):
    from PIL import Image
    from transformers import SegformerImageProcessor

    torch.manual_seed(0)
    config = DeepLabV3PlusConfig(backbone="test_resnet", aspp_channels=16, **LABELS)
    DeepLabV3PlusForSemanticSegmentation(config).save_pretrained(tmp_path)
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path)
    found = pipeline("image-segmentation", model=str(tmp_path))(Image.new("RGB", (70, 50), (90, 120, 30)))
    assert found and all(item["label"] in NAMES.values() and item["mask"].size == (70, 50) for item in found)
