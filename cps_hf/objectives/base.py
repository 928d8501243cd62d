"""What a method is: a frozen dataclass of its hyper-parameters and one call that turns two batches into a loss.

An objective sees tensors and callables. It knows no optimizer, no accelerator, no file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..losses import IGNORE_INDEX, ohem_cross_entropy, pixel_cross_entropy

Branch = Callable[..., Tensor]  # (pixel_values (B, 3, H, W), *, feature_dropout=0.0) -> logits (B, C, H, W)
Views = Mapping[str, Tensor]  # a batch: names to tensors


class ObjectiveOutput(NamedTuple):
    """`loss`: the scalar to back-propagate. `logs`: detached scalars, logged under the names they have here."""

    loss: Tensor
    logs: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """The base of every method.

    Args:
        labeled_loss: "cross_entropy", or "ohem" (hard pixels only; the CPS release uses it on Cityscapes).
        ohem_threshold: a labeled pixel whose true class is more likely than this is left out. Only with "ohem".
        ohem_min_kept: how many pixels *an image* are kept at least. Only with "ohem".
    """

    labeled_loss: str = "cross_entropy"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 50_000

    min_branches: ClassVar[int] = 1
    """How many models the method needs; how many there are is `len(branches)`."""
    teacher: ClassVar[bool] = False
    """Whether the trainer keeps an averaged teacher of branch 0; then `ema_decay(step) -> float` is asked for."""
    citation: ClassVar[str] = ""
    """BibTeX, for the model card."""

    def __post_init__(self):
        if self.labeled_loss not in ("cross_entropy", "ohem"):
            raise ValueError(f'`labeled_loss` must be "cross_entropy" or "ohem", got {self.labeled_loss!r}.')
        if not 0 <= self.ohem_threshold <= 1:
            raise ValueError(f"`ohem_threshold` is a probability in [0, 1], got {self.ohem_threshold}.")
        if self.ohem_min_kept < 1:
            raise ValueError(f"`ohem_min_kept` is a number of pixels an image, at least 1, got {self.ohem_min_kept}.")

    @property
    def views(self) -> tuple[str, ...]:
        """What the unlabeled stream must yield: of "weak", "strong", "strong_2", "cutmix_mask", "cutmix_mask_2".

        Empty: the method reads no unlabeled image.
        """
        return ()

    @abstractmethod
    def __call__(
        self,
        branches: Sequence[Branch],
        labeled: Views,
        unlabeled: Views | None,
        *,
        teacher: Branch | None = None,
        progress: Tensor | float = 0.0,
    ) -> ObjectiveOutput:
        """One step's loss.

        Args:
            branches: the models, each `(pixel_values (B, 3, H, W)) -> logits (B, C, H, W)`.
            labeled: "pixel_values" float (B, 3, H, W), normalised; "labels" long (B, H, W), 255 ignored; and, when
                given, "valid" bool (B, H, W), false on padding, and the counts "num_labels" and "num_pixels".
            unlabeled: the declared `views` by name; "valid" and "num_pixels" as above. `None` without views.
            progress: the share of training done, in [0, 1].
        """

    def supervised_loss(self, logits: Tensor, labeled: Views) -> Tensor:
        """The labeled loss of one branch (the paper's Ls, a mean over labeled pixels; equation 1)."""
        if self.labeled_loss == "ohem":
            return ohem_cross_entropy(
                logits,
                labeled["labels"],
                threshold=self.ohem_threshold,
                min_kept=self.ohem_min_kept * logits.shape[0],
            )
        return pixel_cross_entropy(logits, labeled["labels"], count=num_labels(labeled))


def valid_pixels(batch: Views, like: Tensor) -> Tensor:
    """The batch's "valid" map (B, H, W); where it has none, all pixels of `like` (B, ..., H, W) are valid."""
    if "valid" in batch:
        return batch["valid"]
    return torch.ones(like.shape[0], *like.shape[-2:], dtype=torch.bool, device=like.device)


def num_labels(labeled: Views) -> Tensor:
    """How many pixels have a label: the trainer's global share, or, without one, counted here."""
    if "num_labels" in labeled:
        return labeled["num_labels"]
    return (labeled["labels"] != IGNORE_INDEX).sum()


def num_pixels(batch: Views, like: Tensor) -> Tensor:
    """How many pixels are valid: the trainer's global share, or, without one, counted here."""
    return batch["num_pixels"] if "num_pixels" in batch else valid_pixels(batch, like).sum()
