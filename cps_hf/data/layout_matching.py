"""Match masks with images by their names."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from .layout_names import Affixes, NamedFile, stem_of
from .table import first_few


def match(
    root: Path, pictures: Sequence[NamedFile], labels: Sequence[NamedFile], affixes: Affixes
) -> tuple[dict[str, NamedFile], str]:
    """({image path: mask}, a description of how the names differ).

    Equal names are matched first, then names that are equal without common suffixes, then without folders that all
    masks or all images share, then without a common ending.

    Raises:
        ValueError: an image has several masks, a mask has several images, or none (except in a test split).
    """
    ways: list[tuple[Callable[[str], str], Callable[[str], str]]] = [
        (str, str),
        (str, affixes.bare_mask),
        (affixes.bare_image, str),
        (affixes.bare_image, affixes.bare_mask),
    ]
    images_of = _assigned(root, pictures, labels, ways)
    if not images_of:
        images_of = _assigned(root, _without_common_folders(pictures), _without_common_folders(labels), ways)
    if not images_of and affixes.image_suffix is None and affixes.mask_suffix is None:
        ends = [_common_end([file.stem for file in files]) for files in (pictures, labels)]
        ways = [(lambda stem: stem.removesuffix(ends[0]), lambda stem: stem.removesuffix(ends[1]))]
        images_of = _assigned(root, pictures, labels, ways) if any(ends) else {}
    masks_of: dict[str, list[NamedFile]] = {}
    for label in labels:
        if label.path in images_of:
            masks_of.setdefault(images_of[label.path], []).append(label)
    several = {image: found for image, found in masks_of.items() if len(found) > 1}
    if several:
        image, found = next(iter(several.items()))
        folders = sorted({label.told_by for label in found})
        hint = (
            typed(masks=folders[0])
            if len(folders) > 1
            else typed(mask_suffix=max(_ending(image, label) for label in found))
        )
        raise ValueError(
            f"{len(several)} images in {root} have more than one mask, e.g. {image}: "
            f"{' and '.join(label.path for label in found[:4])}. Choose one: {hint}; or move the others away."
        )
    alone = [label.path for label in labels if label.path not in images_of and label.split != "test"]
    if alone:
        example = next((file.path for file in pictures), "none")
        raise ValueError(
            f"{len(alone)} of {len(labels)} masks in {root} belong to no image: {first_few(alone, 3)}; an image is "
            f"called e.g. {example}. Rename or remove them, or, if the names differ by an ending, give the endings: "
            f"{typed(image_suffix='_image', mask_suffix='_mask')}."
        )
    matched = {image: found[0] for image, found in masks_of.items()}
    return matched, _naming(list(matched.items()))


def _assigned(
    root: Path,
    pictures: Sequence[NamedFile],
    labels: Sequence[NamedFile],
    ways: Sequence[tuple[Callable[[str], str], Callable[[str], str]]],
) -> dict[str, str]:
    """{mask path: image path}, from the first way of comparing names that finds an image. If one of the two is outside
    of split folders, the other may be in any split."""
    found: dict[str, str] = {}
    for of_image, of_mask in ways:
        index: dict[tuple, list[NamedFile]] = {}
        for file in pictures:
            name = "/".join([*file.rest, of_image(file.stem)])
            index.setdefault((file.split, name), []).append(file)
            index.setdefault(("any", name), []).append(file)
        for label in labels:
            if label.path in found:
                continue
            name = "/".join([*label.rest, of_mask(label.stem)])
            hits = index.get((label.split, name)) or index.get(("any" if label.split is None else None, name)) or []
            if len(hits) > 1:
                raise ValueError(
                    f"The mask {label.path} in {root} matches more than one image: "
                    f"{' and '.join(file.path for file in hits[:4])}. Rename or remove all but one."
                )
            if hits:
                found[label.path] = hits[0].path
    return found


def _without_common_folders(files: Sequence[NamedFile]) -> list[NamedFile]:
    """`annotations/trimaps/a.png` -> `annotations/a.png`, if all masks are in `trimaps`."""
    common = len(os.path.commonprefix([file.rest for file in files])) if files else 0
    return [file._replace(rest=file.rest[common:]) for file in files]


def _common_end(stems: Sequence[str]) -> str:
    """The common ending of all names, from a separator on: "_manual1"."""
    if len(stems) < 2:
        return ""
    end = os.path.commonprefix([stem[::-1] for stem in stems])[::-1]
    at = re.search(r"[_\-. ]", end)
    return end[at.start() :] if at else ""


def _ending(image: str, label: NamedFile) -> str:
    """What a mask's name has in addition to its image's."""
    start = os.path.commonprefix([stem_of(image), label.stem])
    separator = re.search(r"[_\-. ]$", start)  # 1_sat.jpg and 1_mask.png
    return label.stem[len(start) - bool(separator) :] if len(start) < len(label.stem) else ""


def _naming(matched: Sequence[tuple[str, NamedFile]]) -> str:
    endings = Counter(_ending(image, label) for image, label in matched)
    common = [ending for ending, _ in endings.most_common(2) if ending]
    return f", named like their images with {' or '.join(f'`{ending}`' for ending in common)}" if common else ""


def typed(**options: str) -> str:
    """The options as typed on a command line."""
    return f"`--load_options '{json.dumps(options, ensure_ascii=False)}'`"
