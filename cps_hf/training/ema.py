"""Moving averages of a branch's parameters and buffers: a method's teacher, and averages that are also evaluated."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_teacher(branch: nn.Module) -> nn.Module:
    """A copy of the branch that is not optimized (`requires_grad=False`), in float32 at least.

    In bfloat16 or float16 a step's change of a weight is less than half of its last digit, and the teacher would never
    change.
    """
    teacher = copy.deepcopy(branch).requires_grad_(False)
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    return teacher


@torch.no_grad()
def update_teacher(teacher: nn.Module, branch: nn.Module, decay: float) -> None:
    """Set teacher = decay * teacher + (1 - decay) * branch for parameters and floating-point buffers (batch norm's).

    Integer buffers (batch norm's counter) are copied. Frozen weights that both use stay as they are.
    """
    own, new = teacher.state_dict(keep_vars=True), branch.state_dict(keep_vars=True)
    once = {id(value): (name, value) for name, value in own.items()}  # a tied parameter has several names
    for name, value in once.values():
        if value is new[name]:
            continue
        if value.dtype.is_floating_point:
            value.lerp_(new[name].to(value.dtype), 1 - decay)
        else:
            value.copy_(new[name])
