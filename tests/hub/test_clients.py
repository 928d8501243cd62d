"""New processes with empty caches: one pushes with our commands, one loads with the public clients only."""

import json

import pytest
from PIL import Image
from support.exported import export, facts
from support.hub_server import TOKEN, Hub
from support.toy import ID2LABEL, NAMES, run_python, write_world
from transformers import AutoConfig, AutoModelForSemanticSegmentation

PUSHER = """
from cps_hf.commands.main import main
for words in {commands}:
    main(words)
"""

# What a stranger does; cps_hf cannot be imported.
LOADER = """
import json, sys, torch
sys.modules["cps_hf"] = None
torch.set_num_threads(1)
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

image, found = Image.open("image.png"), {}
for name, code in (("me/upernet", {}), ("me/deeplab", {"trust_remote_code": True})):
    model = AutoModelForSemanticSegmentation.from_pretrained(name, **code).eval()
    pixels = AutoImageProcessor.from_pretrained(name)(images=image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(pixels).logits
    segments = pipeline("image-segmentation", model=name, **code)(image)
    card = ModelCard.load(name)
    found[name] = {
        "class": type(model).__name__, "module": type(model).__module__, "size": list(pixels.shape),
        "mean": logits.mean().item(), "std": logits.std().item(),
        "labels": model.config.id2label, "segments": sorted(segment["label"] for segment in segments),
        "card": card.data.to_dict(), "metrics": [result.metric_value for result in card.data.eval_results],
    }
try:
    AutoModelForSemanticSegmentation.from_pretrained("me/deeplab", trust_remote_code=False)
except ValueError as error:
    found["error"] = str(error)
found["v2"] = AutoModelForSemanticSegmentation.from_pretrained("me/upernet", revision="v2").config.model_type
rows = [*load_dataset("me/shards", split="train", streaming=True)]
found["rows"] = [(row["id"], row["image"].size, row["label"].getextrema()) for row in rows]
print(json.dumps(found))
"""


def logits_of(directory, image):
    import torch
    from transformers import AutoImageProcessor

    model = AutoModelForSemanticSegmentation.from_pretrained(directory).eval()
    with torch.inference_mode():
        return model(**AutoImageProcessor.from_pretrained(directory)(images=image, return_tensors="pt")).logits


@pytest.mark.slow
def test_pushed_branches_load_by_name(tmp_path):
    import cps_hf.modeling  # noqa: F401  (registers the architecture)

    config = AutoConfig.for_model(
        "deeplabv3_plus", backbone="test_resnet", aspp_channels=12, low_level_channels=6, num_labels=3
    )
    ours = AutoModelForSemanticSegmentation.from_config(config)
    folders = {
        "me/upernet": export(tmp_path / "upernet", id2label=ID2LABEL, card=facts(base_model=None)),
        "me/deeplab": export(tmp_path / "deeplab", ours, id2label=ID2LABEL, card=facts(license="mit")),
    }
    (tmp_path / "set").mkdir()
    write_world(tmp_path / "set" / "images", [(20, 30), (31, 17), (24, 24)])
    (tmp_path / "set" / "masks").mkdir()
    for path in (tmp_path / "set" / "images").glob("*_label.png"):
        path.rename(tmp_path / "set" / "masks" / path.name.replace("_label", ""))
    commands = [["push", str(folder), "--repo_id", name] for name, folder in folders.items()]
    commands[0] += ["--private"]
    commands += [[*commands[0], "--revision", "v2", "--tag", "v2.0"]]
    shards = ["--dataset", "folder", "--data_root", str(tmp_path / "set"), "--rows_per_shard", "2"]
    shards += ["--load_options", json.dumps({"class_names": list(NAMES)}), "--push_to_hub", "me/shards"]
    commands += [["prepare", *shards]]
    Image.effect_noise((51, 37), 80).convert("RGB").save(tmp_path / "image.png")
    with Hub() as hub:
        pushed = run_python(
            "-c", PUSHER.format(commands=commands), cwd=tmp_path, timeout=400, **hub.environment(tmp_path / "cache-1")
        )
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.count(f"{hub.url}/me/") == 3 and "in 2 shards" in pushed.stdout
        assert TOKEN not in pushed.stdout + pushed.stderr
        titles = ["Upload a branch trained with cps_hf"]
        assert hub.titles("me/upernet") == hub.titles("me/deeplab") == titles
        assert len([name for name in hub.files("me/shards", kind="datasets") if name.endswith(".parquet")]) == 2
        loaded = run_python("-P", "-c", LOADER, cwd=tmp_path, timeout=400, **hub.environment(tmp_path / "cache-2"))
        assert loaded.returncode == 0, loaded.stderr
        assert hub.repos["models", "me/upernet"].private and hub.repos["datasets", "me/shards"].private
    found = json.loads(loaded.stdout.splitlines()[-1])
    image = Image.open(tmp_path / "image.png")
    for name, folder in folders.items():
        logits = logits_of(folder, image)
        assert found[name]["mean"] == pytest.approx(logits.mean().item(), rel=1e-3, abs=1e-5)
        assert found[name]["std"] == pytest.approx(logits.std().item(), rel=1e-3)
        assert found[name]["size"] == [1, 3, 37, 51] and [*found[name]["labels"].values()] == list(NAMES)
        assert set(found[name]["segments"]) <= set(NAMES) and found[name]["segments"]
        assert found[name]["card"]["library_name"] == "transformers" and found[name]["metrics"] == [0.5, 0.7]
    assert found["me/upernet"]["module"].startswith("transformers.models.upernet")
    assert found["me/deeplab"]["module"].startswith("transformers_modules.") and "trust_remote_code" in found["error"]
    assert found["me/deeplab"]["card"]["license"] == "mit" and found["me/upernet"]["card"]["license"] == "unknown"
    assert found["v2"] == "upernet"
    assert [row[0] for row in found["rows"]] == ["0", "1", "2"] and found["rows"][1][1] == [17, 31]
    assert all(row[2][1] == 255 for row in found["rows"]), "the void rim of every label"
