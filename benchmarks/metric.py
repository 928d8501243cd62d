"""Time, memory and disk of `MeanIoU` compared with evaluate's own mean_iou, on 1024 x 2048 maps.

evaluate's way is rewritten below: an `evaluate.Metric` with `Image` features, which writes every map to an Arrow file,
reads all of them back in `compute` and takes three histograms per pair. Both run on the same maps, each in a new
process; memory is how far the peak rises above that before the first map (read as on Linux).

    python benchmarks/metric.py --pairs 8        # about a minute
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch

from cps_hf.functional import IGNORE_INDEX
from cps_hf.metrics.mean_iou import MeanIoU

NUM_LABELS = 19


class StoredMeanIoU(evaluate.Metric):
    """What evaluate's mean_iou does: store, then count by histograms."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, num_labels, ignore_index):
        intersect, guess, truth = np.zeros((3, num_labels))
        bins = {"bins": num_labels, "range": (0, num_labels - 1)}
        for prediction, reference in zip(predictions, references, strict=True):
            prediction, reference = np.array(prediction), np.array(reference)
            keep = reference != ignore_index
            prediction, reference = prediction[keep], reference[keep]
            intersect += np.histogram(prediction[prediction == reference], **bins)[0]
            guess += np.histogram(prediction, **bins)[0]
            truth += np.histogram(reference, **bins)[0]
        return {"mean_iou": float(np.nanmean(intersect / (guess + truth - intersect)))}


def pair(index: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A label of 32-pixel blocks with an ignored strip, and a prediction that is wrong on a tenth of the blocks."""
    rng = np.random.default_rng(index)
    blocks = rng.integers(0, NUM_LABELS, (32, 64))
    wrong = np.where(rng.random(blocks.shape) < 0.1, rng.integers(0, NUM_LABELS, blocks.shape), blocks)
    prediction, reference = (np.kron(b, np.ones((32, 32), int)).astype(dtype) for b in (wrong, blocks))
    reference[:40] = IGNORE_INDEX
    return prediction, reference


def measure(kind: str, dtype: str, pairs: int) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        if kind == "ours":
            metric, options = MeanIoU(num_labels=NUM_LABELS, ignore_index=IGNORE_INDEX, cache_dir=cache), {}
        else:
            metric, options = StoredMeanIoU(cache_dir=cache), {"num_labels": NUM_LABELS, "ignore_index": IGNORE_INDEX}
        pair(0, dtype)  # exclude the memory for drawing the maps
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        adding = 0.0
        for index in range(pairs):
            prediction, reference = pair(index, dtype)
            start = time.perf_counter()
            metric.add_batch(predictions=[prediction], references=[reference])
            adding += time.perf_counter() - start
        start = time.perf_counter()
        disk_before_compute = _bytes(cache)
        score = metric.compute(**options)["mean_iou"]
        computing = time.perf_counter() - start
        return {
            "add (s)": adding,
            "compute (s)": computing,
            "memory (MiB)": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
            "disk (MiB)": disk_before_compute / 2**20,
            "mean_iou": score,
        }


def _bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="how many pairs of maps (500: Cityscapes val; 8 GB disk)")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.pairs)))
        return
    columns = ("add (s)", "compute (s)", "memory (MiB)", "disk (MiB)", "mean_iou")
    print(f"{args.pairs} pairs of 1024 x 2048 maps\n")
    print("| maps | metric | " + " | ".join(columns) + " | time, stored / ours |\n|" + "---|" * (len(columns) + 3))
    for dtype in ("uint8", "int64"):
        found = {}
        for kind in ("ours", "stored"):
            command = [sys.executable, __file__, "--pairs", str(args.pairs), "--one", kind, dtype]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        times = {kind: row["add (s)"] + row["compute (s)"] for kind, row in found.items()}
        assert abs(found["ours"]["mean_iou"] - found["stored"]["mean_iou"]) < 1e-9, found
        for kind, row in found.items():
            values = " | ".join(f"{row[c]:.4f}" if c == "mean_iou" else f"{row[c]:.2f}" for c in columns)
            ratio = f"{times['stored'] / times['ours']:.1f} x" if kind == "ours" else ""
            print(f"| {dtype} | {kind} | {values} | {ratio} |")


if __name__ == "__main__":
    main()
