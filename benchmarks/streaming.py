"""How long a step waits for its images when they are streamed from a distant Hub.

    python benchmarks/streaming.py [--steps 30] [--compute 0.3]

A local Hub (tests/support/hub_server.py) answers each request after a latency and with limited bandwidth. The client
is the real one, in a new process: `load_hub(..., streaming=True)` and the unlabeled stream of a run, 8 images per
step. The step's computation is a sleep, since only its duration matters. The wait is measured in the loop, after the
first quarter of the steps. A thread reads rows ahead; "not ahead" disables it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
REPO, BATCH = "me/photos", 8
LINKS = [(0.05, 50e6), (0.2, 10e6)]  # seconds, bytes per second
READERS = [(0, False), (1, False), (1, True)]  # workers, whether rows are read ahead


def shards(count: int, images: int) -> dict[str, bytes]:
    """Parquet files of noisy JPEG images of 375 x 500 pixels (some 70 KB), a few rows per group."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PILImage

    def jpeg(index: int) -> bytes:
        rng = np.random.default_rng(index)
        coarse = PILImage.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-9, 10, (375, 500, 3))
        out = io.BytesIO()
        PILImage.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(out, "jpeg", quality=92)
        return out.getvalue()

    files = {}
    for shard in range(count):
        numbers = range(shard * images, (shard + 1) * images)
        rows = {"image": [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in numbers], "id": [*map(str, numbers)]}
        out = io.BytesIO()
        features = Features({"image": Image(), "id": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(out, batch_size=2 * BATCH)
        files[f"data/train-{shard:05d}-of-{count:05d}.parquet"] = out.getvalue()
    return files


def client(workers: int, ahead: bool, steps: int, compute: float) -> dict[str, float]:
    """Seconds until the first batch, and seconds of waiting per step."""
    import torch

    from cps_hf.data import load_hub, streams
    from cps_hf.data.order import Shard
    from cps_hf.data.transforms import Augmentation

    torch.set_num_threads(1)
    if not ahead:
        streams.read_ahead = lambda plans, count: plans
    began = time.perf_counter()
    batches = iter(
        streams.TrainStream(
            load_hub(REPO, with_labels=False, streaming=True),
            name="unlabeled_dataset",
            shard=Shard(batch_size=BATCH),
            augmentation=Augmentation(crop_size=(128, 128)),
            seed=0,
            views=("weak",),
            num_workers=workers,
            shuffle_buffer_size=2 * BATCH,
        )
    )
    next(batches)
    first, waits = time.perf_counter() - began, []
    for _ in range(steps):
        time.sleep(compute)
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
    waits = waits[steps // 4 :]
    return {"first": first, "mean": statistics.mean(waits), "median": statistics.median(waits), "most": max(waits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compute", type=float, default=0.3, help="seconds of a step's computation")
    parser.add_argument("--client", nargs=2, type=int, metavar=("WORKERS", "AHEAD"), help="used by the script itself")
    options = parser.parse_args()
    if options.client:
        print(json.dumps(client(options.client[0], bool(options.client[1]), options.steps, options.compute)))
        os._exit(0)  # closing a streamed parquet set sleeps for seconds
    sys.path.insert(0, str(ROOT / "tests"))
    from support.hub_server import Hub

    files = shards(4, BATCH * (options.steps // 2))
    size = sum(map(len, files.values())) / len(files)
    print(f"Shards of {size / 1e6:.1f} MB, steps of {BATCH} images and {options.compute} s\n")
    print("| latency, bandwidth | workers | rows | first batch | wait a step: mean | median | most |")
    print("|---|---|---|---|---|---|---|")
    for latency, bandwidth in LINKS:
        for workers, ahead in READERS:
            with tempfile.TemporaryDirectory() as home, Hub(latency, bandwidth) as hub:
                hub.add_repo(REPO, kind="datasets", files=files)
                env = {**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                words = ["--steps", str(options.steps), "--compute", str(options.compute)]
                words += ["--client", str(workers), str(int(ahead))]
                done = subprocess.run([sys.executable, __file__, *words], env=env, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            link = f"{1000 * latency:.0f} ms, {bandwidth / 1e6:.0f} MB/s"
            numbers = " | ".join(f"{1000 * found[key]:.0f} ms" for key in ("mean", "median", "most"))
            rows = "read ahead" if ahead else "not ahead"
            print(f"| {link} | {workers} | {rows} | {found['first']:.1f} s | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
