"""Losses and labels at full size from logits at a coarser stride, without full-size logits.

A segmentation network's logits come at a quarter of the image's size or less. The plain way resizes them and keeps the
resized logits, their soft-max and its gradient: three or four float tensors (B, C, H, W), for 16 images of 512 x 512
pixels and 150 classes 2.5 GB each. Here a piece is resized at a time (some images, or some rows of one), its loss and
its gradient with respect to the coarse logits are added up at once, and the piece is forgotten: what stays is coarse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import resize_rows, source_rows

PIECE = {"cpu": 2**19, "cuda": 2**27}
"""How many numbers a resized piece has at most: what stays in a CPU's cache; what keeps a GPU busy, mostly whole
images. (Both measured: benchmarks/LOG.md.)"""


EPSILON = 1e-6
"""What is added to every score before the logarithm."""


class SetLossSums(NamedTuple):
    """The set loss of some images before it is divided by anything, summed over the network's layers.

    Args:
        masks: (B,), the mask terms summed over an image's targets. A target is a class that its labels contain.
        classes: (B,), the class term summed over an image's queries, those without a target times `no_object_weight`.
        targets: (B,), how many targets an image has. Without one its terms are zero.
        queries: of the network.
        no_object_weight: of the class term of a query that is matched to no target.
    """

    masks: Tensor
    classes: Tensor
    targets: Tensor
    queries: int
    no_object_weight: float


class Queries(Protocol):
    """What the queries of a mask-classification network say of some images, in each layer that its set loss sees."""

    def set_loss_sums(self, labels: Tensor) -> SetLossSums:
        """The terms of the network's own set loss. `labels`: long (B, H, W); ignored pixels have no effect."""

    def split(self, sizes: Sequence[int]) -> list[Queries]:
        """Those of consecutive images, so many per part."""


class StridedLogits(NamedTuple):
    """Logits that stand for full-size ones.

    Args:
        values: (B, C, h, w), any float type.
        size: (H, W), what they are resized to, bilinearly.
        align_corners: how they are resized.
        scores: the values are no logits but scores of classes, at least 0, as mask-classification networks give them.
            They are resized as they are, and the logits are the logarithm of their shares,
            log((s + 1e-6) / sum over classes of (s + 1e-6)), whose soft-max is these shares.
        temperature: what the logits are divided by at last.
        queries: what the values are the scores of, where the network is trained by its own set loss (`set_loss`).
    """

    values: Tensor
    size: tuple[int, int]
    align_corners: bool = False
    scores: bool = False
    temperature: float = 1.0
    queries: Queries | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, C, H, W): that of the full-size logits."""
        return torch.Size((*self.values.shape[:2], *self.size))

    def resized(self) -> Tensor:
        """The full-size logits, (B, C, H, W) float32 (float64 stays): the plain way."""
        values = at_least_float32(self.values)
        if values.shape != self.shape:
            values = F.interpolate(values, size=self.size, mode="bilinear", align_corners=self.align_corners)
        return self.logits_of(values)

    def coarse(self) -> Tensor:
        """The logits at the values' own size, (B, C, h, w): nothing is resized."""
        return self.logits_of(self.values)

    def logits_of(self, values: Tensor) -> Tensor:
        """Values (B, C, ...) that were resized, or some rows of them, as logits."""
        if self.scores:
            values = at_least_float32(values) + EPSILON
            values = (values / values.sum(1, keepdim=True)).log()
        return values if self.temperature == 1 else values / self.temperature


Logits = Tensor | StridedLogits
"""What a network says of each pixel: full-size logits (B, C, H, W), or what stands for them. Every function of this
room takes both."""


def full_size(logits: Logits) -> Tensor:
    """The full-size logits (B, C, H, W), float32 at least, with gradient: for math that is not in this room, at the
    price of the memory that strided logits save."""
    return logits.resized() if isinstance(logits, StridedLogits) else at_least_float32(logits)


