"""The recommended settings, by option name: what `cps-hf train DIR` and benchmarks/real train with.

They are for few labeled photographs and a pretrained backbone, and they are not the paper's: those are the defaults of
`CPSConfig` and of the objectives. What depends on the data or the machine is not here but in `plan.py`.
"""

from __future__ import annotations

from typing import Any

# How a network learns from the labeled images: of a supervised run, and of both stages of a run with unlabeled images.
LABELED: dict[str, Any] = {
    "labeled_loss": "cross_entropy",
    # Rare classes are what few labels teach worst. The frequency to the power of -0.5: +5 points of mean IoU on steel
    # surfaces with 24 labels, +3 on street photos with 23.
    "class_weights": 0.5,
    # Few images are soon known by heart; a labeled image that comes in other colours is not. +4 points on steel.
    "labeled_color_jitter": 0.5,
    "color_jitter": 0.8,
    "grayscale": 0.2,
    "gaussian_blur": 0.5,
    # A handful of images moves the running statistics of the pretrained backbone more than it teaches, the more so
    # under the several passes of a method with unlabeled images. +4 points on steel.
    "freeze_norms": True,
    "horizontal_flip": 0.5,
    # Around the scale at which images are evaluated, in both directions.
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
    # The average over steps is scored and exported beside each branch; it was the better one by 0.5 to 1 point. Of the
    # last hundred steps: runs are short.
    "ema_decay": 0.99,
}

# What a run with unlabeled images adds. It has two stages, the first of which is supervised (`pretrain_steps`).
UNLABELED: dict[str, Any] = {
    # CPS + CutMix from two finished supervised branches: +4 and +3 points on steel. From the start it lost five.
    "objective": "cps",
    "weight": 1.0,
    "cutmix": True,
    # Class weights are on the labeled term alone: with weights on pseudo labels rare classes run away.
    "class_balance": 0.0,
    "per_device_unlabeled_batch_size": 4,
    # The branches are trained already: a fresh schedule at half the rate.
    "second_stage_learning_rate_factor": 0.5,
}

RECOMMENDED: dict[str, Any] = {**LABELED, **UNLABELED}
"""Of a run with labeled and unlabeled images. Its fair control is `LABELED` with `objective` supervised."""

FIRST_STAGE_SHARE = 2 / 3
"""Of all steps, those of the supervised stage: `pretrain_steps = round(FIRST_STAGE_SHARE * max_steps)`."""
