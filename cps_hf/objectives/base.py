"""What a method is: a frozen dataclass of its hyper-parameters and one call that turns two batches into a loss.

An objective sees tensors and callables. It knows no optimizer, no accelerator, no file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..functional.cutmix import draw_cutmix_masks, mix, swap_neighbours
from ..functional.losses import IGNORE_INDEX, ohem_cross_entropy, pixel_cross_entropy
from ..functional.strided import StridedLogits

Branch = Callable[..., Tensor]  # (pixel_values (B, 3, H, W), *, feature_dropout=0.0) -> logits (B, C, H, W)
Logits = Tensor | StridedLogits
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
        joint_forward: the labeled and the unlabeled images that a branch learns from go through it in one pass: fewer,
            larger ones. It changes what is learned where a model has batch norm, whose statistics are then those of
            labeled and unlabeled images together. (A method of one's own gets it by calling `self.logits`.)
    """

    labeled_loss: str = "cross_entropy"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 50_000
    joint_forward: bool = False

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
        """What the unlabeled stream must yield: of "weak", "strong", "strong_2", "cutmix_mask", "cutmix_mask_2" and
        "second_crop" (another crop of the same image, with "second_valid").

        Empty: the method reads no unlabeled image.
        """
        return ()

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        """How "cutmix_mask" and "cutmix_mask_2" are drawn: keyword arguments of `draw_cutmix_masks`."""
        return {}

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
            branches: the models, each `(pixel_values (B, 3, H, W)) -> logits (B, C, H, W)`. The methods here call
                them by `predict`, which leaves resizing to the losses.
            labeled: "pixel_values" float (B, 3, H, W), normalised; "labels" long (B, H, W), 255 ignored; and, when
                given, "valid" bool (B, H, W), false on padding, and the counts "num_labels" and "num_pixels".
            unlabeled: the declared `views` by name; "valid" and "num_pixels" as above. `None` without views.
            progress: the share of training done, in [0, 1].
        """

    def logits(self, branch: Branch, *images: Tensor) -> list[Logits]:
        """A branch's logits of each batch of images (B, 3, H, W), in passes of their own or with `joint_forward` one.

        As `predict` gives them.
        """
        if not self.joint_forward or len(images) == 1:
            return [predict(branch, batch) for batch in images]
        joint, sizes = predict(branch, torch.cat(images)), [len(batch) for batch in images]
        if isinstance(joint, Tensor):
            return [*joint.split(sizes)]
        return [joint._replace(values=one) for one in joint.values.split(sizes)]

    def supervised_loss(self, logits: Logits, labeled: Views) -> Tensor:
        """The labeled loss of one branch (the paper's Ls, a mean over labeled pixels; equation 1)."""
        if self.labeled_loss == "ohem":
            return ohem_cross_entropy(
                logits,
                labeled["labels"],
                threshold=self.ohem_threshold,
                min_kept=self.ohem_min_kept * logits.shape[0],
            )
        return pixel_cross_entropy(logits, labeled["labels"], count=num_labels(labeled))

    def cutmix_view(
        self,
        unlabeled: Views,
        view: str,
        own: Sequence[Tensor],
        partners: Sequence[Tensor],
        *,
        mask: str = "cutmix_mask",
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """CutMix a view with its partners', and the targets alike.

        Args:
            view: which images. mask: the name of the masks to mix by; drawn here, as `cutmix_masks` says, when the
                batch holds none.
            own, partners: targets (B, H, W) or (B, C, H, W) of the images and of their partners.

        Returns:
            The mixed images (B, 3, H, W), where they are valid, bool (B, H, W), and the mixed targets.
        """
        images = unlabeled[view]
        masks = unlabeled.get(mask)
        if masks is None:
            masks = draw_cutmix_masks(*images[:, 0].shape, **self.cutmix_masks).to(images.device)
        valid = valid_pixels(unlabeled, images)
        mixed = mix(images, partner_of(unlabeled, view), masks)
        mixed_valid = mix(valid, unlabeled.get("partner_valid", swap_neighbours(valid)), masks)
        return mixed, mixed_valid, [mix(a, b, masks) for a, b in zip(own, partners, strict=True)]


def predict(branch: Branch, images: Tensor, **options) -> Logits:
    """The logits, as `StridedLogits` where the branch can leave them at its own size (the trainer's), else full-size.

    Args:
        images: (B, 3, H, W). options: the branch's, such as `feature_dropout`.
    """
    if not hasattr(branch, "align_corners"):
        return branch(images, **options)
    values = branch(images, resize=False, **options)
    return StridedLogits(values, tuple(images.shape[-2:]), branch.align_corners)


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


def ramp(progress: Tensor | float, *, warm_up: float = 0.0, ramp_up: float = 0.0) -> Tensor:
    """What an unsupervised weight is multiplied with: 0 while warming up, then linearly up to 1.

    Args:
        progress: the share of training done, in [0, 1]. warm_up, ramp_up: shares of training.
    """
    since = torch.as_tensor(progress) - warm_up
    if ramp_up == 0:
        return (since >= 0).float()
    return (since / ramp_up).clamp(0, 1)


def partner_of(unlabeled: Views, view: str) -> Tensor:
    """The CutMix partners of a view's images: the neighbours in the batch, or, with an odd batch, what was sent."""
    sent = unlabeled.get(f"partner_{view}")
    return swap_neighbours(unlabeled[view]) if sent is None else sent


def partner_targets(unlabeled: Views, own: Sequence[Tensor], predict: Callable[[Tensor], list[Tensor]]):
    """The targets of the CutMix partners of the weak views: `own` ones swapped, or `predict`ed when they were sent."""
    if "partner_weak" in unlabeled:
        return predict(unlabeled["partner_weak"])
    return [swap_neighbours(target) for target in own]


def check_shares(objective: Objective, *names: str) -> None:
    """Each of these fields must be in [0, 1]."""
    for name in names:
        if not 0 <= getattr(objective, name) <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {getattr(objective, name)}.")


def check_not_negative(objective: Objective, *names: str) -> None:
    """Each of these fields must be at least 0."""
    for name in names:
        if getattr(objective, name) < 0:
            raise ValueError(f"`{name}` must not be negative, got {getattr(objective, name)}.")
