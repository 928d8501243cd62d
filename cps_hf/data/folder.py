"""A folder of a user's own images, with or without masks."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from datasets import Dataset, Image, IterableDataset

from .black_and_white import settled
from .labels import LabelEncoding, reduced_values
from .table import as_stream, as_typed, build, first_few
from .walk import IMAGE_SUFFIXES, MASK_SUFFIXES, OTHER_KIND, Walk, is_hidden, no_folder, walk

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
CLASSES = "classes.json"


def load_folder(
    root: str | Path,
    split: str | None = None,
    *,
    images: str = "images",
    masks: str = "masks",
    image_suffix: str = "",
    mask_suffix: str = "",
    class_names: Sequence[str] | Mapping[int | str, str] | str | Path | None = None,
    values: Mapping[int, int] | None = None,
    colors: Mapping[tuple[int, int, int] | str, int] | None = None,
    reduce_labels: bool = False,
    palette: Sequence[tuple[int, int, int]] | None = None,
    resize_masks: bool = False,
    with_labels: bool = True,
    only_ids: Collection[str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Images of `<root>/images` and masks of `<root>/masks`, matched by name. Subfolders are kept, links to folders
    followed. Hidden files, thumbnails and unsupported file types are skipped and logged.

    With a `split`, `<root>/<split>/images` is read, or `<root>/images/<split>`, and masks likewise. With
    `with_labels=False`, images may be directly in that folder. If there is a `metadata.jsonl` (lines with "file_name"
    and, if labeled, "mask_file_name"), it is used instead of names.

    Args:
        image_suffix, mask_suffix: what an image's and a mask's name have in addition to their common part: "" and
            "_mask" for `a.jpg` and `a_mask.png`, which may be in one folder; "_training" and "_manual1" for
            `21_training.tif` and `21_manual1.gif`.
        class_names: a list, {id: name}, or a JSON file of either. If None, `<root>/classes.json` if it exists.
            Without names, the values in masks are class ids.
        values: stored value -> class id or 255 (ignored), e.g. `{0: 0, 255: 1}` for masks of 0 and 255. This is also
            assumed, and logged, for two classes if no coding is given and the masks contain only 0 and 255.
        colors: colour -> class id or 255, for masks that are RGB pictures, or GIFs with a palette other than plain
            grey: {(128, 64, 128): 0}. JSON needs text keys: {"128, 64, 128": 0} or {"#804080": 0}.
        reduce_labels: 0 is not a class, k is class k - 1.
        palette: the display colour of each class.
        resize_masks: masks with the aspect ratio of their images but another size are resized to them by the nearest
            pixel, in training, evaluation and check alike. Needs `class_names`.
        with_labels: if False, no mask is read.
        only_ids: skip all other images, whose masks may then be missing.
        streaming: return an `IterableDataset`.

    Returns:
        Columns "image", "label" (unless `with_labels` is False) and "id" (the image's path without its suffix).

    Raises:
        ValueError: the folder is empty, an image has no mask, two images have the same name, or the class names do
            not fit.
    """
    folder, images, masks = _place_of(Path(root), split, images, masks)
    if (folder / METADATA).is_file():
        pairs = _listed_pairs(folder, with_labels, only_ids)
    else:
        suffixes = (image_suffix, mask_suffix)
        pairs = _named_pairs(folder, images, masks if with_labels else None, suffixes, only_ids)
    ids = [name for name, _, _ in pairs]
    files = [image for _, image, _ in pairs]
    if not with_labels:
        return build(ids, files, streaming=streaming)
    names = read_class_names(class_names, default=[folder / CLASSES, Path(root) / CLASSES])
    coding = {"values": values, "colors": colors, "reduce_labels": reduce_labels, "palette": palette}
    feature = label_feature(names, **coding, resize_masks=resize_masks)
    if names is None:
        logger.info(
            "%s: no class names given; mask values are class ids, and models define the number of classes.", folder
        )
    dataset = settled(build(ids, files, [mask for _, _, mask in pairs], feature), str(folder))
    return as_stream(dataset) if streaming else dataset


