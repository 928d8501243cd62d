"""Writes the model cards of a run's branches once their content is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from .optional import optional

if TYPE_CHECKING:
    from ..export import BranchExporter  # which imports this package


class ModelCardCallback(TrainerCallback):
    """Rewrites the cards of exported branches with the final scores at the end of a run, and those of the supervised
    branches at the end of the supervised stage.

    Args:
        exporter: the exporter that wrote the branches.
    """

    def __init__(self, exporter: BranchExporter):
        self.exporter = exporter

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.exporter.run.stages.is_border(state.global_step):
            for name, folder in self.exporter.supervised.items():
                self._rewrite(name, folder)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in self.exporter.names:
                self._rewrite(name, self.exporter.output_dir / name)
            if state.best:
                self._rewrite(state.best["branch"], self.exporter.output_dir / "best")

    @optional("a model card with the final scores")
    def _rewrite(self, name: str, directory: Path) -> None:
        if directory.is_dir():
            self.exporter.rewrite_card(name, directory)
