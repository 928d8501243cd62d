"""Exports a run's branches as folders that load anywhere, each with its model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..checkpointing.resume import on_main_process
from ..files import filled_whole, write_atomically
from ..hub.card import render_card
from ..hub.export import check_target, export_branch
from ..modeling.adapters import merged
from ..modeling.universal import with_settled_masked_attention
from . import sharding
from .callbacks.optional import optional
from .callbacks.pictures import PREDICTIONS, Pictures
from .module import TrainingModule
from .processes import together
from .results import Run, card_facts
from .state import RunState


class BranchExporter:
    """Writes branches, and model cards from the run's current state. All processes call every method.

    Args:
        image_mean, image_std, do_reduce_labels, processing_class: for the image processor, see
            `cps_hf.hub.export.export_branch`.
        pictures: draws the pictures of cards.
    """

    def __init__(
        self,
        run: Run,
        state: RunState,
        module: TrainingModule,
        accelerator: Accelerator,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        do_reduce_labels: bool,
        processing_class: Any,
        pictures: Pictures,
    ):
        self.run, self.state, self.module, self.accelerator = run, state, module, accelerator
        self.image_mean, self.image_std, self.processing_class = image_mean, image_std, processing_class
        self.do_reduce_labels = do_reduce_labels
        self.pictures = pictures
        self.output_dir = Path(run.settings["output_dir"])

    @property
    def names(self) -> list[str]:
        """The names in `TrainingModule.networks`."""
        return [*self.module.networks()]

    @property
    def supervised(self) -> dict[str, Path]:
        """The folders of the networks that the second stage starts from, by name. Empty if there is one stage. (The
        teacher starts as a copy of branch 0.)"""
        names = [name for name in self.names if name != "teacher"] if self.run.stages.border else []
        return {name: self.output_dir / name.replace("branch_", "supervised_", 1) for name in names}

    def name_of(self, branch: int | str) -> str:
        """ "branch_<number>" for a number, "teacher" for the teacher, "branch_<number>_average" for
        "<number>_average".

        Raises:
            ValueError: no such branch exists.
        """
        known = {name.removeprefix("branch_"): name for name in self.names}
        if str(branch).removeprefix("branch_") not in known:
            raise ValueError(f"`branch` must be one of {', '.join(known)}, got {branch!r}.")
        return known[str(branch).removeprefix("branch_")]

    def network(self, branch: int | str) -> nn.Module:
        """A branch by number or name, its average, or the teacher."""
        return self.module.networks()[self.name_of(branch)]

    def check_folders(self) -> None:
        """Raise a ValueError if a branch's folder contains something else, which an export would not replace."""
        folders = [*(self.output_dir / name for name in (*self.names, "best")), *self.supervised.values()]
        on_main_process(self.accelerator, lambda: [check_target(folder) for folder in folders])

    def export(self, name: str, directory: Path | None = None) -> None:
        """Write one branch: weights, config, image processor and card, without anything of the other branches.

        Args:
            directory: if `None`, `<name>` in the output folder.
        """
        directory = directory or self.output_dir / name
        aside, card = self.output_dir / "tmp-card", None
        model = self.network(name).model
        self.module.share_buffers(self.accelerator)
        with with_settled_masked_attention(model):
            weights = sharding.weights(model)
            with sharding.whole(self.module):
                if self.accelerator.is_main_process:
                    card = self._card(name, directory.name, aside)
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    export_branch(
                        merged(model),
                        directory,
                        state_dict=weights,
                        id2label=self.run.id2label,
                        image_mean=self.image_mean,
                        image_std=self.image_std,
                        do_reduce_labels=self.do_reduce_labels,
                        input_shrink=self.run.settings["eval_shrink"],
                        processing_class=self.processing_class,
                        card=card,
                    )
                    shutil.rmtree(aside, ignore_errors=True)

    def has_supervised(self, name: str) -> bool:
        """Whether the supervised stage's branch is still there. It is not if its folder was deleted, or if the run was
        resumed in another folder."""
        return on_main_process(self.accelerator, lambda: (self.supervised[name] / "config.json").is_file())

    def copy_supervised(self, name: str, directory: Path) -> None:
        """Export the supervised stage's branch again, to `directory`. Its card becomes that of the new place when it
        is rewritten."""
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                with filled_whole(directory, replace=True) as temporary:
                    shutil.copytree(self.supervised[name], temporary, dirs_exist_ok=True)

    @optional("a model card")
    def _card(self, name: str, directory: str, aside: Path) -> dict[str, Any]:
        picture = self._picture(name, aside)
        facts = {**card_facts(self.run, self.state, name, directory), "picture": picture}
        render_card(facts)  # fails here, and not while the weights are written
        return facts

    @optional("a picture in the model card")
    def _picture(self, name: str, aside: Path) -> Path | None:
        return self.pictures.draw_for_card(self.network(name), aside)

    def rewrite_card(self, name: str, directory: Path) -> None:
        """Rewrite the card of a branch that was exported before its scores were known. Only on the main process."""
        facts = card_facts(self.run, self.state, name, directory.name)
        facts["picture"] = PREDICTIONS if (directory / PREDICTIONS).is_file() else None
        write_atomically(directory / "README.md", render_card(facts))
