"""Pushes a run to the Hub: at its saves, if configured, and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from ...checkpointing.checkpoints import newest_checkpoint
from ...config import HubConfig
from ...hub.background import BackgroundPushes

if TYPE_CHECKING:
    from ..export import BranchExporter  # which imports this package


class PushCallback(TrainerCallback):
    """Pushes the best branch in the background, or branch 0 if nothing was evaluated. All processes call it.

    Args:
        exporter: writes a branch that is not exported yet.

    Raises:
        ValueError: on the main process, the token is missing or rejected, or the repository's name or privacy cannot
            be as the settings say.
    """

    def __init__(self, hub: HubConfig, output_dir: str, exporter: BranchExporter, *, is_main_process: bool):
        self.hub, self.output_dir, self.exporter = hub, Path(output_dir), exporter
        self.pushes = BackgroundPushes(hub, output_dir) if is_main_process else None

    def on_save(self, args, state, control, **kwargs):
        if self.hub.hub_strategy == "end" or control.should_training_stop:
            return  # the last state is pushed at the end
        if not state.best:
            self.exporter.export("branch_0")
        if self.pushes is not None:
            message = f"Training in progress, step {state.global_step}"
            self.pushes.submit(self._branch(state), message, checkpoint=self._checkpoint())

    def on_train_end(self, args, state, control, **kwargs):
        if self.pushes is not None:
            self.pushes.finish(self._branch(state), "End of training", checkpoint=self._checkpoint())

    def _branch(self, state) -> Path:
        return self.output_dir / ("best" if state.best else "branch_0")

    def _checkpoint(self) -> Path | None:
        return newest_checkpoint(self.output_dir) if self.hub.hub_strategy == "checkpoint" else None