def label_feature(
    names: tuple[str, ...] | None,
    *,
    values: Mapping[int, int] | None = None,
    colors: Mapping[tuple[int, int, int] | str, int] | None = None,
    reduce_labels: bool = False,
    palette: Sequence[tuple[int, int, int]] | None = None,
    resize_masks: bool = False,
) -> Image:
    """The feature of a label column, from the user's options.

    Raises:
        ValueError: two codings are given, one is given without class names, or one is invalid.
    """
    ways = {"values": values, "colors": colors, "reduce_labels": reduce_labels or None}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give only one coding of labels, not {' and '.join(given)}.")
    if names is None:
        if given or palette:
            raise ValueError(f"`{(given or ['palette'])[0]}` needs `class_names`: which classes does it refer to?")
        if resize_masks:  # it is stored in the coding, which needs names
            raise ValueError("`resize_masks` needs `class_names`: it is stored together with them.")
        return Image()
    if reduce_labels:
        values = reduced_values(len(names))
    try:  # JSON keys are text
        if values is not None:
            values = {int(key): int(value) for key, value in values.items()}
        if colors is not None:
            colors = {_color(key): int(value) for key, value in colors.items()}
    except (ValueError, TypeError, AttributeError) as error:
        wanted = as_typed(values={7: 0}) if values is not None else as_typed(colors={(128, 64, 128): 0})
        raise ValueError(f"`{given[0]}` must be like {wanted}, found {ways[given[0]]!r:.80} ({error}).") from error
    palette = None if palette is None else tuple(map(tuple, palette))
    return LabelEncoding(
        names, values=values, colors=colors, palette=palette, resize_masks=bool(resize_masks)
    ).to_feature()


def _color(key) -> tuple[int, ...]:
    if isinstance(key, str) and re.fullmatch("#[0-9a-fA-F]{6}", key):
        return tuple(bytes.fromhex(key[1:]))
    return tuple(int(part) for part in (key.split(",") if isinstance(key, str) else key))


