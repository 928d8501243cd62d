"""Losses and labels at full size from logits at a coarser stride, without full-size logits.

A segmentation network's logits have a quarter of the image's size or less. The usual way resizes them and keeps the
resized logits, their soft-max and its gradient: three or four float tensors (B, C, H, W), of 2.5 GB each for 16 images
of 512 x 512 pixels and 150 classes. Here one piece is resized at a time (some images, or some rows of one). Its loss
and its gradient with respect to the coarse logits are accumulated at once, and the piece is freed: only coarse tensors
stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import resize_rows, source_rows

PIECE = {"cpu": 2**19, "cuda": 2**27}
"""The largest size of a resized piece: on a CPU it fits into the cache; on a GPU it keeps the device busy, usually
with whole images. (Both measured: benchmarks/LOG.md.)"""


EPSILON = 1e-6
"""Added to every score before the logarithm."""


class SetLossSums(NamedTuple):
    """The set loss of each image before any division, summed over the network's layers.

    Args:
        masks: (B,), the mask terms, summed over an image's targets. A target is a class that occurs in its labels.
        classes: (B,), the class terms, summed over an image's queries.
        targets: (B,), the number of targets per image. An image without targets has zero terms.
        queries: the number of queries.
        no_object_weight: the weight of a query's class term if the query is matched to no target; else 1.
    """

    masks: Tensor
    classes: Tensor
    targets: Tensor
    queries: int
    no_object_weight: float


class Queries(Protocol):
    """The predictions of a mask-classification network's queries, in each layer that its set loss trains."""

    def set_loss_sums(self, labels: Tensor) -> SetLossSums:
        """The terms of the network's own set loss on labels, long (B, H, W). Ignored pixels have no effect."""

    def split(self, sizes: Sequence[int]) -> list[Queries]:
        """Split into consecutive groups of images of these sizes."""


class StridedLogits(NamedTuple):
    """Logits that stand for full-size ones.

    Args:
        values: (B, C, h, w), any float type.
        size: (H, W), the size to resize to, bilinearly.
        align_corners: how to resize.
        scores: if true, the values are not logits but class scores >= 0, as from mask-classification networks. They
            are resized as they are. The logits are the logarithm of their shares,
            log((s + 1e-6) / sum over classes of (s + 1e-6)), whose soft-max equals these shares.
        temperature: the logits are finally divided by this.
        queries: the queries that the values are scores of, if the network is trained with its own set loss.
    """

    values: Tensor
    size: tuple[int, int]
    align_corners: bool = False
    scores: bool = False
    temperature: float = 1.0
    queries: Queries | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, C, H, W): the shape of the full-size logits."""
        return torch.Size((*self.values.shape[:2], *self.size))

    def resized(self) -> Tensor:
        """The full-size logits, (B, C, H, W) float32 (or float64), computed in the usual way."""
        values = at_least_float32(self.values)
        if values.shape != self.shape:
            values = F.interpolate(values, size=self.size, mode="bilinear", align_corners=self.align_corners)
        return self.logits_of(values)

    def coarse(self) -> Tensor:
        """The logits at the values' own size, (B, C, h, w), without resizing."""
        return self.logits_of(self.values)

    def logits_of(self, values: Tensor) -> Tensor:
        """The logits of values (B, C, ...) that were resized, or of some rows of them."""
        if self.scores:
            values = at_least_float32(values) + EPSILON
            values = values.log() - values.sum(1, keepdim=True).log()  # a quotient's gradient costs more
        return values if self.temperature == 1 else values / self.temperature


Logits = Tensor | StridedLogits
"""The network's output for each pixel: full-size logits (B, C, H, W), or an object that stands for them. Every
function of this subpackage accepts both."""


def full_size(logits: Logits) -> Tensor:
    """The full-size logits (B, C, H, W), float32 or higher, with gradient: for math outside this subpackage. This uses
    the memory that strided logits save."""
    return logits.resized() if isinstance(logits, StridedLogits) else at_least_float32(logits)


def mirrored(logits: Logits) -> Logits:
    """Flip logits left to right: from those of a mirrored image to those of the image."""
    return logits._replace(values=logits.values.flip(-1)) if isinstance(logits, StridedLogits) else logits.flip(-1)


def split_images(logits: Logits, sizes: Sequence[int]) -> list[Logits]:
    """Split logits into consecutive groups of images of these sizes, to undo joining batches for one network pass."""
    if isinstance(logits, StridedLogits):
        queries = [None] * len(sizes) if logits.queries is None else logits.queries.split(sizes)
        parts = zip(logits.values.split(sizes), queries, strict=True)
        return [logits._replace(values=values, queries=part) for values, part in parts]
    return [*logits.split(sizes)]


