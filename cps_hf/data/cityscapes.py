"""Cityscapes on disk (Cordts et al., CVPR 2016): the official layout, names, ids and colours."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset

from ..functional import IGNORE_INDEX
from .labels import LabelEncoding
from .table import build, first_few
from .walk import is_hidden

logger = logging.getLogger(__name__)


class Label(NamedTuple):
    """A row of the official table. `train_id` is 255 if a label is not evaluated."""

    name: str
    id: int
    train_id: int
    color: tuple[int, int, int]


LABELS = (
    Label("unlabeled", 0, 255, (0, 0, 0)),
    Label("ego vehicle", 1, 255, (0, 0, 0)),
    Label("rectification border", 2, 255, (0, 0, 0)),
    Label("out of roi", 3, 255, (0, 0, 0)),
    Label("static", 4, 255, (0, 0, 0)),
    Label("dynamic", 5, 255, (111, 74, 0)),
    Label("ground", 6, 255, (81, 0, 81)),
    Label("road", 7, 0, (128, 64, 128)),
    Label("sidewalk", 8, 1, (244, 35, 232)),
    Label("parking", 9, 255, (250, 170, 160)),
    Label("rail track", 10, 255, (230, 150, 140)),
    Label("building", 11, 2, (70, 70, 70)),
    Label("wall", 12, 3, (102, 102, 156)),
    Label("fence", 13, 4, (190, 153, 153)),
    Label("guard rail", 14, 255, (180, 165, 180)),
    Label("bridge", 15, 255, (150, 100, 100)),
    Label("tunnel", 16, 255, (150, 120, 90)),
    Label("pole", 17, 5, (153, 153, 153)),
    Label("polegroup", 18, 255, (153, 153, 153)),
    Label("traffic light", 19, 6, (250, 170, 30)),
    Label("traffic sign", 20, 7, (220, 220, 0)),
    Label("vegetation", 21, 8, (107, 142, 35)),
    Label("terrain", 22, 9, (152, 251, 152)),
    Label("sky", 23, 10, (70, 130, 180)),
    Label("person", 24, 11, (220, 20, 60)),
    Label("rider", 25, 12, (255, 0, 0)),
    Label("car", 26, 13, (0, 0, 142)),
    Label("truck", 27, 14, (0, 0, 70)),
    Label("bus", 28, 15, (0, 60, 100)),
    Label("caravan", 29, 255, (0, 0, 90)),
    Label("trailer", 30, 255, (0, 0, 110)),
    Label("train", 31, 16, (0, 80, 100)),
    Label("motorcycle", 32, 17, (0, 0, 230)),
    Label("bicycle", 33, 18, (119, 11, 32)),
)
"""The official ids 0 to 33. (License plates have the official id -1 and are not drawn into label images: 255 here.)"""

_EVALUATED = sorted((label for label in LABELS if label.train_id != IGNORE_INDEX), key=lambda label: label.train_id)
NAMES = tuple(label.name for label in _EVALUATED)
PALETTE = tuple(label.color for label in _EVALUATED)
ID2LABEL = dict(enumerate(NAMES))

ENCODINGS = {
    # An 8-bit image cannot store -1: tools write 255 instead.
    "labelIds": LabelEncoding(
        NAMES, values={**{label.id: label.train_id for label in LABELS}, IGNORE_INDEX: IGNORE_INDEX}, palette=PALETTE
    ),
    "labelTrainIds": LabelEncoding(NAMES, palette=PALETTE),
}
SPLITS = ("train", "val", "test", "train_extra")


def load_cityscapes(
    root: str | Path,
    split: str = "train",
    *,
    annotations: str = "fine",
    with_labels: bool | None = None,
    only_ids: Collection[str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Cityscapes: columns "image", "label" (19 classes, 255 ignored) and "id" (`<city>_<sequence>_<frame>`).

    Args:
        root: the folder that contains `leftImg8bit/` and `gtFine/` (or `gtCoarse/`).
        split: train, val, test or train_extra.
        annotations: "fine" or "coarse". `train_extra` only has coarse ones.
        with_labels: if None, labels are read where the official data set has them: not for test, and for train_extra
            only with `annotations="coarse"`. If False, no label file is read.
        only_ids: skip all other images, whose labels may then be missing.
        streaming: return an `IterableDataset`.

    Labels are read from `*_labelIds.png` or, if there are none, from `*_labelTrainIds.png`.

    Raises:
        ValueError: a folder, all images or some labels are missing.
    """
    root = Path(root)
    if split not in SPLITS:
        raise ValueError(f"`split` of Cityscapes must be one of {', '.join(SPLITS)}, got {split!r}.")
    if annotations not in ("fine", "coarse"):
        raise ValueError(f'`annotations` of Cityscapes must be "fine" or "coarse", got {annotations!r}.')
    if with_labels is None:
        with_labels = split in ("train", "val") or (split == "train_extra" and annotations == "coarse")
    folder = root / "leftImg8bit" / split
    if not folder.is_dir():
        there = first_few(sorted(p.name for p in root.iterdir())) if root.is_dir() else "no such folder"
        raise ValueError(
            f"No folder {folder}. Expected the official layout, {root}/leftImg8bit/{split}/<city>/*_leftImg8bit.png; "
            f"found in {root}: {there}. Give the folder that contains leftImg8bit/ as `root`."
        )
    images = sorted(folder.glob("*/*_leftImg8bit.png"), key=lambda path: path.name)
    images = [path for path in images if not is_hidden(path.name)]  # "._..." from an archive made on a Mac
    if not images:
        raise ValueError(f"No image <city>/*_leftImg8bit.png below {folder}.")
    if only_ids is not None:
        images = [path for path in images if path.name.removesuffix("_leftImg8bit.png") in only_ids]
    ids = [path.name.removesuffix("_leftImg8bit.png") for path in images]
    if not with_labels:
        return build(ids, images, streaming=streaming)
    labels, encoding = _labels_of(root, split, annotations, images, ids)
    return build(ids, images, labels, encoding.to_feature(), streaming=streaming)


def splits_of(root: str | Path) -> list[str]:
    """The splits whose images are present."""
    return [split for split in SPLITS if (Path(root) / "leftImg8bit" / split).is_dir()]


def _labels_of(root: Path, split: str, annotations: str, images, ids) -> tuple[list[Path], LabelEncoding]:
    kind = "gtFine" if annotations == "fine" else "gtCoarse"
    missing: dict[str, list[Path]] = {}
    for suffix, encoding in ENCODINGS.items():
        labels = [
            root / kind / split / image.parent.name / f"{sample}_{kind}_{suffix}.png"
            for image, sample in zip(images, ids, strict=True)
        ]
        missing[suffix] = [path for path in labels if not path.is_file()]
        if not missing[suffix]:
            logger.info("Cityscapes %s: %d images, labels from *_%s_%s.png.", split, len(ids), kind, suffix)
            return labels, encoding
    suffix = min(missing, key=lambda s: len(missing[s]))
    advice = "with_labels=False" if split != "train_extra" else 'annotations="coarse", with_labels=False'
    raise ValueError(
        f"Cityscapes {split}: {len(missing[suffix])} of {len(ids)} label files are missing: "
        f"{first_few(missing[suffix], 3)}. Unpack {kind}_*.zip into {root}, or read the images alone with `{advice}`."
    )
