"""Run-length encoded masks of COCO, CVAT and Label Studio.

COCO's compressed text takes twenty lines here, instead of a dependency on pycocotools, a compiled library. A test
compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def from_runs(counts: Sequence[int], height: int, width: int, *, by_columns: bool) -> np.ndarray:
    """Runs of outside, inside, outside, ... as bool (H, W).

    Args:
        by_columns: COCO counts down the columns, CVAT along the rows.

    Raises:
        ValueError: the runs do not add up to the size of the mask, or one is negative.
    """
    try:
        runs = np.asarray(counts, dtype=np.int64)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"its runs are not integers ({error})") from error
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its runs cover {int(runs.sum())} pixels, expected {height} x {width} = {height * width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T if by_columns else flat.reshape(height, width)


def to_runs(mask: np.ndarray, *, by_columns: bool) -> list[int]:
    """The inverse of `from_runs`."""
    flat = (mask.T if by_columns else mask).ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return [0, *runs] if len(flat) and flat[0] else runs


def decompress(text: str) -> list[int]:
    """The runs of COCO's compressed text.

    A number is stored in groups of five bits, lowest first, each as a character from "0" on. The sixth bit of a group
    says that another follows; the fifth bit of the last group is the sign. From the fourth run on, the difference to
    the run before the previous one is stored.

    Raises:
        ValueError: a character is invalid, or the text is truncated.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its compressed runs contain the character {letter!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its compressed runs are truncated")
    return runs


def from_brush(numbers: Sequence[int], height: int, width: int) -> np.ndarray:
    """Label Studio's brush as bool (H, W): bytes that encode an RGBA picture, whose alpha channel is the mask.

    The header has 32 bits for the number of values, 5 for the length of a value (minus one), and four times 4 for the
    lengths of counts (minus one). Blocks follow: a bit (all values are equal), 2 bits (which length of count), the
    count minus one, and one value or all of them.

    Raises:
        ValueError: the data is truncated or of another size.
    """
    try:
        bits = np.unpackbits(np.asarray(numbers, dtype=np.uint8))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"its brush strokes are not bytes ({error})") from error
    weights = 1 << np.arange(32, dtype=np.int64)[::-1]
    position = 0

    def take(size: int) -> int:
        nonlocal position
        position += size
        if position > len(bits):
            raise ValueError("its brush strokes are truncated")
        return int(bits[position - size : position] @ weights[32 - size :])

    count, length = take(32), take(5) + 1
    counts = [take(4) + 1 for _ in range(4)]
    if count != height * width * 4:
        raise ValueError(f"its brush strokes contain {count} values, expected {height} x {width} x 4")
    values, filled = np.zeros(count, np.int64), 0
    while filled < count:
        same = take(1)
        run = take(counts[take(2)]) + 1
        if same:
            values[filled : filled + run] = take(length)
        else:
            position += run * length
            if position > len(bits) or filled + run > count:
                raise ValueError("its brush strokes are truncated")
            block = bits[position - run * length : position].reshape(run, length)
            values[filled : filled + run] = block @ weights[32 - length :]
        filled += run
    return values.reshape(height, width, 4)[..., 3] > 0
