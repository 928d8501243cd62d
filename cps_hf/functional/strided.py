"""Losses and labels at full size from logits at a coarser stride, without full-size logits.

A segmentation network's logits come at a quarter of the image's size or less. The plain way resizes them and keeps the
resized logits, their soft-max and its gradient: three or four float tensors (B, C, H, W), for 16 images of 512 x 512
pixels and 150 classes 2.5 GB each. Here a piece is resized at a time (some images, or some rows of one), its loss and
its gradient with respect to the coarse logits are added up at once, and the piece is forgotten: what stays is coarse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = {"cpu": 2**19, "cuda": 2**27}
"""How many numbers a resized piece has at most: what stays in a CPU's cache; what keeps a GPU busy, mostly whole
images. (Both measured: benchmarks/LOG.md.)"""

BY_LINES = {"cpu": True, "cuda": False}
"""Where columns are resized as lines, one a class and row. On GPUs torch's kernel for lines gives each column one
thread, and takes 30 times as long as the one for images (benchmarks/LOG.md)."""


class StridedLogits(NamedTuple):
    """Logits that stand for full-size ones.

    Args:
        values: (B, C, h, w), any float type.
        size: (H, W), what they are resized to, bilinearly.
        align_corners: how they are resized.
    """

    values: Tensor
    size: tuple[int, int]
    align_corners: bool = False

    @property
    def shape(self) -> torch.Size:
        """(B, C, H, W): that of the full-size logits."""
        return torch.Size((*self.values.shape[:2], *self.size))

    def resized(self) -> Tensor:
        """The full-size logits, (B, C, H, W) float32 (float64 stays): the plain way."""
        values = at_least_float32(self.values)
        if values.shape == self.shape:
            return values
        return F.interpolate(values, size=self.size, mode="bilinear", align_corners=self.align_corners)


def sum_over_pixels(
    loss: Callable[..., Tensor], logits: Tensor | StridedLogits, *maps: Tensor | StridedLogits
) -> Tensor:
    """`loss(logits, *maps)` at full size, for a loss that is a sum over pixels; strided logits a piece at a time.

    The gradient is computed along with the value, so backward costs next to nothing; it has no second derivative.

    Args:
        loss: takes full-size logits (b, C, rows, W) and maps, returns their sum over pixels, a scalar.
        logits: (B, C, H, W), for which this is the plain call, or strided ones.
        maps: targets and the like, (B, H, W) or (B, ..., H, W), or strided logits, which `loss` gets resized. No
            gradient flows into them.
    """
    if isinstance(logits, Tensor):
        return loss(logits, *(_full_size(one) for one in maps))
    return _SumOverPixels.apply(logits.values, logits, loss, maps)


@torch.no_grad()
def map_over_pixels(
    function: Callable[..., Tensor], logits: Tensor | StridedLogits, *maps: Tensor | StridedLogits
) -> Tensor:
    """`function(logits, *maps)` at full size, without gradient; strided logits a piece at a time.

    Args:
        function: (b, C, rows, W) and maps -> (b, rows, W) or (b, ..., rows, W), each pixel by itself.
    """
    if isinstance(logits, Tensor):
        return function(logits.detach(), *(_full_size(one) for one in maps))
    found = None
    for piece in _pieces(logits):
        here = function(piece.of(logits), *(piece.of(one) for one in maps))
        if found is None:
            found = here.new_empty(logits.shape[0], *here.shape[1:-2], *logits.size)
        found[piece.images, ..., piece.rows, :] = here
    return found


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _full_size(one: Tensor | StridedLogits) -> Tensor:
    return one.resized().detach() if isinstance(one, StridedLogits) else one


class _SumOverPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, logits: StridedLogits, loss: Callable[..., Tensor], maps: tuple) -> Tensor:
        with_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(at_least_float32(values), memory_format=torch.contiguous_format)
        total = gradient.new_zeros(())
        device = values.device.type  # "meta", on which costs are counted, has no autocast
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            for piece in _pieces(logits):
                source = piece.source(logits)
                coarse = source.read(values.detach()).requires_grad_(with_gradient)
                targets = [piece.of(one) for one in maps]
                with torch.set_grad_enabled(with_gradient):
                    here = loss(source.resize(coarse), *targets)
                if with_gradient:  # add_, since += on an indexed tensor copies it onto itself afterwards
                    gradient[source.part].add_(torch.autograd.grad(here, coarse)[0])
                total += here.detach()
        ctx.save_for_backward(gradient)
        ctx.dtype = values.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None


class _Piece(NamedTuple):
    """Some images, or some rows of one."""

    images: slice
    rows: slice  # of the full size

    def of(self, one: Tensor | StridedLogits) -> Tensor:
        """This piece of a full-size map (B, ..., H, W), or of strided logits, resized."""
        if isinstance(one, StridedLogits):
            source = self.source(one)
            return source.resize(source.read(one.values.detach()))
        return one[self.images, ..., self.rows, :]

    def source(self, logits: StridedLogits) -> _Source:
        """What it is resized from: logits of the same full size may be of different strides."""
        if self.rows == slice(0, logits.size[0]) and not _by_lines(logits.values):
            return _Source(logits, (self.images,), None)
        coarse_height, height = logits.values.shape[-2], logits.size[0]
        if coarse_height == height:
            return _Source(logits, (self.images, slice(None), self.rows), None)
        if logits.align_corners:
            scale, offset = (coarse_height - 1) / max(height - 1, 1), 0.0
        else:
            scale, offset = coarse_height / height, 0.5 * coarse_height / height - 0.5
        # Row y lies at scale * y + offset among the coarse ones.
        rows = torch.arange(self.rows.start, self.rows.stop, device=logits.values.device, dtype=torch.float64)
        position = (rows * scale + offset).clamp(min=0)
        above = position.long().clamp(max=coarse_height - 1)
        below = (above + 1).clamp(max=coarse_height - 1)
        share = (position - above).unsqueeze(1)
        first = min(int(max(scale * self.rows.start + offset, 0)), coarse_height - 1)
        last = min(int(max(scale * (self.rows.stop - 1) + offset, 0)) + 1, coarse_height - 1)
        return _Source(
            logits, (self.images, slice(None), slice(first, last + 1)), (above - first, below - first, share)
        )


class _Source(NamedTuple):
    """The coarse values that a piece of strided logits is resized from, and how."""

    logits: StridedLogits
    part: tuple[slice, ...]  # of the coarse values
    weights: tuple[Tensor, Tensor, Tensor] | None
    """Long (rows,): the first of a row's two coarse rows, counted from the part's first one; the second one; float
    (rows, 1): the second one's weight. None: as they are, or whole images, which torch resizes in both directions."""

    def read(self, values: Tensor) -> Tensor:
        """(B, C, h, w) -> (b, C, coarse rows, w), float32 at least."""
        return at_least_float32(values[self.part]).contiguous()

    def resize(self, coarse: Tensor) -> Tensor:
        """(b, C, coarse rows, w) -> (b, C, rows, W)."""
        size, align_corners = self.logits.size, self.logits.align_corners
        if len(self.part) == 1:
            return F.interpolate(coarse, size=size, mode="bilinear", align_corners=align_corners)
        if self.weights is not None:
            above, below, share = self.weights
            coarse = torch.lerp(coarse.index_select(2, above), coarse.index_select(2, below), share.to(coarse.dtype))
        images, classes, rows, width = coarse.shape
        if width != size[1]:
            by_lines = _by_lines(coarse)
            mode, goal = ("linear", size[1]) if by_lines else ("bilinear", (rows, size[1]))
            lines = coarse.reshape(1, -1, width) if by_lines else coarse
            coarse = F.interpolate(lines, size=goal, mode=mode, align_corners=align_corners)
        return coarse.view(images, classes, rows, size[1])


def _by_lines(values: Tensor) -> bool:
    return BY_LINES.get(values.device.type, False)


def _pieces(logits: StridedLogits) -> Iterator[_Piece]:
    """All of it, in pieces of at most `PIECE` numbers (at least one row)."""
    batch, classes, height, width = logits.shape
    limit = PIECE.get(logits.values.device.type, PIECE["cuda"])
    num_images = max(1, limit // (classes * height * width))
    num_rows = max(1, min(height, limit // (classes * width)))
    for top in range(0, height, num_rows):
        for image in range(0, batch, num_images):
            yield _Piece(slice(image, image + num_images), slice(top, min(top + num_rows, height)))
