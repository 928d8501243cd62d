"""The recipes do what their first lines say, and each family runs at toy size."""

import json
import logging
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from cps_hf.commands import parser, smoke, train
from cps_hf.commands.settings import Settings
from cps_hf.data.partitions import NAMES as PARTITIONS
from cps_hf.modeling import check_input_size
from cps_hf.modeling.backbones import backbone_of
from cps_hf.objectives import OBJECTIVES

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("configs/*.yaml"))
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def parse(*words):
    return parser.parse(Settings, [*map(str, words)], defaults=lambda given: train.DEFAULTS)


def header(recipe: Path) -> dict[str, str]:
    """The comment lines at the top, as {"Paper": ..., "Command": ...}; a continued line is indented."""
    lines = recipe.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines) and lines[1] == "#"
    found, key = {}, None
    for line in lines[2:]:
        if start := re.fullmatch(r"# (\w[\w ]*): (.+)", line):
            key = start[1]
            found[key] = start[2]
        else:
            found[key] += " " + re.fullmatch(r"#   (.+)", line)[1]
    return found


def test_every_kind_of_recipe_is_there():
    assert {path.stem for path in RECIPES} >= {
        *(f"{data}_cps{cut}_{net}" for data in ("voc", "cityscapes") for cut in ("", "_cutmix") for net in NETS),
        "cityscapes_coarse_cps_cutmix_hrnet_w48",
        "voc_pseudoseg_cps_cutmix_r50",
        "voc_segformer_b2_deeplabv3_plus_r50",
        "voc_upernet_swin_t",
        "voc_upernet_convnext_t",
        *(f"{data}_cps_cutmix_dinov2_{size}" for data in ("voc", "cityscapes") for size in "sb"),
        *(f"cityscapes_unimatch_v2_dinov2_{size}" for size in "sb"),
        "voc_unimatch_v2_dinov2_b",
    }


NETS = {
    "r50": ("models/deeplabv3_plus_r50.json", "timm/resnet50s.gluon_in1k"),
    "r101": ("models/deeplabv3_plus_r101.json", "timm/resnet101s.gluon_in1k"),
}


PAPERS = {"cps": "arXiv 2106.01226", "unimatch_v2": "arXiv 2410.10777"}


@every_recipe
def test_a_recipe_starts_with_its_header(recipe):
    said, values = header(recipe), yaml.safe_load(recipe.read_text())
    assert list(said) == ["Paper", "Command", "Hardware", "Steps", "Expected mIoU"]
    assert PAPERS[values["objective"]] in said["Paper"]
    batch = values["num_processes"] * values["per_device_train_batch_size"]
    assert said["Hardware"].startswith(f"{values['num_processes']} GPUs, {values['per_device_train_batch_size']} lab")
    assert f"global batch {batch} + {batch}." in said["Hardware"]
    assert re.search(rf"\b{values['max_steps']}\b", said["Steps"])
    number = r"\d\d\.\d+ (at 1/\d.*)?\((read from public material|paper, unverified)\)"
    assert re.match(rf"{number}|none (given|published)", said["Expected mIoU"])


@every_recipe
def test_a_recipes_command_runs_this_file(recipe, monkeypatch):
    words = shlex.split(header(recipe)["Command"].replace("\\ ", ""))
    values = yaml.safe_load(recipe.read_text())
    assert words[:4] == ["accelerate", "launch", "--multi_gpu", "--num_processes"]
    assert words[4] == str(values["num_processes"]) and words[5] == "examples/train_cps.py"
    monkeypatch.chdir(EXAMPLES.parent)
    settings = parse(*words[6:])
    args, data, backbone = settings.args, settings.data, settings.model_config.backbone
    assert words[7] == f"examples/configs/{recipe.name}" and data.partition == values["partition"]
    assert data.partition in PARTITIONS and data.data_root in ("cityscapes", "VOCdevkit/VOC2012")
    assert args.output_dir == f"outputs/{recipe.stem}" and args.max_steps == values["max_steps"]
    for model in data.models:
        assert (recipe.parent / model).is_file() or model == "nvidia/mit-b2"
    assert isinstance(backbone, str) or len(backbone) == len(data.models)


@every_recipe
def test_no_demonstration_setting_leaks_into_a_recipe(recipe):
    names = {name for name in train.DEFAULTS if name not in OBJECTIVES} | train.DEFAULTS["cps"].keys()
    unset = names - yaml.safe_load(recipe.read_text()).keys()
    assert not unset


