"""A test program, in the number of processes it is launched in: something fails on one process before or after
training.

`run_late_failures.py OUT`: what each process raised in each case is written to `OUT/found-<rank>.json`.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState
from transformers import TrainerCallback

from cps_hf.checkpointing import checkpoints, lock
from cps_hf.checkpointing.checkpoints import problem_of
from cps_hf.metrics.mean_iou import IoUCounter
from cps_hf.objectives import CrossPseudoSupervision
from cps_hf.training import evaluation, export
from cps_hf.training import trainer as trainer_module
from cps_hf.training.evaluation import Evaluator
from cps_hf.training.trainer import CPSTrainer
from support.resume_cases import without_cards_and_pictures
from support.toy import settings, toy_models, write_world

LAST = 2
out = Path(sys.argv[1])
torch.set_num_threads(1)
rank = PartialState(cpu=True).process_index


class Fails(TrainerCallback):
    def __init__(self, event):
        def fail(args, state, control, **kwargs):
            if state.global_step == LAST:
                raise TypeError(f"the user's own fault on process {rank}")

        setattr(self, event, fail)


def trainer_for(name, *callbacks, **fields):
    world = out / f"world-{rank}"
    return CPSTrainer(
        toy_models(),
        **settings(
            **{"output_dir": str(out / name), "max_steps": LAST, "logging_steps": 1, "crop_size": [16, 16]},
            **{"per_device_train_batch_size": 2, "dataloader_num_workers": 0, "disable_tqdm": True},
            **{"num_pictures": 0, "agreement_images": 2, "ddp_timeout": 60, **fields},
        ),
        objective=CrossPseudoSupervision(),
        train_dataset=write_world(world / "labeled", [(20, 20)] * 4),
        unlabeled_dataset=write_world(world / "unlabeled", [(20, 20)] * 4, first=9, labels=False),
        eval_dataset=write_world(world / "eval", [(20, 20)] * 4, first=20),
        callbacks=[*callbacks],
    )


def fails_on(process, owner, name):
    """A patch on that process only."""

    def fail(*_, **__):
        raise OSError(28, f"No space left on process {process}")

    return patch.object(owner, name, fail if rank == process else getattr(owner, name))


# What fails on which process alone: a patch, or an event of a callback.
CASES = {
    "reading an image, process 1": (1, (Evaluator, "_batches")),
    "the metric, process 1": (1, (IoUCounter, "compute")),
    "the metric, process 0": (0, (IoUCounter, "compute")),
    "an export, process 0": (0, (export, "export_branch")),
    "amending, process 0": (0, (checkpoints, "amend_checkpoint")),
    "results.json, process 0": (0, (trainer_module, "write_atomically")),
    **{f"{event}, process {process}": (process, event) for process, event in enumerate(("on_log", "on_evaluate"))},
    **{f"{event}, process 1": (1, event) for event in ("on_step_end", "on_log", "on_save", "on_train_end")},
    "the folder's files, process 0": (0, (checkpoints, "prepare_output_dir")),
    "the lock, process 0": (0, (lock.FolderLock, "take")),
    "the first evaluation image, process 1": (1, (evaluation, "predict_logits")),
    "a tracker, process 0": (0, (Accelerator, "init_trackers")),
}
found = {}
with without_cards_and_pictures():
    expected = trainer_for("sound").train()
    for number, (name, (process, what)) in enumerate(CASES.items()):
        events = isinstance(what, str)
        trackers = {"report_to": ["tensorboard"] if name.startswith("a tracker") else []}
        trainer = trainer_for(f"case-{number}", *([Fails(what)] if events and rank == process else []), **trackers)
        raised = None
        if what == (Evaluator, "_batches"):
            trainer.evaluator.check_first_batch = lambda dataset: None
            trainer.args.agreement_images = 0
        try:
            if events:
                trainer.train()
            else:
                with fails_on(process, *what):
                    trainer.train()
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        whole = problem_of(out / f"case-{number}" / f"checkpoint-{LAST}") is None
        fields = {"resume_from_checkpoint": "auto"}
        again = trainer_for(f"case-{number}", **fields).train()
        found[name] = {"raised": raised, "whole": whole, "same": again["final"] == expected["final"]}
        (out / f"found-{rank}.json").write_text(json.dumps(found))
