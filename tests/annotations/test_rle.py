"""Run-length encoding: compared with loops, and with COCO's library if it is installed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from support.exports import brush, compressed, runs_of

from cps_hf.annotations import rle


def masks():
    sizes = some.tuples(some.integers(1, 9), some.integers(1, 9), some.integers(0, 2**32 - 1), some.floats(0, 1))
    return sizes.map(lambda s: np.random.default_rng(s[2]).random(s[:2]) < s[3])


@given(masks())
def test_masks_are_restored_from_rows_columns_and_brush_strokes(mask):
    height, width = mask.shape
    for by_columns in (True, False):
        runs = runs_of((mask.T if by_columns else mask).ravel())
        assert rle.to_runs(mask, by_columns=by_columns) == runs
        assert np.array_equal(rle.from_runs(runs, height, width, by_columns=by_columns), mask)
        assert rle.decompress(compressed(runs)) == runs
    assert np.array_equal(rle.from_brush(brush(mask.astype(np.uint8)), height, width), mask)


def test_compressed_runs_equal_cocos_library():
    library = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (300, 200), (1, 4000)):
        for share in (0, 0.001, 0.5, 1):
            mask = rng.random((height, width)) < share
            text = library.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
            assert np.array_equal(rle.from_runs(rle.decompress(text), height, width, by_columns=True), mask)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: rle.from_runs([3, 4], 2, 3, by_columns=True), "cover 7 pixels, expected 2 x 3 = 6"),
        (lambda: rle.from_runs([8, -2], 2, 3, by_columns=True), "cover 6 pixels"),
        (lambda: rle.decompress("5!"), "the character '!'"),
        (lambda: rle.decompress("5P"), "truncated"),
        (lambda: rle.from_brush(brush(np.eye(4, dtype=np.uint8))[:-3], 4, 4), "truncated"),
        (lambda: rle.from_brush(brush(np.eye(4, dtype=np.uint8)), 4, 5), "contain 64 values, expected 4 x 5 x 4"),
        (lambda: rle.from_brush([], 4, 5), "truncated"),
    ],
)
def test_invalid_runs_are_an_error(read, said):
    with pytest.raises(ValueError, match=said):
        read()