# The release's configurations, converted to an averaged gradient (its learning rates divided and its weight decays
# multiplied by the number of processes): nominal 0.01 / 4 and 0.02 / 8, 1e-4 * 4 and 1e-4 * 8.
VOC = {
    "train_split": "train_aug",
    "learning_rate": 0.0025,
    "weight_decay": 4e-4,
    "crop_size": [512, 512],
    "eval_crop_size": [512, 512],
    "eval_stride": [342, 342],
    "labeled_loss": "cross_entropy",
    "max_steps": 39338,
    "global batch": 8,
}
CITYSCAPES = {
    "train_split": "train",
    "learning_rate": 0.0025,
    "weight_decay": 8e-4,
    "crop_size": [800, 800],
    "eval_crop_size": [800, 800],
    "eval_stride": [534, 534],
    "labeled_loss": "ohem",
    "ohem_threshold": 0.7,
    "ohem_min_kept": 50_000,
    "max_steps": 44525,
    "global batch": 8,
}
ADAMW = {"optim": "adamw", "learning_rate": 5e-6, "head_learning_rate_factor": 40, "weight_decay": 0.01}
DINOV2_STREETS = {
    **ADAMW,
    "crop_size": [798, 798],
    "eval_stride": [532, 532],
    "max_steps": math.ceil(2603 / 4) // 2 * 180,  # UniMatch-V2: 4 processes with batches of 2, 180 epochs
    "global batch": 8,
}
DINOV2_OBJECTS = {
    **ADAMW,
    "crop_size": [518, 518],
    "max_steps": math.ceil(9259 / 4) // 4 * 60,  # 4 processes with batches of 4, 60 epochs
    "global batch": 16,
}
UNIMATCH_V2 = {
    "weight": 1.0,
    "confidence_threshold": 0.95,
    "cutmix": 0.5,
    "complementary_dropout": 0.5,
    "decay": 0.996,
}
SGD = {"optim": "sgd", "momentum": 0.9, "lr_scheduler_type": "polynomial"}
SGD |= {"lr_scheduler_kwargs": {"power": 0.9, "lr_end": 0.0}, "head_learning_rate_factor": 1, "warmup_steps": 0}
SGD |= {"random_scale": [0.5, 0.75, 1.0, 1.5, 1.75, 2.0], "random_scale_mode": "choice", "horizontal_flip": 0.5}
EXPECTED = {
    **{f"voc_cps_{net}": {**SGD, **VOC, "cutmix": False, "weight": 1.5} for net in NETS},
    **{f"voc_cps_cutmix_{net}": {**SGD, **VOC, "cutmix": True, "weight": 1.0} for net in NETS},
    **{f"cityscapes_cps_{net}": {**SGD, **CITYSCAPES, "cutmix": False, "weight": 6.0} for net in NETS},
    **{f"cityscapes_cps_cutmix_{net}": {**SGD, **CITYSCAPES, "cutmix": True, "weight": 5.0} for net in NETS},
    "cityscapes_coarse_cps_cutmix_hrnet_w48": {
        **{**SGD, **CITYSCAPES, "max_steps": 45_000},
        "partition": "coarse-3000",
        "backbone": "timm/hrnet_w48.ms_in1k",
    },
    "voc_pseudoseg_cps_cutmix_r50": {
        **{**SGD, **VOC, "train_split": "train", "max_steps": 20_000},
        "partition": "pseudoseg/voc/92",
        "weight": 1.0,
    },
    **{f"cityscapes_cps_cutmix_dinov2_{size}": DINOV2_STREETS for size in "sb"},
    **{f"voc_cps_cutmix_dinov2_{size}": DINOV2_OBJECTS for size in "sb"},
    **{
        f"cityscapes_unimatch_v2_dinov2_{size}": {
            **{**DINOV2_STREETS, **UNIMATCH_V2, "ohem_threshold": 0.7, "ohem_min_kept": 200_000 // 2},
            "models": [f"models/vit_dpt_dinov2_{size}.json"],
            "backbone": f"facebook/dinov2-{name}",
        }
        for size, name in (("s", "small"), ("b", "base"))
    },
    "voc_unimatch_v2_dinov2_b": {
        **{**DINOV2_OBJECTS, **UNIMATCH_V2, "labeled_loss": "cross_entropy"},
        "max_steps": math.ceil((10_582 - 183) / 4) // 4 * 60,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_are_the_published_ones(name):
    settings = parse("--config", EXAMPLES / "configs" / f"{name}.yaml", "--data_root", "X")
    args, values = settings.args, settings.flat()
    expected = dict(EXPECTED[name])
    count = args.num_processes * args.gradient_accumulation_steps
    batch = expected.pop("global batch")
    assert count * args.per_device_train_batch_size == count * args.unlabeled_batch_size == batch
    assert {key: values[key] for key in expected} == expected
    assert values["eval_mode"] == "sliding" and values["class_balance"] == 0
    assert expected.get("confidence_threshold", 0) == values["confidence_threshold"]
    assert values.get("warm_up", 0) == values["ramp_up"] == 0 and values["max_grad_norm"] is None
    net = NETS.get(name.rsplit("_", 1)[1])
    assert net is None or (values["models"], values["backbone"]) == ([net[0]], net[1])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("voc_cps_r50", "39680 at 1/16, 39338 at 1/8, 39680 at 1/4, 39660 at 1/2"),
        ("cityscapes_cps_cutmix_r101", "44544 at 1/16, 44525 at 1/8, 44640 at 1/4, 44640 at 1/2"),
    ],
)
def test_steps_of_all_ratios_are_those_of_the_release(name, steps):
    assert header(EXAMPLES / "configs" / f"{name}.yaml")["Steps"].startswith(steps)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("voc_cps_cutmix_r50", "73.67 at 1/8 (read from public material); 71.98 at 1/16, 74.90 at 1/4, 76.15 at 1/2"),
        ("voc_cps_cutmix_r101", "74.48 at 1/16, 76.44 at 1/8, 77.68 at 1/4, 78.64 at 1/2 (read"),
        ("cityscapes_cps_r50", "74.39 at 1/8 (read from public material); 69.79 at 1/16, 76.85 at 1/4, 78.64 at 1/2"),
        ("cityscapes_cps_cutmix_r50", "78.77 at 1/2 (read from public material); 74.47 at 1/16, 76.61 at 1/8, 77.83"),
        ("cityscapes_cps_cutmix_r101", "74.72 at 1/16, 77.62 at 1/8, 79.21 at 1/4, 80.21 at 1/2 (read"),
        ("cityscapes_coarse_cps_cutmix_hrnet_w48", "82.4 (read"),
        ("cityscapes_cps_cutmix_dinov2_s", "none published for CPS."),
        ("cityscapes_unimatch_v2_dinov2_s", "80.6 at 1/16, 81.9 at 1/8, 82.4 at 1/4, 82.6 at 1/2 (read"),
        ("cityscapes_unimatch_v2_dinov2_b", "83.6 at 1/16, 84.3 at 1/8, 84.5 at 1/4, 85.1 at 1/2 (read"),
        ("voc_unimatch_v2_dinov2_b", "86.3 at 1/16 (92 labels), 87.9 at 183, 88.9 at 366, 90.0 at 732, 90.8 at 1464"),
        ("voc_upernet_swin_t", "none published."),
    ],
)
def test_expected_scores_are_the_published_ones(name, numbers):
    assert header(EXAMPLES / "configs" / f"{name}.yaml")["Expected mIoU"].startswith(numbers)


