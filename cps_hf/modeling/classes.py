"""Compares the classes that models name, with each other and with the data's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..functional.losses import IGNORE_INDEX

_ONE_CLASS = (
    "A single class cannot be learned: every pixel is right, whatever a network predicts. For a binary task, name "
    'both classes, the background first, like ["background", "crack"], and use masks of 0 and 1. Masks of 0 and 255 '
    "are supported if the data set is loaded with `values={0: 0, 255: 1}` (on a command line `--load_options "
    """'{"values": {"0": 0, "255": 1}}'`)."""
)


def by_number(id2label: Mapping[Any, str], whose: str) -> dict[int, str]:
    """Class names by number, also if the keys are "0", "1", ..., as in JSON.

    Args:
        whose: the beginning of the error message.

    Raises:
        ValueError: the keys are not the numbers 0, 1, ... without a gap.
    """
    try:
        table = {int(key): str(name) for key, name in id2label.items()}
    except (TypeError, ValueError):
        table = {}
    if not table or sorted(table) != list(range(len(table))):
        found = f"the indices {sorted(table)}" if table else f"{dict([*id2label.items()][:3])}"
        raise ValueError(
            f'{whose} must name the classes 0, 1, ... without a gap, like {{0: "background", 1: "road"}}, got {found}.'
        )
    return dict(sorted(table.items()))


def checked_id2label(id2label: Mapping[Any, str]) -> dict[int, str]:
    """`by_number`, for at least two classes.

    Raises:
        ValueError: it is not such a table.
    """
    id2label = by_number(id2label, "`id2label`")
    if len(id2label) < 2:
        raise ValueError(f"{_ONE_CLASS} Here {id2label[0]!r} is the only one.")
    return id2label


def are_named(id2label: Mapping[Any, str]) -> bool:
    """Whether these classes have names: transformers' default names are LABEL_0, LABEL_1, ..."""
    return not all(re.fullmatch(r"LABEL_\d+", str(name)) for name in id2label.values())


def same_names(one: Mapping[int, str], other: Mapping[int, str]) -> bool:
    """Whether two tables give the same numbers the same names, ignoring case."""
    return one.keys() == other.keys() and all(
        str(one[key]).strip().casefold() == str(other[key]).strip().casefold() for key in one
    )


def letters(name: str) -> str:
    """A name's letters and digits in lower case, so that "Traffic light" and "traffic_light" are equal."""
    return re.sub(r"[\W_]", "", name.lower())


def has_other_names(own: Mapping[Any, str], id2label: Mapping[int, str]) -> bool:
    """Whether a checkpoint's table names as many classes as `id2label`, but others, or in another order."""
    own, ours = ({str(key): name for key, name in table.items()} for table in (own, id2label))
    return len(own) == len(ours) and are_named(own) and are_named(ours) and not same_names(own, ours)


def classes_of(branches: Sequence[PreTrainedModel]) -> dict[int, str]:
    """The branches' common classes, with the names that one of them has, if any."""
    return branches[_first_named(branches)].config.id2label


def _first_named(branches: Sequence[PreTrainedModel]) -> int:
    return next((i for i, branch in enumerate(branches) if are_named(branch.config.id2label)), 0)


def settle_classes(branches: Sequence[PreTrainedModel], id2label: Mapping[int, str] | None) -> None:
    """Check that branches have the same classes, and those of `id2label` if given. Keys of their configurations'
    tables become numbers. Unnamed classes are compared by count.

    Raises:
        ValueError: they differ, or are fewer than 2 or more than 255.
    """
    for index, branch in enumerate(branches):
        branch.config.id2label = by_number(branch.config.id2label, f"The configuration's `id2label` of branch {index}")
    expected = classes_of(branches) if id2label is None else id2label
    if len(expected) < 2:
        raise ValueError(f"{_ONE_CLASS} Here {expected[0]!r} is the only one.")
    if len(expected) > IGNORE_INDEX:
        raise ValueError(
            f"Branches can have at most {IGNORE_INDEX} classes, got {len(expected)}: a label is one byte, and "
            f"{IGNORE_INDEX} is the ignored label. Merge classes."
        )
    for index, branch in enumerate(branches):
        found = branch.config.id2label
        if len(found) == len(expected) and (not are_named(found) or same_names(found, expected)):
            continue
        where = "`id2label`" if id2label is not None else f"branch {_first_named(branches)}"
        differing = next((key for key in expected if found.get(key) != expected[key]), None)
        detail = (
            ""
            if differing is None
            else f", first at {differing}: {expected[differing]!r} against {found.get(differing)!r}"
        )
        raise ValueError(
            f"Branches can only teach each other the same classes: {where} has {len(expected)}, branch {index} "
            f"has {len(found)}{detail}. Pass `id2label` to build all branches with the same ones; "
            "for a model object, set `model.config.id2label`."
        )


def reject_classes_of_another_task(config: PreTrainedConfig, name: str, made_in_python: bool) -> None:
    """If the data do not name the classes, reject a checkpoint that is no segmentation model as their source: its
    classes are a classifier's thousand, or the two that the library writes by default.

    Args:
        name: the checkpoint's name in the error.
        made_in_python: whether it is a configuration object, whose classes may have been counted but not named.

    Raises:
        ValueError: the configuration belongs to such a checkpoint.
    """
    architectures = getattr(config, "architectures", None) or []
    tasks = ("SemanticSegmentation", "UniversalSegmentation", "InstanceSegmentation")
    if not architectures or any(task in architecture for task in tasks for architecture in architectures):
        return
    if made_in_python and not are_named(config.id2label):
        return
    raise ValueError(
        f"{name} is a {architectures[0]}: its {len(config.id2label)} classes ({listed(config.id2label)}) are not "
        "those of the masks, and the data set does not name its classes. Name them, one per value of the masks: in a "
        '`classes.json` like ["background", "road"] in the data set\'s folder, with `class_names` when loading the '
        "data set, or with `id2label` when calling build_branches."
    )


def listed(id2label: Mapping[Any, str]) -> str:
    """The first names."""
    names = [str(name) for name in id2label.values()]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
