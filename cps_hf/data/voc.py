"""Pascal VOC 2012 on disk (Everingham et al.), and train_aug: its train set plus SBD (Hariharan et al., ICCV 2011).

    python -m cps_hf.data.voc --voc_root VOCdevkit/VOC2012 --sbd_root benchmark_RELEASE/dataset

writes `SegmentationClassAug/` and `ImageSets/Segmentation/train_aug.txt` next to VOC's own (10,582 images).
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image
from tqdm.auto import tqdm

from ..files import write_atomically, written_whole
from ..functional import IGNORE_INDEX
from .labels import LabelEncoding
from .reading import read_label
from .table import build, first_few

logger = logging.getLogger(__name__)

NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
ID2LABEL = dict(enumerate(NAMES))


def voc_color(index: int) -> tuple[int, int, int]:
    """The VOC colour map: the index's bits, from the lowest, become the high bits of red, green and blue in turn."""
    color = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return color[0], color[1], color[2]


PALETTE = tuple(voc_color(index) for index in range(len(NAMES)))
ENCODING = LabelEncoding(NAMES, palette=PALETTE)
TRAIN_AUG_SIZE = 10_582


def voc_folder(root: str | Path) -> Path:
    """`root` itself, or the `VOC2012` folder below it, whichever contains `JPEGImages/`.

    Raises:
        ValueError: neither does.
    """
    root = Path(root)
    for candidate in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (candidate / "JPEGImages").is_dir():
            return candidate
    there = first_few(sorted(p.name for p in root.iterdir())) if root.is_dir() else "no such folder"
    raise ValueError(
        f"No VOC2012 at {root}: expected JPEGImages/ there or in VOCdevkit/VOC2012/ below it, found: {there}."
    )


def load_voc(
    root: str | Path,
    split: str = "train",
    *,
    annotations: str | None = None,
    with_labels: bool = True,
    only_ids: Collection[str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """VOC 2012: columns "image", "label" (21 classes, 255 void) and "id" (like `2007_000032`).

    Args:
        root: the VOC2012 folder, or the folder that contains `VOCdevkit/VOC2012`.
        split: a file of `ImageSets/Segmentation/`: train, val, trainval, or train_aug once it has been built.
        annotations: the label folder: "SegmentationClass" (palette PNGs) or "SegmentationClassAug" (greyscale PNGs).
            If None, the latter for train_aug, otherwise the former.
        with_labels: if False, no label file is read.
        only_ids: skip all other images, whose labels may then be missing.
        streaming: return an `IterableDataset`.

    Raises:
        ValueError: a folder, the split's file, or images or labels that it lists are missing.
    """
    folder = voc_folder(root)
    listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        there = first_few(sorted(p.stem for p in listing.parent.glob("*.txt"))) or "none"
        hint = " Build it with `python -m cps_hf.data.voc --help`." if split == "train_aug" else ""
        raise ValueError(f"VOC split {split!r} has no file {listing}; there are: {there}.{hint}")
    ids = _read_ids(listing)
    if not ids:
        raise ValueError(f"{listing} lists no images.")
    ids = ids if only_ids is None else [name for name in ids if name in only_ids]
    images = [folder / "JPEGImages" / f"{name}.jpg" for name in ids]
    _require_files(images, f"VOC {split}: images that {listing.name} lists")
    if not with_labels:
        return build(ids, images, streaming=streaming)
    annotations = annotations or ("SegmentationClassAug" if split == "train_aug" else "SegmentationClass")
    labels = [folder / annotations / f"{name}.png" for name in ids]
    _require_files(labels, f"VOC {split}: labels of {annotations}")
    logger.info("VOC %s: %d images, labels from %s.", split, len(ids), annotations)
    return build(ids, images, labels, ENCODING.to_feature(), streaming=streaming)


def splits_of(root: str | Path) -> list[str]:
    """The image lists that exist, without lists that are contained in others.

    Raises:
        ValueError: there is no VOC2012.
    """
    found = sorted(path.stem for path in (voc_folder(root) / "ImageSets" / "Segmentation").glob("*.txt"))
    both = {"trainval"} if {"train", "val"} <= set(found) else set()
    return [split for split in found if split not in both and split != "test"]


def _read_ids(listing: Path) -> list[str]:
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing} is not a list of image names in UTF-8 text: {error}.") from error
    ids = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            name = line.split()[0]
            if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):  # also keeps paths inside the folder
                raise ValueError(f"{listing}, line {number}: {line[:80]!r} is not an image name like 2007_000032.")
            ids.append(name)
    return ids


