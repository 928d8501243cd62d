"""Images per second with one process and with several, for one global batch, and whether the batches are the same.

    python benchmarks/scaling.py [--processes 1 2] [--steps 12]          CPU processes, with gloo
    python benchmarks/scaling.py --processes 1 2 4 8 --model nvidia/mit-b2 --crop 512 --global_batch 32 --gpus

Every run trains with CPS + CutMix on the same drawn images for the same steps; each optimizer step's samples (ids and
pixels after augmentation, of both streams, in the global order) are hashed and compared, also with accumulation
instead of processes. The first steps do not count. Efficiency is the images per second divided by those of one process
and by the number of processes; CPU time is summed over all processes, so that other jobs on the machine count less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM = 3  # steps that are not measured


def recorded(streams: Any, seen: dict[str, list]) -> None:
    """Record a line for each sample that this process trains on: "id checksum", by stream."""
    original = streams.TrainStream.__iter__

    def recording(self):
        for batch in original(self):
            pixels = batch["weak" if "weak" in batch else "pixel_values"]
            lines = [
                f"{name} {zlib.crc32(image.numpy().tobytes())}"
                for name, image in zip(batch["ids"], pixels, strict=True)
            ]
            seen.setdefault(self.name, []).append(lines)
            yield batch

    streams.TrainStream.__iter__ = recording


def train(options: argparse.Namespace) -> None:
    """Train in each process of a run; the main one writes the measurements."""
    from accelerate.utils import gather_object
    from support.toy import tiny_upernet, write_world
    from transformers import TrainerCallback

    from cps_hf import AugmentationConfig, CPSConfig, CPSTrainer
    from cps_hf.data import streams
    from cps_hf.objectives import CrossPseudoSupervision

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (WARM, options.steps):
                if trainer.device.type == "cuda":
                    import torch

                    torch.cuda.synchronize()
                times.append((time.perf_counter(), time.process_time()))

    seen: dict[str, list] = {}
    times: list[tuple[float, float]] = []
    recorded(streams, seen)
    folder = options.child.with_suffix(f".{os.environ.get('RANK', 0)}")
    sizes = [(options.crop * 5 // 4, options.crop * 3 // 2)] * (2 * options.global_batch)
    batch = options.global_batch // (int(os.environ.get("WORLD_SIZE", 1)) * options.accumulation)
    trainer = CPSTrainer(
        options.model or tiny_upernet(),
        CPSConfig(
            output_dir=str(options.child.with_suffix(".run")),
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=options.accumulation,
            dataloader_num_workers=options.workers,
            mixed_precision="bf16" if options.gpus else "no",
            agreement_images=0,
            disable_tqdm=True,
            overwrite_output_dir=True,
        ),
        augmentation=AugmentationConfig(crop_size=[options.crop, options.crop]),
        objective=CrossPseudoSupervision(cutmix=True),
        train_dataset=write_world(folder / "labeled", sizes),
        unlabeled_dataset=write_world(folder / "unlabeled", sizes, first=1000, labels=False),
        callbacks=[Clock()],
    )
    trainer.train()
    (wall, cpu), (wall_end, cpu_end) = times
    micro = options.accumulation
    # In the global order, a process's micro-batches of a step are adjacent.
    mine = [[seen[name][k * micro : (k + 1) * micro] for name in sorted(seen)] for k in range(options.steps)]
    everyone, cpus = gather_object([mine]), gather_object([cpu_end - cpu])
    if trainer.accelerator.is_main_process:
        hashes = []
        for k in range(options.steps):
            order = [one for s in (0, 1) for process in everyone for micro in process[k][s] for one in micro]
            hashes.append(hashlib.sha256("\n".join(order).encode()).hexdigest())
        images = 2 * options.global_batch * (options.steps - WARM)
        found = {"rate": images / (wall_end - wall), "cpu": sum(cpus) / images, "steps": hashes}
        options.child.write_text(json.dumps(found | {"device": str(trainer.device.type)}))


def measure(processes: int, accumulation: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / f"{processes}-{accumulation}.json"
    words = ["--steps", options.steps, "--crop", options.crop, "--global_batch", options.global_batch]
    words += ["--workers", options.workers, "--accumulation", accumulation, "--child", out]
    words += ["--model", options.model] if options.model else []
    words += ["--gpus"] if options.gpus else []
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
        launch += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path} | ({} if options.gpus else {"ACCELERATE_USE_CPU": "1"})
    done = subprocess.run(
        [*map(str, [*launch, __file__, *words])],
        env={"OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--global_batch", type=int, default=8, help="labeled images per step, and as many unlabeled ones"
    )
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--workers", type=int, default=0, help="data workers per process")
    parser.add_argument("--model", help="a Hub id or folder; default: a tiny UperNet")
    parser.add_argument("--gpus", action="store_true", help="one GPU per process, in bf16; else CPU processes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--accumulation", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return train(options)
    runs = [(count, 1) for count in options.processes] + [(1, 2)]
    print("| processes x accumulation | images/s | efficiency | CPU s an image | the same batches |")
    print("|---|---|---|---|---|")
    base = None
    with tempfile.TemporaryDirectory() as folder:
        for processes, accumulation in runs:
            found = measure(processes, accumulation, options, Path(folder))
            base = base or found
            efficiency = found["rate"] / base["rate"] / processes * runs[0][0]
            same = sum(a == b for a, b in zip(found["steps"], base["steps"], strict=True))
            print(
                f"| {processes} x {accumulation} | {found['rate']:.2f} | {efficiency:.2f} | {found['cpu']:.4f} | "
                f"{same} of {options.steps} steps |",
                flush=True,
            )


if __name__ == "__main__":
    main()
