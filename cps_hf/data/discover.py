"""A user's folder: images with a mask are labeled, the others unlabeled, and part of the labeled images is held out
for validation.

    found = discover("DIR")
    print(found.table())

`layout.py` detects the layout, `mask_codes.py` the meaning of masks, and `holdout.py` chooses what is held out.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PILImage

from .class_tables import find_class_tables, given_classes
from .discovered import Discovered
from .folder import load_folder
from .holdout import FEW, group_of, hold_out, suggested_groups
from .labels import IGNORE_INDEX
from .layout import Layout, Pair, find_layout, images_alone
from .layout_names import SPLITS
from .mask_codes import Coding, class_pixels, look_at_masks, settle
from .partitions import read_list
from .same_files import KnownFiles
from .table import build, first_few
from .windowed import is_beyond_decoding, windowed_size

SHARE = 0.2  # of the labeled images, if there is no validation split
SIZES_OF = 1000  # images of a set, evenly spaced, whose sizes are read
_LAYOUT_OPTIONS = ("images", "masks", "image_suffix", "mask_suffix")
_CODING_OPTIONS = ("values", "colors", "reduce_labels")
_LATER_OPTIONS = ("palette", "resize_masks")
OPTIONS = (*_LAYOUT_OPTIONS, "class_names", *_CODING_OPTIONS, *_LATER_OPTIONS)
"""The supported `load_options`, with the names of `load_folder`."""
assert {*OPTIONS} <= {*inspect.signature(load_folder).parameters}


def discover(
    root: str | Path,
    *,
    unlabeled_root: str | Path | None = None,
    validation: str | float | Path = "auto",
    group_by: str | None = None,
    seed: int = 0,
    class_names: Sequence[str] | Mapping[int | str, str] | str | Path | None = None,
    load_options: Mapping[str, Any] | None = None,
) -> Discovered:
    """Find the labeled, unlabeled and validation images of a folder.

    Args:
        root: the folder. Supported layouts are listed in docs/data.md.
        unlabeled_root: a folder of additional images without masks, at any depth.
        validation: which labeled images are held out: a share (0.2), a file with one image per line, the name of a
            split ("val", "test"), "none", or "auto": the validation split if any, otherwise 0.2.
        group_by: a regular expression, searched in each image's path below `root`. Images with the same first group
            stay on one side. Unlabeled images of a held-out group are skipped.
        seed: draws the held-out images.
        class_names: names, or a file of them. If `None`, from a file next to the images, otherwise `class_0`, ...
        load_options: `OPTIONS`, as in `load_folder`, for what common names do not reveal.

    Raises:
        ValueError: something is missing or ambiguous; the message says what was found and what to do.
    """
    root, options = Path(root), dict(load_options or {})
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"`load_options` of an own folder: no {unknown[0]!r}, only {', '.join(OPTIONS)}.")
    layout = find_layout(root, **{name: options[name] for name in _LAYOUT_OPTIONS if name in options})
    sides = _sides(layout)
    wish = _wish(sides, validation)  # its errors come before masks are read
    notes = sides.left_alone(wish.split)
    if unlabeled_root is not None:
        notes += sides.add_unlabeled(Path(unlabeled_root), wish.pairs or [])
    masked = [*sides.labeled, *((wish.pairs or []) if wish.split else [])]
    coding, pixels = _read_masks(layout, masked, class_names or options.get("class_names"), options)
    notes += coding.notes
    evaluation = wish.pairs or []
    if wish.share is not None:
        evaluation, more = _held_out(sides, pixels, wish.share, group_by, seed)
        notes += more
    elif group_by is not None:
        notes.append("`group_by` has no effect: no share of the labeled images is held out.")
    out = {pair.path for pair in evaluation}
    train = [pair for pair in sides.labeled if pair.path not in out]
    if not train:
        raise ValueError(f"All {len(out)} labeled images of {root} are validation images: none is left to train on.")
    sets = {"labeled": train, "unlabeled": sides.unlabeled, "validation": evaluation}
    totals = {name: _total(pixels, sets[name]) for name in ("labeled", "validation") if sets[name]}
    notes += _absent(coding.encoding.names, totals) if evaluation else [NO_VALIDATION]
    feature = coding.encoding.to_feature()
    return Discovered(
        root=root,
        labeled=_dataset(train, feature),
        unlabeled=_dataset(sides.unlabeled) if sides.unlabeled else None,
        evaluation=_dataset(evaluation, feature) if evaluation else None,
        class_names=coding.encoding.names,
        layout=layout.sentence,
        held_out=[] if wish.split else sorted(pair.id for pair in evaluation),
        passed_over=layout.passed_over,
        sizes={name: _sizes([pair.image for pair in pairs]) for name, pairs in sets.items() if pairs},
        pixels=totals,
        judged_on=wish.words if evaluation else "",
        notes=notes,
    )


def _read_masks(
    layout: Layout, pairs: Sequence[Pair], class_names: Any, options: Mapping[str, Any]
) -> tuple[Coding, dict[str, np.ndarray]]:
    """(how masks are read, the pixels of each class by path)."""
    names = [pair.path for pair in pairs]
    root = layout.root
    masks = [(p.mask.relative_to(root) if p.mask.is_relative_to(root) else p.mask).as_posix() for p in pairs]
    looks = look_at_masks(masks, [pair.mask for pair in pairs])
    coding = settle(
        masks,
        looks,
        find_class_tables(_folders_of(layout)),
        given=None if class_names is None else given_classes(class_names),
        coding={name: options[name] for name in _CODING_OPTIONS if options.get(name)},
    )
    later = {name: options[name] for name in _LATER_OPTIONS if options.get(name)}
    if "palette" in later:
        later["palette"] = tuple(map(tuple, later["palette"]))
    encoding = replace(coding.encoding, **later)
    problems = [look.problem for look in looks if look.problem is not None]
    unread = [f"WARNING: {len(problems)} masks cannot be read. {problems[0]}"] if problems else []
    pixels = {name: class_pixels(look, encoding) for name, look in zip(names, looks, strict=True)}
    return Coding(encoding, [*coding.notes, *unread]), pixels


# ------------------------------------------------------------------------------------------------ the sides


@dataclass
class _Sides:
    """The images of a folder: training images with and without a mask, and the images of other splits."""

    root: Path
    labeled: list[Pair]
    unlabeled: list[Pair]
    splits: dict[str, list[Pair]]

    def left_alone(self, chosen: str | None) -> list[str]:
        """Sentences about splits that the run does not use. `chosen`: the validation split."""
        found = []
        for name, pairs in self.splits.items():
            bare = sum(pair.mask is None for pair in pairs)
            if name == chosen and bare:
                found.append(f"{bare} images of the {name} split have no mask and are not used.")
            elif name != chosen and pairs:
                score = f" `--validation {name}` scores on it." if bare < len(pairs) else ""
                found.append(
                    f"The {name} split ({len(pairs)} images, {len(pairs) - bare} with a mask) is not used for "
                    f"training or validation.{score}"
                )
        return found

    def add_unlabeled(self, folder: Path, evaluation: Sequence[Pair]) -> list[str]:
        """Add unlabeled images that are not in use already. Returns sentences."""
        known = KnownFiles(pair.image for pair in [*self.labeled, *self.unlabeled, *evaluation])
        taken, further = {pair.id for pair in self.unlabeled}, images_alone(folder)
        new = [pair for pair in further if pair.image not in known]
        if any(pair.id in taken for pair in new):
            new = [pair._replace(id=f"{folder.name}/{pair.id}") for pair in new]
        self.unlabeled = [*self.unlabeled, *new]
        same = len(further) - len(new)
        return [f"{same} images of {folder} are already in {self.root} and are not added."] if same else []


def _sides(layout: Layout) -> _Sides:
    """
    Raises:
        ValueError: no training image has a mask.
    """
    pool = [pair for pair in layout.pairs if pair.split in (None, "train")]
    labeled, unlabeled = ([p for p in pool if (p.mask is not None) == with_mask] for with_mask in (True, False))
    splits = {name: [pair for pair in layout.pairs if pair.split == name] for name in ("val", "test")}
    if not labeled:
        there = ", ".join(f"{sum(p.mask is not None for p in pairs)} in {name}" for name, pairs in splits.items())
        raise ValueError(
            f"{layout.root}: {len(pool)} images to train on, and none of them has a mask ({layout.sentence}; images "
            f"with masks: {there}). Add masks of some of them next to the other masks."
        )
    return _Sides(layout.root, _with_own_ids(labeled), _with_own_ids(unlabeled), splits)


def _with_own_ids(pairs: list[Pair]) -> list[Pair]:
    """Make ids unique: if two are equal, all use the whole path."""
    for make in (lambda pair: pair.id, lambda pair: os.path.splitext(pair.path)[0]):
        if len({make(pair) for pair in pairs}) == len(pairs):
            return [pair._replace(id=make(pair)) for pair in pairs]
    return [pair._replace(id=pair.path) for pair in pairs]


def _folders_of(layout: Layout) -> list[Path]:
    """Where class files may be: the folder itself, and all folders on the way to labeled images and masks."""
    found = {layout.root: None}
    for pair in layout.pairs:
        for path in [pair.image, pair.mask] if pair.mask is not None else []:
            for folder in path.parents:
                if folder == layout.root:
                    break
                found[folder] = None
    return sorted(found, key=lambda folder: (len(folder.parts), folder))


# ------------------------------------------------------------------------------------------------ validation


@dataclass
class _Wish:
    """Which images are validation images: a share of the labeled ones, or the given pairs (a split or a list).
    `words` describes the source."""

    share: float | None = None
    pairs: list[Pair] | None = None
    words: str = ""
    split: str | None = None


def _wish(sides: _Sides, validation: str | float | Path) -> _Wish:
    with_masks = {name: [p for p in pairs if p.mask is not None] for name, pairs in sides.splits.items()}
    text = str(validation).strip()
    if text == "auto" and with_masks["val"]:
        return _Wish(pairs=with_masks["val"], words="the validation split", split="val")
    if text.casefold() == "none":
        return _Wish()
    split = SPLITS.get(text.casefold())
    if split in with_masks:
        if not with_masks[split]:
            raise ValueError(f"`validation` {text}: {sides.root} has no images with masks in such a split.")
        return _Wish(pairs=with_masks[split], words=f"the {split} split, as set by `validation`", split=split)
    if text != "auto" and Path(text).is_file():
        return _Wish(pairs=_listed(sides, Path(text)), words=f"the images listed in {Path(text).name}")
    try:
        share = SHARE if text == "auto" else float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        hint = f" By default, the validation split of {sides.root} is used." if with_masks["val"] else ""
        raise ValueError(
            "`validation` must be a share between 0 and 1, a file that lists images, the name of a split (val, test), "
            f"or none; got {text!r}, and there is no such file.{hint}"
        )
    return _Wish(share=share, words=f"{100 * share:g} % of the labeled images, held out")


def _listed(sides: _Sides, file: Path) -> list[Pair]:
    by_id = {pair.id: pair for pair in sides.labeled}
    ids = read_list(file.read_bytes(), str(file), [*by_id, *(pair.id for pair in sides.unlabeled)])
    missing = [name for name in dict.fromkeys(ids) if name not in by_id]
    if missing or not ids:
        raise ValueError(
            f"{file}: {len(missing)} of {len(ids)} listed images are not labeled images of {sides.root}: "
            f"{first_few(missing, 3) or 'it is empty'}; there are {first_few([*by_id], 3)}. Write one image per line."
        )
    return [by_id[name] for name in sorted({*ids})]


def _held_out(
    sides: _Sides, pixels: Mapping[str, np.ndarray], share: float, group_by: str | None, seed: int
) -> tuple[list[Pair], list[str]]:
    """(the held-out images, sentences). Removes unlabeled images of held-out groups from `sides`."""
    usable = [pair for pair in sides.labeled if pixels[pair.path][:IGNORE_INDEX].any()]
    too_large = {pair.path for pair in usable if is_beyond_decoding({"path": str(pair.image)})}
    usable = [pair for pair in usable if pair.path not in too_large]
    if group_by is not None and too_large:  # their groups stay in training
        kept = {*group_of(group_by, sorted(too_large))}
        of_usable = group_of(group_by, [pair.path for pair in usable])
        usable = [pair for pair, group in zip(usable, of_usable, strict=True) if group not in kept]
    paths = [pair.path for pair in usable]
    groups = None if group_by is None else group_of(group_by, paths)
    notes = []
    if too_large:
        notes.append(
            f"{len(too_large)} labeled images are too large to be scored whole and are not held out. `cps-hf prepare "
            "--tile 1024` cuts images for validation."
        )
    chosen: set[str] = set()
    if usable:
        holds = np.stack([pixels[path][:IGNORE_INDEX] > 0 for path in paths])
        chosen = {*hold_out(paths, holds, share, groups=groups, seed=seed)}
    held = [pair for pair in usable if pair.path in chosen]
    if not held:
        if usable or not too_large:
            notes.append(f"With {len(usable)} labeled images, none is held out ({FEW} or more are needed).")
    elif groups is not None:
        theirs = {group for group, path in zip(groups, paths, strict=True) if path in chosen}
        of_unlabeled = group_of(group_by, [pair.path for pair in sides.unlabeled], strict=False)
        kept = [p for p, group in zip(sides.unlabeled, of_unlabeled, strict=True) if group not in theirs]
        notes.append(f"Held out as whole groups: {first_few(sorted(theirs))} (of {len({*groups})} groups).")
        if len(kept) < len(sides.unlabeled):
            left_out = len(sides.unlabeled) - len(kept)
            notes.append(f"{left_out} unlabeled images of these groups are skipped.")
        sides.unlabeled = kept
    elif suggested := suggested_groups(paths):
        pattern, found = suggested
        notes.append(
            f"The names look like numbered frames of {len(found)} sequences ({first_few(found, 3)}). Neighbouring "
            "frames are similar, so scores on held-out frames are too good. To hold out whole sequences: "
            f"`--group_by '{pattern}'`."
        )
    return held, notes


NO_VALIDATION = (
    "WARNING: there is no validation image. No scores can be computed, no best network can be chosen, and the effect "
    "of the unlabeled images cannot be measured."
)


# ------------------------------------------------------------------------------------------------ what is reported


def _total(pixels: Mapping[str, np.ndarray], pairs: Sequence[Pair]) -> np.ndarray:
    return np.sum([pixels[pair.path] for pair in pairs], axis=0, dtype=np.int64)


def _absent(names: Sequence[str], pixels: Mapping[str, np.ndarray]) -> list[str]:
    notes = []
    for name, what in (("labeled", "no labeled training image has"), ("validation", "no validation image has")):
        if name in pixels and (absent := [c for c, n in zip(names, pixels[name], strict=False) if n == 0]):
            notes.append(f"{what[0].upper()}{what[1:]}: {first_few(absent, 8)}.")
    return notes


def _sizes(images: Sequence[Path]) -> list[tuple[int, int]]:
    """(height, width) as displayed, from the headers of at most `SIZES_OF` images; unreadable ones are skipped."""
    found = []
    for path in images[:: max(1, -(-len(images) // SIZES_OF))]:
        if size := windowed_size({"path": str(path)}):
            found.append(size)
            continue
        try:
            with PILImage.open(path) as image:
                turned = image.format in ("JPEG", "MPO") and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                found.append((image.width, image.height) if turned else (image.height, image.width))
        except Exception:  # PIL's error for a damaged file: the survey of all samples reports it
            continue
    return found


def _dataset(pairs: Sequence[Pair], feature: Image | None = None) -> Dataset:
    ids, images = [pair.id for pair in pairs], [pair.image for pair in pairs]
    return build(ids, images, None if feature is None else [pair.mask for pair in pairs], feature)