def sum_over_pixels(loss: Callable[..., Tensor], logits: Logits, *maps: Tensor | StridedLogits) -> Tensor:
    """`loss(logits, *maps)` at full size, for a loss that is a sum over pixels; piecewise for strided logits.

    The gradient is computed with the value, so the backward pass is almost free. There is no second derivative.

    Args:
        loss: takes full-size logits (b, C, rows, W) and maps, returns their sum over pixels, a scalar.
        logits: (B, C, H, W), for which `loss` is simply called, or strided ones.
        maps: targets etc., (B, H, W) or (B, ..., H, W), or strided logits, which `loss` gets resized. No gradient
            flows into them.
    """
    if isinstance(logits, Tensor):
        return loss(logits, *(full_size(one).detach() for one in maps))
    return _SumOverPixels.apply(logits.values, logits, loss, maps)


@torch.no_grad()
def map_over_pixels(function: Callable[..., Tensor], logits: Logits, *maps: Tensor | StridedLogits) -> Tensor:
    """`function(logits, *maps)` at full size, without gradient; piecewise for strided logits.

    Args:
        function: (b, C, rows, W) and maps -> (b, rows, W) or (b, ..., rows, W), independently for each pixel.
    """
    if isinstance(logits, Tensor):
        return function(logits.detach(), *(full_size(one) for one in maps))
    found = None
    for piece in _pieces(logits):
        here = function(piece.of(logits), *(piece.of(one) for one in maps))
        if found is None:
            found = here.new_empty(logits.shape[0], *here.shape[1:-2], *logits.size)
        found[piece.images, ..., piece.rows, :] = here
    return found


@torch.no_grad()
def add_over_pixels(function: Callable[..., Tensor], logits: Logits, *maps: Tensor | StridedLogits) -> Tensor:
    """`function(logits, *maps)` at full size, without gradient, for sums over pixels of any shape; piecewise for
    strided logits.

    Args:
        function: (b, C, rows, W) and maps -> sums over these pixels.
    """
    if isinstance(logits, Tensor):
        return function(logits.detach(), *(full_size(one) for one in maps))
    total: Tensor | float = 0.0
    for piece in _pieces(logits):
        total = total + function(piece.of(logits), *(piece.of(one) for one in maps))
    return total


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32; float64 is unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class _SumOverPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, logits: StridedLogits, loss: Callable[..., Tensor], maps: tuple) -> Tensor:
        with_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(at_least_float32(values), memory_format=torch.contiguous_format)
        total = gradient.new_zeros(())
        device = values.device.type  # "meta", where costs are counted, has no autocast
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            for piece in _pieces(logits):
                coarse = piece.source(logits, values.detach()).requires_grad_(with_gradient)
                targets = [piece.of(one) for one in maps]
                with torch.set_grad_enabled(with_gradient):
                    here = loss(piece.resized(coarse, logits), *targets)
                if with_gradient:  # add_, since += on an indexed tensor also copies it onto itself
                    gradient[piece.part(logits)].add_(torch.autograd.grad(here, coarse)[0])
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
        """This piece of a full-size map (B, ..., H, W), or of resized strided logits."""
        if isinstance(one, StridedLogits):
            return self.resized(self.source(one, one.values.detach()), one)
        return one[self.images, ..., self.rows, :]

    def part(self, logits: StridedLogits) -> tuple[slice, slice, slice]:
        """The coarse values that it is resized from: logits of the same full size may have different strides."""
        rows = source_rows(logits.values.shape[2], logits.size[0], self.rows, align_corners=logits.align_corners)
        return self.images, slice(None), rows

    def source(self, logits: StridedLogits, values: Tensor) -> Tensor:
        """These coarse values, (b, C, coarse rows, w), float32 or higher."""
        return at_least_float32(values[self.part(logits)]).contiguous()

    def resized(self, source: Tensor, logits: StridedLogits) -> Tensor:
        """(b, C, coarse rows, w) -> logits (b, C, rows, W)."""
        resized = resize_rows(
            source,
            self.rows,
            first=self.part(logits)[2].start,
            height=logits.values.shape[2],
            size=logits.size,
            align_corners=logits.align_corners,
        )
        return logits.logits_of(resized)


def _pieces(logits: StridedLogits) -> Iterator[_Piece]:
    """Split the logits into pieces of at most `PIECE` numbers (at least one row)."""
    batch, classes, height, width = logits.shape
    limit = PIECE.get(logits.values.device.type, PIECE["cuda"])
    num_images = max(1, limit // (classes * height * width))
    num_rows = max(1, min(height, limit // (classes * width)))
    for top in range(0, height, num_rows):
        for image in range(0, batch, num_images):
            yield _Piece(slice(image, image + num_images), slice(top, min(top + num_rows, height)))
