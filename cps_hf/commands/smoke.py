"""`cps-hf train --config RECIPE.yaml --smoke`: run a recipe at toy size, on generated data, in seconds on a CPU.

The recipe's decisions are kept: objective, optimizer, schedule, augmentation, evaluation mode, model family.
Everything that is replaced is logged. The scores mean nothing.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..inference.windows import default_stride
from ..scenes.write import write_object_scenes, write_street_scenes
from .datasets import DataConfig
from .settings import Settings

logger = logging.getLogger(__name__)

STEPS = 4
STAGES = ["stage1", "stage2", "stage3", "stage4"]

# model_type -> the fields that make it small; the other fields keep the values of the recipe's model.
_VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "out_features": STAGES}
_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}
TOYS: dict[str, dict[str, Any]] = {
    "deeplabv3_plus": {"aspp_channels": 16, "low_level_channels": 8},
    "cps_hrnet": {},
    "segformer": {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "decoder_hidden_size": 16,
    },
    "upernet": {"hidden_size": 16},
    "cps_vit_dpt": {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 16},
    "tipsv2_dpt": {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 16},
    # backbones
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "dinov2": _VIT,
    "dinov2_with_registers": _VIT,
    "dinov3_vit": {**_VIT, "intermediate_size": 32},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "timm_backbone": {},
}
# Prefix of a Hub id -> its model_type, so that nothing is downloaded.
HUB_FAMILIES = {"nvidia/mit-": "segformer", "nvidia/segformer-": "segformer"}


def shrink(settings: Settings) -> Settings:
    """The settings at toy size, in a temporary folder that is removed when Python exits.

    Raises:
        ValueError: a model has no toy, or the data set has no scenes.
    """
    folder = Path(tempfile.mkdtemp(prefix="cps_hf-smoke-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    args, crop_size, evaluation = settings.args, settings.augmentation.crop_size, settings.evaluation
    toys = [toy_config(model) for model in settings.data.models]
    side = crop_side(toys)
    values: dict[str, Any] = {}
    if evaluation.eval_mode == "sliding":
        window = evaluation.eval_crop_size or crop_size
        stride = evaluation.eval_stride or default_stride(window)
        values["eval_crop_size"] = [side, side]
        values["eval_stride"] = [math.ceil(side * s / length) for s, length in zip(stride, window, strict=True)]
    if settings.objective.labeled_loss == "ohem":
        share = side**2 / math.prod(crop_size)
        values["ohem_min_kept"] = max(1, round(share * settings.objective.ohem_min_kept))
    small = settings.with_values(
        **_small_data(settings.data, folder),
        **values,
        models=[_write(folder / f"model_{index}.json", toy) for index, toy in enumerate(toys)],
        backbone=None,
        crop_size=[side, side],
        max_steps=min(args.max_steps, STEPS),
        warmup_steps=min(args.warmup_steps, 1),
        per_device_train_batch_size=2,
        per_device_unlabeled_batch_size=2,
        num_processes=None,
        output_dir=f"{args.output_dir}-smoke",
        overwrite_output_dir=True,
        resume_from_checkpoint=None,
        eval_steps=1 if args.unlabeled_weight == "auto" else None,
        save_steps=None,
        logging_steps=1,
        agreement_images=2,
        num_pictures=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    before, after = settings.flat(), small.flat()
    replaced = [f"  {name}: {old} -> {after[name]}" for name, old in before.items() if old != after[name]]
    logger.info("--smoke replaced:\n%s", "\n".join(replaced))
    for index, toy in enumerate(toys):
        logger.info("  model_%d.json is %s", index, json.dumps(toy))
    return small


def toy_config(model: str) -> dict[str, Any]:
    """The content of a config.json for a toy of the same family as a config.json file, a folder or a known Hub id.

    Raises:
        ValueError: the family has no entry in `TOYS`, or the id none in `HUB_FAMILIES`.
    """
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if path.is_file():
        return _toy(json.loads(path.read_text(encoding="utf-8")), model)
    family = next((family for prefix, family in HUB_FAMILIES.items() if model.startswith(prefix)), None)
    if family is None:
        raise ValueError(
            f"`--smoke` does not know the family of `{model}`, which is not a local file. Give its config.json, or "
            "add it to HUB_FAMILIES in cps_hf/commands/smoke.py."
        )
    return _toy({"model_type": family}, model)


def _toy(config: dict[str, Any], model: str) -> dict[str, Any]:
    model_type = config.get("model_type")
    if model_type not in TOYS:
        raise ValueError(
            f"`--smoke` has no toy for {model_type!r} in `{model}`. Add its small sizes to TOYS in "
            f"cps_hf/commands/smoke.py. It has {', '.join(TOYS)}."
        )
    toy = {**config, **TOYS[model_type]}
    if "backbone_config" in config:
        toy["backbone_config"] = _toy(config["backbone_config"], model)
    elif model_type in ("deeplabv3_plus", "cps_hrnet", "timm_backbone"):
        is_hrnet = model_type == "cps_hrnet" or toy.get("backbone", "").startswith("hrnet")
        toy["backbone"] = "hrnet_w18_small" if is_hrnet else "test_resnet"  # timm's smallest ones
        toy.pop("multi_grid", None)  # only for regular ResNets
    return toy


def crop_side(toys: list[dict[str, Any]]) -> int:
    """A side in pixels that every toy accepts: a multiple of the patch size, or of 32, and at least 56."""
    step = 1
    for toy in toys or [{}]:
        patch = toy.get("backbone_config", toy).get("patch_size", 32)
        step = math.lcm(step, patch if patch >= 8 else 32)
    return step * math.ceil(56 / step)


def _small_data(data: DataConfig, folder: Path) -> dict[str, Any]:
    if data.dataset in ("cityscapes", "street_scenes"):
        root = write_street_scenes(
            folder / "data", num_train=8, num_train_extra=0, num_val=2, size=(96, 160), progress=False
        )
        dataset = "cityscapes"
    elif data.dataset in ("voc", "object_scenes"):
        root = write_object_scenes(folder / "data", num_train=8, num_val=2, progress=False)
        dataset = "voc"
    else:
        raise ValueError(f"`--smoke` replaces cityscapes and voc with drawn scenes, but not {data.dataset!r}.")
    return {
        "dataset": dataset,
        "data_root": str(root),
        "train_split": "train",
        "eval_split": "val",
        "load_options": {},
        "partition": "4",  # published partitions list ids of the real data
    }


def _write(path: Path, config: dict[str, Any]) -> str:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return str(path)