@pytest.mark.parametrize(
    ("name", "parameters", "backbone_parameters", "crop"),
    [
        # 40,475,957 as the release's model has it; ResNet-101 has 44,549,160 - 25,557,032 more than ResNet-50
        ("deeplabv3_plus_r50", 40_475_957, None, 800),
        ("deeplabv3_plus_r101", 40_475_957 + 44_549_160 - 25_557_032, None, 800),
        ("hrnet_w48", 65.9e6, None, 800),
        ("upernet_swin_t", None, 27.5e6, 512),  # of backbones: as published, without the classifier
        ("upernet_convnext_t", None, 27.8e6, 512),
        ("dpt_dinov2_s", None, 22_056_576, 798),
        ("dpt_dinov2_b", None, 86_580_480, 798),
        ("vit_dpt_dinov2_s", None, 22_056_576, 798),
        ("vit_dpt_dinov2_b", None, 86_580_480, 798),
        ("vit_dpt_dinov2_registers_s", None, 22_056_576 + 4 * 384, 518),
        ("vit_dpt_dinov3_s", None, 21.6e6, 512),
        ("upernet_dinov2_s", None, 22_056_576, 518),
        ("upernet_dinov3_s", None, 21.6e6, 512),
        ("upernet_dinov3_convnext_t", None, 27.8e6, 512),
        ("deeplabv3_plus_dinov3_convnext_t", None, 27.8e6, 512),
    ],
)
def test_models_have_the_published_sizes_and_take_the_crop(name, parameters, backbone_parameters, crop):
    config = AutoConfig.from_pretrained(EXAMPLES / "configs" / "models" / f"{name}.json", num_labels=21)
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False
    with torch.device("meta"):
        model = AutoModelForSemanticSegmentation.from_config(config)
    for part, published in ((model, parameters), (backbone_of(model), backbone_parameters)):
        if published is not None:
            count = sum(p.numel() for p in part.parameters())
            assert count == pytest.approx(published, rel=0 if isinstance(published, int) else 0.01)
    check_input_size(model, crop, crop)


# ---------------------------------------------------------------------------------------------------------- --smoke


