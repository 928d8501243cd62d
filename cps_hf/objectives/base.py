"""The base of all methods: a frozen dataclass of hyper-parameters whose call turns two batches into a loss.

An objective only sees tensors and callables. It knows nothing about optimizers, accelerators or files.
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
    """A network as an objective calls it: any function from images to full-size logits.

    The trainer's branches return `StridedLogits`, which stand for full-size logits. The functions of
    `cps_hf.functional` accept both; for your own math, `full_size(logits)` gives a tensor (B, C, H, W).
    """

    def __call__(
        self, pixel_values: Tensor, *, feature_dropout: float = 0.0, complementary_dropout: float = 0.0
    ) -> Logits:
        """The logits of normalised images (B, 3, H, W).

        A method that needs no dropout omits these arguments.

        Args:
            feature_dropout: the probability of dropping a channel of the backbone's feature maps.
            complementary_dropout: the images are pairs of views, with the first views in the first half of the batch.
                In this share of the pairs, each channel of the maps is dropped in one view and doubled in the other.
        """


class ObjectiveOutput(NamedTuple):
    """`loss`: the scalar to back-propagate, summed over branches. `logs`: detached scalars to log under these names.
    The loss parts in `logs` are means over branches, so that runs with one and with two branches are comparable."""

    loss: Tensor
    logs: dict[str, Tensor]


LABELED_LOSSES = ("cross_entropy", "ohem", "focal", "dice", "cross_entropy_dice", "set")
UNLABELED_LOSSES = ("cross_entropy", "set")


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """The base class of every method.

    Args:
        labeled_loss: "cross_entropy"; "ohem" (hard pixels only; the CPS release uses it on Cityscapes); "focal" (easy
            pixels count less); "dice" (each class's overlap); "cross_entropy_dice", the sum of the two; or "set", the
            own loss of Mask2Former, MaskFormer and EoMT on masks made from the labels.
        ohem_threshold: skip labeled pixels whose true class has a higher probability than this. Only with "ohem".
        ohem_min_kept: keep at least this many pixels *per image*. Only with "ohem".
        focal_gamma: multiply each pixel's loss by (1 - p)^gamma. Only with "focal".
        class_weights: weights of the labeled loss by a pixel's class (with Dice, of the mean over classes). If `None`,
            as in the papers, all classes have equal weight. A number p weights each class by its frequency in the
            labeled set to the power of -p, scaled to a mean of 1 over the set's pixels; 0.5 is a good start, and 1
            balances all classes. A list has one weight per class, which is used as it is.
        joint_forward: pass a branch's labeled and unlabeled images through it together: fewer, larger passes. This
            changes the result if a model has batch norm, whose statistics then mix labeled and unlabeled images. (Your
            own method supports this by calling `self.logits`.)
    """

    labeled_loss: str = "cross_entropy"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 50_000
    focal_gamma: float = 2.0
    class_weights: float | list[float] | None = None
    joint_forward: bool = False

    min_branches: ClassVar[int] = 1
    """The smallest number of models the method needs. The actual number is `len(branches)`."""
    teacher: ClassVar[bool] = False
    """Whether the trainer keeps an averaged teacher of branch 0. It then calls `ema_decay(step) -> float`."""
    averages: ClassVar[bool] = False
    """Whether the method needs an average of each branch (`CPSConfig.ema_decay`), which is passed as `averages`."""
    labelers: ClassVar[Sequence[str]] = ()
    """Folders or Hub ids of trained networks that make labels for the method. Override this with a field. The trainer
    loads the networks and passes them as `labelers`."""
    citation: ClassVar[str] = ""
    """BibTeX for the model card."""

    def __post_init__(self):
        if self.labeled_loss not in LABELED_LOSSES:
            raise ValueError(f"`labeled_loss` must be one of {', '.join(LABELED_LOSSES)}, got {self.labeled_loss!r}.")
        if not 0 <= self.ohem_threshold <= 1:
            raise ValueError(f"`ohem_threshold` must be a probability in [0, 1], got {self.ohem_threshold}.")
        if self.ohem_min_kept < 1:
            raise ValueError(f"`ohem_min_kept` must be at least 1 pixel per image, got {self.ohem_min_kept}.")
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
                raise ValueError(f"`class_weights` must be numbers >= 0, and at least one > 0, got {weights}.")

    @property
    def weighs_by_frequency(self) -> bool:
        """Whether the method needs the pixels per class of the labeled set (`LabeledBatch.class_counts`)."""
        return isinstance(self.class_weights, int | float)

    def check_class_weights(self, classes: int) -> None:
        """Raise a ValueError if `class_weights` is a list whose length is not the number of classes."""
        if self.class_weights is None or self.weighs_by_frequency or len(self.class_weights) == classes:
            return
        raise ValueError(
            f"`class_weights` has {len(self.class_weights)} numbers for {classes} classes: give one per class, in the "
            "order of their ids."
        )

    @property
    def least_confidence(self) -> float:
        """Predictions for unlabeled images below this probability are not learned from; 0: all are."""
        return getattr(self, "confidence_threshold", 0.0)

    @property
    def views(self) -> tuple[str, ...]:
        """The views that the unlabeled stream must provide, from `UnlabeledBatch`: "weak", "strong", "strong_2",
        "cutmix_mask", "cutmix_mask_2", "second_crop" and "pseudo_labels". The last one needs a column "pseudo_label"
        in the unlabeled set.

        If empty, the method uses no unlabeled images. Views that are not listed are `None` in the batch.
        """
        return ()

    @property
    def cutmix_masks(self) -> dict[str, Any]:
        """How to draw "cutmix_mask" and "cutmix_mask_2": keyword arguments of `draw_cutmix_masks`."""
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
        """Compute the loss of one step.

        Args:
            branches: the networks to train.
            labeled: images and labels. unlabeled: the views listed in `views`; `None` if there are none.
            teacher: the averaged network; only if `teacher = True`.
            averages: the branches' averages, a sequence of `Branch` in evaluation mode. Passed only if
                `averages = True`; such a method adds this argument.
            labelers: the trained networks, a sequence of `Branch` in evaluation mode and without gradient. Passed only
                if `labelers` is not empty; such a method adds this argument.
            progress: the share of training completed, in [0, 1].
            unlabeled_weight: multiplies the unlabeled term, in addition to the method's own weight
                (`CPSConfig.unlabeled_weight`). A method without this argument cannot be used with that setting.
        """

    def logits(self, branch: Branch, *images: Tensor) -> list[Logits]:
        """A branch's logits of each of these images (B, 3, H, W): one pass each, or a single one if
        `joint_forward`."""
        if not self.joint_forward or len(images) == 1:
            return [branch(batch) for batch in images]
        return split_images(branch(torch.cat(images)), [len(batch) for batch in images])

    def supervised_loss(self, logits: Logits, labeled: LabeledBatch) -> Tensor:
        """The labeled loss of one branch: the paper's Ls, a mean over labeled pixels (equation 1)."""
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
            return weights.to(labeled.labels.device, non_blocking=True)  # otherwise the host would wait for the GPU
        counts = labeled.class_counts
        counts = class_counts(labeled.labels, classes) if counts is None else counts
        return frequency_weights(counts, power=self.class_weights)


def pseudo_label_weights(logits: Logits, labels: Tensor, valid: Tensor, power: float) -> Tensor | None:
    """The class weights (C,) of a loss on pseudo labels, from their frequency in the batch. `None` if `power` is 0.

    Args:
        logits: the logits that are trained. labels: long (B, H, W), 255 where ignored. valid: bool (B, H, W).
    """
    if power == 0:
        return None
    return balanced_class_weights(labels, valid & (labels != IGNORE_INDEX), logits.shape[1], power=power)


def soft_label_weights(logits: Logits, target: Tensor | StridedLogits, valid: Tensor, power: float) -> Tensor | None:
    """`pseudo_label_weights` for a soft target, where a pixel counts towards its most likely class."""
    return None if power == 0 else pseudo_label_weights(logits, pseudo_label(target), valid, power)


def ramp(progress: Tensor | float, *, warm_up: float = 0.0, ramp_up: float = 0.0) -> Tensor:
    """The factor on an unsupervised weight: 0 during warm-up, then growing linearly to 1.

    Args:
        progress: the share of training completed, in [0, 1]. warm_up, ramp_up: shares of training.
    """
    since = torch.as_tensor(progress) - warm_up
    if ramp_up == 0:
        return (since >= 0).float()
    return (since / ramp_up).clamp(0, 1)


def one_box(probability: float) -> dict[str, Any]:
    """Keyword arguments of `draw_cutmix_masks` that draw masks as UniMatch's release does (obtain_cutmix_box in its
    dataset/transform.py).

    Args:
        probability: the probability of mixing an image.
    """
    return {"boxes": 1, "area": (0.02, 0.4), "aspect": (0.3, 1 / 0.3), "probability": probability}


def warmed_up(decay: float, step: int) -> float:
    """The decay of an average after optimizer step `step` (1, 2, ...): that of a true mean at first, then `decay`."""
    return min(1 - 1 / (step + 1), decay)


def check_shares(objective: Objective, *names: str) -> None:
    """Check that each of these fields is in [0, 1]."""
    for name in names:
        if not 0 <= getattr(objective, name) <= 1:
            raise ValueError(f"`{name}` must be from 0 to 1, got {getattr(objective, name)}.")


def check_not_negative(objective: Objective, *names: str) -> None:
    """Check that each of these fields is at least 0."""
    for name in names:
        if getattr(objective, name) < 0:
            raise ValueError(f"`{name}` must not be negative, got {getattr(objective, name)}.")
