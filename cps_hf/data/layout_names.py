"""The meaning of folder and file names: images, masks and splits; and the common part of an image's and its mask's
name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .table import first_few
from .walk import IMAGE_SUFFIXES, MASK_SUFFIXES, Walk

SPLITS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ROLES = {
    **dict.fromkeys(("images", "image", "imgs", "img", "jpegimages", "photos", "pictures", "leftimg8bit"), "image"),
    **dict.fromkeys(("masks", "mask", "labels", "label", "annotations", "annotation", "ann", "anns"), "mask"),
    **dict.fromkeys(("annot", "gt", "groundtruth", "segmentation", "segmentations", "segmentationclass"), "mask"),
    **dict.fromkeys(("segmentationclassraw", "segmentationclassaug", "segmentationmask", "segmentationmasks"), "mask"),
    **dict.fromkeys(("trainannot", "valannot", "testannot"), "mask"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
    **dict.fromkeys(("segmentationobject", "instances", "overlay", "overlays", "preview", "previews"), "other"),
    **dict.fromkeys(("visualization", "visualizations", "predictions"), "other"),
}
_NEUTRAL = {"png", "jpg", "jpeg", "tif", "tiff", "semantic", "seg", "ground", "truth", "dir", "data", "set"}
"""Words that a folder's name may contain in addition: `images_png`, `semantic_masks`."""

_MASK_AFFIX = (
    "masks?|labels?|gt|groundtruth|ground_truth|seg|segmentation|annotations?|annot|semantic|"
    "(?:gtFine_)?label(?:Train)?Ids"
)
_IMAGE_AFFIX = "images?|imgs?|img|rgb|photo|sat|leftImg8bit"
_IN_A_MASK_FOLDER = f"{_MASK_AFFIX}|L"  # CamVid's; next to images it may mean the left camera


class NamedFile(NamedTuple):
    """An image file, and what its folders' names mean; `rest`: folders without a meaning."""

    path: str
    file: Path
    role: str | None
    split: str | None
    rest: tuple[str, ...]
    told_by: str  # the folder that determines the role

    @property
    def stem(self) -> str:
        return stem_of(self.path)


class Places:
    """The meaning of a file's folders."""

    def __init__(self, root: Path, looked: Walk, images: str | None, masks: str | None):
        self.given = {
            role: tuple(PurePosixPath(name.strip("/")).parts)
            for role, name in (("image", images), ("mask", masks))
            if name is not None
        }
        dirs = [PurePosixPath(path).parts[:-1] for path in looked.files]
        self.wrappers = _wrappers(dirs, {part for wanted in self.given.values() for part in wanted})
        for role, wanted in self.given.items():
            if wanted and not any(_position(parts, wanted) is not None for parts in dirs):
                there = sorted({part for parts in dirs for part in parts})
                raise ValueError(
                    f"`{role}s`: no folder {'/'.join(wanted)!r} with images in {root}; folders there: "
                    f"{first_few(there, 10) or 'none'}."
                )

    def __call__(self, path: str, file: Path) -> NamedFile:
        dirs = PurePosixPath(path).parts[self.wrappers : -1]
        role, start, end = self._role(dirs)
        said = {i: words_of(part)[0] for i, part in enumerate(dirs) if words_of(part) and words_of(part)[0]}
        near = {0, start - 1, *range(start, end + 1)} if role else {0}  # a deeper `test` may mean something else
        at = next((i for i in sorted(said) if i in near), None)
        drop = {*range(start, end)} if role and role != "unlabeled" else set()
        drop |= {i for i, part in enumerate(dirs) if role and (words_of(part) or ("", ""))[1] in ("image", "mask")}
        rest = tuple(_composed(part) for i, part in enumerate(dirs) if i not in drop and i != at)
        told_by = "/".join(dirs[start:end]) if role else ""
        return NamedFile(path, file, role, None if at is None else said[at], rest, told_by)

    def _role(self, dirs: Sequence[str]) -> tuple[str | None, int, int]:
        """(role, and the range of folders that determine it): as given, or by the deepest common name."""
        for role in ("mask", "image"):
            wanted = self.given.get(role)
            if wanted and (at := _position(dirs, wanted)) is not None:
                return role, at, at + len(wanted)
        said = {i: words_of(part)[1] for i, part in enumerate(dirs) if words_of(part) and words_of(part)[1]}
        said = {i: role for i, role in said.items() if role not in self.given}  # a given folder replaces common names
        for i in reversed(said):
            if said[i] != "unlabeled" or not {"image", "mask"} & {*said.values()}:
                return said[i], i, i + 1
        return ("image" if "image" in self.given and not self.given["image"] else None), 0, 0


