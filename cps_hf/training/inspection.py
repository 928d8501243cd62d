"""Checks labels before the first step: those for training and evaluation, all of them if there is time.

Otherwise a problem would be found at the first evaluation, or never: a whole set of masks can be readable and still
teach nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from ..config import CPSConfig
from ..data.labels import IGNORE_INDEX, LabelEncoding
from ..data.survey import Survey, survey
from ..data.table import as_typed, first_few

logger = logging.getLogger(__name__)

ROLES = {"train_dataset": "training", "eval_dataset": "evaluation"}
_TO_KNOW = {("label", "cannot tell"), ("label", "white"), ("image", "few bits")}  # possible mistakes


def check_labels(args: CPSConfig, train_dataset, eval_dataset, names: Sequence[str]) -> dict[str, list[str]]:
    """Check every label's values and size, within `args.check_labels_seconds`. Called by the main process only.

    Args:
        eval_dataset: the evaluation set, or `None`.
        names: the models' class names.

    Returns:
        By "training" and "evaluation", the classes without any pixel. Empty if no label was checked.

    Raises:
        ValueError: a label cannot be read (except a training label with `skip_bad_samples`), nothing is labeled, or
            the masks as a whole are not what they seem. The message says what to do.
    """
    if args.check_labels_seconds == 0:
        logger.info(
            "Labels are not checked before step 1 (`check_labels_seconds=0`): an unusable label stops the run when it "
            "is read, and classes that never occur are not reported."
        )
        return {}
    logger.info("Checking the labels, for %g seconds at most ...", args.check_labels_seconds)
    sets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    sets = {what: dataset for what, dataset in sets.items() if dataset is not None}
    _check_codings(sets)
    found, left = {}, args.check_labels_seconds
    for i, (what, dataset) in enumerate(sets.items()):
        begin = time.monotonic()
        found[what] = survey(
            dataset,
            what=what,
            names=names,
            seconds=left / (len(sets) - i),
            num_workers=args.dataloader_num_workers,
            progress=not args.disable_tqdm,
            in_windows=what == "train_dataset",
        )
        left = max(left - (time.monotonic() - begin), 0.0)
        _judge(found[what], skips=args.skip_bad_samples and what == "train_dataset")
    _check_white(found)
    for what, seen in found.items():
        _say(seen, what)
    return {ROLES[what]: seen.absent for what, seen in found.items()}


def _judge(seen: Survey, *, skips: bool) -> None:
    if seen.problems:
        first, listed = seen.problems[0]["problem"], first_few([repr(p["id"]) for p in seen.problems])
        count = len(seen.problems)
        more = f" {count} of {seen.looked_at} samples cannot be used: {listed}." if count > 1 else ""
        if skips and seen.readable:
            logger.warning("`%s`: samples that cannot be read will be replaced. %s%s", seen.what, first, more)
        else:
            may_skip = seen.what == "train_dataset" and seen.readable
            skip = " To train without such samples: `skip_bad_samples`." if may_skip else ""
            raise ValueError(f"{first}{more}{skip}")
    if faults := seen.faults():
        raise ValueError(" ".join(faults))


def _check_codings(sets) -> None:
    """`map` with a function that returns the label column loses its encoding."""
    codings = {what: LabelEncoding.from_feature((d.features or {}).get("label")) for what, d in sets.items()}
    for what, other in (("train_dataset", "eval_dataset"), ("eval_dataset", "train_dataset")):
        coded = codings.get(other)
        if what in sets and coded is not None and codings[what] is None and coded.has_table:
            raise ValueError(
                f"`{other}` says how its labels are encoded and `{what}` does not, so its masks would be read as "
                "plain class ids. If `map` lost the encoding, use `map(..., features=loaded.features)`, with the "
                "features of the set it was called on."
            )


def _check_white(found: dict[str, Survey]) -> None:
    """255 is a class in one set and ignored in the other if the loader inferred its meaning from each set's values."""
    for what, seen in found.items():
        for other, theirs in found.items():
            coded = theirs.encoding is not None and theirs.encoding.has_table
            if seen.white_is_a_class and not coded and theirs.pixels[IGNORE_INDEX]:
                raise ValueError(
                    f"The masks of `{what}` contain only 0 and 255, so 255 means {seen.names[1]!r} there. Those of "
                    f"`{other}` also contain other values, so 255 is ignored there. Say for both what it means: "
                    f"{as_typed(values={0: 0, 1: 1, IGNORE_INDEX: 1})}, or map 255 to 255 to ignore it."
                )


def _say(seen: Survey, what: str) -> None:
    if not seen.is_whole:
        why = "of the stream" if seen.rows is None else "within `check_labels_seconds`"
        logger.info("`%s`: labels were checked before step 1 in %s %s.", what, seen.scope, why)
    if seen.white_is_a_class:
        logger.info("`%s`: 255 in the masks is %r.", what, seen.names[1])
    if seen.absent:
        logger.warning("%s", absent_line({ROLES[what]: seen.absent}, len(seen.names), seen.scope))
    for note in seen.notes():
        level = logging.WARNING if note.kind in _TO_KNOW else logging.INFO
        logger.log(level, "`%s`: %d %s: %s.", what, note.count, note.what, first_few(seen.unusual[note.kind], 3))


def absent_line(absent: dict[str, list[str]], count: int, scope: str | None = None) -> str:
    """A sentence about the named classes that never occur.

    Args:
        absent: by "training" and "evaluation", the result of `check_labels`.
        count: the number of named classes.
        scope: what was checked; omitted if `None`.
    """
    where = f" ({scope})" if scope else ""
    parts = [
        f"{len(names)} of {count} classes never {_occur(names)} in {role}{where}: {first_few(names, 12)}"
        for role, names in absent.items()
        if names
    ]
    return f"{'; '.join(parts)}." if parts else ""


def _occur(names: Sequence[str]) -> str:
    return "occurs" if len(names) == 1 else "occur"