def _require_files(paths: list[Path], what: str) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{what} are missing, {len(missing)} of {len(paths)}: {first_few(missing, 3)}.")


def build_train_aug(voc_root: str | Path, sbd_root: str | Path, *, progress: bool = True) -> int:
    """Write train_aug: VOC's train labels, and SBD's for additional images that are not in VOC's val.

    All labels, including those of val, become greyscale PNGs in `SegmentationClassAug/` (0-20, 255 void); the sorted
    ids go to `ImageSets/Segmentation/train_aug.txt`. VOC's own labels win over SBD's. Existing files are kept, so an
    interrupted call resumes; the id list is written last.

    Args:
        sbd_root: the folder that contains SBD's `cls/*.mat`.

    Returns:
        The number of ids: 10,582 with the real data, and a warning otherwise.

    Raises:
        ValueError: a folder, list or label is missing, or a label or `.mat` file cannot be read.
        ImportError: scipy is not installed (`pip install "cps_hf[sbd]"`).
    """
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise ImportError('SBD\'s .mat files are read with scipy: `pip install "cps_hf[sbd]"`.') from error
    folder, mats = voc_folder(voc_root), Path(sbd_root) / "cls"
    if not mats.is_dir():
        raise ValueError(f"No folder {mats}. Give SBD's `dataset` folder, which contains cls/*.mat, as `sbd_root`.")
    lists = folder / "ImageSets" / "Segmentation"
    _require_files([lists / "train.txt", lists / "val.txt"], "VOC's own lists of images")
    voc = {split: set(_read_ids(lists / f"{split}.txt")) for split in ("train", "val")}
    own = sorted(voc["train"] | voc["val"])
    _require_files([folder / "SegmentationClass" / f"{name}.png" for name in own], "VOC's own labels")
    sbd = {path.stem for path in mats.glob("*.mat")} - voc["val"]
    target = folder / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    for name in tqdm(sorted(voc["train"] | voc["val"] | sbd), desc="SegmentationClassAug", disable=not progress):
        if (target / f"{name}.png").is_file():
            continue
        if name in voc["train"] or name in voc["val"]:
            path = folder / "SegmentationClass" / f"{name}.png"
            label = read_label({"bytes": None, "path": str(path)}, ENCODING, name=repr(name)).numpy()
        else:
            label = _read_sbd(mats / f"{name}.mat")
        with written_whole(target / f"{name}.png") as temporary:
            Image.fromarray(label).save(temporary)
    ids = sorted(voc["train"] | sbd)
    write_atomically(lists / "train_aug.txt", "".join(f"{name}\n" for name in ids))
    if len(ids) != TRAIN_AUG_SIZE:
        logger.warning(
            "train_aug has %d images, the published one %d: VOC train %d, SBD without VOC val %d.",
            len(ids),
            TRAIN_AUG_SIZE,
            len(voc["train"]),
            len(sbd),
        )
    return len(ids)


def _read_sbd(path: Path) -> np.ndarray:
    """The class map of one SBD file: `GTcls.Segmentation`, uint8 (H, W)."""
    from scipy.io import loadmat

    try:
        label = loadmat(path, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
    except Exception as error:  # scipy raises many kinds on broken files
        raise ValueError(f"Cannot read GTcls.Segmentation of {path}: {type(error).__name__}: {error}.") from error
    label = np.asarray(label)
    if label.ndim != 2 or not ((label < len(NAMES)) | (label == IGNORE_INDEX)).all():
        raise ValueError(f"{path} is not a map of classes 0 to 20: shape {label.shape}, maximum {label.max()}.")
    return label.astype(np.uint8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build VOC's train_aug (10,582 images) from VOC 2012 and SBD.")
    parser.add_argument("--voc_root", required=True, help="VOC2012, or the folder that contains VOCdevkit/VOC2012")
    parser.add_argument("--sbd_root", required=True, help="SBD's `dataset` folder, which contains cls/*.mat")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        count = build_train_aug(options.voc_root, options.sbd_root)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    sys.stdout.write(f"{count} ids written to ImageSets/Segmentation/train_aug.txt, labels to SegmentationClassAug/\n")


if __name__ == "__main__":
    main()
