"""Which labeled images are held out for validation: a share, every class on both sides where that can be.

Greedy, and a function of the seed and the names alone: the same images give the same split in whatever order they are
listed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .table import first_few

FEW = 5  # labeled images, below which none is held out unless the share says so


def hold_out(
    ids: Sequence[str], holds: np.ndarray, share: float, *, groups: Sequence[str] | None = None, seed: int = 0
) -> list[str]:
    """The ids that are held out, sorted.

    A unit is an image, or all images of one group. One after another is taken until the share is reached: first those
    that bring most classes that are not held out yet, then those that bring the classes which are furthest below the
    share (each class counts by its images, so that a rare one weighs as much as a common one), then by a hash of seed
    and name. A unit that is the last one with some class stays in training, and so does one that would lead further
    away from the share.

    Args:
        holds: bool (images, classes), which image holds which class.
        share: of the images, 0 to 1. At least one image is held out where there are `FEW`; of fewer the share is
            rounded down.
        groups: the group of each image.

    Raises:
        ValueError: the share is none, or all images are in one group.
    """
    if not 0 < share < 1:
        raise ValueError(f"`validation` must be a share between 0 and 1, got {share:g}.")
    count = max(1, int(share * len(ids) + 0.5)) if len(ids) >= FEW else int(share * len(ids))
    if count == 0:
        return []
    names = list(ids) if groups is None else sorted(set(groups))
    if len(names) < 2:
        raise ValueError(
            f"`group_by` finds one group, {names[0]!r}, in all {len(ids)} labeled images, so that none can be held "
            "out. Give another pattern, a list of images as `validation`, or `validation` none."
        )
    holds = holds[:, holds.any(0)]  # a mask may hold any of 255 classes; most sets have few
    number = {name: i for i, name in enumerate(names)}
    of_image = np.array([number[name] for name in (ids if groups is None else groups)])
    images = np.zeros((len(names), holds.shape[1]), np.int64)  # of each unit, how many hold each class
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
    has, counts = (images > 0).astype(float), images.astype(float)  # products of floats are fast
    taken: list[int] = []
    held = 0
    while held < count and free.sum() > 1:
        lost = has @ (left <= 1)  # classes that training would have no more
        nearer = np.abs(count - held - sizes) < count - held
        allowed = free & (lost == 0) & nearer
        if not allowed.any() and not taken:  # one is needed: that which costs training least, then the smallest
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
    """What the pattern's first group (without one: the pattern) finds in each path; where it finds nothing, `None`.

    Raises:
        ValueError: it is no pattern, or (`strict`) does not fit a path.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`group_by` {pattern!r} is no regular expression: {error}.") from error
    hits = [compiled.search(path) for path in paths]
    found = [hit and hit[1 if compiled.groups else 0] for hit in hits]
    missed = [path for path, name in zip(paths, found, strict=True) if name is None]
    if missed and strict:
        raise ValueError(
            f"`group_by` {pattern!r} fits {len(paths) - len(missed)} of {len(paths)} labeled images, not: "
            f"{first_few(missed, 3)}. It is searched in paths like these, and its first group names a video, patient "
            "or site."
        )
    return found


OF_A_FOLDER, OF_A_NAME = r"([^/]+)/[^/]+$", r"([^/]*?)[_\- ]?\d+\.[^./]+$"


def suggested_groups(paths: Sequence[str]) -> tuple[str, list[str]] | None:
    """(a pattern for `group_by`, the groups that it finds) where names look like numbered frames of a few sequences:
    from two of them to one for every three images, each with a number at its end."""
    for pattern in (OF_A_NAME, OF_A_FOLDER):
        hits = [re.search(pattern, path) for path in paths]
        numbered = all(re.search(r"\d\.[^./]+$", path) for path in paths)
        found = Counter(hit[1] for hit in hits if hit)
        if numbered and all(hits) and "" not in found and 2 <= len(found) <= len(paths) // 3:
            return pattern, sorted(found)
    return None
