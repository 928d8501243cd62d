"""The page for trying branches: its results, its error messages, and in a real browser."""

import ast
import io
import json
import os
import re
import struct
import subprocess
import sys
import tomllib
import urllib.request
import zlib
from importlib.metadata import version

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.browser import chromium, needs_chromium, served
from support.toy import EXAMPLES, MEAN, STD, tiny_branch, toy_models
from transformers import AutoModelForSemanticSegmentation, DPTConfig

from cps_hf.app import page as app
from cps_hf.app.space import write_space
from cps_hf.commands import app as command
from cps_hf.data import cityscapes, voc
from cps_hf.hub.export import export_branch
from cps_hf.visualization import AGREEMENT, palette

BARE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The files of a run that the page reads."""
    folder = tmp_path_factory.mktemp("app") / "run"
    folder.mkdir()
    for seed, name in ((1, "best"), (1, "branch_0"), (3, "branch_1")):
        tiny_branch(folder / name, 19, seed, cityscapes.NAMES)
    (folder / "results.json").write_text(json.dumps({"best": {"branch": "branch_0"}}))
    return folder


@pytest.fixture(scope="module")
def page(run_folder):
    return app.Page(app.find_branches([str(run_folder)]), device="cpu")


@pytest.fixture
def picture(tmp_path):
    """37 x 53 pixels, as PNG, with several predicted classes; the branches agree on part of it."""
    pixels = np.random.default_rng(0).integers(0, 255, (37, 53, 3)).astype(np.uint8)
    pixels[:, :26] //= 8
    pixels[:18, 26:] //= 4
    pixels[:18, 26:, 0] += 190
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def png_of_size(path, width, height):
    """A PNG with a size in its header but no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_a_run_means_its_branches_and_best_is_compared(run_folder):
    sources = app.find_branches([str(run_folder)])
    assert [*sources] == ["best", "branch_0", "branch_1"] and sources["best"] == str(run_folder / "best")
    assert app.other_branch(sources) == "branch_1"
    two = app.find_branches([str(run_folder / "branch_1"), "user/name"])
    assert two == {"branch_1": str(run_folder / "branch_1"), "user/name": "user/name"}
    assert app.other_branch(two) == "user/name" and app.other_branch({"a": "a"}) == app.NO_BRANCH
    with pytest.raises(ValueError, match="neither a branch .* nor a run's output folder"):
        app.find_branches([str(run_folder.parent)])


def test_overlays_shares_and_differences_match_the_predictions(page, picture):
    found = page.segment(str(picture), "best", "branch_1")
    image = np.asarray(Image.open(picture))
    ids = []
    for i in (0, 2):
        model, processor = page.branches.networks[i].model, page.branches.processors[i]
        with torch.no_grad():
            outputs = model(**processor(Image.open(picture), return_tensors="pt"))
        ids.append(processor.post_process_semantic_segmentation(outputs, target_sizes=[(37, 53)])[0].numpy())
    differs = ids[0] != ids[1]
    assert 0 < differs.mean() < 1
    assert found.overlay.shape == (9 * 37, 9 * 53, 3)  # a small picture is enlarged: 512 // 53
    for shown, classes in ((found.overlay[4::9, 4::9], ids[0]), (found.other[4::9, 4::9], ids[1])):
        assert np.abs(shown - (image / 2 + np.array(cityscapes.PALETTE)[classes] / 2)).max() <= 1
    red = np.array(AGREEMENT["disagree"])
    near = np.abs(found.differing[4::9, 4::9].astype(float) - red).max(-1) < 60
    assert (near | ~differs).all()
    assert np.abs(found.differing[4::9, 4::9] - (image // 2 + 127.0))[~differs].max() <= 1  # pale where they agree
    assert f"differ on {100 * differs.mean():.1f} %" in found.message and "53 × 37 pixels" in found.message
    for k, name in enumerate(cityscapes.NAMES):
        row = re.search(rf"</b>{name}</td>(.*?)</tr>", found.table)
        shares = [float((classes == k).mean()) for classes in ids]
        assert (row is not None) == (max(shares) > 0)
        if row:
            shown = re.findall(r"<span>(.*?)</span>", row[1])
            assert shown == [app._percent(share) for share in shares]


def test_one_branch_alone_shows_no_second_picture(page, picture):
    for other in (app.NO_BRANCH, "best", None):
        found = page.segment(str(picture), "best", other)
        assert found.overlay.shape == (333, 477, 3) and found.other is None and found.differing is None
        assert "differ" not in found.message and found.table.count("<th>") == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.png", b"", "damaged or not an image"),
        ("<b>.jpg", b"no image at all", "&lt;b&gt;.jpg cannot be read"),
        ("cut.png", None, "cut.png cannot be read"),
    ],
)
def test_a_broken_upload_is_an_error_on_the_page(page, tmp_path, name, content, said):
    if content is None:
        data = io.BytesIO()
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(data, "PNG")
        content = data.getvalue()[:-30]
    (tmp_path / name).write_bytes(content)
    found = page.segment(str(tmp_path / name), "best", "branch_1")
    assert said in found.message and 'role="alert"' in found.message
    assert found.overlay is None and found.other is None and found.table == ""


