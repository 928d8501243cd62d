"""The module that is trained, as seen by DDP and torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..modeling.branches import Branch
from ..objectives import Branch as CallableBranch
from ..objectives import LabeledBatch, Objective, ObjectiveOutput, UnlabeledBatch
from . import health
from .ema import make_teacher


class TrainingModule(nn.Module):
    """The branches, the teacher, the branches' averages and the objective in one module, called once per micro-batch.

    DDP and torch.compile therefore see a single forward pass for every method.

    Args:
        averages: whether to keep an average of each branch, like a teacher. The code that steps the optimizer updates
            the averages.
        labelers: the trained networks that the objective names. They are not part of the module: not trained, sharded,
            broadcast or saved.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        objective: Objective,
        *,
        averages: bool = False,
        labelers: Sequence[CallableBranch] = (),
    ):
        super().__init__()
        self.labelers = tuple(labelers)  # modules in a tuple are not registered
        self.branches = nn.ModuleList(Branch(model) for model in models)
        self.objective = objective
        for branch in self.branches:
            branch.keep_queries = objective.labeled_loss == "set"
        self.teacher = make_teacher(self.branches[0]) if objective.teacher else None
        self.averages = nn.ModuleList(map(make_teacher, self.branches)) if averages else None
        labeling = ("teacher",) if objective.teacher else [f"branch_{i}" for i in range(len(self.branches))]
        labeling = [f"{name}_average" for name in labeling] if objective.averages else [*labeling]
        self.labeling = [] if "pseudo_labels" in objective.views or objective.labelers else labeling
        """The names of the networks whose predictions are the method's pseudo labels."""

    def networks(self) -> dict[str, nn.Module]:
        """All networks by the names used for scores and exports: "branch_0", ..., "branch_0_average", ...,
        "teacher"."""
        found: dict[str, nn.Module] = {f"branch_{i}": branch for i, branch in enumerate(self.branches)}
        found |= {f"branch_{i}_average": average for i, average in enumerate(self.averages or ())}
        return found if self.teacher is None else {**found, "teacher": self.teacher}

    def compile_networks(self, backend: str, mode: str | None) -> None:
        """Compile each network for training passes. Weights, hooks and exports are unchanged.

        Code around the networks (the objective, with its piecewise losses) is not compiled.
        """
        for branch in self.branches:
            branch.compile_model(backend=backend, mode=mode)

    def train(self, mode: bool = True) -> TrainingModule:
        """Keep the teacher and averages in evaluation mode: their batch norm uses the averaged statistics."""
        super().train(mode)
        for averaged in (self.teacher, self.averages):
            if averaged is not None:
                averaged.eval()
        return self

    def forward(
        self,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        progress: Tensor,
        unlabeled_weight: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Call the objective on a micro-batch. Batches are already on the module's device: DDP and FSDP2 move tensors
        in lists and dictionaries only, and pass these unchanged.

        Args:
            unlabeled_weight: multiplies the unlabeled term. If `None`, it is not passed to the objective.
        """

        def watched(networks):
            return health.watch(networks, labeled, self.objective)

        branches, teachers, averages = (
            watched([network.strided for network in networks])
            for networks in (self.branches, [] if self.teacher is None else [self.teacher], self.averages or [])
        )
        labelers = watched(self.labelers)
        asked_for = {"averages": averages} if self.objective.averages else {}
        asked_for |= {"labelers": labelers} if self.objective.labelers else {}
        if unlabeled_weight is not None:
            asked_for["unlabeled_weight"] = unlabeled_weight
        teacher = teachers[0] if teachers else None
        output = self.objective(branches, labeled, unlabeled, teacher=teacher, progress=progress, **asked_for)
        if unlabeled is not None:
            networks = [*branches, *teachers, *averages, *labelers]
            output = health.with_class_pixels(output, networks, labeled.labels, unlabeled.pseudo_labels)
        return health.with_one_class(output, branches)

    def share_buffers(self, accelerator: Accelerator) -> None:
        """Use the main process's batch-norm running statistics, which differ between processes after a step."""
        if accelerator.num_processes > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)
