"""Choose the labeled images held out for validation: a share, with every class on both sides if possible.

Greedy and deterministic: the split depends only on the seed and the names, not on the order in which images are
listed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .table import first_few

FEW = 5  # with fewer labeled images, none is held out unless the share requires it


def hold_out(
    ids: Sequence[str], holds: np.ndarray, share: float, *, groups: Sequence[str] | None = None, seed: int = 0
) -> list[str]:
    """The held-out ids, sorted.

    A unit is an image, or all images of one group. Units are taken one by one until the share is reached. First come
    units with the most classes that are not held out yet, then units with the classes furthest below the share (each
    class counts by its images, so that a rare class weighs as much as a common one), then the order of a hash of seed
    and name. A unit stays in training if it is the last one with some class, or if taking it would move away from the
    share.

    Args:
        holds: bool (images, classes), whether an image contains a class.
        share: of the images, 0 to 1. At least one image is held out if there are `FEW`; with fewer, the share is
            rounded down.
        groups: the group of each image.

    Raises:
        ValueError: the share is invalid, or all images are in one group.
    """
    if not 0 < share < 1:
        raise ValueError(f"`validation` must be a share between 0 and 1, got {share:g}.")
    count = max(1, int(share * len(ids) + 0.5)) if len(ids) >= FEW else int(share * len(ids))
    if count == 0:
        return []
    names = list(ids) if groups is None else sorted(set(groups))
    if len(names) < 2:
        raise ValueError(
            f"`group_by` finds a single group, {names[0]!r}, in all {len(ids)} labeled images, so none can be held "
            "out. Use another pattern, a list of images as `validation`, or `validation` none."
        )
    holds = holds[:, holds.any(0)]  # a mask may contain any of 255 classes; most sets have few
    number = {name: i for i, name in enumerate(names)}
    of_image = np.array([number[name] for name in (ids if groups is None else groups)])
    images = np.zeros((len(names), holds.shape[1]), np.int64)  # per unit, the number of images with each class
    np.add.at(images, of_image, holds.astype(np.int64))
    sizes = np.bincount(of_image, minlength=len(names))
    taken = _taken(names, images, sizes, count, seed)
    chosen = {names[i] for i in taken}
    return sorted(name for name, unit in zip(ids, of_image.tolist(), strict=True) if names[unit] in chosen)


def _taken(names: Sequence[str], images: np.ndarray, sizes: np.ndarray, count: int, seed: int) -> list[int]:
    total, units = images.sum(0), (images > 0).sum(0)
    wanted = np.where(units > 1, np.maximum(1, total * count / sizes.sum()), 0)
    by_hash = sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode()).digest())
    rank = np.argsort(by_hash)
    free, left, have = np.ones(len(names), bool), units.copy(), np.zeros_like(total)
    has, counts = (images > 0).astype(float), images.astype(float)  # matrix products are fast for floats
    taken: list[int] = []
    held = 0
    while held < count and free.sum() > 1:
        lost = has @ (left <= 1)  # classes that training would lose
        nearer = np.abs(count - held - sizes) < count - held
        allowed = free & (lost == 0) & nearer
        if not allowed.any() and not taken:  # one is needed: the one that costs training least, then the smallest
            allowed = free & (lost == lost[free].min())
            allowed &= sizes == sizes[allowed].min()
        if not allowed.any():
            break
        new = has @ ((have == 0) & (units > 1))
        lack = (counts @ ((wanted - have) / np.maximum(total, 1))).round(9)
        alike = np.flatnonzero(allowed)
        for merit in (new, lack, -rank):
            alike = alike[merit[alike] == merit[alike].max()]
        best = int(alike[0])
        taken.append(best)
        free[best] = False
        left -= images[best] > 0
        have += images[best]
        held += int(sizes[best])
    return taken


def group_of(pattern: str, paths: Sequence[str], *, strict: bool = True) -> list[str | None]:
    """The match of the pattern's first group (or of the whole pattern) in each path; `None` without a match.

    Raises:
        ValueError: the pattern is invalid, or (`strict`) does not match a path.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`group_by` {pattern!r} is not a regular expression: {error}.") from error
    hits = [compiled.search(path) for path in paths]
    found = [hit and hit[1 if compiled.groups else 0] for hit in hits]
    missed = [path for path, name in zip(paths, found, strict=True) if name is None]
    if missed and strict:
        raise ValueError(
            f"`group_by` {pattern!r} matches {len(paths) - len(missed)} of {len(paths)} labeled images, but not "
            f"{first_few(missed, 3)}. It is searched in paths like these; its first group should be a video, patient "
            "or site."
        )
    return found


OF_A_FOLDER, OF_A_NAME = r"([^/]+)/[^/]+$", r"([^/]*?)[_\- ]?\d+\.[^./]+$"


def suggested_groups(paths: Sequence[str]) -> tuple[str, list[str]] | None:
    """(a pattern for `group_by`, its groups) if names look like numbered frames of a few sequences: at least two, at
    most one per three images, each name ending in a number."""
    for pattern in (OF_A_NAME, OF_A_FOLDER):
        hits = [re.search(pattern, path) for path in paths]
        numbered = all(re.search(r"\d\.[^./]+$", path) for path in paths)
        found = Counter(hit[1] for hit in hits if hit)
        if numbered and all(hits) and "" not in found and 2 <= len(found) <= len(paths) // 3:
            return pattern, sorted(found)
    return None
