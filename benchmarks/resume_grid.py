"""Is a resumed run bit for bit the uninterrupted run? For all objectives, kinds of data, workers and processes.

    python benchmarks/resume_grid.py [--output benchmarks/results/resume_grid.md] [--workers 0 2] [--processes 1 2]

Each case of tests/support/resume_cases.py is three small trainings: one of six steps; one that stops in the second of
two micro-batches of step 5, with its newest checkpoint at step 3; and one that resumes from there. They train two toy
networks with batch norm and dropout, augmentation, AdamW, clipping, and evaluate every second step. Compared bit for
bit, on every process: weights, teacher and batch-norm statistics, the optimizer's and the schedule's state, the global
random state, every logged number, the scores, the exported branches, the ids that were trained on and those of the
next 20 samples. Runs on a CPU for some minutes if it is idle.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from cps_hf.objectives import OBJECTIVES

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from support.resume_cases import Case, differences_in_processes, write_resume_world  # noqa: E402


def run(workers: list[int], processes: list[int], folder: Path) -> dict[str, list[str]]:
    """What differs, by case."""
    root = write_resume_world(folder / "world")

    def all_cases(count: int) -> dict[str, list[str]]:
        cases = [Case(o, data, w, count) for o in OBJECTIVES for data in ("map", "stream") for w in workers]
        print(f"{len(cases)} cases in {count} process(es) ...", flush=True)
        return differences_in_processes(root, cases, folder / f"{count}")

    with ThreadPoolExecutor() as pool:
        return {case: wrong for found in pool.map(all_cases, processes) for case, wrong in found.items()}


def report(found: dict[str, list[str]], workers: list[int], processes: list[int]) -> str:
    columns = [(count, data, w) for count in processes for data in ("map", "stream") for w in workers]
    lines = [
        "# Exact resuming: the grid",
        "",
        f"`python benchmarks/resume_grid.py`, {datetime.date.today()}, CPU; torch {version('torch')}, accelerate "
        f"{version('accelerate')}, datasets {version('datasets')}, transformers {version('transformers')}. A cell "
        "says what of the resumed run differs from the run that was never stopped; what is compared, and how it is "
        "stopped, is said at the head of the script.",
        "",
        "| processes, data, workers | " + " | ".join(OBJECTIVES) + " |",
        "|---" * (len(OBJECTIVES) + 1) + "|",
    ]
    for count, data, w in columns:
        cells = [", ".join(found[str(Case(o, data, w, count))]) or "identical" for o in OBJECTIVES]
        lines.append(f"| {count}, {data}, {w} | " + " | ".join(cells) + " |")
    identical = sum(not wrong for wrong in found.values())
    return "\n".join([*lines, "", f"{identical} of {len(found)} cases are identical bit for bit.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="a Markdown file; default: print")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.workers, args.processes, Path(folder))
    text = report(found, args.workers, args.processes)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
