"""Checks of models that need the run: its data, its optimizer, and the other branches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import EvaluationConfig
from ..modeling import freeze_unused_parameters
from ..modeling.classes import are_named, by_number, listed, same_names
from ..modeling.universal import UNIVERSAL, is_universal
from .normalization import processor_of

logger = logging.getLogger(__name__)


def check_passed_classes(models, id2label: Mapping[int, str] | None) -> None:
    """Check that models passed as objects have the classes that the data name.

    Args:
        models: the trainer's argument.
        id2label: the data's classes; `None` if they have no names.

    Raises:
        ValueError: a model has a different number of classes, other names, or the same names in another order.
    """
    for index, model in enumerate(_each(models)):
        if id2label is None or not isinstance(model, PreTrainedModel):
            continue
        own = by_number(model.config.id2label, f"The configuration's `id2label` of branch {index}")
        if len(own) != len(id2label):
            raise ValueError(
                f"The models have {len(own)} classes and `train_dataset` has {len(id2label)} ({listed(id2label)}). "
                f"Build the models with `num_labels={len(id2label)}`."
            )
        if are_named(own) and not same_names(own, id2label):
            at = next(i for i in own if not same_names({i: own[i]}, {i: id2label[i]}))
            shown = dict(id2label) if len(id2label) <= 20 else f"{{0: {id2label[0]!r}, ...}}"
            raise ValueError(
                f"The class names of the model passed as branch {index} differ from the data's: class {at} is "
                f"{own[at]!r} there and {id2label[at]!r} in `train_dataset`. If its numbers mean the same as the "
                f"data's, set `model.config.id2label = {shown}`; otherwise, build it with that `id2label`."
            )


def log_class_source(models, id2label: Mapping[int, str], *, trust_remote_code: bool = False) -> None:
    """Log whose classes are used if the data name none, so that the checkpoint's number of classes is taken.

    Args:
        models: the trainer's argument.
        id2label: the branches' classes.
    """
    source = next((source for source in _each(models) if isinstance(source, str | PathLike)), None)
    if source is None or not are_named(id2label):
        return
    logger.warning(
        "The data set does not name its classes. The %d classes of %s are used (%s). If they are different, pass "
        "`class_names` when loading the data set, or add a `classes.json` to its folder.",
        *(len(id2label), source, listed(id2label)),
    )
    processor = processor_of(source, trust_remote_code=trust_remote_code)
    if getattr(processor, "do_reduce_labels", False):
        logger.warning(
            "%s was trained on masks in which 0 is ignored and 1 is class 0 (`do_reduce_labels` of its image "
            "processor); here 0 is class 0. If the masks are like those, load the data set with `reduce_labels`.",
            source,
        )


def _each(models) -> list:
    """The items of the trainer's `models`: one or several."""
    return [models] if isinstance(models, str | PathLike | PreTrainedConfig | PreTrainedModel) else [*models]


def check_trainable(model: nn.Module, index: int) -> None:
    """Check that a branch can learn.

    Args:
        index: the branch's number.

    Raises:
        ValueError: all of its parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise _nothing_to_train(model, index, "all of its parameters are frozen (`requires_grad` is false)")


def check_set_loss(model: PreTrainedModel, index: int, *, compiles: bool) -> None:
    """Check that a branch can be trained with `labeled_loss="set"`.

    Args:
        index: the branch's number.
        compiles: whether the branch is compiled.

    Raises:
        ValueError: the model has no set loss, or it is compiled, so that its layers' predictions cannot be recorded.
    """
    if not is_universal(model.config):
        raise ValueError(
            f'`labeled_loss="set"` is the own loss of {", ".join(UNIVERSAL)}, and branch {index} is a '
            f'{model.config.model_type!r}, which has none. Use `labeled_loss="cross_entropy"`, which trains every '
            "model, or these models alone."
        )
    if compiles:
        raise ValueError('`labeled_loss="set"` does not work with `torch_compile`: leave one of them out.')


def structure_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a pass on shapes without values depends on. It is equal for branches that differ only in their weights."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    masked_attention = getattr(model, "attn_mask_probs", None)  # EoMT's code branches on these few numbers
    return config, modules, parameters, None if masked_attention is None else masked_attention.tolist()


def freeze_unused(model: PreTrainedModel, index: int, size: tuple[int, int]) -> list[str]:
    """Call `freeze_unused_parameters`, which must leave trainable parameters.

    Raises:
        ValueError: the logits depend on no trainable parameter.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        return freeze_unused_parameters(model, size)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        why = f"its logits depend on none of the trainable parameters ({', '.join(trainable[:3])}, ...)"
        raise _nothing_to_train(model, index, why) from error


def _nothing_to_train(model: nn.Module, index: int, why: str) -> ValueError:
    return ValueError(
        f"Branch {index}, a {type(model).__name__}, has nothing to train: {why}. A network that never changes cannot "
        "be a branch. Unfreeze it, `model.requires_grad_(True)`, and remove what freezes more (`freeze_backbone`)."
    )


def check_optimizer(optimizer: torch.optim.Optimizer, models: Sequence[nn.Module]) -> None:
    """Check that a user's optimizer updates every branch.

    Raises:
        ValueError: it contains no parameter of some branch, which would never change.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for index, model in enumerate(models):
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if len(left_out) == len(trainable):
            raise ValueError(
                f"`optimizers`: the optimizer contains no parameter of branch {index}, which would never learn. "
                "Create it with all models' parameters: `[p for m in models for p in m.parameters()]`."
            )
        if left_out:
            logger.warning(
                "`optimizers`: the optimizer omits %d of the %d trainable parameters of branch %d, which will not "
                "change: %s, ...",
                *(len(left_out), len(trainable), index, ", ".join(left_out[:3])),
            )


def reject_equal_branches(branches: Sequence[nn.Module], accelerator: Accelerator, step: int) -> None:
    """Reject branches that are identical after a step: they stay so and teach each other nothing. Called by all
    processes; with sharded weights, each compares its own shards.

    Raises:
        ValueError: two branches are equal on every process.
    """
    for i, j in itertools.combinations(range(len(branches)), 2):
        equal = torch.tensor(int(_equal(branches[i], branches[j])), device=accelerator.device)
        if accelerator.reduce(equal, "sum") == accelerator.num_processes:
            raise ValueError(
                f"Branches {i} and {j} are one network: after step {step} all of their weights are equal, and neither "
                "learns anything from the other. Start one of them differently: another checkpoint, another head "
                "(`reinit_heads`), or another architecture."
            )


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = itertools.zip_longest(one.named_parameters(), other.named_parameters(), fillvalue=("", None))
    return all(name == twin and _same(p, q) for (name, p), (twin, q) in pairs)


def _same(p: Tensor, q: Tensor) -> bool:
    p, q = (t.to_local() if isinstance(t, DTensor) else t for t in (p, q))
    return p.shape == q.shape and torch.equal(p, q)


def check_shrink(evaluation: EvaluationConfig, models: Sequence[PreTrainedModel]) -> None:
    """With `eval_shrink`, exported branches must accept whole images and therefore shrink them themselves.

    Raises:
        ValueError: a model cannot do that.
    """
    for index, model in enumerate(models):
        if evaluation.eval_shrink > 1 and not hasattr(model.config, "input_shrink"):
            raise ValueError(
                f"`eval_shrink={evaluation.eval_shrink}` is for DeepLabV3+, which shrinks images itself once it is "
                f"exported; branch {index} is a {type(model).__name__}. Remove it, and use a `random_scale` around 1."
            )
