"""Some rows of a resized map equal those of the whole map resized by torch, whichever source rows are used."""

import pytest
import torch
import torch.nn.functional as F

from cps_hf.functional import resize, resize_rows, source_rows

SHAPES = [
    ((6, 8), (24, 32)),
    ((7, 5), (25, 18)),
    ((9, 6), (9, 11)),
    ((9, 6), (4, 6)),
    ((1, 3), (5, 9)),
    ((5, 9), (1, 1)),
]


@pytest.fixture(params=[True, False], ids=["as on CPUs", "as on GPUs"], autouse=True)
def by_lines(request, monkeypatch):
    monkeypatch.setitem(resize.BY_LINES, "cpu", request.param)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("source", "size"), SHAPES)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_resized_rows_equal_those_of_the_whole(source, size, align_corners, count):
    maps = torch.randn(2, 3, *source, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
    how = {"height": source[0], "size": size, "align_corners": align_corners}
    for start in range(0, size[0], count):
        rows = slice(start, min(start + count, size[0]))
        named = source_rows(source[0], size[0], rows, align_corners=align_corners)
        torch.testing.assert_close(resize_rows(maps[:, :, named], rows, first=named.start, **how), whole[:, :, rows])
        torch.testing.assert_close(resize_rows(maps, rows, first=0, **how), whole[:, :, rows])
        assert named.stop - named.start <= 2 + (rows.stop - rows.start) * max(1, -(-source[0] // size[0]))


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_gradient_is_the_derivative(align_corners):
    maps = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    how = {"first": 1, "height": 5, "size": (10, 7), "align_corners": align_corners}
    assert torch.autograd.gradcheck(lambda part: resize_rows(part, slice(3, 6), **how), maps)