def test_paths_in_a_recipe_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "models").mkdir(parents=True)
    (tmp_path / "recipes" / "models" / "a.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "x.yaml").write_text("models: [models/a.json]\n")
    for argv in (["--config", "recipes/x.yaml", "--smoke"], ["--smoke", "--config=recipes/x.yaml"]):
        assert train.parse(argv).data.models == ["recipes/models/a.json"]
        assert train.parse([*argv, "--models", "nvidia/mit-b2"]).data.models == ["nvidia/mit-b2"]
        assert train.parse([*argv, "--models", "recipes/models/a.json"]).data.models == ["recipes/models/a.json"]
    assert train.parse(["--models", "models/a.json"]).data.models == ["models/a.json"]


def test_a_toy_recipe_only_changes_sizes():
    toy = smoke.toy_config(str(EXAMPLES / "configs/models/dpt_dinov2_s.json"))
    assert toy["model_type"] == "tipsv2_dpt" and toy["fusion_hidden_size"] == 16
    inner = toy["backbone_config"]
    assert inner["hidden_size"] == 16 and inner["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
    assert (inner["patch_size"], inner["image_size"], inner["num_register_tokens"]) == (14, 518, 0)
    toy = smoke.toy_config(str(EXAMPLES / "configs/models/deeplabv3_plus_r101.json"))
    assert toy["backbone"] == "test_resnet" and (toy["head"], toy["output_stride"]) == ("original", 16)
    assert smoke.toy_config("nvidia/mit-b5")["model_type"] == "segformer"


def test_the_toy_crop_fits_every_model():
    patches = {"backbone_config": {"patch_size": 14}}
    assert [smoke.crop_side(toys) for toys in ([], [{}], [patches], [{}, patches])] == [64, 64, 56, 224]


def test_models_and_data_without_a_toy_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not know the family of `someone/model`"):
        smoke.toy_config("someone/model")
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(ValueError, match="has no toy for 'sam'"):
        smoke.toy_config(str(tmp_path))
    settings = parse("--smoke", "--dataset", "folder", "--data_root", "X")
    with pytest.raises(ValueError, match="but not 'folder'"):
        smoke.shrink(settings)


KEPT = ("optim", "learning_rate", "head_learning_rate_factor", "weight_decay", "momentum", "lr_scheduler_type")
KEPT += (
    "lr_scheduler_kwargs",
    "random_scale",
    "random_scale_mode",
    "horizontal_flip",
    "resize_antialias",
    "eval_mode",
)
KEPT += ("mixed_precision", "objective", "cutmix", "weight", "ramp_up", "labeled_loss", "ohem_threshold", "seed")


@pytest.fixture
def own_precision():
    """Accelerate has one precision per process, and the recipes have two."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize(
    ("name", "kinds", "crop"),
    [
        ("cityscapes_cps_r101", ["deeplabv3_plus"] * 2, 64),
        ("cityscapes_coarse_cps_cutmix_hrnet_w48", ["cps_hrnet"] * 2, 64),
        ("voc_segformer_b2_deeplabv3_plus_r50", ["segformer", "deeplabv3_plus"], 64),
        ("voc_upernet_convnext_t", ["upernet"] * 2, 64),
        ("cityscapes_cps_cutmix_dinov2_s", ["tipsv2_dpt"] * 2, 56),
    ],
)
def test_a_recipe_of_each_family_runs_at_toy_size(name, kinds, crop, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    recipe = EXAMPLES / "configs" / f"{name}.yaml"
    with caplog.at_level(logging.INFO):
        results = train.main(["--config", str(recipe), "--smoke"])
    out = tmp_path / "outputs" / f"{name}-smoke"
    ran = yaml.safe_load((out / "config.yaml").read_text())
    meant = yaml.safe_load(parse("--config", recipe, "--data_root", "X").to_yaml())
    assert {key: ran.get(key) for key in KEPT} == {key: meant.get(key) for key in KEPT}
    assert [json.loads((out / f"branch_{i}" / "config.json").read_text())["model_type"] for i in (0, 1)] == kinds
    assert results["steps"] == 4 and ran["crop_size"] == ran["eval_crop_size"] == [crop, crop]
    share = (crop / meant["crop_size"][0]) ** 2 if meant["labeled_loss"] == "ohem" else 1
    assert ran["ohem_min_kept"] == round(share * meant["ohem_min_kept"])
    logs = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    losses = [line["loss"] for line in logs if "loss" in line]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    replaced = next(message for message in caplog.messages if message.startswith("--smoke replaced"))
    assert f"partition: {meant['partition']} -> 4" in replaced and "learning_rate" not in replaced
    assert not (tmp_path / "outputs" / name).exists()