def _wrappers(dirs: Iterable[tuple[str, ...]], named: Collection[str]) -> int:
    """The number of leading folders without a meaning that contain all files, as from an unpacked archive."""
    common = os.path.commonprefix(list(dirs))
    return next((i for i, part in enumerate(common) if part in named or words_of(part)), len(common))


def _position(dirs: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((i for i in range(len(dirs)) if tuple(dirs[i : i + len(wanted)]) == tuple(wanted)), None)


@cache
def words_of(name: str) -> tuple[str | None, str | None] | None:
    """(split, role) from a folder's name; none if it names neither, or contains other words."""
    whole = name.casefold()
    if whole in ROLES or whole in SPLITS:
        annot = re.fullmatch("(train|val|test)annot", whole)
        return SPLITS.get(annot[1] if annot else whole), ROLES.get(whole)
    words = [word for word in re.split(r"[_\-. ]+", whole) if word]
    splits = [SPLITS[word] for word in words if word in SPLITS]
    roles = [ROLES[word] for word in words if word in ROLES]
    known = all(word in SPLITS or word in ROLES or word in _NEUTRAL or word.isdigit() for word in words)
    if not known or not (splits or roles):
        return None
    role = next((role for role in ("unlabeled", "other", "mask", "image") if role in roles), None)
    return (splits[0] if splits else None), role


class Affixes:
    """The parts of names that an image and its mask do not share."""

    def __init__(self, image_suffix: str | None, mask_suffix: str | None):
        self.image_suffix, self.mask_suffix = image_suffix, mask_suffix

    def bare_image(self, stem: str) -> str:
        if self.image_suffix is not None:
            return stem.removesuffix(self.image_suffix)
        return _without_affix(stem, _IMAGE_AFFIX)

    def bare_mask(self, stem: str) -> str:
        if self.mask_suffix is not None:
            return stem.removesuffix(self.mask_suffix)
        stem = _without_affix(stem, _IN_A_MASK_FOLDER)
        inner = PurePosixPath(stem)
        return inner.stem if inner.suffix.lower() in IMAGE_SUFFIXES else stem  # a.jpg.png

    def is_mask(self, path: str) -> bool:
        """Whether a file among images is a mask."""
        stem, kind = stem_of(path), PurePosixPath(path).suffix.lower()
        if self.mask_suffix is not None:
            return bool(self.mask_suffix) and stem.endswith(self.mask_suffix)
        return kind in MASK_SUFFIXES and _without_affix(stem, _MASK_AFFIX) != stem


def _without_affix(stem: str, words: str) -> str:
    """ "a_mask", "mask_a", "a-Mask" -> "a"; unchanged if nothing would be left."""
    bare = re.sub(rf"[_\-. ](?:{words})$", "", stem, flags=re.IGNORECASE)
    bare = bare if bare != stem else re.sub(rf"^(?:{words})[_\-. ]", "", stem, flags=re.IGNORECASE)
    return bare or stem


def stem_of(path: str) -> str:
    return PurePosixPath(_composed(path)).stem


def _composed(name: str) -> str:
    """The composed Unicode form: macOS writes an ü as two characters."""
    return unicodedata.normalize("NFC", name)
