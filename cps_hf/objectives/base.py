"""What a method is: a frozen dataclass of its hyper-parameters and one call that turns two batches into a loss.

An objective sees tensors and callables. It knows no optimizer, no accelerator, no file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..functional import (
    IGNORE_INDEX,
    Logits,
    StridedLogits,
    balanced_class_weights,
    class_counts,
    dice_loss,
    focal_loss,
    frequency_weights,
    labeled_set_loss,
    ohem_cross_entropy,
    pixel_cross_entropy,
    pseudo_label,
    pseudo_labeled_set_loss,
    split_images,
)
from .batch import LabeledBatch, UnlabeledBatch


class Branch(Protocol):
    """A network as an objective calls it. Any function from images to full-size logits is one.

    The trainer's branches return `StridedLogits`, which stand for full-size ones: the functions of `cps_hf.functional`
    take both, and `full_size(logits)` is a tensor (B, C, H, W) for math of one's own.
    """

    def __call__(
        self, pixel_values: Tensor, *, feature_dropout: float = 0.0, complementary_dropout: float = 0.0
    ) -> Logits:
        """The logits of normalised images (B, 3, H, W).

        Methods that do not ask for a dropout leave it out.

        Args:
            feature_dropout: the probability with which a channel of the backbone's feature maps is dropped.
            complementary_dropout: the images are two views each, the first half of the batch and the second: the share
                of these pairs of whose maps each channel is dropped in one view and doubled in the other.
        """


class ObjectiveOutput(NamedTuple):
    """`loss`: the scalar to back-propagate, a sum over branches. `logs`: detached scalars, logged under the names they
    have here; the parts of the loss are means over branches, so that runs of one and of two branches compare."""

    loss: Tensor
    logs: dict[str, Tensor]


LABELED_LOSSES = ("cross_entropy", "ohem", "focal", "dice", "cross_entropy_dice", "set")
UNLABELED_LOSSES = ("cross_entropy", "set")


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """The base of every method.

    Args:
        labeled_loss: "cross_entropy"; "ohem" (hard pixels only; the CPS release uses it on Cityscapes); "focal" (easy
            pixels count less); "dice" (each class's overlap); "cross_entropy_dice", the sum of the two; or "set", the
            own loss of Mask2Former, MaskFormer and EoMT, on masks made from the labels.
        ohem_threshold: a labeled pixel whose true class is more likely than this is left out. Only with "ohem".
        ohem_min_kept: how many pixels *an image* are kept at least. Only with "ohem".
        focal_gamma: how much less: a pixel's loss is multiplied with (1 - p)^gamma. Only with "focal".
        class_weights: what the labeled loss of a pixel is multiplied with, by its class (in Dice, the weights of the
            mean over classes). None, as in the papers: all alike. A number p: the class's frequency in the labeled set
            to the power of minus p, scaled to a mean of 1 over that set's pixels; 0.5 is a good start, 1 weighs all
            classes alike. A list: a weight a class, taken as it is.
        joint_forward: the labeled and the unlabeled images that a branch learns from go through it in one pass: fewer,
            larger ones. It changes what is learned where a model has batch norm, whose statistics are then those of
            labeled and unlabeled images together. (A method of one's own gets it by calling `self.logits`.)
    """

    labeled_loss: str = "cross_entropy"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 50_000
    focal_gamma: float = 2.0
    class_weights: float | list[float] | None = None
    joint_forward: bool = False

    min_branches: ClassVar[int] = 1
    """How many models the method needs; how many there are is `len(branches)`."""
    teacher: ClassVar[bool] = False
    """Whether the trainer keeps an averaged teacher of branch 0; then `ema_decay(step) -> float` is asked for."""
    averages: ClassVar[bool] = False
    """Whether the method asks for an average of each branch (`CPSConfig.ema_decay`), which it gets as `averages`."""
    labelers: ClassVar[Sequence[str]] = ()
    """Folders or Hub ids of finished networks that label for the method, which overrides this by a field of its own.
    The trainer reads them, and the method gets them as `labelers`."""
    citation: ClassVar[str] = ""
    """BibTeX, for the model card."""

    def __post_init__(self):
        if self.labeled_loss not in LABELED_LOSSES:
            raise ValueError(f"`labeled_loss` must be one of {', '.join(LABELED_LOSSES)}, got {self.labeled_loss!r}.")
        if not 0 <= self.ohem_threshold <= 1:
            raise ValueError(f"`ohem_threshold` is a probability in [0, 1], got {self.ohem_threshold}.")
        if self.ohem_min_kept < 1:
            raise ValueError(f"`ohem_min_kept` is a number of pixels an image, at least 1, got {self.ohem_min_kept}.")
        check_not_negative(self, "focal_gamma")
        if self.labeled_loss == "set" and self.class_weights is not None:
            raise ValueError(
                f'`class_weights` {self.class_weights} weigh pixels, and `labeled_loss="set"` is a loss of masks. '
                "Leave `class_weights` out, or use another `labeled_loss`."
            )
        self._check_unlabeled_loss()
        if self.weighs_by_frequency:
            check_shares(self, "class_weights")
        elif self.class_weights is not None:
            weights = [*self.class_weights]
            if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
                raise ValueError(f"`class_weights` must be numbers of at least 0, and one above it, got {weights}.")

    @property
    def weighs_by_frequency(self) -> bool:
        """Whether the labeled set's pixels by class are asked for (`LabeledBatch.class_counts`)."""
        return isinstance(self.class_weights, int | float)

    def check_class_weights(self, classes: int) -> None:
        """Raises a ValueError where `class_weights` is a list of another length than there are classes."""
        if self.class_weights is None or self.weighs_by_frequency or len(self.class_weights) == classes:
            return
        raise ValueError(
            f"`class_weights` has {len(self.class_weights)} numbers for {classes} classes: give one a class, in the "
            "order of their ids."
        )

    @property
    def least_confidence(self) -> float:
        """A prediction for an unlabeled image whose probability is smaller teaches nothing; 0: all teach."""
        return getattr(self, "confidence_threshold", 0.0)

    @property
    def views(self) -> tuple[str, ...]:
        """What the unlabeled stream must yield: of `UnlabeledBatch`'s "weak", "strong", "strong_2", "cutmix_mask",
        "cutmix_mask_2", "second_crop" and "pseudo_labels" (then the unlabeled set has a column "pseudo_label").

        Empty: the method reads no unlabeled image. What is not named here is None in the batch.
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
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        *,
        teacher: Branch | None = None,
        progress: Tensor | float = 0.0,
        unlabeled_weight: Tensor | float = 1.0,
    ) -> ObjectiveOutput:
        """One step's loss.

        Args:
            branches: the networks that are trained.
            labeled: images and labels. unlabeled: the declared `views`; `None` without views.
            teacher: the averaged network, with `teacher = True` alone.
            averages: with `averages = True` alone, which such a method adds to these arguments: a sequence of the
                branches' averages, `Branch` each, in evaluation mode.
            labelers: with `labelers` alone, which such a method adds likewise: the finished networks, `Branch` each,
                in evaluation mode and without gradient.
            progress: the share of training done, in [0, 1].
            unlabeled_weight: a factor on the unlabeled term, beside the method's own weight
                (`CPSConfig.unlabeled_weight`). A method of one's own that leaves it out can be trained without that
                setting alone.
        """

    def logits(self, branch: Branch, *images: Tensor) -> list[Logits]:
        """A branch's logits of each of these images (B, 3, H, W), a pass each, or with `joint_forward` one for all."""
        if not self.joint_forward or len(images) == 1:
            return [branch(batch) for batch in images]
        return split_images(branch(torch.cat(images)), [len(batch) for batch in images])

    def supervised_loss(self, logits: Logits, labeled: LabeledBatch) -> Tensor:
        """The labeled loss of one branch (the paper's Ls, a mean over labeled pixels; equation 1)."""
        if self.labeled_loss == "set":
            return labeled_set_loss(logits, labeled.labels, num_targets=labeled.num_targets)
        labels, weights = labeled.labels, self._labeled_class_weights(logits, labeled)
        if self.labeled_loss == "ohem":
            return ohem_cross_entropy(
                logits,
                labels,
                threshold=self.ohem_threshold,
                min_kept=self.ohem_min_kept * logits.shape[0],
                class_weights=weights,
            )
        counted = {"count": labeled.num_labels, "class_weights": weights}
        if self.labeled_loss == "focal":
            return focal_loss(logits, labels, gamma=self.focal_gamma, **counted)
        dice = 0.0
        if "dice" in self.labeled_loss:
            dice = dice_loss(logits, labels, over_processes=labeled.over_processes, class_weights=weights)
        return dice if self.labeled_loss == "dice" else pixel_cross_entropy(logits, labels, **counted) + dice

    def pseudo_label_loss(self, logits: Logits, labels: Tensor, *, valid: Tensor, count: Tensor | float) -> Tensor:
        """The loss on hard pseudo labels of a method that has the fields `class_balance` and `unlabeled_loss`: a sum
        over the pixels that teach, divided by a count.

        Args:
            labels: long (B, H, W), 255 where nothing is taught. valid: bool (B, H, W), which pixels teach.
        """
        if self.unlabeled_loss == "set":
            return pseudo_labeled_set_loss(logits, labels, valid=valid, count=count)
        weights = pseudo_label_weights(logits, labels, valid, self.class_balance)
        return pixel_cross_entropy(logits, labels, valid=valid, count=count, class_weights=weights)

    def _check_unlabeled_loss(self) -> None:
        loss = getattr(self, "unlabeled_loss", "cross_entropy")
        if loss not in UNLABELED_LOSSES:
            raise ValueError(f"`unlabeled_loss` must be one of {', '.join(UNLABELED_LOSSES)}, got {loss!r}.")
        if loss == "cross_entropy":
            return
        if self.labeled_loss != "set":
            raise ValueError(
                f'`unlabeled_loss="set"` needs `labeled_loss="set"`, got {self.labeled_loss!r}: queries learn from '
                "labels first which masks are theirs."
            )
        if self.class_balance > 0:
            raise ValueError(
                f'`class_balance` {self.class_balance} weighs pixels, and `unlabeled_loss="set"` is a loss of masks. '
                "Leave one of them out."
            )

    def _labeled_class_weights(self, logits: Logits, labeled: LabeledBatch) -> Tensor | None:
        """The weights of the labeled loss, (C,)."""
        classes = logits.shape[1]
        if self.class_weights is None:
            return None
        if not self.weighs_by_frequency:
            self.check_class_weights(classes)
            weights = torch.tensor(self.class_weights, dtype=torch.float32)
            return weights.to(labeled.labels.device, non_blocking=True)  # else the host would wait for the GPU
        counts = labeled.class_counts
        counts = class_counts(labeled.labels, classes) if counts is None else counts
        return frequency_weights(counts, power=self.class_weights)


def pseudo_label_weights(logits: Logits, labels: Tensor, valid: Tensor, power: float) -> Tensor | None:
    """The weights (C,) of a loss on pseudo labels by their frequency in the batch; none where `power` is 0.

    Args:
        logits: of what is taught. labels: long (B, H, W), 255 where nothing is. valid: bool (B, H, W).
    """
    if power == 0:
        return None
    return balanced_class_weights(labels, valid & (labels != IGNORE_INDEX), logits.shape[1], power=power)


def soft_label_weights(logits: Logits, target: Tensor | StridedLogits, valid: Tensor, power: float) -> Tensor | None:
    """`pseudo_label_weights` for a soft target, whose pixels count as those of its most likely class."""
    return None if power == 0 else pseudo_label_weights(logits, pseudo_label(target), valid, power)


def ramp(progress: Tensor | float, *, warm_up: float = 0.0, ramp_up: float = 0.0) -> Tensor:
    """What an unsupervised weight is multiplied with: 0 while warming up, then linearly up to 1.

    Args:
        progress: the share of training done, in [0, 1]. warm_up, ramp_up: shares of training.
    """
    since = torch.as_tensor(progress) - warm_up
    if ramp_up == 0:
        return (since >= 0).float()
    return (since / ramp_up).clamp(0, 1)


def one_box(probability: float) -> dict[str, Any]:
    """How UniMatch's release draws CutMix masks (obtain_cutmix_box in its dataset/transform.py): keyword arguments of
    `draw_cutmix_masks`.

    Args:
        probability: with which an image is mixed.
    """
    return {"boxes": 1, "area": (0.02, 0.4), "aspect": (0.3, 1 / 0.3), "probability": probability}


def warmed_up(decay: float, step: int) -> float:
    """The decay of an average over steps after optimizer step `step` (1, 2, ...): of a true mean at first, then
    `decay`."""
    return min(1 - 1 / (step + 1), decay)


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
