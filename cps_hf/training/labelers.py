"""Trained networks that make labels for a method: loaded once, checked against the run, and never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..functional import StridedLogits
from ..hub.image_processors import read_processor
from ..inference.ensemble import Ensemble
from ..modeling import check_input_size
from ..modeling.branches import Branch
from ..modeling.classes import are_named, letters, listed


class Labeler:
    """A trained network as an objective calls it, on images that are normalised as in the run.

    Args:
        branch: the network. It is put into evaluation mode and gets no gradient.
        source: its name in errors.
        factor, shift: float (3,); the network's input is factor * pixel + shift. If `None`, the pixels.
        swaps_colors: whether the network expects blue, green, red; `factor` and `shift` are then in that order.
    """

    def __init__(
        self,
        branch: Branch,
        source: str,
        *,
        factor: Tensor | None = None,
        shift: Tensor | None = None,
        swaps_colors: bool = False,
    ):
        self.branch, self.source, self.swaps_colors = branch.eval().requires_grad_(False), source, swaps_colors
        self.factor, self.shift = factor, shift

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> StridedLogits:
        """The logits of images (B, 3, H, W) that are normalised as in the run."""
        if self.swaps_colors:
            pixel_values = pixel_values.flip(1)
        if self.factor is not None:
            pixel_values = pixel_values * self.factor.view(1, 3, 1, 1) + self.shift.view(1, 3, 1, 1)
        return self.branch.strided(pixel_values)

    def sha256(self) -> str:
        """The beginning of a hash of everything that determines its predictions."""
        digest = hashlib.sha256(str(self.branch.model.config.model_type).encode())
        for name, tensor in self.branch.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if self.factor is not None:
            digest.update(str([self.factor.tolist(), self.shift.tolist(), self.swaps_colors]).encode())
        return digest.hexdigest()[:16]


def check_sources(sources: Sequence[str], *, option: str = "labelers") -> None:
    """Reject sources that are not folders of branches, before models are built.

    Args:
        sources: folders of exported branches, or Hub ids, which are not looked up.
        option: the option that names them.

    Raises:
        ValueError: a folder is missing, belongs to a whole run, or contains no model.
    """
    for source in sources:
        path = Path(source)
        if (path / "config.json").is_file():
            continue
        inside = sorted(found.parent.name for found in path.glob("*/config.json")) if path.is_dir() else []
        if inside:
            one = next((name for name in inside if name.startswith("branch")), inside[0])
            raise ValueError(
                f"`{option}`: {source} is the folder of a run. Name networks in it, like {path / one} (it has "
                f"{', '.join(inside)})."
            )
        if path.is_dir():
            raise ValueError(f"`{option}`: {source} contains no model (config.json is missing).")
        is_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or path.parent.is_dir()
        if path.exists() or ("/" in source and is_local):
            raise ValueError(
                f"`{option}`: there is no folder {source}. Name folders of exported branches, like OUT/branch_0, or "
                "Hub ids."
            )


def load_labelers(
    sources: Sequence[str],
    *,
    id2label: Mapping[int, str],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    crop_size: Sequence[int],
    device: torch.device,
    trust_remote_code: bool = False,
) -> list[Labeler]:
    """Load networks with their image processors; each keeps its own normalisation.

    Args:
        sources: folders of exported branches, or Hub ids; may be empty.
        id2label: the run's classes.
        image_mean, image_std: the run's normalisation of images in [0, 1].
        crop_size: height and width of the images to label.

    Raises:
        ValueError: one cannot be loaded, has other classes than the run, does not accept images of the crop's size, or
            has an image processor that does not normalise.
    """
    if not sources:
        return []
    ensemble = Ensemble.from_pretrained(sources, device=device, trust_remote_code=trust_remote_code)
    found = []
    for branch, processor, source in zip(ensemble.networks, ensemble.processors, ensemble.sources, strict=True):
        _check_classes(branch.model.config.id2label, id2label, source)
        try:
            check_input_size(branch.model, *crop_size)
            reading = read_processor(processor)
        except ValueError as error:
            raise ValueError(f"`labelers`: {source} cannot label the crops of this run. {error}") from error
        own, ours = (reading.mean, reading.std), (image_mean, image_std)
        factor = shift = None
        if reading.swaps_colors or not np.allclose(own, ours, rtol=0, atol=1e-6):
            mean, std = (torch.tensor(one[::-1] if reading.swaps_colors else one) for one in map(list, ours))
            own_mean, own_std = (torch.tensor(one) for one in own)
            factor, shift = (std / own_std).to(device), ((mean - own_mean) / own_std).to(device)
        found.append(Labeler(branch, source, factor=factor, shift=shift, swaps_colors=reading.swaps_colors))
    return found


def _check_classes(own: Mapping[int, str], id2label: Mapping[int, str], source: str) -> None:
    """Check for the same number of classes, and the same names in the same order if both have names."""
    own = {int(key): str(name) for key, name in own.items()}
    if len(own) != len(id2label):
        raise ValueError(
            f"`labelers`: {source} has {len(own)} classes ({listed(own)}), and this run has {len(id2label)} "
            f"({listed(id2label)}). A labeler needs the run's classes."
        )
    if not (are_named(own) and are_named(id2label)):
        return
    other = next((key for key in id2label if letters(own[key]) != letters(id2label[key])), None)
    if other is not None:
        raise ValueError(
            f"`labelers`: class {other} of {source} is {own[other]!r}, and of this run {id2label[other]!r}. A labeler "
            "needs the run's classes in the same order. If they mean the same, write the run's names into "
            "`id2label` of its config.json."
        )
