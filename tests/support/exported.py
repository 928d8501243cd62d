"""A tiny exported branch and the facts of its card, for the tests of exporting and pushing."""

from __future__ import annotations

import numpy as np
from transformers import AutoModelForSemanticSegmentation

from cps_hf.hub.export import export_branch
from support.toy import NAMES, tiny_upernet

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def scores(value):
    return {
        "mean_iou": np.float64(value),
        "mean_accuracy": 0.7,
        "overall_accuracy": 0.8,
        "per_category_iou": [value, float("nan"), 0.25],
    }


def facts(**changes):
    return {
        "model_name": "my-run",
        "branch": "branch_0",
        "architecture": "UperNetForSemanticSegmentation",
        "base_model": "some/backbone",
        "license": None,
        "id2label": dict(enumerate(NAMES)),
        "trust_remote_code": False,
        "directory": "branch_0",
        "dataset_name": "street_scenes",
        "partition_name": "cps/voc/1-8",
        "partition_sha256": "ab" * 32,
        "num_labeled": 12,
        "num_unlabeled": 84,
        "objective": "FixMatch",
        "objective_fields": {"weight": 1.5, "confidence_threshold": 0.95},
        "citation": "@inproceedings{sohn2020fixmatch,\n  year = {2020}\n}",
        "settings": {"learning_rate": 0.0025, "crop_size": [64, 96]},
        "scores": {"branch_0": scores(0.5), "branch_1": scores(0.4), "mean": scores(0.6)},
        "best": {
            "branch_0": scores(0.55),
            "branch_1": scores(0.45),
            "mean": scores(0.65),
            "step": 30,
            "branch": "branch_0",
        },
        "absent": {"training": ["disc"], "evaluation": []},
        "step": 40,
        "eval": {"mode": "sliding", "stride": [42, 64]},
        "versions": {"python": "3.11", "torch": "2.15"},
        "picture": None,
        "limits": "Drawings, not photographs.",
    } | changes


def export(directory, model=None, **options):
    model = model if model is not None else AutoModelForSemanticSegmentation.from_config(tiny_upernet())
    return export_branch(model, directory, **{"image_mean": MEAN, "image_std": STD, **options})
