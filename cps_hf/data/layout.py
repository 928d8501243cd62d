"""Which files below a folder are images, which are masks, and which belong together: the layouts that people have.

Folders tell by their names (`images`, `masks`, `SegmentationClass`, `train_masks` ...), files by what their names have
beside what an image and its mask share (`a.jpg` and `a_mask.png`). What cannot be told is an error that lists what was
found: a wrong guess would train on wrong labels without a word.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .table import first_few
from .walk import IMAGE_SUFFIXES, MASK_SUFFIXES, OTHER_KIND, Walk, walk

SPLITS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ROLES = {
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
"""Words that a folder's name may have beside the telling one: `images_png`, `semantic_masks`."""

_MASK_AFFIX = (
    "masks?|labels?|gt|groundtruth|ground_truth|seg|segmentation|annotations?|annot|semantic|"
    "(?:gtFine_)?label(?:Train)?Ids"
)
_IMAGE_AFFIX = "images?|imgs?|img|rgb|photo|sat|leftImg8bit"
_IN_A_MASK_FOLDER = f"{_MASK_AFFIX}|L"  # CamVid's; beside images it may be the left one of two


class Pair(NamedTuple):
    """An image, and its mask where there is one.

    Attributes:
        id: the image's path below the folder, without the folders that tell image from mask and the split.
        path: the image's whole path below the folder.
        split: "train", "val", "test", or none.
    """

    id: str
    path: str
    image: Path
    mask: Path | None
    split: str | None


class NoMasksError(ValueError):
    """A folder holds images, and nothing that looks like a mask."""


@dataclass
class Layout:
    """What lies below a folder.

    Attributes:
        sentence: how it is laid out, in words.
        passed_over: by reason, how many files.
    """

    root: Path
    pairs: list[Pair]
    sentence: str
    passed_over: dict[str, int] = field(default_factory=dict)


class _File(NamedTuple):
    """An image file, and what its folders say of it; `rest`: those that say nothing."""

    path: str
    file: Path
    role: str | None
    split: str | None
    rest: tuple[str, ...]
    told_by: str  # the folder that told the role

    @property
    def stem(self) -> str:
        return _stem(self.path)


def find_layout(
    root: str | Path,
    *,
    images: str | None = None,
    masks: str | None = None,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
) -> Layout:
    """Images and masks below `root`, matched.

    Args:
        images, masks: the names of the folders that hold them; `None`: told by the names that are usual.
        image_suffix, mask_suffix: what names have after what an image and its mask share; `None`: what is usual.

    Raises:
        ValueError: there is nothing, or something cannot be told: which files are masks, which images; an image has
            two masks, or a mask no image. The message lists what was found.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"No folder {root}. Expected a folder of images and masks; a data set of the Hub is read with `--dataset "
            "hub --data_root ID`."
        )
    looked = walk(root, IMAGE_SUFFIXES)
    _refuse_other_loaders(root, looked)
    if not looked.files:
        passed = f" Passed over: {'; '.join(looked.lines())}." if looked.passed_over else ""
        raise ValueError(f"No image in {root}: looked for {', '.join(IMAGE_SUFFIXES)}.{passed}")
    place = _Places(root, looked, images, masks)
    files = [place(path, file) for path, file in looked.files.items()]
    affixes = _Affixes(image_suffix, mask_suffix)
    labels, pictures, how = _sides(root, files, affixes, looked)
    used = {file.path for file in [*labels, *pictures]}
    mask_of, named = _matched(root, pictures, labels, affixes)
    listed = _listed_splits(root, looked)
    pairs = [
        Pair(
            id="/".join([*file.rest, file.stem]),
            path=file.path,
            image=file.file,
            mask=mask_of[file.path].file if file.path in mask_of else None,
            split=file.split or listed.get(file.stem),
        )
        for file in pictures
    ]
    passed_over = {reason: len(names) for reason, names in looked.passed_over.items()}
    elsewhere = Counter(
        PurePosixPath(file.path).parts[0] if "/" in file.path else "the folder itself"
        for file in files
        if file.path not in used
    )
    for folder, count in sorted(elsewhere.items()):
        passed_over[f"images elsewhere, in {folder}"] = count
    found_splits = [name for name in ("train", "val", "test") if any(pair.split == name for pair in pairs)]
    told = "no split" if not found_splits else f"splits {', '.join(found_splits)}"
    by_list = " of ImageSets/Segmentation" if listed and found_splits else ""
    return Layout(root, pairs, f"{how}{named}; {told}{by_list}", passed_over)


def images_alone(folder: str | Path) -> list[Pair]:
    """The images below a folder of unlabeled ones, at any depth; masks and what else their folders say is left out.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`unlabeled_root`: no folder {folder}.")
    looked = walk(folder, IMAGE_SUFFIXES)
    looked.say()
    place, affixes = _Places(folder, looked, None, None), _Affixes(None, None)
    files = [place(path, file) for path, file in looked.files.items()]
    files = [file for file in files if file.role not in ("mask", "other")]
    stems = {(file.rest, file.stem) for file in files}
    found = [
        Pair("/".join([*file.rest, file.stem]), file.path, file.file, None, file.split)
        for file in files
        if not (affixes.is_mask(file.path) and (file.rest, affixes.bare_mask(file.stem)) in stems)
    ]
    if not found:
        passed = f" Passed over: {'; '.join(looked.lines())}." if looked.passed_over else ""
        raise ValueError(f"`unlabeled_root`: no image in {folder}.{passed}")
    return found


