"""Run every recipe of examples/configs with `--smoke`, and print a table.

    python examples/run_recipes.py                    # all recipes
    python examples/run_recipes.py voc_cps_r50 ...    # some of them

Exits with 1 if a recipe fails. Nothing is downloaded; a recipe takes some ten seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> int:
    """Return how many recipes failed."""
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="NAME", help=f"default: all of {', '.join(known)}")
    names = parser.parse_args(argv).recipes
    for name in names:
        if name not in known:
            parser.error(f"there is no recipe {name!r}; there are {', '.join(known)}")
    recipes = [CONFIGS / f"{name}.yaml" for name in names or known]
    width = max(len(recipe.stem) for recipe in recipes)
    print(f"{'recipe':{width}}  models{'':31}  steps  first loss  last loss  seconds")
    errors = {}
    with tempfile.TemporaryDirectory(prefix="cps_hf-recipes-") as folder:
        for recipe in recipes:
            start = time.perf_counter()
            row, error = run(recipe, Path(folder) / recipe.stem)
            print(f"{recipe.stem:{width}}  {row}  {time.perf_counter() - start:7.1f}", flush=True)
            if error:
                errors[recipe.stem] = error
    for name, error in errors.items():
        print(f"\n{name} failed:\n{error}", file=sys.stderr)
    print(f"\n{len(recipes) - len(errors)} of {len(recipes)} ran.")
    return len(errors)


def run(recipe: Path, output_dir: Path) -> tuple[str, str | None]:
    """A recipe's row of the table, and its error output if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "cps_hf", "train", "--config", recipe, "--smoke", "--output_dir", output_dir],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        return f"FAILED, exit status {done.returncode:<27}{'':24}", done.stderr[-3000:]
    out = Path(f"{output_dir}-smoke")
    losses = [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").open()) if "loss" in line]
    kinds = [json.loads((out / f"branch_{i}" / "config.json").read_text())["model_type"] for i in (0, 1)]
    steps = json.loads((out / "results.json").read_text())["steps"]
    return f"{' + '.join(kinds):37}  {steps:5}  {losses[0]:10.3f}  {losses[-1]:9.3f}", None


if __name__ == "__main__":
    sys.exit(min(main(), 1))