def read_class_names(given, *, default: Sequence[Path] = ()) -> tuple[str, ...] | None:
    """Class names in the order of their ids, from a list, {id: name}, or a JSON file of either.

    Raises:
        ValueError: the file cannot be read, or the ids are not 0, 1, ... without a gap.
    """
    if given is None:
        given = next((path for path in default if path.is_file()), None)
        if given is None:
            return None
    where = "`class_names`"
    if isinstance(given, str | Path):
        where = str(given)
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"Cannot read class names from {where}: {error}. Expected a JSON list or mapping."
            ) from error
    if isinstance(given, Mapping):
        try:
            by_id = {int(key): str(value) for key, value in given.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: the keys must be class ids, found {list(given)[:5]}.") from error
        if sorted(by_id) != list(range(len(by_id))):
            raise ValueError(
                f"{where} must name the classes 0, 1, ... without a gap, found the ids {sorted(by_id)[:9]}."
            )
        return tuple(by_id[index] for index in range(len(by_id)))
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{where} must be a list of names or a mapping from ids to names, found {given!r:.80}.")
    return tuple(given)


def _place_of(root: Path, split: str | None, images: str, masks: str) -> tuple[Path, str, str]:
    """(the folder of a split, and the names of its image and mask folders)."""
    if not root.is_dir():
        raise ValueError(no_folder(root))
    if split is None:
        return root, images, masks
    if (root / split).is_dir():
        return root / split, images, masks
    if (root / images / split).is_dir():
        return root, f"{images}/{split}", f"{masks}/{split}"
    there = first_few(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
    raise ValueError(
        f"No split {split!r} in {root}: expected a folder {root / split}, or {root / images / split}; folders there: "
        f"{there}."
    )


def _named_pairs(
    folder: Path, images: str, masks: str | None, suffixes: tuple[str, str], only_ids: Collection[str] | None
) -> list[tuple[str, Path, Path | None]]:
    source, (image_suffix, mask_suffix) = folder / images, suffixes
    if masks is None and not source.is_dir() and _holds_only_images(folder):
        source = folder
    everything, _ = _files_by_stem(source, IMAGE_SUFFIXES)
    together = masks is not None and source.resolve() == (folder / masks).resolve()
    if together and mask_suffix:  # in a shared folder, masks are not images
        everything = {name: path for name, path in everything.items() if not name.endswith(mask_suffix)}
    mask_of = {name: name.removesuffix(image_suffix) + mask_suffix for name in everything}
    found = {name: path for name, path in everything.items() if only_ids is None or name in only_ids}
    if masks is None:
        return [(name, path, None) for name, path in found.items()]
    labels, looked = _files_by_stem(folder / masks, MASK_SUFFIXES, say=not together)
    if together:
        labels = {name: path for name, path in labels.items() if name.endswith(mask_suffix)}
    missing = [name for name in found if mask_of[name] not in labels]
    alone = sorted(labels.keys() - {*mask_of.values()})
    if missing:
        others = {Path(name).with_suffix("").as_posix(): name for name in looked.passed_over.get(OTHER_KIND, [])}
        lossy = [others[mask_of[name]] for name in missing if mask_of[name] in others]
        there = f" There are {first_few(lossy, 3)}: masks are read as {', '.join(MASK_SUFFIXES)}." if lossy else ""
        if alone:
            there += f" {len(alone)} masks belong to no image: {first_few(alone)}."
        raise ValueError(
            f"{len(missing)} of {len(found)} images in {folder / images} have no mask in {folder / masks} (expected "
            f"e.g. {mask_of[missing[0]]}.png): {first_few(missing)}.{there} Add them; or set what names have after "
            "the common part of an image and its mask, like "
            f"{as_typed(image_suffix='_image', mask_suffix='_mask')}; or read the "
            "images alone with `with_labels=False` (`cps-hf check --images_only`)."
        )
    if alone:
        logger.warning("%s: %d masks belong to no image: %s.", folder / masks, len(alone), first_few(alone))
    return [(name, path, labels[mask_of[name]]) for name, path in found.items()]


def _holds_only_images(folder: Path) -> bool:
    """Whether the folder has images and no subfolder, which might contain masks."""
    entries = [path for path in folder.iterdir() if not is_hidden(path.name)]
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in entries) and not any(p.is_dir() for p in entries)


def _files_by_stem(folder: Path, suffixes: tuple[str, ...], *, say: bool = True) -> tuple[dict[str, Path], Walk]:
    """(the files by their path without its suffix, the walk). Logs skipped files."""
    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
        splits = [name for name in there if (folder.parent / name / folder.name).is_dir()]
        hint = f" Set `split` to one of {first_few(splits)}; or give that folder itself." if splits else ""
        raise ValueError(f"No folder {folder}; {folder.parent} contains: {first_few(there) or 'nothing'}.{hint}")
    looked = walk(folder, suffixes)
    if say:
        looked.say()
    found: dict[str, Path] = {}
    for path in looked.files.values():
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(
                f"Two files have the same name: {found[name]} and {path}. Rename one: names match images and masks."
            )
        found[name] = path
    if not found:
        passed = f" Skipped: {'; '.join(looked.lines())}." if looked.passed_over else ""
        lossless = " Masks need a lossless file type, unlike JPEG." if suffixes == MASK_SUFFIXES else ""
        raise ValueError(f"No image in {folder}: looked for {', '.join(suffixes)}.{lossless}{passed}")
    return found, looked


def splits_of(root: str | Path, images: str = "images") -> list[str | None]:
    """The splits that `load_folder` finds in `root`: subfolders with a folder of images or a list of files. None
    stands for `root` itself, if it is such a folder or has no splits."""
    root = Path(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    splits = [path.name for path in folders if not is_hidden(path.name) and _is_a_set(path, images)]
    return [*([None] if _is_a_set(root, images) or not splits else []), *splits]


def _is_a_set(folder: Path, images: str) -> bool:
    return (folder / images).is_dir() or (folder / METADATA).is_file()


def _listed_pairs(
    folder: Path, with_labels: bool, only_ids: Collection[str] | None
) -> list[tuple[str, Path, Path | None]]:
    pairs, listed = [], set()
    try:
        lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / METADATA} is not UTF-8 text: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{folder / METADATA}, line {number}"
        try:
            row = json.loads(line)
            image = row["file_name"]
            listed |= {os.path.normpath(name) for name in (image, row.get("mask_file_name")) if isinstance(name, str)}
            if only_ids is not None and Path(image).with_suffix("").as_posix() not in only_ids:
                continue
            mask = row["mask_file_name"] if with_labels else ""
            if not isinstance(image, str) or not isinstance(mask, str):
                raise TypeError("a file name is not text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = '{"file_name": ..., "mask_file_name": ...}' if with_labels else '{"file_name": ...}'
            raise ValueError(f"{where}: expected {wanted}, found {line[:80]!r} ({error}).") from error
        path = _inside(folder, image, where)
        mask_path = _inside(folder, mask, where) if with_labels else None
        pairs.append((Path(image).with_suffix("").as_posix(), path, mask_path))
    if not pairs:
        raise ValueError(f"{folder / METADATA} lists no images.")
    repeated = [name for name, count in Counter(name for name, _, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"{folder / METADATA} lists images more than once: {first_few(repeated)}.")
    beside = [name for name in walk(folder, IMAGE_SUFFIXES).files if os.path.normpath(name) not in listed]
    if beside:
        logger.info("%s does not list %d images of its folder: %s.", folder / METADATA, len(beside), first_few(beside))
    return pairs


def _inside(folder: Path, name: str, where: str) -> Path:
    try:
        path = (folder / name).resolve()
    except (ValueError, OSError) as error:  # a zero byte, or a name that is too long
        raise ValueError(f"{where}: {name[:80]!r} is not a file name ({error}).") from error
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {name!r} is outside {folder}.")
    if not path.is_file():
        raise ValueError(f"{where}: no file {folder / name}.")
    return path
