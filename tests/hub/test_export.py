import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jinja2.meta
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.exported import MEAN, STD, export, facts
from support.toy import NAMES, tiny_upernet
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    DPTConfig,
    SegformerConfig,
    SegformerImageProcessor,
)

from cps_hf.hub import card as cards

UGLY = "{{ 7 * 7 }}|<b>x</b> `c` _d_ [e](f) # g\nh"


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


# ------------------------------------------------------------------------------------------------------- exporting


@pytest.mark.parametrize(
    "config",
    [
        tiny_upernet(),
        SegformerConfig(
            num_labels=3,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1] * 4,
            num_attention_heads=[1, 2, 2, 2],
            decoder_hidden_size=16,
        ),
    ],
    ids=lambda c: c.model_type,
)
def test_an_exported_branch_loads_with_the_same_weights_names_and_numbers(config, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSemanticSegmentation.from_config(config).eval()
    before = dict(model.config.id2label)
    names = {0: "one", 1: "zwei – ü", 2: "three"}
    directory = export(tmp_path / "branch_0", model, id2label=names)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(image).logits, model(image).logits, rtol=1e-4, atol=1e-5)
    assert loaded.config.id2label == names and loaded.config.label2id == {v: k for k, v in names.items()}
    assert model.config.id2label == before, "exporting leaves the model as it is"
    # A non-square image of odd size is used at its own size, normalised as in training.
    image = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    pixel_values = AutoImageProcessor.from_pretrained(directory)(images=image, return_tensors="pt")["pixel_values"]
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    assert np.allclose(pixel_values[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_the_folder_has_only_what_loading_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "pictures" / "my panel.png"
    picture.parent.mkdir()
    Image.new("RGB", (4, 4)).save(picture)
    directory = export(tmp_path / "b", card=facts(picture="pictures/my panel.png"))
    found = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    assert found == [
        "README.md",
        "config.json",
        "model.safetensors",
        "my panel.png",
        "preprocessor_config.json",
    ]
    assert "](<my panel.png>)" in (directory / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(("tmp-", ".tmp-"))] == []


def test_weights_are_readable_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        directory = export(tmp_path / "b", card=facts())
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in directory.iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {"0o640"}, modes


def test_a_model_of_one_size_gets_a_resizing_processor(tmp_path):
    config = DPTConfig(
        num_labels=3,
        image_size=64,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=16,
        use_auxiliary_head=False,
    )
    directory = export(tmp_path / "dpt", AutoModelForSemanticSegmentation.from_config(config))
    processor = AutoImageProcessor.from_pretrained(directory)
    inputs = processor(images=np.zeros((37, 51, 3), np.uint8), return_tensors="pt")
    model = AutoModelForSemanticSegmentation.from_pretrained(directory)
    assert model(**inputs).logits.shape == (1, 3, 64, 64)


def test_a_matching_processor_of_the_caller_is_saved(tmp_path, caplog):
    right = {"image_mean": MEAN, "image_std": STD}
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        export(tmp_path / "a", processing_class=SegformerImageProcessor(size={"height": 32, "width": 48}, **right))
    assert "squashes every image to 32 x 48" in caplog.text
    assert AutoImageProcessor.from_pretrained(tmp_path / "a").do_resize
    caplog.clear()
    processor = SegformerImageProcessor(do_resize=False, **right)
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        export(tmp_path / "b", processing_class=processor)
    assert not caplog.records
    for name, value in (("do_normalize", False), ("do_rescale", False), ("image_mean", [0.9] * 3)):
        setattr(wrong := SegformerImageProcessor(do_resize=False, **right), name, value)
        with pytest.raises(ValueError, match=f"normalises images differently from training.*{name}"):
            export(tmp_path / "c", processing_class=wrong)
    assert not (tmp_path / "c").exists()


def test_the_exported_processor_reads_masks_like_training(tmp_path):
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    for reduces, read in ((False, [[0, 1], [2, 255]]), (True, [[255, 0], [1, 255]])):
        directory = export(tmp_path / "b", do_reduce_labels=reduces)
        processor = AutoImageProcessor.from_pretrained(directory)
        image = np.zeros((2, 2, 3), np.uint8)
        made = processor(images=image, segmentation_maps=mask, input_data_format="channels_last", return_tensors="pt")
        assert made["labels"][0].tolist() == read


def test_no_path_of_this_machine_leaves_it(tmp_path):
    model = AutoModelForSemanticSegmentation.from_config(tiny_upernet())
    model.config._name_or_path = str(tmp_path)
    model.config.backbone_config._name_or_path = str(tmp_path / "secret" / "weights")
    card = facts(
        dataset_name=f"{tmp_path}/cityscapes",
        partition_name="~/lists/labeled.txt",
        directory=str(tmp_path / "b"),
        base_model=str(tmp_path),
        settings={"a": str(tmp_path), "b": [str(tmp_path), "C:\\Users\\me\\x"], "c": f"see '{tmp_path}/y'"},
    )
    directory = export(tmp_path / "b", model, card=card)
    for path in directory.glob("*.*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text(encoding="utf-8")
            assert str(tmp_path) not in text and tmp_path.parent.name not in text, path.name
            assert "secret" not in text and "~/" not in text and "Users" not in text, path.name
    readme = (directory / "README.md").read_text(encoding="utf-8")
    assert "of cityscapes" in readme and "| labeled.txt |" in readme and "cps/voc/1-8" in cards.render_card(facts())


def test_a_failing_export_keeps_the_earlier_one(tmp_path, monkeypatch):
    directory = export(tmp_path / "best", card=facts())
    old = {p.name: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(ValueError, match="missing"):
        export(directory, card={"model_name": "x"})
    with pytest.raises(OSError):
        export(directory, card=facts(picture=str(tmp_path / "not there.png")))

    def fails(self, folder):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(SegformerImageProcessor, "save_pretrained", fails)
        export(directory)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == old
    export(directory)  # without a card: the folder is replaced as a whole
    assert not (directory / "README.md").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_invalid_exports_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="bare transformers model, got Sequential"):
        export(tmp_path / "x", torch.nn.Sequential())
    with pytest.raises(ValueError, match=r"classes 0 to 2.*got \[0, 1\]"):
        export(tmp_path / "x", id2label={0: "a", 1: "b"})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match="chapter.tex"):
        export(tmp_path / "thesis")
    clone = export(tmp_path / "clone")
    (clone / ".git").mkdir()
    with pytest.raises(ValueError, match="not of an exported model"):
        export(clone)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clone", "thesis"]


# -------------------------------------------------------------------------------------------------------- the card


def test_the_metadata_has_plain_floats_of_the_exported_step():
    data = metadata(cards.render_card(facts()))
    result = data["model-index"][0]["results"][0]
    assert type(result["metrics"][0]["value"]) is float
    assert result["metrics"][0] == {"type": "mean_iou", "value": 0.5, "name": "mIoU over 2 of 3 classes"}
    assert result["dataset"]["name"] == "street_scenes" and data["model-index"][0]["name"] == "my-run"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-segmentation"
    assert data["base_model"] == "some/backbone" and data["license"] == "unknown"
    assert "datasets" not in data, "not a name on the Hub"
    assert metadata(cards.render_card(facts(dataset_name="me/shapes")))["datasets"] == ["me/shapes"]
    best = metadata(cards.render_card(facts(step=30, license="mit")))
    assert best["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.55 and best["license"] == "mit"
    bare = metadata(cards.render_card(facts(scores={}, best={}, base_model=None, dataset_name=None)))
    assert "model-index" not in bare and "base_model" not in bare and bare["license"] == "unknown"


def test_the_card_has_every_section_in_order():
    text = cards.render_card(facts())
    pattern = r"""---
.*---

# my-run

A semantic segmentation model for 3 .*some/backbone\), trained with FixMatch on 12 labeled and 84 unlabeled images.*
These are the weights of branch 0 at step 40: a single network that predicts on its own\. .*2106\.01226\).*

> \*\*Limits\.\*\* Drawings, not photographs\.

## How to use

```python
.*```

## Results

.*mode sliding, stride \\\[42, 64\\\]\..*
\| network \| mIoU, last step \| mIoU, best step \(30\) \| mean accuracy \| pixel accuracy \|
\|---\|---:\|---:\|---:\|---:\|
\| branch 0 \| 50\.00 over 2 of 3 classes \| 55\.00 over 2 of 3 classes \| 70\.00 \| 80\.00 \|
\| branch 1 \| 40\.00 over 2 of 3 classes \| 45\.00 over 2 of 3 classes \| 70\.00 \| 80\.00 \|
\| mean \| 60\.00 over 2 of 3 classes \| 65\.00 over 2 of 3 classes \| 70\.00 \| 80\.00 \|

.*
\| class \| branch 0 \| branch 1 \| mean \|
\|---\|---:\|---:\|---:\|
\| ground \| 50\.00 \| 40\.00 \| 60\.00 \|
\| disc \| - \| - \| - \|
\| bar \| 25\.00 \| 25\.00 \| 25\.00 \|

1 of the 3 classes has no pixel in the labels of training: disc\.

## Training

.*\| partition \| cps/voc/1-8 \|
\| partition, SHA-256 \| (ab){32} \|
\| labeled images \| 12 \|
\| unlabeled images \| 84 \|

\| FixMatch \| \|
\|---\|---\|
\| weight \| 1\.5 \|
\| confidence\\_threshold \| 0\.95 \|

\| setting \| \|
\|---\|---\|
\| learning\\_rate \| 0\.0025 \|
\| crop\\_size \| \\\[64, 96\\\] \|

Environment: python 3\.11, torch 2\.15\.

## Limits

.*
## Citation

```bibtex
@inproceedings\{chen2021cps,.*
```

```bibtex
@inproceedings\{sohn2020fixmatch,.*
```
"""
    assert re.fullmatch(pattern, text, flags=re.DOTALL), text


def test_text_of_users_is_shown_as_it_is():
    card = cards.render_card(
        facts(
            id2label={0: "ground", 1: UGLY, 2: "road / path"},
            dataset_name="a|b: {{ 6 * 6 }}\n---\nlicense: mit",
            model_name="<script>",
            objective_fields={"note": UGLY},
            citation="@misc{x}\n```\n# not a heading",
        )
    )
    assert "49" not in card and "36" not in card, "nothing of it ran as a template"
    assert metadata(card)["license"] == "unknown"
    assert metadata(card)["model-index"][0]["results"][0]["dataset"]["name"] == "a|b: {{ 6 * 6 }} --- license: mit"
    assert "<script" not in card.split("---\n")[2] and "<b" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| \\{\\{ 7") and "note" not in line]
    cells = re.split(r"(?<!\\)\|", row)
    assert len(cells) == 6, "four cells between five unescaped bars"
    # After unescaping as a Markdown reader does, the cell is the name, on one line.
    shown = re.sub(r"\\([^A-Za-z0-9\s])", r"\1", cells[1]).replace("&lt;", "<").replace("&gt;", ">").strip()
    assert shown == UGLY.replace("\n", " ")
    assert "| road / path |" in card
    assert card.count("```") == 6, "a fence inside a citation does not close the block"


def test_a_fact_that_is_missing_or_unknown_is_an_error():
    few = facts()
    del few["partition_name"]
    with pytest.raises(ValueError, match=r"missing \['partition_name'\], unknown \['partition'\]"):
        cards.render_card(few | {"partition": "1-8"})


def test_classes_that_do_not_match_the_scores_are_an_error():
    with pytest.raises(ValueError, match=r"keys 0 to 1, got \['0', '1'\]"):
        cards.render_card(facts(id2label={"0": "a", "1": "b"}))
    shuffled = cards.render_card(facts(id2label={2: NAMES[2], 0: NAMES[0], 1: NAMES[1]}))
    assert shuffled == cards.render_card(facts()), "rows stand in the order of the classes"
    with pytest.raises(ValueError, match="per_category_iou` of branch_0 has 3 values for 2 classes"):
        cards.render_card(facts(id2label={0: "a", 1: "b"}))


def test_the_template_uses_no_name_that_is_not_given():
    source = (cards.files("cps_hf") / "model_card_template.md").read_text(encoding="utf-8")
    used = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
    given = {"card_data", "auto_class", "model_id", "networks", "own", "citations", "percent", "over"}
    assert used <= given | set(facts()), used - given - set(facts())
    assert set(facts()) - used <= {"license", "directory", "citation"}, "a fact that no one reads"


@pytest.mark.parametrize("absent", ["scores", "partition_name", "num_labeled", "limits", "best", "eval", "absent"])
def test_a_card_handles_missing_facts(absent):
    empty = {} if isinstance(facts()[absent], dict) else None
    card = cards.render_card(facts(**{absent: empty}))
    assert "None" not in card and "nan" not in card and "Undefined" not in card
    assert ("Not evaluated." in card) == (absent == "scores")
    assert "  " not in re.search(r"# my-run\n\n(.*)\n", card)[1]


def test_the_example_of_the_docs_has_what_a_card_has():
    example = (Path(__file__).parents[2] / "docs" / "model_card_example.md").read_text(encoding="utf-8")
    for pattern in (r"^## .*$", r"^\w+:", r"^\| network.*step \(|^\| class \||^\| setting \|"):
        shown, written = (set(re.findall(pattern, text, re.M)) for text in (example, cards.render_card(facts())))
        assert shown and shown <= written
    assert re.findall(r"^## .*$", example, re.M) == re.findall(r"^## .*$", cards.render_card(facts()), re.M)
    assert "None" not in example and example.count("\n| ") > 40


def run_the_example(directory, folder):
    """Run the card's Python block as printed, in a Python that cannot import cps_hf."""
    block = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    check = "\nassert classes.shape == (37, 51) and segments\n"
    photo, exif = Image.fromarray(np.random.default_rng(0).integers(0, 256, (51, 37, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    photo.save(folder / "image.jpg", exif=exif)
    (folder / "example.py").write_text(block + check, encoding="utf-8")
    code = "import sys, torch; torch.set_num_threads(1); sys.modules['cps_hf'] = None; exec(open('example.py').read())"
    return subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_example_of_a_card_runs_as_printed(tmp_path):
    directory = export(tmp_path / "branch_0", id2label=dict(enumerate(NAMES)), card=facts())
    result = run_the_example(directory, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_cards_example_runs_without_the_package(tmp_path):
    import cps_hf.modeling  # noqa: F401  (registers the architecture)

    config = AutoConfig.for_model(
        "deeplabv3_plus", backbone="test_resnet", aspp_channels=12, low_level_channels=6, num_labels=3
    )
    model = AutoModelForSemanticSegmentation.from_config(config)
    directory = export(tmp_path / "branch_0", model, id2label=dict(enumerate(NAMES)), card=facts())
    assert (directory / "modeling_deeplabv3_plus.py").is_file()
    assert "trust_remote_code=True" in (directory / "README.md").read_text(encoding="utf-8")
    result = run_the_example(directory, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_card_shown_is_json_safe_in_its_names(tmp_path):
    directory = export(tmp_path / 'a "quoted" name', card=facts(directory='a "quoted" name'))
    line = re.search(r"^model_id = (.*)$", (directory / "README.md").read_text(encoding="utf-8"), re.M)[1]
    assert json.loads(line) == eval(line) == directory.name
