"""The table of networks: every network that the plan may pick is a row, and it needs no permission."""

import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import SegformerConfig

from cps_hf.modeling.licences import conditions
from cps_hf.planning.machine import Machine, candidates

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "models.py"
DOCS = SCRIPT.parents[1] / "docs"
MACHINES = [Machine(), *(Machine(device="cuda", memory=memory) for memory in (4.0, 6.0, 16.0, 24.0, 80.0))]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("models_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"{machine.device} {machine.memory}")
def test_what_the_plan_may_pick_is_in_both_tables_and_free_of_conditions(script, machine):
    page, licences = ((DOCS / name).read_text(encoding="utf-8") for name in ("models.md", "licences.md"))
    rows = {candidate.weights: candidate for candidate in script.CANDIDATES}
    for place, name in enumerate(candidates(machine)):
        assert conditions(name) is None
        assert f"`{name}`" in licences or name == script.SOURCE
        assert place > 0 or (name in rows and rows[name].licence == "Apache 2.0" and f"| `{name}` |" in page)


def test_the_committed_page_has_every_row_and_names_the_picks(script):
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    for candidate in script.CANDIDATES:
        row = next(line for line in page.splitlines() if line.startswith(f"| {candidate.name} |"))
        assert f"`{candidate.weights}`" in row and candidate.ade20k in row and candidate.cityscapes in row
        assert (f"**{candidate.licence}**" in row) == (conditions(candidate.weights) is not None)
        assert row.endswith(f"| {script.picked().get(candidate.weights, '')} |")
        assert not candidate.source or f"]: {candidate.source}\n" in page
    assert sum(name in page for name in script.picked()) == 3


def test_a_score_has_a_source(script):
    for candidate in script.CANDIDATES:
        assert candidate.source or candidate.ade20k == candidate.cityscapes == "-"


def test_what_is_counted_is_what_a_step_needs(script):
    sizes = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    small, large = (SegformerConfig(**sizes, decoder_hidden_size=width) for width in (16, 64))
    one, other = script.counted(small, 64), script.counted(large, 64)
    assert one.state == pytest.approx(16 * one.parameters * 1e6 / 2**20, rel=1e-6)
    assert other.activations > one.activations > 0 and other.flops > one.flops > 0
    larger = script.counted(small, 128)
    assert larger.activations == pytest.approx(4 * one.activations, rel=0.1) and larger.state == one.state


def test_sides_fit_the_patches(script):
    sides = {candidate.name: script.side_of(candidate.config(), 96) for candidate in script.CANDIDATES}
    assert sides["ViT-DPT, DINOv2-S"] == 84 and sides["ViT-DPT, DINOv3 ViT-S"] == 96


def test_the_table_is_written_between_the_marks_alone(script):
    text = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.with_table(text, "new") == f"before\n{script.BEGIN}\n\nnew\n\n{script.END}\nafter\n"
