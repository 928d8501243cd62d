"""The one module that is trained: what DDP and torch.compile see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..modeling.branches import Branch
from ..objectives import LabeledBatch, Objective, ObjectiveOutput, UnlabeledBatch
from . import health
from .ema import make_teacher


class TrainingModule(nn.Module):
    """The branches, the teacher and the objective in one module, called once a micro-batch.

    So DDP and torch.compile see one forward, whatever the method does inside.
    """

    def __init__(self, models: Sequence[nn.Module], objective: Objective):
        super().__init__()
        self.branches = nn.ModuleList(Branch(model) for model in models)
        self.objective = objective
        self.teacher = make_teacher(self.branches[0]) if objective.teacher else None

    def compile_networks(self, backend: str, mode: str | None) -> None:
        """Compile each network for its passes in training; weights, hooks and exports stay as they are.

        What is around the networks, the objective with its losses a piece at a time, is not compiled.
        """
        for branch in self.branches:
            branch.compile_model(backend=backend, mode=mode)

    def train(self, mode: bool = True) -> TrainingModule:
        """The teacher stays in evaluation mode: its batch norm uses the statistics that it averages."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None, progress: Tensor) -> ObjectiveOutput:
        """What the objective makes of a micro-batch. Batches are on the module's device: DDP and FSDP2 move tensors in
        lists and dictionaries only, and pass these on as they are."""
        branches = health.watch([branch.strided for branch in self.branches], labeled)
        teacher = None if self.teacher is None else self.teacher.strided
        output = self.objective(branches, labeled, unlabeled, teacher=teacher, progress=progress)
        return health.with_one_class(output, branches)

    def share_buffers(self, accelerator: Accelerator) -> None:
        """Batch norm's running statistics differ between processes after a step: take the main process's."""
        if accelerator.num_processes > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)
