"""benchmarks/rank.py: the same images first, two choices of more, and differences paired by seed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "rank.py"


@pytest.fixture(scope="module")
def benchmark():
    before = sys.path[:]
    spec = importlib.util.spec_from_file_location("rank_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    shadowed = {name: sys.modules.pop(name, None) for name in ("arms", "cells", "report", "sets")}
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name, there in shadowed.items():
        sys.modules.pop(name, None)
        if there is not None:
            sys.modules[name] = there


def write(folder, seed, way, mean, by_class, steps=300):
    cell = {"seed": seed, "mean_iou": mean, "per_category_iou": by_class, "settings": {"max_steps": steps}}
    (folder / f"seed{seed}-{way}.json").write_text(json.dumps(cell))


def test_the_first_images_and_the_random_choice_depend_on_the_seed_alone(benchmark):
    images = [f"{i:03}" for i in range(40)]
    first, rest = benchmark.draw(images, 1)
    assert (first, rest) == benchmark.draw(images, 1) != benchmark.draw(images, 2)
    assert len(first) == 12 and sorted(first + rest) == images


def test_differences_are_paired_by_seed_and_unfinished_seeds_are_left_out(benchmark, tmp_path):
    write(tmp_path, 1, "ranked", 0.40, {"sky": 0.8, "car": None})
    write(tmp_path, 1, "random", 0.38, {"sky": 0.7, "car": 0.1})
    write(tmp_path, 2, "ranked", 0.41, {"sky": 0.9, "car": None})
    write(tmp_path, 2, "random", 0.42, {"sky": 0.7, "car": 0.3})
    write(tmp_path, 3, "ranked", 0.99, {"sky": 0.9, "car": 0.9})
    text = benchmark.markdown(benchmark.read(tmp_path))
    assert "12 + 12 labeled images, 300 steps" in text
    assert "| 1 | 40.0 | 38.0 | +2.0 |" in text and "| 2 | 41.0 | 42.0 | -1.0 |" in text
    assert "| mean | 40.5 | 40.0 | +0.5 |" in text and "ranked - random: +0.5 (+2.0, -1.0; 95 %" in text
    assert "| sky | 85.0 | 70.0 |" in text and "| car | - | 20.0 |" in text and "| 3 |" not in text
    assert benchmark.markdown({}) == "No seed is finished yet.\n"


def test_an_interrupted_seed_resumes_and_other_settings_are_an_error(benchmark, tmp_path, monkeypatch):
    options = benchmark.arguments(["--real", "x", "--cells", str(tmp_path / "cells"), "--runs", str(tmp_path)])
    root = tmp_path / "camvid"
    (root / "train" / "images").mkdir(parents=True)
    for i in range(40):
        (root / "train" / "images" / f"{i:03}.webp").write_bytes(b"")
    (root / "classes.json").write_text('["sky", "car"]')
    monkeypatch.setattr(benchmark, "prepare", lambda *_: root)
    ran, ranked = [], []

    def run_all(cells):
        ran.append((cells[0].name, Path(f"{cells[0].folder}.txt").read_text().split()))
        if len(ran) == 3:
            return cells  # the second of the two trainings fails
        scores = {"mean_iou": 0.5, "per_category_iou": [0.4, 0.6]}
        results = {"final": {"branch_0": scores}, "training": {"seconds": 1, "cpu_seconds": 1, "device": "cpu"}}
        cells[0].folder.mkdir(exist_ok=True)
        (cells[0].folder / "results.json").write_text(json.dumps(results))
        return []

    def rank(words):
        ranked.append(words)
        return words[1:29][::-1]

    monkeypatch.setattr(benchmark, "run_all", run_all)
    monkeypatch.setattr(benchmark.rank, "main", rank)
    assert not benchmark.Benchmark(options).run(1) and benchmark.Benchmark(options).run(1)
    first, rest = benchmark.draw([f"{i:03}" for i in range(40)], 1)
    assert [name for name, _ in ran] == ["seed1-first", "seed1-ranked", "seed1-random", "seed1-random"]
    assert ran[0][1] == first and ran[1][1] == first + rest[:-13:-1] and ran[2][1] == ran[3][1] == first + rest[:12]
    assert len(ranked) == 1 and ranked[0][0] == str(tmp_path / "seed1-first") and ranked[0][1].endswith(".webp")
    cell = json.loads((tmp_path / "cells" / "seed1-ranked.json").read_text())
    assert cell["per_category_iou"] == {"sky": 0.4, "car": 0.6} and cell["settings"]["num_branches"] == 1
    options.steps = 10
    with pytest.raises(SystemExit, match="made with other settings"):
        benchmark.Benchmark(options).run(1)