def _refuse_other_loaders(root: Path, looked: Walk) -> None:
    """Layouts that another loader knows better."""
    others = looked.passed_over.get(OTHER_KIND, [])
    listed = [name for name in others if PurePosixPath(name).name == "metadata.jsonl"]
    if listed:
        raise ValueError(
            f"{root / listed[0]} lists files: read them with `--dataset folder --data_root "
            f"{(root / listed[0]).parent}`, or take the list away."
        )
    if any("gtFine" in PurePosixPath(name).parts for name in looked.files):
        raise ValueError(f"{root} has Cityscapes' folders: read it with `--dataset cityscapes --data_root {root}`.")


# ------------------------------------------------------------------------------------------------ by folders


class _Places:
    """What the folders of a file say of it."""

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

    def __call__(self, path: str, file: Path) -> _File:
        dirs = PurePosixPath(path).parts[self.wrappers : -1]
        role, start, end = self._role(dirs)
        said = {i: _words(part)[0] for i, part in enumerate(dirs) if _words(part) and _words(part)[0]}
        near = {0, start - 1, *range(start, end + 1)} if role else {0}  # a deeper `test` may be a field test's
        at = next((i for i in sorted(said) if i in near), None)
        drop = {*range(start, end)} if role and role != "unlabeled" else set()
        drop |= {i for i, part in enumerate(dirs) if role and (_words(part) or ("", ""))[1] in ("image", "mask")}
        rest = tuple(part for i, part in enumerate(dirs) if i not in drop and i != at)
        told_by = "/".join(dirs[start:end]) if role else ""
        return _File(path, file, role, None if at is None else said[at], rest, told_by)

    def _role(self, dirs: Sequence[str]) -> tuple[str | None, int, int]:
        """(role, and which of the folders say so): as given, or by the deepest name that is usual."""
        for role in ("mask", "image"):
            wanted = self.given.get(role)
            if wanted and (at := _position(dirs, wanted)) is not None:
                return role, at, at + len(wanted)
        for i in reversed(range(len(dirs))):
            words = _words(dirs[i])
            role = words[1] if words else None
            if role and role not in self.given:  # where its folder was named, no other one is it
                return role, i, i + 1
        return ("image" if "image" in self.given and not self.given["image"] else None), 0, 0


def _wrappers(dirs: Iterable[tuple[str, ...]], named: Collection[str]) -> int:
    """How many folders lead to all files and say nothing, as those that an archive was packed in."""
    common = os.path.commonprefix(list(dirs))
    return next((i for i, part in enumerate(common) if part in named or _words(part)), len(common))


