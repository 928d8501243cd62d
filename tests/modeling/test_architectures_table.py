"""The script behind docs/architectures.md: its rows cover every architecture, and are correct."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support.architectures import ARCHITECTURES, FULL_SIZES, KNOWN

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "architectures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("architectures_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def tiny(name):
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def full(script, name):
    return script.full_size_row(next(row for row in FULL_SIZES if row.name == name))


def test_every_architecture_has_a_full_size_and_a_tiny_row():
    assert {row.model_type for row in FULL_SIZES} == KNOWN
    assert {row.family for row in FULL_SIZES} == {architecture.name for architecture in ARCHITECTURES}


def test_the_committed_page_has_every_row():
    page = (SCRIPT.parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    missing = [row.name for row in FULL_SIZES if f"| {row.name} |" not in page]
    missing += [a.name for a in ARCHITECTURES if f"| `{a.name}` |" not in page]
    assert missing == []


@pytest.mark.slow
def test_full_size_rows_have_the_published_counts(script):
    segformer = full(script, "SegFormer-B0")
    assert (segformer["parameters"], segformer["stride"], segformer["sizes"]) == ("3.75", "4", "any")
    mobilenet = full(
        script, "MobileNetV2 1.0 (DeepLabV3)"
    )  # the paper's 2.11 million, and 320 x 1280 weights, 2 x 1280
    assert (mobilenet["parameters"], mobilenet["used"], mobilenet["stride"]) == ("2.53", "2.11", "16")
    swin = full(script, "UperNet, Swin-T")
    assert (swin["with auxiliary head"], swin["stride"]) == ("59.94", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words", [("hrnet", "multiples of 32"), ("dpt", "square"), ("data2vec", "64 x 64 only")]
)
def test_sizes_that_a_model_rejects_are_explained(script, name, words):
    assert script.allowed_sizes(script.build_branches(tiny(name).config(), num_branches=1)[0]) == words


@pytest.mark.slow
def test_a_tiny_row_trains_reloads_and_runs_in_the_pipeline(script, tmp_path):
    own = script.tiny_row(tiny("deeplabv3_plus-timm"), tmp_path / "row")
    assert len(own["losses"]) == 20 and own["losses"][-1] < 0.7 * own["losses"][0] and own["odd"] == "yes"
    damaged = script.tiny_row(tiny("segformer"), tmp_path / "damaged")
    expected = torch.load(tmp_path / "damaged" / "expected.pt")
    torch.save({**expected, "logits": expected["logits"] + 1}, tmp_path / "damaged" / "expected.pt")
    assert damaged["odd"] == "yes"
    for package in ("without", "with"):
        good, bad = script.reload([tmp_path / "row", tmp_path / "damaged"], package)
        assert good["difference"] <= 1e-5 * good["scale"] and 1 <= good["pipeline"] <= 5
        assert not {"reload error", "pipeline error"} & (set(good) | set(bad))
        assert bad["difference"] == pytest.approx(1, abs=1e-3)
        assert script.reload_cell(bad, script.Footnotes("e")).startswith("**no**")


@pytest.mark.slow
def test_odd_sizes_are_reported_with_lost_pixels_or_the_error(script):
    def odd(name):
        return script.odd_size(script.build_branches(tiny(name).config(), num_branches=1)[0])

    assert odd("upernet-dinov2") == ("yes, less 5 rows and 11 columns", "")  # 75 = 5 x 14 + 5, 53 = 3 x 14 + 11
    answer, error = odd("hrnet")
    assert answer == "no" and "cannot process images of 75 x 53" in error and "multiples of 32" in error