def mirrored(logits: Logits) -> Logits:
    """Flipped from left to right: of an image, from the logits of its mirror image."""
    return logits._replace(values=logits.values.flip(-1)) if isinstance(logits, StridedLogits) else logits.flip(-1)


def split_images(logits: Logits, sizes: Sequence[int]) -> list[Logits]:
    """The logits of consecutive images, so many a part: what one network pass on joined batches is taken apart by."""
    if isinstance(logits, StridedLogits):
        queries = [None] * len(sizes) if logits.queries is None else logits.queries.split(sizes)
        parts = zip(logits.values.split(sizes), queries, strict=True)
        return [logits._replace(values=values, queries=part) for values, part in parts]
    return [*logits.split(sizes)]


def sum_over_pixels(loss: Callable[..., Tensor], logits: Logits, *maps: Tensor | StridedLogits) -> Tensor:
    """`loss(logits, *maps)` at full size, for a loss that is a sum over pixels; strided logits a piece at a time.

    The gradient is computed along with the value, so backward costs next to nothing; it has no second derivative.

    Args:
        loss: takes full-size logits (b, C, rows, W) and maps, returns their sum over pixels, a scalar.
        logits: (B, C, H, W), for which this is the plain call, or strided ones.
        maps: targets and the like, (B, H, W) or (B, ..., H, W), or strided logits, which `loss` gets resized. No
            gradient flows into them.
    """
    if isinstance(logits, Tensor):
        return loss(logits, *(full_size(one).detach() for one in maps))
    return _SumOverPixels.apply(logits.values, logits, loss, maps)


@torch.no_grad()
def map_over_pixels(function: Callable[..., Tensor], logits: Logits, *maps: Tensor | StridedLogits) -> Tensor:
    """`function(logits, *maps)` at full size, without gradient; strided logits a piece at a time.

    Args:
        function: (b, C, rows, W) and maps -> (b, rows, W) or (b, ..., rows, W), each pixel by itself.
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
    """`function(logits, *maps)` at full size, without gradient, for sums over pixels of any shape; strided logits a
    piece at a time.

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
    """Half precision as float32; float64 stays."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class _SumOverPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, logits: StridedLogits, loss: Callable[..., Tensor], maps: tuple) -> Tensor:
        with_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(at_least_float32(values), memory_format=torch.contiguous_format)
        total = gradient.new_zeros(())
        device = values.device.type  # "meta", on which costs are counted, has no autocast
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            for piece in _pieces(logits):
                coarse = piece.source(logits, values.detach()).requires_grad_(with_gradient)
                targets = [piece.of(one) for one in maps]
                with torch.set_grad_enabled(with_gradient):
                    here = loss(piece.resized(coarse, logits), *targets)
                if with_gradient:  # add_, since += on an indexed tensor copies it onto itself afterwards
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
        """This piece of a full-size map (B, ..., H, W), or of strided logits, resized."""
        if isinstance(one, StridedLogits):
            return self.resized(self.source(one, one.values.detach()), one)
        return one[self.images, ..., self.rows, :]

    def part(self, logits: StridedLogits) -> tuple[slice, slice, slice]:
        """Where the coarse values lie that it is resized from: logits of one full size may be of different strides."""
        rows = source_rows(logits.values.shape[2], logits.size[0], self.rows, align_corners=logits.align_corners)
        return self.images, slice(None), rows

    def source(self, logits: StridedLogits, values: Tensor) -> Tensor:
        """These coarse values, (b, C, coarse rows, w), float32 at least."""
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
    """All of it, in pieces of at most `PIECE` numbers (at least one row)."""
    batch, classes, height, width = logits.shape
    limit = PIECE.get(logits.values.device.type, PIECE["cuda"])
    num_images = max(1, limit // (classes * height * width))
    num_rows = max(1, min(height, limit // (classes * width)))
    for top in range(0, height, num_rows):
        for image in range(0, batch, num_images):
            yield _Piece(slice(image, image + num_images), slice(top, min(top + num_rows, height)))
