"""CutMix for segmentation: draws box masks and mixes with them (French et al. 2020; as in the CPS release)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_cutmix_masks(
    batch_size: int,
    height: int,
    width: int,
    *,
    boxes: int = 3,
    area: tuple[float, float] = (0.25, 0.5),
    aspect: tuple[float, float] | None = None,
    probability: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one mask per image: true where the partner's pixel is taken.

    Each box has an area share p ~ U(area), the height share p**u with u ~ U(0, 1) and the width share p / p**u, both
    scaled by sqrt(1 / boxes), and a uniform position inside the image. A mask is the exclusive or of its boxes. With
    the defaults, a quarter of the pixels is mixed in (0.2515 on average at 512 x 512). With a `probability` below 1,
    the other masks are empty: nothing is mixed into those images.

    With `aspect`, two bounds, the height share is r times the width share instead, with r ~ U(aspect). It is drawn
    again with the position until the box is inside the image (as in UniMatch's release, which has square crops).

    Returns:
        bool (batch_size, height, width), on the generator's device.
    """
    if boxes < 1:
        raise ValueError(f"`boxes` must be at least 1, got {boxes}.")
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"`area` must be two shares with 0 < low <= high <= 1, got {tuple(area)}.")
    if aspect is not None and not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"`aspect` must be two ratios with 0 < low <= high, got {tuple(aspect)}.")
    if not 0 <= probability <= 1:
        raise ValueError(f"`probability` must be from 0 to 1, got {probability}.")
    device = generator.device if generator is not None else "cpu"
    draws = torch.rand(batch_size, 4, boxes, generator=generator, device=device, dtype=torch.float64)
    share, form, top, left = draws.unbind(1)
    share = area[0] + (area[1] - area[0]) * share
    height_share = (form * share.log()).exp() if aspect is None else _height_share(share, aspect, form)
    box_height = (height_share * math.sqrt(1 / boxes) * height).round()
    box_width = (share / height_share * math.sqrt(1 / boxes) * width).round()
    top = (top * (height - box_height)).round()
    left = (left * (width - box_width)).round()
    rows = torch.arange(height, device=device).view(1, 1, height, 1)
    columns = torch.arange(width, device=device).view(1, 1, 1, width)
    top, left, box_height, box_width = (t[..., None, None] for t in (top, left, box_height, box_width))
    inside = (rows >= top) & (rows < top + box_height) & (columns >= left) & (columns < left + box_width)
    masks = inside.sum(dim=1) % 2 == 1
    if probability < 1:
        masks &= (torch.rand(batch_size, generator=generator, device=device) < probability).view(-1, 1, 1)
    return masks


def _height_share(share: Tensor, aspect: tuple[float, float], draw: Tensor) -> Tensor:
    """The quantile `draw` of the distribution of height shares, for boxes with these area shares.

    Drawing until a box is inside gives each ratio a weight that is proportional to the number of positions of its box.
    Here these weights are computed instead, so that every mask uses the same number of random numbers.
    """
    ratios = torch.linspace(*aspect, 1001, dtype=share.dtype, device=share.device)
    heights = (share.unsqueeze(-1) * ratios).sqrt()
    widths = share.unsqueeze(-1) / heights
    places = ((1 - heights).clamp(min=0) * (1 - widths).clamp(min=0)).cumsum(-1)
    index = torch.searchsorted(places, draw.unsqueeze(-1) * places[..., -1:])
    # If no ratio fits, as for a box that is nearly the whole image: the nearest one that does.
    return heights.gather(-1, index).squeeze(-1).maximum(share).clamp(max=1)


def mix(own: Tensor, partner: Tensor, mask: Tensor) -> Tensor:
    """`partner` where `mask` (B, H, W) is true, `own` elsewhere; both (B, C, H, W) or (B, H, W)."""
    return torch.where(mask.unsqueeze(1) if own.dim() == 4 else mask, partner, own)


def swap_neighbours(batch: Tensor) -> Tensor:
    """The partner of each image: its neighbour, in pairs (0, 1), (2, 3), ... A last odd image gets the first one."""
    index = torch.arange(batch.shape[0], device=batch.device) ^ 1
    return batch[index.where(index < batch.shape[0], 0)]
