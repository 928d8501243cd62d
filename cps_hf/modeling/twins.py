"""Ensures that no two branches start as the same network: identical networks cannot learn from each other."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .backbones import head_parameters
from .initialization import branch_seed, initialize_weights

logger = logging.getLogger("cps_hf")


def redraw_equal_heads(branches: Sequence[PreTrainedModel], passed: Sequence[bool], seed: int) -> None:
    """Draw a new head for each branch that would start with the head of another one.

    This happens if one checkpoint, or a copy of it, is given for several branches: the first one is kept unchanged,
    the others keep the backbone. Weights are compared, so it does not matter how they were loaded.

    Args:
        passed: which branches are the user's model objects, and stay unchanged.
        seed: together with the branch's index, the seed of its new head.

    Raises:
        ValueError: two branches share parameters.
    """
    _reject_shared_parameters(branches)
    settled = [index for index, is_passed in enumerate(passed) if is_passed]
    for index, model in enumerate(branches):
        if passed[index]:
            continue
        twin = next((i for i in sorted(settled) if _alike(model, branches[i], heads=True)), None)
        settled.append(index)
        if twin is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(branch_seed(seed, index))
                initialize_weights(model, head_parameters(model))
            logger.warning(
                "branch %d, %s: its head would be that of branch %d, and one network cannot teach itself. The "
                "backbone is kept and a new head is drawn (seed %d, branch %d). Its first pseudo labels are of little "
                "use; the objective's `ramp_up` reduces their weight.",
                *(index, type(model).__name__, twin, seed, index),
            )


def reject_twins(branches: Sequence[PreTrainedModel]) -> None:
    """Check branches that are to teach each other.

    Raises:
        ValueError: two are the same network, as can happen with model objects, which are used unchanged.
    """
    for (i, one), (j, other) in itertools.combinations(enumerate(branches), 2):
        if _alike(one, other, heads=False):
            raise ValueError(
                f"The models passed as branches {i} and {j} have the same weights: they are one network, which cannot "
                "teach itself. Pass the folder or Hub id that they were loaded from instead: then the first is "
                "kept unchanged, and each of the others gets a new head."
            )


def _reject_shared_parameters(branches: Sequence[PreTrainedModel]) -> None:
    owners: dict[int, int] = {}
    for index, branch in enumerate(branches):
        for name, parameter in branch.named_parameters():
            owner = owners.setdefault(id(parameter), index)
            if owner == index:
                continue
            if branches[owner] is branch:
                raise ValueError(
                    "The same model object was passed twice: a branch cannot teach itself. Pass two models."
                )
            raise ValueError(
                f"Branches {owner} and {index} share parameters ({name}, ...), but each is trained separately. Give "
                f"branch {index} its own: `copy.deepcopy` the shared part."
            )


def _alike(one: PreTrainedModel, other: PreTrainedModel, *, heads: bool) -> bool:
    """Whether two models have the same weights, or the same head, up to the rounding of a half-precision copy."""
    if type(one) is not type(other):
        return False
    weights, others = ({name: p.detach() for name, p in model.named_parameters()} for model in (one, other))
    if heads:
        weights, others = (
            {name: tensors[name] for name in head_parameters(model)}
            for tensors, model in ((weights, one), (others, other))
        )
    return weights.keys() == others.keys() and all(_close(p, others[name]) for name, p in weights.items())


def _close(p: torch.Tensor, q: torch.Tensor) -> bool:
    return p.shape == q.shape and torch.allclose(p.float().cpu(), q.float().cpu(), rtol=2**-8, atol=1e-7)
