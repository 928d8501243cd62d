"""No two branches start as one network: what one says, the other says already, and neither learns from it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .backbones import head_parameters
from .initialization import branch_seed, initialize_weights

logger = logging.getLogger("cps_hf")


def tell_apart(branches: Sequence[PreTrainedModel], passed: Sequence[bool], seed: int) -> None:
    """Draws the head of a branch anew that would start with the head of another.

    So it is where one checkpoint is given for several branches, or a copy of it: the first of them is kept as it is,
    the others keep the backbone. Told by the weights, so by whatever way they came.

    Args:
        passed: which branches are models of the user, and stay as they are.
        seed: with it and a branch's index its head is drawn.

    Raises:
        ValueError: two branches share parameters.
    """
    _refuse_shared_parameters(branches)
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
                "backbone is kept and the head drawn anew (seed %d, branch %d); its first pseudo labels are worth "
                "little, which the objective's `ramp_up` allows for.",
                *(index, type(model).__name__, twin, seed, index),
            )


def refuse_twins(branches: Sequence[PreTrainedModel]) -> None:
    """For branches that are to teach each other.

    Raises:
        ValueError: two are one network. So models can be that were passed, and are used as they are.
    """
    for (i, one), (j, other) in itertools.combinations(enumerate(branches), 2):
        if _alike(one, other, heads=False):
            raise ValueError(
                f"The models passed as branches {i} and {j} have the same weights: they are one network, which cannot "
                "teach itself. Pass the folder or Hub id that they were loaded from in their place: then the first is "
                "kept as it is, and each of the others gets a head of its own."
            )


def _refuse_shared_parameters(branches: Sequence[PreTrainedModel]) -> None:
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
                f"Branches {owner} and {index} share parameters ({name}, ...), and each is trained by itself. Give "
                f"branch {index} its own: `copy.deepcopy` of the part that is shared."
            )


def _alike(one: PreTrainedModel, other: PreTrainedModel, *, heads: bool) -> bool:
    """Whether two models have the same weights, or the same head, to the rounding of a copy in half precision."""
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
