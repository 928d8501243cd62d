"""Your own data format on one page: polygons in JSON files, as labeling tools write them.

    python examples/custom_dataset.py              # first draws a small set into outputs/custom_dataset/polygons
    python examples/custom_dataset.py DIR          # DIR/*.json with "imagePath" and "shapes", as LabelMe writes them

The trainer takes a `datasets.Dataset` with the columns "image", "label" and "id". For any format on disk, you only
write which classes there are, and how a file becomes a row.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageOps
from transformers import ResNetConfig, UperNetConfig

from cps_hf import AugmentationConfig, CPSConfig, CPSTrainer, CrossPseudoSupervision
from cps_hf.data import LabelEncoding
from cps_hf.training.reporting import mean_iou_in_words

NAMES = ("background", "house", "tree")
# The label column defines its values: class ids 0, 1, 2; 255 is ignored. The definition stays with the data set, even
# through `push_to_hub`. Masks with other codes need no conversion: see LabelEncoding's `values` and `colors`.
FEATURES = Features({"image": Image(), "label": LabelEncoding(names=NAMES).to_feature(), "id": Value("string")})


def load_polygons(folder: Path) -> Dataset:
    """One row per JSON file. Images stay files; label maps are drawn from the polygons and stored as PNG.

    Raises:
        ValueError: there is no JSON file, or one is not such an annotation.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"No *.json in {folder}.")
    return Dataset.from_list([read_polygons(path) for path in paths], features=FEATURES)


def read_polygons(path: Path) -> dict:
    """The row of one file."""
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
        picture = path.parent / annotation["imagePath"]
        shapes = [(shape["label"], [tuple(point) for point in shape["points"]]) for shape in annotation["shapes"]]
    except (ValueError, KeyError, TypeError) as error:
        wanted = '{"imagePath": ..., "shapes": [{"label": ..., "points": ...}, ...]}'
        raise ValueError(f"{path}: expected {wanted}, as LabelMe writes it ({error!r}).") from error
    # Outlines refer to the picture as shown and as the trainer reads it: rotated by its EXIF orientation.
    label = PILImage.new("L", ImageOps.exif_transpose(PILImage.open(picture)).size, 0)
    for name, points in shapes:  # later shapes are drawn on top
        if name not in NAMES:
            raise ValueError(f"{path}: a shape is called {name!r}; the classes are {', '.join(NAMES)} (see NAMES).")
        ImageDraw.Draw(label).polygon(points, fill=NAMES.index(name))
    file = io.BytesIO()
    label.save(file, format="PNG")
    return {"image": str(picture), "label": {"bytes": file.getvalue(), "path": None}, "id": path.stem}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="default: draw a small set")
    parser.add_argument("--labeled", type=int, default=4, help="how many images keep their labels")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/custom_dataset"))
    options = parser.parse_args(argv)
    folder = options.folder or draw_polygons(options.output_dir / "polygons")

    dataset = load_polygons(folder)
    parts = dataset.train_test_split(test_size=0.25, seed=0)
    train = parts["train"]
    if not 0 < options.labeled < len(train):
        raise ValueError(f"`--labeled` must be from 1 to {len(train) - 1}, so that some stay unlabeled.")
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic", out_features=stages
    )
    trainer = CPSTrainer(
        UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False),
        CPSConfig(
            output_dir=str(options.output_dir / "run"),
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            optim="adamw",
            learning_rate=4e-3,
            logging_steps=20,
            dataloader_num_workers=0,
        ),
        augmentation=AugmentationConfig(crop_size=[48, 64]),
        objective=CrossPseudoSupervision(weight=1.0, ramp_up=0.3),
        train_dataset=train.select(range(options.labeled)),
        unlabeled_dataset=train.select(range(options.labeled, len(train))).remove_columns("label"),
        eval_dataset=parts["test"],
    )
    results = trainer.train()
    for row, scores in results["final"].items():
        print(f"{row}: {mean_iou_in_words(scores)}")
    return results


def draw_polygons(folder: Path, count: int = 32, size: tuple[int, int] = (80, 60)) -> Path:
    """Houses and trees on a meadow, with their outlines in JSON, for this example to read."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        dice = random.Random(index)
        picture = PILImage.effect_noise(size, 40).convert("RGB")
        picture = PILImage.blend(picture, PILImage.new("RGB", size, (90, 150, 70)), 0.7)
        shapes = []
        for _ in range(dice.randint(2, 4)):
            name = dice.choice(NAMES[1:])
            x, y, width = dice.randint(0, 60), dice.randint(10, 45), dice.randint(10, 24)
            roof = [[x + width // 2, y - width // 2], [x + width, y], [x, y]]
            shape = roof if name == "tree" else [*roof[:2], [x + width, y + width], [x, y + width], roof[2]]
            color = (30, 80, 40) if name == "tree" else (dice.randint(140, 220), 90, 70)
            ImageDraw.Draw(picture).polygon([tuple(point) for point in shape], fill=color)
            shapes.append({"label": name, "points": shape})
        picture.save(folder / f"{index:03d}.png")
        annotation = {"imagePath": f"{index:03d}.png", "shapes": shapes}
        (folder / f"{index:03d}.json").write_text(json.dumps(annotation), encoding="utf-8")
    return folder


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # errors the user can fix are one line, without a traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
