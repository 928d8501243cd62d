"""A test program: toy models trained for a long time, with the newest step written to a file after each."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training.trainer import CPSTrainer
from support.toy import settings, toy_models, write_world

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--ddp_timeout", type=int, default=60)
parser.add_argument("--nan_at", type=int, default=0, help="the last process's loss is NaN at this step")
parser.add_argument("--max_skipped_steps", type=int, default=0)
parser.add_argument("--max_steps", type=int, default=100_000)
options = parser.parse_args()
torch.set_num_threads(1)
rank = os.environ.get("RANK", "0")


class Program(CrossPseudoSupervision):
    def __call__(self, branches, labeled, unlabeled, *, teacher=None, progress=0.0):
        output = super().__call__(branches, labeled, unlabeled, teacher=teacher, progress=progress)
        bad = trainer.state.global_step + 1 == options.nan_at and int(rank) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        return output._replace(loss=output.loss * float("nan")) if bad else output


class Tell(TrainerCallback):
    """Write the step and the process's number, and limit the steps per second."""

    def on_step_end(self, args, state, control, **kwargs):
        path = options.out / f"step-{rank}"
        path.with_suffix(".tmp").write_text(f"{state.global_step} {os.getpid()}")
        path.with_suffix(".tmp").replace(path)
        time.sleep(0.02)


options.out.mkdir(parents=True, exist_ok=True)
world = options.out / f"world-{rank}"
trainer = CPSTrainer(
    toy_models(),
    **settings(
        output_dir=str(options.out / "run"),
        max_steps=options.max_steps,
        per_device_train_batch_size=2,
        crop_size=[16, 16],
        dataloader_num_workers=options.workers,
        agreement_images=0,
        disable_tqdm=True,
        logging_steps=5,
        ddp_timeout=options.ddp_timeout,
        max_skipped_steps=options.max_skipped_steps,
    ),
    objective=Program(cutmix=False),
    train_dataset=write_world(world / "labeled", [(20, 20)] * 4),
    unlabeled_dataset=write_world(world / "unlabeled", [(20, 20)] * 4, first=9, labels=False),
    callbacks=[Tell()],
)
trainer.train()
sys.stdout.flush()
