"""What of a trainer goes into a checkpoint and comes back from it; `checkpoints` writes the files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState

from . import checkpoints

logger = logging.getLogger(__name__)


def save_checkpoint(trainer: Any) -> None:
    """Write the `CPSTrainer`'s checkpoint of the step it is at; called by every process."""
    checkpoints.save_checkpoint(
        trainer.args.output_dir,
        trainer.state.global_step,
        _state_of(trainer),
        save_state=trainer.accelerator.save_state,
        wait_for_everyone=trainer.accelerator.wait_for_everyone,
        is_main_process=trainer.accelerator.is_main_process,
        save_total_limit=trainer.args.save_total_limit,
    )


def _state_of(trainer: Any) -> dict[str, Any]:
    """What Accelerate does not save: JSON values only."""
    step = trainer.state.global_step
    return {
        "step": step,
        "streams": {
            name: {"position": stream.start + (step - trainer.first_step) * stream.shard.global_batch_size}
            | stream.state()
            for name, stream in trainer.streams.items()
        },
        "scheduler": trainer.lr_scheduler.state_dict(),
        "averages": trainer.averages.state(),
        "stopwatch": trainer.stopwatch.total,
        "skipped_steps": trainer.guard.skipped_steps,
        "scores": trainer.scores,
        "best": trainer.best,
        "best_metric": trainer.state.best_metric,
        "agreement": trainer.agreement,
        "callbacks": {
            type(c).__name__: c.state()["attributes"]
            for c in trainer.callback_handler.callbacks
            if isinstance(c, ExportableState)
        },
        "settings": trainer.args.to_dict(),
    }


def load_checkpoint(trainer: Any, checkpoint: Path, state: dict[str, Any]) -> None:
    """Bring the trainer to where it was; called by every process before the first step.

    Args:
        state: what `checkpoints.read_state(checkpoint)` gave.
    """
    trainer.accelerator.load_state(str(checkpoint))
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    trainer.averages.load(state["averages"])
    trainer.stopwatch.total = state["stopwatch"]
    trainer.guard.skipped_steps = state["skipped_steps"]
    trainer.scores, trainer.best, trainer.agreement = state["scores"], state["best"], state["agreement"]
    trainer.state.global_step = trainer.first_step = state["step"]
    trainer.state.best_metric, trainer.state.best_global_step = state["best_metric"], state["best"].get("step")
    if not (Path(trainer.args.output_dir) / "best").is_dir():  # resumed into another folder: the best is found anew
        trainer.best, trainer.state.best_metric, trainer.state.best_global_step = {}, None, None
    for callback in trainer.callback_handler.callbacks:
        for name, value in state["callbacks"].get(type(callback).__name__, {}).items():
            setattr(callback, name, value)
    logger.info("Resumed from %s at step %d.", checkpoint, state["step"])
