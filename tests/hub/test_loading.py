"""The printed lines that load a branch run unchanged, for architectures of transformers and of this package."""

import json
import re

import pytest
from PIL import Image
from support.toy import ID2LABEL, MEAN, STD, run_python, settings, tiny_upernet, write_world
from transformers import AutoConfig, AutoModelForSemanticSegmentation

import cps_hf.modeling  # noqa: F401  (registers our architectures)
from cps_hf.commands import train
from cps_hf.hub.export import export_branch
from cps_hf.hub.loading import loading_lines
from cps_hf.objectives import Supervised
from cps_hf.training.trainer import CPSTrainer

OWN = {
    "deeplabv3_plus": {"backbone": "test_resnet", "aspp_channels": 12, "low_level_channels": 6},
    "cps_hrnet": {"backbone": "hrnet_w18_small"},
}
SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2]}


def config_of(kind):
    if kind == "upernet":
        return tiny_upernet()
    return AutoConfig.for_model(kind, **OWN.get(kind, SEGFORMER), id2label=ID2LABEL)


@pytest.mark.slow
def test_the_lines_load_every_branch_without_cps_hf(tmp_path):
    lines = {}
    for kind in ("upernet", "segformer", *OWN):
        model = AutoModelForSemanticSegmentation.from_config(config_of(kind))
        folder = export_branch(model, tmp_path / f"a 'quoted' \"{kind}\" run", image_mean=MEAN, image_std=STD)
        lines[kind] = loading_lines(folder)
        assert ("trust_remote_code=True" in lines[kind][-1]) == (kind in OWN)
    (tmp_path / "lines.json").write_text(json.dumps({kind: "\n".join(some) for kind, some in lines.items()}))
    (tmp_path / "load.py").write_text(
        "import json, sys, torch\n"
        "sys.modules['cps_hf'] = None\n"
        f"for kind, lines in json.load(open({str(tmp_path / 'lines.json')!r})).items():\n"
        "    names = {}\n"
        "    exec(lines, names)\n"
        "    with torch.no_grad():\n"
        "        logits = names['model'](torch.zeros(1, 3, 64, 64)).logits\n"
        "    print(kind, names['model'].config.model_type, logits.shape[1], type(names['processor']).__name__)\n"
    )
    done = run_python(str(tmp_path / "load.py"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    loaded = [line.split()[:3] for line in done.stdout.splitlines()]
    assert loaded == [[kind, kind, "3"] for kind in lines]


@pytest.mark.parametrize("kind", ["segformer", "deeplabv3_plus"])
@pytest.mark.parametrize("evaluates", [True, False])
def test_the_last_lines_of_a_run_load_what_it_wrote(tmp_path, capsys, monkeypatch, kind, evaluates):
    world = write_world(tmp_path / "world", [(64, 64)] * 2)
    values = {"output_dir": "out", "crop_size": [64, 64], "per_device_train_batch_size": 2, "max_steps": 1}
    monkeypatch.chdir(tmp_path)
    trainer = CPSTrainer(
        config_of(kind),
        **settings(**values, dataloader_num_workers=0, num_branches=1, num_pictures=0, disable_tqdm=True),
        objective=Supervised(),
        train_dataset=world,
        eval_dataset=world if evaluates else None,
    )
    results = trainer.train()
    given = train.parse(["--output_dir", "out"])
    capsys.readouterr()
    train.report(results, given, [*ID2LABEL.values()])
    out = capsys.readouterr().out
    printed = out[re.search(r"^from transformers", out, re.M).start() :]
    Image.new("L", (80, 48)).save("photo.jpg")
    names = {}
    exec(printed, names)
    assert names["mask"].shape == (48, 80)
    assert names["model"].config.id2label == ID2LABEL and "report.html" in out
    assert ("out/best" in printed) == evaluates and ("Not evaluated" in out) == (not evaluates)
    assert ("trust_remote_code=True" in printed) == (kind == "deeplabv3_plus")