@pytest.mark.parametrize(("width", "height"), [(10_000, 6_000), (60_000, 60_000)])
def test_a_huge_image_is_rejected_before_it_is_decoded(page, tmp_path, width, height):
    found = page.segment(str(png_of_size(tmp_path / "huge.png", width, height)), "best", None)
    assert "huge.png is too large" in found.message and "up to 50 megapixels" in found.message
    small = page.segment(str(png_of_size(tmp_path / "empty.png", 10, 10)), "best", None)
    assert "empty.png cannot be read" in small.message  # the message of a failed decode


def test_a_large_image_is_reduced_before_prediction(run_folder, tmp_path):
    small = app.Page({"best": str(run_folder / "best")}, device="cpu", predicted_pixels=5000)
    Image.fromarray(np.zeros((100, 200, 3), np.uint8)).save(tmp_path / "a.png")
    found = small.segment(str(tmp_path / "a.png"), "best", None)
    assert found.overlay.shape == (250, 500, 3) and "200 × 100 pixels, reduced to 100 × 50" in found.message


def test_branches_with_restricted_sizes_predict_any_image(tmp_path, picture):
    config = DPTConfig(
        **{"image_size": 64, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"intermediate_size": 32, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4},
        fusion_hidden_size=16,
        id2label={0: "a", 1: "b"},
    )
    model = AutoModelForSemanticSegmentation.from_config(config).eval()
    dpt = app.Page({"dpt": str(export_branch(model, tmp_path / "dpt", image_mean=MEAN, image_std=STD))}, device="cpu")
    assert dpt.segment(str(picture), "dpt", None).overlay.shape == (333, 477, 3)

    class Multiples(torch.nn.Module):
        def __call__(self, images):
            assert images.shape[-2] % 32 == images.shape[-1] % 32 == 0
            return images

    dpt.branches.networks, dpt.branches.processors = (
        [Multiples()],
        [lambda images, **_: {"pixel_values": images[None]}],
    )
    dpt.palette = palette(3)
    assert dpt.segment(str(picture), "dpt", None).overlay.shape == (333, 477, 3)


def test_examples_are_drawn_for_the_branches_classes(tmp_path):
    streets = app.write_examples(tmp_path / "streets", cityscapes.NAMES, count=1)
    objects = app.write_examples(tmp_path / "objects", voc.NAMES, count=1)
    sizes = {Image.open(*paths).size for paths in (streets, objects)}
    assert len(sizes) == 2 and app.find_examples(str(tmp_path / "streets")) == streets
    with pytest.raises(ValueError, match="no image"):
        app.find_examples(str(tmp_path))


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys, run_folder):
    toy_models(1)[0].save_pretrained(tmp_path / "bare")
    for words, said in (
        ([str(tmp_path)], "neither a branch"),
        ([str(tmp_path / "nothing")], "no model could be read"),
        ([str(run_folder), "--examples", str(tmp_path)], "no image"),
        ([str(run_folder), "--port", "99999999"], "`--port` must be from 1 to 65535, got 99999999"),
        ([str(run_folder), "--device", "cudda"], "`--device` 'cudda' cannot be used here"),
    ):
        with pytest.raises(SystemExit):
            command.main(words)
        assert said in capsys.readouterr().err


