"""A pretrained backbone for the object scenes: a small ResNet that classified other drawn objects first.

    python benchmarks/object_backbone.py --output object_backbone
    python benchmarks/comparisons/compare_objectives.py --dataset object_scenes --backbone object_backbone ...

It replaces ImageNet, from which the paper's networks start: single objects cut out of 3,000 object scenes, drawn with
another seed than those that are segmented, each with its class and no mask. From random weights, the demonstration's
network predicts only background after 1,000 steps on 300 object scenes. Takes some seven minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from cps_hf.commands.models import small_model
from cps_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cps_hf.data.voc import NAMES
from cps_hf.functional import IGNORE_INDEX
from cps_hf.scenes.write import draw_object_scene

SCENE_SEED = 1  # the scenes that are segmented have seed 0
STORED = 80  # height and width of an object's picture in pixels
BATCH, LEARNING_RATE = 64, 4e-3
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def draw_objects(scenes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, uint8 (N, 3, 80, 80), and classes, (N,), 0 to 19: the visible part of one class in one scene."""
    pictures, classes = [], []
    for index in tqdm(range(scenes), desc="Drawing objects"):
        image, labels = draw_object_scene(index, seed=SCENE_SEED)
        for label in np.setdiff1d(labels, (0, IGNORE_INDEX)):
            rows, columns = np.nonzero(labels == label)
            if len(rows) < 60:  # mostly hidden by others
                continue
            half = 0.65 * max(np.ptp(rows), np.ptp(columns)) + 2
            y, x = (rows.max() + rows.min()) / 2, (columns.max() + columns.min()) / 2
            box = int(x - half), int(y - half), int(x + half), int(y + half)
            picture = Image.fromarray(image).crop(box).resize((STORED, STORED), Image.Resampling.BILINEAR)
            pictures.append(np.array(picture))
            classes.append(label - 1)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(classes).long()


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.float() / 255 - MEAN) / STD


def augmented(pictures: torch.Tensor) -> torch.Tensor:
    """Augment a batch: one box and one size for all, and a flip, contrast and brightness per picture."""
    size = int(torch.randint(56, STORED + 1, ()))
    y, x = (int(torch.randint(0, STORED + 1 - size, ())) for _ in range(2))
    images = normalized(pictures[:, :, y : y + size, x : x + size])
    side = int(torch.randint(32, 65, ()))
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    flipped = torch.rand(len(images)) < 0.5
    images[flipped] = images[flipped].flip(3)
    contrast = (1 + 0.2 * torch.randn(len(images), 1, 1, 1)).clamp(0.5, 1.5)
    return images * contrast + 0.2 * torch.randn(len(images), 1, 1, 1)


@torch.no_grad()
def accuracy(network, pictures: torch.Tensor, classes: torch.Tensor) -> float:
    network.eval()
    predictions = torch.cat([network(normalized(some)).logits.argmax(1) for some in pictures.split(256)])
    network.train()
    return (predictions == classes).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/object_backbone"))
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=2400)
    options = parser.parse_args()
    if options.scenes < 10 or options.steps < 1:
        parser.error(f"--scenes must be at least 10, --steps 1; got {options.scenes} and {options.steps}.")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"--output: {options.output} is not empty; choose another folder, or delete it.")

    pictures, classes = draw_objects(options.scenes)
    held_out = len(classes) // 10
    config = small_model().backbone_config
    names = dict(enumerate(NAMES[1:]))
    config = ResNetConfig(**{**config.to_dict(), "id2label": names, "label2id": {v: k for k, v in names.items()}})
    torch.manual_seed(0)
    network = ResNetForImageClassification(config).train()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, options.steps)
    for step in (bar := tqdm(range(1, options.steps + 1), desc="Classifying")):
        some = held_out + torch.randint(len(classes) - held_out, (BATCH,))
        loss = F.cross_entropy(network(augmented(pictures[some])).logits, classes[some], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == options.steps:
            right = accuracy(network, pictures[:held_out], classes[:held_out])
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{100 * right:.1f} %")
    network.save_pretrained(options.output)
    print(f"{held_out} objects held out: {100 * right:.1f} % right. Written to {options.output}.")


if __name__ == "__main__":
    main()
