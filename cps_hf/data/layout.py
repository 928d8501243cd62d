"""Find the images and masks in a folder, and which belong together: the layouts that users have.

Folders are recognized by their names (`images`, `masks`, `SegmentationClass`, `train_masks`, ...), files by the parts
of their names that images and masks do not share (`a.jpg` and `a_mask.png`). Anything ambiguous is an error that lists
what was found: a wrong guess would silently train on wrong labels.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .class_tables import READERS
from .layout_matching import match, typed
from .layout_names import Affixes, NamedFile, Places, words_of
from .table import first_few
from .walk import IMAGE_SUFFIXES, MASK_SUFFIXES, OTHER_KIND, Walk, no_folder, walk


class Pair(NamedTuple):
    """An image, and its mask if any.

    Attributes:
        id: the image's path below the folder, without the split and without folders that only mark images or masks.
        path: the image's whole path below the folder.
        split: "train", "val", "test", or none.
    """

    id: str
    path: str
    image: Path
    mask: Path | None
    split: str | None


class NoMasksError(ValueError):
    """A folder has images, but nothing that looks like a mask."""


@dataclass
class Layout:
    """The content of a folder.

    Attributes:
        sentence: a description of the layout.
        passed_over: number of skipped files by reason.
    """

    root: Path
    pairs: list[Pair]
    sentence: str
    passed_over: dict[str, int] = field(default_factory=dict)


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
        images, masks: the names of their folders. If `None`, common names are recognized.
        image_suffix, mask_suffix: what names have after the common part of an image and its mask. If `None`, common
            suffixes are recognized.

    Raises:
        ValueError: there is nothing, or something is ambiguous: which files are masks, which are images; an image has
            two masks, or a mask no image. The message lists what was found.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{no_folder(root)} Give a folder of images and masks; a data set on the Hub is read with `--dataset "
            "hub --data_root ID`."
        )
    looked = _walk(root)
    _reject_other_layouts(root, looked)
    if not looked.files:
        passed = f" Skipped: {'; '.join(looked.lines())}." if looked.passed_over else ""
        raise ValueError(f"No image in {root}: looked for {', '.join(IMAGE_SUFFIXES)}.{passed}")
    place = Places(root, looked, images, masks)
    files = [place(path, file) for path, file in looked.files.items()]
    affixes = Affixes(image_suffix, mask_suffix)
    labels, pictures, how = _sides(root, files, affixes, looked)
    used = {file.path for file in [*labels, *pictures]}
    mask_of, named = match(root, pictures, labels, affixes)
    listed = _listed_splits(root, looked)
    pairs = [
        Pair(
            id="/".join([*file.rest, file.stem]),
            path=file.path,
            image=file.file,
            mask=mask_of[file.path].file if file.path in mask_of else None,
            split=file.split or (file.path in mask_of and mask_of[file.path].split) or listed.get(file.stem),
        )
        for file in pictures
    ]
    passed_over = _counted(looked)
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


def _walk(folder: Path) -> Walk:
    """The files below the folder, without the output of earlier runs: `cps-hf train .` leaves pictures there."""
    looked = walk(folder, IMAGE_SUFFIXES)
    others = [PurePosixPath(name) for name in looked.passed_over.get(OTHER_KIND, [])]
    runs = set.intersection(
        *({p.parent for p in others if p.name == name} for name in ("config.yaml", "metrics.jsonl"))
    )
    theirs = [name for name in looked.files if runs & {*PurePosixPath(name).parents}]
    for name in theirs:
        del looked.files[name]
        looked.pass_over("of earlier runs", name)
    return looked


def _counted(looked: Walk) -> dict[str, int]:
    """Number of skipped files by reason, without files that are used here, such as lists."""
    found = {}
    for reason, names in looked.passed_over.items():
        if reason == OTHER_KIND:
            names = [name for name in names if PurePosixPath(name).name not in READERS and not _is_list(name)]
            kinds = sorted({PurePosixPath(name).suffix.lower() or "no suffix" for name in names})
            reason = f"{reason} ({first_few(kinds)})"
        if names:
            found[reason] = len(names)
    return found


def images_alone(folder: str | Path) -> list[Pair]:
    """The images below a folder of unlabeled ones, at any depth, without masks according to their folders' names.

    Raises:
        ValueError: there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`unlabeled_root`: {no_folder(folder)}")
    looked = _walk(folder)
    looked.say()
    place, affixes = Places(folder, looked, None, None), Affixes(None, None)
    files = [place(path, file) for path, file in looked.files.items()]
    files = [file for file in files if file.role not in ("mask", "other")]
    stems = {(file.rest, file.stem) for file in files}
    found = [
        Pair("/".join([*file.rest, file.stem]), file.path, file.file, None, file.split)
        for file in files
        if not (affixes.is_mask(file.path) and (file.rest, affixes.bare_mask(file.stem)) in stems)
    ]
    if not found:
        passed = f" Skipped: {'; '.join(looked.lines())}." if looked.passed_over else ""
        raise ValueError(f"`unlabeled_root`: no image in {folder}.{passed}")
    return found


def _reject_other_layouts(root: Path, looked: Walk) -> None:
    """Raise an error for layouts that have their own loader."""
    others = looked.passed_over.get(OTHER_KIND, [])
    listed = [name for name in others if PurePosixPath(name).name == "metadata.jsonl"]
    if listed:
        raise ValueError(
            f"{root / listed[0]} lists files: read them with `--dataset folder --data_root "
            f"{(root / listed[0]).parent}`, or remove the list."
        )
    if any("gtFine" in PurePosixPath(name).parts for name in looked.files):
        raise ValueError(f"{root} has Cityscapes' folders: read it with `--dataset cityscapes --data_root {root}`.")


