"""Check that small mask-classification networks learn from few real labels, next to UperNet on the same backbone.

All networks start from random weights. Each run appends a JSON line to `--out`:

    python benchmarks/real/set_loss.py --data DIR/camvid --arms upernet mask2former mask2former-set
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from transformers import Mask2FormerConfig, PreTrainedConfig, SwinConfig, UperNetConfig

from cps_hf import AugmentationConfig, CPSConfig, CPSTrainer, EvaluationConfig, ModelConfig
from cps_hf.data import load_folder
from cps_hf.objectives import Supervised
from cps_hf.training import setup

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def backbone() -> SwinConfig:
    """A Swin of 1.8 million parameters with windows of 4 x 4 patches."""
    return SwinConfig(embed_dim=32, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 8], window_size=4, out_features=STAGES)


def upernet() -> PreTrainedConfig:
    return UperNetConfig(backbone_config=backbone(), hidden_size=64)


def mask2former() -> PreTrainedConfig:
    width = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 4, "encoder_feedforward_dim": 128, "dim_feedforward": 128}
    options = {"num_attention_heads": 4, "num_queries": 20, "train_num_points": 2048}
    return Mask2FormerConfig(backbone_config=backbone(), **width, **layers, **options)


ARMS = {
    "upernet": (upernet, "cross_entropy"),
    "mask2former": (mask2former, "cross_entropy"),
    "mask2former-set": (mask2former, "set"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="a folder with train/ and val/, each images/ and masks/"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--labels", type=int, default=23, help="labeled images, evenly spaced over train")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/set_loss.jsonl"))
    options = parser.parse_args()
    for arm in options.arms:
        found = run(arm, options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


def run(arm: str, options: argparse.Namespace) -> dict[str, object]:
    config, loss = ARMS[arm]
    train, val = (
        load_folder(options.data, split, class_names=options.data / "classes.json") for split in ("train", "val")
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = CPSTrainer(
            config(),
            CPSConfig(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=options.learning_rate,
                optim="adamw",
                warmup_steps=options.steps // 20,
                max_grad_norm=1.0,
                logging_steps=max(1, options.steps // 10),
                dataloader_num_workers=0,
                check_labels_seconds=0,
                seed=options.seed,
                disable_tqdm=True,
            ),
            objective=Supervised(labeled_loss=loss),
            train_dataset=setup.evenly_spaced(train, options.labels),
            eval_dataset=val,
            augmentation=AugmentationConfig(
                crop_size=[options.crop] * 2, random_scale=[0.75, 1.5], random_scale_mode="range"
            ),
            model_config=ModelConfig(num_branches=1),
            evaluation=EvaluationConfig(num_pictures=0),
        )
        begin = time.process_time()
        results = trainer.train()
        seconds = time.process_time() - begin
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    scores = results["final"]["branch_0"]
    return {
        "arm": arm,
        "steps": options.steps,
        "parameters": sum(p.numel() for p in trainer.models[0].parameters()),
        "cpu_seconds": round(seconds),
        "losses": [round(one, 3) for one in losses],
        "val_mean_iou": round(scores["mean_iou"], 4),
        "val_overall_accuracy": round(scores["overall_accuracy"], 4),
        "seed": options.seed,
    }


if __name__ == "__main__":
    main()