def _position(dirs: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((i for i in range(len(dirs)) if tuple(dirs[i : i + len(wanted)]) == tuple(wanted)), None)


def _words(name: str) -> tuple[str | None, str | None] | None:
    """(split, role) that a folder's name says; none where it says neither, or says more than that."""
    whole = name.casefold()
    if whole in _ROLES or whole in SPLITS:
        annot = re.fullmatch("(train|val|test)annot", whole)
        return SPLITS.get(annot[1] if annot else whole), _ROLES.get(whole)
    words = [word for word in re.split(r"[_\-. ]+", whole) if word]
    splits = [SPLITS[word] for word in words if word in SPLITS]
    roles = [_ROLES[word] for word in words if word in _ROLES]
    known = all(word in SPLITS or word in _ROLES or word in _NEUTRAL or word.isdigit() for word in words)
    if not known or not (splits or roles):
        return None
    role = next((role for role in ("unlabeled", "other", "mask", "image") if role in roles), None)
    return (splits[0] if splits else None), role


# ------------------------------------------------------------------------------------------------ by names


class _Affixes:
    """What a name has beside what an image and its mask share."""

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
        """Of a file among images."""
        stem, kind = _stem(path), PurePosixPath(path).suffix.lower()
        if self.mask_suffix is not None:
            return bool(self.mask_suffix) and stem.endswith(self.mask_suffix)
        return kind in MASK_SUFFIXES and _without_affix(stem, _MASK_AFFIX) != stem


def _without_affix(stem: str, words: str) -> str:
    """ "a_mask", "mask_a", "a-Mask" -> "a"; what would leave nothing stays."""
    bare = re.sub(rf"[_\-. ](?:{words})$", "", stem, flags=re.IGNORECASE)
    bare = bare if bare != stem else re.sub(rf"^(?:{words})[_\-. ]", "", stem, flags=re.IGNORECASE)
    return bare or stem


def _stem(path: str) -> str:
    return PurePosixPath(unicodedata.normalize("NFC", path)).stem  # macOS writes an ü as two characters


# ------------------------------------------------------------------------------------------------ the two sides


def _sides(root: Path, files: list[_File], affixes: _Affixes, looked: Walk) -> tuple[list[_File], list[_File], str]:
    """(masks, images, the layout in words)."""
    by_role: dict[str | None, list[_File]] = {}
    for file in files:
        by_role.setdefault(file.role, []).append(file)
    labels, pictures = by_role.get("mask", []), by_role.get("image", [])
    unlabeled, rest = by_role.get("unlabeled", []), by_role.get(None, [])
    if labels:
        if affixes.mask_suffix:
            labels = [file for file in labels if file.stem.endswith(affixes.mask_suffix)] or labels
        _refuse_lossy(root, labels)
        where = "masks in " + _folders(labels)
        if not pictures:
            pictures, told = _image_folder(root, rest, labels, affixes)
            return labels, [*pictures, *unlabeled], f"images in {told}, {where}"
        return labels, [*pictures, *unlabeled], f"images in {_folders(pictures)}, {where}"
    together = [*pictures, *rest]
    labels = [file for file in together if affixes.is_mask(file.path)]
    if labels:
        _refuse_lossy(root, labels)
        named = {file.path for file in labels}
        pictures = [file for file in together if file.path not in named]
        return labels, [*pictures, *unlabeled], "images and masks side by side"
    labels, pictures = _by_kind(together)
    if labels:
        return labels, [*pictures, *unlabeled], "images and masks side by side, told by their kind (a.jpg, a.png)"
    raise _no_masks(root, files, looked)


def _folders(files: Sequence[_File]) -> str:
    names = sorted({f"{file.told_by or '.'}/" for file in files})
    return first_few(names, 3)


def _refuse_lossy(root: Path, labels: Sequence[_File]) -> None:
    lossy = [file.path for file in labels if PurePosixPath(file.path).suffix.lower() not in MASK_SUFFIXES]
    if lossy:
        raise ValueError(
            f"{len(lossy)} of {len(labels)} masks in {root} are of a kind that may change values: "
            f"{first_few(lossy, 3)}. Masks are read as {', '.join(MASK_SUFFIXES)}: save them as PNG from what they "
            "were made of, not from these files."
        )


def _by_kind(files: Sequence[_File]) -> tuple[list[_File], list[_File]]:
    """(masks, images) of one name in one folder, where one of two files is of a kind that loses values."""
    twins: dict[tuple, list[_File]] = {}
    for file in files:
        twins.setdefault((str(PurePosixPath(file.path).parent), file.stem), []).append(file)
    labels = []
    for both in twins.values():
        lossless = [file for file in both if PurePosixPath(file.path).suffix.lower() in MASK_SUFFIXES]
        if len(both) == 2 and len(lossless) == 1:
            labels += lossless
    found = {file.path for file in labels}
    return labels, [file for file in files if file.path not in found]


def _image_folder(
    root: Path, rest: Sequence[_File], labels: Sequence[_File], affixes: _Affixes
) -> tuple[list[_File], str]:
    """The images that masks belong to, where no folder's name says it: in the folder itself, or in the one folder
    whose names fit."""
    candidates: dict[str, list[_File]] = {"": list(rest)} if rest else {}
    for file in rest:
        if file.rest:
            candidates.setdefault(file.rest[0], []).append(file._replace(rest=file.rest[1:], told_by=file.rest[0]))
    wanted = {(label.rest, affixes.bare_mask(label.stem)) for label in labels}
    fits = {
        name: len({(file.rest, affixes.bare_image(file.stem)) for file in files} & wanted)
        for name, files in candidates.items()
    }
    best = max(fits.values(), default=0)
    names = [name for name, count in fits.items() if count == best]
    there = ", ".join(f"{name or '.'}/ ({len(candidates[name])} files, {fits[name]} fit)" for name in sorted(fits))
    if best == 0 or len(names) > 1:
        what = "no image has the name of a mask" if best == 0 else f"{' and '.join(names)} fit equally well"
        raise ValueError(
            f"Masks were found in {root} ({_folders(labels)}, {len(labels)}), but not where their images are: {what}; "
            f"images lie in {there or 'no other folder'}. Name the folder: "
            f"{_typed(images=next((n for n in names if n), 'FOLDER'))}."
        )
    chosen = names[0]
    return candidates[chosen], f"{chosen}/" if chosen else "the folder itself"


def _no_masks(root: Path, files: Sequence[_File], looked: Walk) -> NoMasksError:
    folders: dict[str, Counter] = {}
    for file in files:
        kinds = folders.setdefault(str(PurePosixPath(file.path).parent), Counter())
        kinds[PurePosixPath(file.path).suffix.lower()] += 1
    there = [
        f"{'the folder itself' if name == '.' else name} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
        for name, kinds in sorted(folders.items())
    ]
    shapes = [
        name
        for name in looked.passed_over.get(OTHER_KIND, [])
        if PurePosixPath(name).suffix.lower() in (".json", ".xml", ".txt")
        and any((_words(part) or (None, None))[1] == "mask" for part in PurePosixPath(name).parts[:-1])
    ]
    drawn = f" {first_few(shapes, 1)}: boxes and polygons must be drawn as masks first." if shapes else ""
    folder = next((name for name in sorted(folders) if name != "."), "FOLDER")
    return NoMasksError(
        f"Nothing in {root} looks like masks; found images in {first_few(there)}. Expected folders such as images/ "
        "and masks/, with one name for an image and its mask, or a.jpg and a_mask.png side by side. If the masks are "
        f"there under other names: {_typed(images='IMAGES', masks=folder)} or {_typed(mask_suffix='_seg')}.{drawn}"
    )


# ------------------------------------------------------------------------------------------------ matching


def _matched(
    root: Path, pictures: Sequence[_File], labels: Sequence[_File], affixes: _Affixes
) -> tuple[dict[str, _File], str]:
    """(by image, its mask; how the names differ, in words)."""
    ways: list[tuple[Callable[[str], str], Callable[[str], str]]] = [
        (str, str),
        (str, affixes.bare_mask),
        (affixes.bare_image, str),
        (affixes.bare_image, affixes.bare_mask),
    ]
    images_of = _assigned(root, pictures, labels, ways)
    if not images_of and affixes.image_suffix is None and affixes.mask_suffix is None:
        ends = [_common_end([file.stem for file in files]) for files in (pictures, labels)]
        ways = [(lambda stem: stem.removesuffix(ends[0]), lambda stem: stem.removesuffix(ends[1]))]
        images_of = _assigned(root, pictures, labels, ways) if any(ends) else {}
    masks_of: dict[str, list[_File]] = {}
    for label in labels:
        if label.path in images_of:
            masks_of.setdefault(images_of[label.path].path, []).append(label)
    several = {image: found for image, found in masks_of.items() if len(found) > 1}
    if several:
        image, found = next(iter(several.items()))
        folders = sorted({label.told_by for label in found})
        hint = _typed(masks=folders[0]) if len(folders) > 1 else _typed(mask_suffix=_ending(image, found[0]))
        raise ValueError(
            f"{len(several)} images in {root} have more than one mask, e.g. {image}: "
            f"{' and '.join(label.path for label in found[:4])}. Say which is meant: {hint}; or move the others away."
        )
    alone = [label.path for label in labels if label.path not in images_of and label.split != "test"]
    if alone:
        example = next((file.path for file in pictures), "none")
        raise ValueError(
            f"{len(alone)} of {len(labels)} masks in {root} belong to no image: {first_few(alone, 3)}; an image is "
            f"called e.g. {example}. Rename or remove them, or say what names have after what both share: "
            f"{_typed(image_suffix='_image', mask_suffix='_mask')}."
        )
    matched = {image: found[0] for image, found in masks_of.items()}
    return matched, _naming(list(matched.items()))


def _assigned(
    root: Path,
    pictures: Sequence[_File],
    labels: Sequence[_File],
    ways: Sequence[tuple[Callable[[str], str], Callable[[str], str]]],
) -> dict[str, _File]:
    """By mask, its image: the first way of comparing names that finds one. A mask outside of split folders may belong
    to an image within one."""
    found: dict[str, _File] = {}
    for of_image, of_mask in ways:
        index: dict[tuple, list[_File]] = {}
        for file in pictures:
            if file.role == "unlabeled":
                continue
            name = "/".join([*file.rest, of_image(file.stem)])
            name = unicodedata.normalize("NFC", name)
            index.setdefault((file.split, name), []).append(file)
            index.setdefault(("any", name), []).append(file)
        for label in labels:
            if label.path in found:
                continue
            name = unicodedata.normalize("NFC", "/".join([*label.rest, of_mask(label.stem)]))
            hits = index.get((label.split, name)) or (index.get(("any", name)) if label.split is None else None) or []
            if len(hits) > 1:
                raise ValueError(
                    f"The mask {label.path} in {root} fits more than one image: "
                    f"{' and '.join(file.path for file in hits[:4])}. Rename or remove all but one."
                )
            if hits:
                found[label.path] = hits[0]
    return found


def _common_end(stems: Sequence[str]) -> str:
    """What all names end in, from a separator on: "_manual1"."""
    if len(stems) < 2:
        return ""
    end = os.path.commonprefix([stem[::-1] for stem in stems])[::-1]
    at = re.search(r"[_\-. ]", end)
    return end[at.start() :] if at else ""


def _ending(image: str, label: _File) -> str:
    """What a mask's name has after its image's."""
    stem = _stem(image)
    start = os.path.commonprefix([stem, label.stem])
    return label.stem[len(start) :]


def _naming(matched: Sequence[tuple[str, _File]]) -> str:
    endings = Counter(_ending(image, label) for image, label in matched)
    common = [ending for ending, _ in endings.most_common(2) if ending]
    return f", named like their images with {' or '.join(f'`{ending}`' for ending in common)}" if common else ""


def _listed_splits(root: Path, looked: Walk) -> dict[str, str]:
    """The split of an image by its name, where ImageSets/Segmentation lists a validation set (Pascal VOC's way)."""
    found: dict[str, str] = {}
    lists = [
        name
        for name in looked.passed_over.get(OTHER_KIND, [])
        if PurePosixPath(name).parts[-3:-1] == ("ImageSets", "Segmentation") and name.lower().endswith(".txt")
    ]
    for split in ("train", "val", "test"):
        for name in lists:
            if PurePosixPath(name).stem.lower() == split:
                try:
                    lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
                except (OSError, UnicodeDecodeError) as error:
                    raise ValueError(f"{root / name} is no list of images in UTF-8 text: {error}.") from error
                found |= {
                    unicodedata.normalize("NFC", PurePosixPath(line.strip()).name): split
                    for line in lines
                    if line.strip()
                }
    return found if "val" in found.values() else {}


def _typed(**options: str) -> str:
    """As a command line takes them."""
    return f"`--load_options '{json.dumps(options, ensure_ascii=False)}'`"