# ------------------------------------------------------------------------------------------------ the two sides


def _sides(
    root: Path, files: list[NamedFile], affixes: Affixes, looked: Walk
) -> tuple[list[NamedFile], list[NamedFile], str]:
    """(masks, images, a description of the layout)."""
    by_role: dict[str | None, list[NamedFile]] = {}
    for file in files:
        by_role.setdefault(file.role, []).append(file)
    labels, pictures = by_role.get("mask", []), by_role.get("image", [])
    unlabeled, rest = by_role.get("unlabeled", []), by_role.get(None, [])
    if labels:
        if affixes.mask_suffix:
            labels = [file for file in labels if file.stem.endswith(affixes.mask_suffix)] or labels
        _reject_lossy(root, labels)
        where = "masks in " + _folders(labels)
        if not pictures:
            pictures, told = _image_folder(root, rest, labels, affixes)
            return labels, [*pictures, *unlabeled], f"images in {told}, {where}"
        return labels, [*pictures, *unlabeled], f"images in {_folders(pictures)}, {where}"
    together = [*pictures, *rest]
    labels = [file for file in together if affixes.is_mask(file.path)]
    if labels:
        _reject_lossy(root, labels)
        named = {file.path for file in labels}
        pictures = [file for file in together if file.path not in named]
        return labels, [*pictures, *unlabeled], "images and masks side by side"
    labels, pictures = _by_kind(together)
    if labels:
        return labels, [*pictures, *unlabeled], "images and masks side by side, told apart by file type (a.jpg, a.png)"
    raise _no_masks(root, files, looked)


def _folders(files: Sequence[NamedFile]) -> str:
    names = sorted({f"{file.told_by or '.'}/" for file in files})
    return first_few(names, 3)


def _reject_lossy(root: Path, labels: Sequence[NamedFile]) -> None:
    lossy = [file.path for file in labels if PurePosixPath(file.path).suffix.lower() not in MASK_SUFFIXES]
    if lossy:
        raise ValueError(
            f"{len(lossy)} of {len(labels)} masks in {root} are of a kind that may change values: "
            f"{first_few(lossy, 3)}. Masks are read as {', '.join(MASK_SUFFIXES)}: save them as PNG from the original "
            "annotations, not from these files."
        )


def _by_kind(files: Sequence[NamedFile]) -> tuple[list[NamedFile], list[NamedFile]]:
    """(masks, images) with equal names in one folder, where one of two files has a lossy file type."""
    twins: dict[tuple, list[NamedFile]] = {}
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
    root: Path, rest: Sequence[NamedFile], labels: Sequence[NamedFile], affixes: Affixes
) -> tuple[list[NamedFile], str]:
    """The images that masks belong to, if no folder name reveals them: in the folder itself, or in the only folder
    whose names match."""
    candidates: dict[str, list[NamedFile]] = {"": list(rest)} if rest else {}
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
    there = ", ".join(f"{name or '.'}/ ({len(candidates[name])} files, {fits[name]} match)" for name in sorted(fits))
    if best == 0 or len(names) > 1:
        what = "no image has the name of a mask" if best == 0 else f"{' and '.join(names)} match equally well"
        raise ValueError(
            f"Masks were found in {root} ({_folders(labels)}, {len(labels)}), but not their images: {what}; "
            f"images are in {there or 'no other folder'}. Name the folder: "
            f"{typed(images=next((n for n in names if n), 'FOLDER'))}."
        )
    chosen = names[0]
    return candidates[chosen], f"{chosen}/" if chosen else "the folder itself"


def _no_masks(root: Path, files: Sequence[NamedFile], looked: Walk) -> NoMasksError:
    folders: dict[str, Counter] = {}
    told, strange = [], []
    for file in files:
        (told if file.told_by else strange).append(file.told_by or "/".join(file.rest))
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
        and any((words_of(part) or (None, None))[1] == "mask" for part in PurePosixPath(name).parts[:-1])
    ]
    drawn = f" {first_few(shapes, 1)}: boxes and polygons must first be converted to masks." if shapes else ""
    here, truth = (next((name for name in sorted(names) if name), None) for names in (told, strange))
    return NoMasksError(
        f"Nothing in {root} looks like masks; found images in {first_few(there)}. Expected folders such as images/ "
        "and masks/, with the same name for an image and its mask, or a.jpg and a_mask.png side by side. If the masks "
        f"have other names: {typed(images=here or 'IMAGES', masks=truth or 'MASKS')} or "
        f"{typed(mask_suffix='_seg')}.{drawn}"
    )


def _listed_splits(root: Path, looked: Walk) -> dict[str, str]:
    """The split of each image by name, if ImageSets/Segmentation lists a validation set (as in Pascal VOC)."""
    found: dict[str, str] = {}
    lists = [name for name in looked.passed_over.get(OTHER_KIND, []) if _is_list(name)]
    for split in ("train", "val", "test"):
        for name in lists:
            if PurePosixPath(name).stem.lower() == split:
                try:
                    lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
                except (OSError, UnicodeDecodeError) as error:
                    raise ValueError(f"{root / name} is not a list of images in UTF-8 text: {error}.") from error
                found |= {
                    unicodedata.normalize("NFC", PurePosixPath(line.strip()).name): split
                    for line in lines
                    if line.strip()
                }
    return found if "val" in found.values() else {}


def _is_list(name: str) -> bool:
    return PurePosixPath(name).parts[-3:-1] == ("ImageSets", "Segmentation") and name.lower().endswith(".txt")
