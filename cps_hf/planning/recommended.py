"""The recommended settings, by option name, which `cps-hf train DIR` and benchmarks/real train with.

They are for few labeled photographs and a pretrained backbone. They are not the paper's settings, which are the
defaults of `CPSConfig` and of the objectives. Settings that depend on the data or the machine are in `plan.py`.
"""

from __future__ import annotations

from typing import Any

# How a network learns from the labeled images: in a supervised run, and in both stages of a run with unlabeled images.
LABELED: dict[str, Any] = {
    "labeled_loss": "cross_entropy",
    # With few labels, rare classes are learned worst. The frequency to the power of -0.5: +5 points of mean IoU on
    # steel surfaces with 24 labels, +3 on street photos with 23.
    "class_weights": 0.5,
    # Few images are soon memorized; color changes slow that down. +4 points on steel.
    "labeled_color_jitter": 0.5,
    "color_jitter": 0.8,
    "grayscale": 0.2,
    "gaussian_blur": 0.5,
    # A handful of images disturbs the running statistics of the pretrained backbone more than it improves them, even
    # more so under the several passes of a method with unlabeled images. +4 points on steel.
    "freeze_norms": True,
    "horizontal_flip": 0.5,
    # Around the scale used for evaluation, in both directions.
    "random_scale": [0.75, 1.5],
    "random_scale_mode": "range",
    "resize_antialias": True,
    # AdamW needs no tuning to the batch size at these lengths. The backbone is pretrained and the head is not, so the
    # head learns ten times as fast: 1e-3 and 1e-4.
    "optim": "adamw",
    "learning_rate": 1e-4,
    "head_learning_rate_factor": 10.0,
    "weight_decay": 0.01,
    "lr_scheduler_type": "polynomial",
    "per_device_train_batch_size": 4,
    # The average over steps is scored and exported next to each branch; it was better by 0.5 to 1 point. It covers
    # the last hundred steps, as runs are short.
    "ema_decay": 0.99,
}

# What a run with unlabeled images adds. It has two stages; the first is supervised (`pretrain_steps`).
UNLABELED: dict[str, Any] = {
    # CPS + CutMix from two finished supervised branches: +4 and +3 points on steel. Without that stage it lost five.
    "objective": "cps",
    "weight": 1.0,
    "cutmix": True,
    # Class weights apply to the labeled term only: with weights on pseudo labels, rare classes take over.
    "class_balance": 0.0,
    "per_device_unlabeled_batch_size": 4,
    # The branches are already trained: a new schedule at half the rate.
    "second_stage_learning_rate_factor": 0.5,
}

RECOMMENDED: dict[str, Any] = {**LABELED, **UNLABELED}
"""For a run with labeled and unlabeled images. Its fair control is `LABELED` with `objective` supervised."""

FIRST_STAGE_SHARE = 0.5
"""Share of the steps in the supervised stage: `pretrain_steps = round(FIRST_STAGE_SHARE * max_steps)`."""