@pytest.mark.slow
@needs_chromium
def test_the_page_works_in_a_browser_and_loads_nothing_else(run_folder, tmp_path, picture):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    broken, huge = tmp_path / "broken.jpg", png_of_size(tmp_path / "huge.png", 20_000, 20_000)
    broken.write_bytes(b"\xff\xd8\xff\xe0 and then nothing")
    with served("-m", "cps_hf", "app", run_folder) as address, chromium(tmp_path / "profile") as browser:
        wait = WebDriverWait(browser, 90)
        text = lambda name: browser.find_element(By.ID, name).text  # noqa: E731
        pictures = lambda name: browser.find_elements(By.CSS_SELECTOR, f"#{name} img[src]")  # noqa: E731
        upload = lambda path: browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(str(path))  # noqa: E731
        browser.get(address)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
        assert (
            "Drop an image" in text("message")
            and "up to 50 megapixels" in browser.find_element(By.TAG_NAME, "body").text
        )

        browser.find_elements(By.CSS_SELECTOR, ".gallery img")[0].click()
        wait.until(lambda _: "differ on" in text("message"))
        wait.until(lambda _: pictures("overlay") and pictures("other") and pictures("differing"))
        assert "class" in text("table") and "%" in text("table")

        def again(path):
            browser.find_element(By.CSS_SELECTOR, '#image button[aria-label="Remove Image"]').click()
            wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
            upload(path)

        again(broken)
        wait.until(lambda _: "broken.jpg cannot be read" in text("message"))
        again(huge)
        wait.until(lambda _: "huge.png is too large" in text("message") and "50 megapixels" in text("message"))
        assert not pictures("overlay")
        again(picture)
        wait.until(lambda _: "53 × 37 pixels" in text("message") and pictures("overlay"))
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)


@pytest.mark.slow
def test_a_space_folder_is_complete_and_uses_its_own_source(run_folder, tmp_path):
    branches = [str(run_folder / "branch_0"), str(run_folder / "branch_1")]
    folder = write_space(tmp_path / "space", branches, cityscapes.NAMES, title="Streets: who sees what")
    with served("app.py", cwd=folder, path=[]) as address, urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    assert config["title"] == "Streets: who sees what" and "drawn_0.jpg" in json.dumps(config)
    dropdown = next(part for part in config["components"] if part["props"].get("elem_id") == "branch")
    assert [name for name, _ in dropdown["props"]["choices"]] == ["branch_0", "branch_1"]
    code = "import cps_hf.training.trainer; print(cps_hf.__file__)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=BARE)
    assert imported.stdout.strip() == str(folder / "cps_hf" / "__init__.py")


def test_a_space_header_has_branches_license_and_requirements(tmp_path):
    folder = write_space(tmp_path / "s", ["me/streets", "me/other"], cityscapes.NAMES, license="mit", private=True)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "app.py",
        "cps_hf",
        "examples",
        "requirements.txt",
    }
    header, page = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1:]
    header = yaml.safe_load(header)
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and header["sdk_version"] == version("gradio")
    assert header["models"] == ["me/streets", "me/other"] and header["license"] == "mit" and "HF_TOKEN" in page
    needed = (folder / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needed[-1] == project["optional-dependencies"]["app"][0]
    assert {re.split("[<>=]", line)[0] for line in needed[:-1]} == {
        re.split("[<>=]", line)[0] for line in project["dependencies"]
    }
    assert len([*(folder / "examples").iterdir()]) == 4 and not [*folder.rglob("__pycache__")]
    assert (folder / "cps_hf" / "model_card_template.md").read_text().startswith("---")
    ast.parse((folder / "app.py").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="already exists"):
        write_space(folder, ["me/streets"], cityscapes.NAMES)
    with pytest.raises(ValueError, match="at least one branch"):
        write_space(tmp_path / "none", [], cityscapes.NAMES)
