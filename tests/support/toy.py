"""Shared by several tests: a small labeled world on disk, and small models."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    UperNetConfig,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from cps_hf.config import AugmentationConfig, CPSConfig, EvaluationConfig, HubConfig, ModelConfig, Provenance
from cps_hf.data.labels import LabelEncoding
from cps_hf.hub.export import export_branch

NAMES = ("ground", "disc", "bar")
ID2LABEL = dict(enumerate(NAMES))
EXAMPLES = Path(__file__).parents[2] / "examples"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ToyConfig(PreTrainedConfig):
    model_type = "toy_segmentation"
    width: int = 8
    dropout: float = 0.0
    norm: bool = False


class ToyForSemanticSegmentation(PreTrainedModel):
    """Two convolutions, by default without norm, so that a sample's gradient does not depend on its batch. Stride
    2."""

    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.backbone = nn.Conv2d(3, config.width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(config.width) if config.norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.decode_head = nn.Conv2d(config.width, config.num_labels, 3, padding=1)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d) and not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values, labels=None, **kwargs):
        hidden = self.dropout(torch.tanh(self.norm(self.backbone(pixel_values))))
        return SemanticSegmenterOutput(logits=self.decode_head(hidden))


def toy_models(count=2, num_labels=3, seed=0, **config):
    models = []
    for i in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed + i)
            id2label = {k: ID2LABEL.get(k, f"class {k}") for k in range(num_labels)}
            models.append(ToyForSemanticSegmentation(ToyConfig(id2label=id2label, **config)))
    return models


def tiny_upernet() -> UperNetConfig:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, id2label=ID2LABEL)


def tiny_branch(folder: Path, num_labels: int, seed: int = 0, names=None, scale: float = 1.0) -> Path:
    """A small branch that depends on its input, exported as by a run. A smaller `scale` is less confident."""
    torch.manual_seed(seed)
    config = tiny_upernet()
    config.id2label = dict(enumerate(names or [f"class {i}" for i in range(num_labels)]))
    model = AutoModelForSemanticSegmentation.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.decode_head.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return export_branch(model, folder, image_mean=MEAN, image_std=STD)


def predict_by_hand(folder: Path):
    """Logits (1, C, H, W) of an image file at its size, with only transformers."""
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    def logits(path):
        image = PILImage.open(path).convert("RGB")
        with torch.no_grad():
            found = model(**processor(image, return_tensors="pt")).logits
        return nn.functional.interpolate(found, size=image.size[::-1], mode="bilinear", align_corners=False)

    return logits


def script(name: str):
    """A file of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def settings(**fields) -> dict[str, object]:
    """The groups of settings that `CPSTrainer` takes, from fields of any group."""
    groups = {
        "args": CPSConfig,
        "augmentation": AugmentationConfig,
        "model_config": ModelConfig,
        "evaluation": EvaluationConfig,
        "hub": HubConfig,
        "provenance": Provenance,
    }
    owner = {name: group for group, cls in groups.items() for name in cls.__dataclass_fields__}
    by_group: dict[str, dict] = {group: {} for group in groups}
    for name, value in fields.items():
        by_group[owner.get(name, "args")][name] = value
    return {group: cls(**by_group[group]) for group, cls in groups.items()}


def draw(index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A disc and a bar on noise: image (H, W, 3), label (H, W) with a void rim."""
    rng = np.random.default_rng([7, index])
    rows, columns = np.mgrid[:height, :width]
    label = np.zeros((height, width), np.uint8)
    radius = min(height, width) // 4
    label[(rows - rng.integers(height)) ** 2 + (columns - rng.integers(width)) ** 2 < radius**2] = 1
    left = rng.integers(width)
    label[:, left : left + max(2, width // 8)] = 2
    colors = np.array([[60, 120, 60], [200, 60, 60], [60, 60, 200]])
    image = np.clip(colors[label] + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    label[:1] = 255
    return image, label


def write_world(folder: Path, sizes, *, first=0, labels=True, encoding=True) -> Dataset:
    """One image per size, as PNG files, and the data set over them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [], "label": [], "id": []}
    for i, (height, width) in enumerate(sizes):
        image, label = draw(first + i, height, width)
        PILImage.fromarray(image).save(folder / f"{i}.png")
        PILImage.fromarray(label).save(folder / f"{i}_label.png")
        rows["image"].append(str(folder / f"{i}.png"))
        rows["label"].append(str(folder / f"{i}_label.png"))
        rows["id"].append(f"{folder.name}-{i}")
    label = LabelEncoding(names=NAMES).to_feature() if encoding else Image()
    features = Features({"image": Image(), "label": label, "id": Value("string")})
    dataset = Dataset.from_dict(rows, features=features)
    return dataset if labels else dataset.remove_columns("label")


def write_three_sets(root: Path, sizes) -> dict[str, Dataset]:
    """The trainer's labeled, unlabeled and evaluation sets; the last one has the first two sizes."""
    return {
        "train_dataset": write_world(root / "labeled", sizes),
        "unlabeled_dataset": write_world(root / "unlabeled", sizes, first=50, labels=False),
        "eval_dataset": write_world(root / "eval", sizes[:2], first=90),
    }


def run_python(
    *words: str, processes: int = 1, config_file: Path | None = None, cwd: Path | None = None, timeout=240, **env: str
):
    """Run a new Python (several connected by gloo if `processes` > 1). Returns its CompletedProcess.

    `config_file` is the launcher's, instead of the arguments that make it start processes with DDP.
    """
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        launch += ["--config_file", str(config_file)] if config_file else ["--multi_gpu"]
        launch += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        env = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    paths = [*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **env}
    return subprocess.run([*launch, *words], capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)


SUPPORT = Path(__file__).parent
PATHS = [Path(__file__).parents[2], Path(__file__).parents[1]]
