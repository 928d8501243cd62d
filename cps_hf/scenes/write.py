"""Data that needs no download: drawn scenes, written once in the layouts of Cityscapes and VOC.

`write_street_scenes()` and `write_object_scenes()` create folders that `load_cityscapes` and `load_voc`, and also
torchvision's classes, read like the real ones. They are for trying the package, not a benchmark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from huggingface_hub import constants
from PIL import Image
from tqdm.auto import tqdm

from ..data.voc import voc_color
from ..files import filled_whole
from .object_scenes import draw_object_scene
from .street_scenes import STREET_SIZE, draw_street_scene

GENERATOR_VERSION = 1
"""Part of every cached folder's name. Scores are compared across runs, so increase it if any pixel changes."""

MANIFEST = "manifest.json"
_MOST = 1_000_000  # images per split: names have six digits, and each split has its own range of scene indices
_CITIES = {
    "train": ("aachen", "bochum", "bremen", "cologne", "hanover", "stuttgart", "ulm", "weimar"),
    "train_extra": ("augsburg", "dortmund", "freiburg", "mannheim"),
    "val": ("frankfurt", "lindau", "munster"),
}
_VOC_YEARS = {"train": 2007, "val": 2008}


def write_street_scenes(
    root: str | Path | None = None,
    *,
    num_train: int = 400,
    num_train_extra: int = 100,
    num_val: int = 100,
    size: tuple[int, int] = STREET_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Street scenes in the Cityscapes layout: `leftImg8bit/` and `gtFine/*_labelIds.png` with the official ids.

    Args:
        root: the folder to create; a folder that already contains exactly this set is returned as it is. If None, a
            folder in the Hugging Face cache, named after everything that determines its content.
        num_train, num_train_extra, num_val: how many images; `train_extra` has no labels.
        size: (height, width) in pixels.
        seed: another seed draws other scenes. Scene n of a split does not depend on the number of scenes.
        progress: show a progress bar while drawing.

    Returns:
        The folder, for `load_cityscapes`.

    Raises:
        ValueError: a number is invalid, or `root` contains something else (nothing is ever overwritten).
    """
    counts = {"train": num_train, "train_extra": num_train_extra, "val": num_val}
    _check(counts, may_be_empty="train_extra", seed=seed)
    size = tuple(size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 32 for side in size):
        raise ValueError(f"`size` must be (height, width), two integers of at least 32 pixels, got {size}.")

    def write_scene(folder: Path, split: str, n: int) -> None:
        image, label_ids = draw_street_scene(_scene_index(list(counts), split, n), size=size, seed=seed)
        cities = _CITIES[split]
        city = cities[n * len(cities) // counts[split]]
        name = f"{city}_{n:06d}_000019"
        _save(image, folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        if split != "train_extra":
            _save(label_ids, folder / "gtFine" / split / city / f"{name}_gtFine_labelIds.png")

    def fill(folder: Path) -> None:
        for split, n in _scenes_of(counts, "street scenes", progress):
            write_scene(folder, split, n)

    made_of = {
        **{f"num_{split}": int(count) for split, count in counts.items()},
        "size": list(size),
        "seed": int(seed),
    }
    return _write_once(root, {"kind": "street", **made_of}, fill)


def write_object_scenes(
    root: str | Path | None = None,
    *,
    num_train: int = 300,
    num_val: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Object scenes in the VOC layout, in `VOCdevkit/VOC2012/` below `root`: JPEG images of many sizes, palette PNGs.

    Args:
        root: the folder to create; a folder that already contains exactly this set is returned as it is. If None, a
            folder in the Hugging Face cache, named after everything that determines its content.
        num_train, num_val: how many images.
        seed: another seed draws other scenes. Scene n of a split does not depend on the number of scenes.
        progress: show a progress bar while drawing.

    Returns:
        The folder (`root`), for `load_voc`.

    Raises:
        ValueError: a number is invalid, or `root` contains something else (nothing is ever overwritten).
    """
    counts = {"train": num_train, "val": num_val}
    _check(counts, may_be_empty=None, seed=seed)
    palette = [channel for index in range(256) for channel in voc_color(index)]

    def fill(folder: Path) -> None:
        voc = folder / "VOCdevkit" / "VOC2012"
        names: dict[str, list[str]] = {split: [] for split in counts}
        for split, n in _scenes_of(counts, "object scenes", progress):
            image, labels = draw_object_scene(_scene_index(list(counts), split, n), seed=seed)
            name = f"{_VOC_YEARS[split]}_{n:06d}"
            mask = Image.fromarray(labels)
            mask.putpalette(palette)  # changes grayscale to palette mode and keeps the values
            _save(image, voc / "JPEGImages" / f"{name}.jpg", quality=92)
            _save(mask, voc / "SegmentationClass" / f"{name}.png")
            names[split].append(name)
        listings = voc / "ImageSets" / "Segmentation"
        listings.mkdir(parents=True)
        for split, ids in {**names, "trainval": sorted(names["train"] + names["val"])}.items():
            (listings / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")

    made_of = {**{f"num_{split}": int(count) for split, count in counts.items()}, "seed": int(seed)}
    return _write_once(root, {"kind": "object", **made_of}, fill)


def is_drawn(path: str | Path) -> bool:
    """Whether an image file is in a folder filled by this module: a drawing, not a user's photograph."""
    manifests = (_read_manifest(parent) for parent in Path(path).parents)
    return any(isinstance(found, dict) and "generator_version" in found for found in manifests)


def _check(counts: dict[str, int], *, may_be_empty: str | None, seed: int) -> None:
    for split, count in counts.items():
        least = 0 if split == may_be_empty else 1
        if not _is_integer(count) or not least <= count < _MOST:
            raise ValueError(f"`num_{split}` must be an integer from {least} to {_MOST - 1}, got {count!r}.")
    if not _is_integer(seed) or seed < 0:
        raise ValueError(f"`seed` must be an integer of 0 or more, got {seed!r}.")


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _scene_index(splits: list[str], split: str, n: int) -> int:
    return splits.index(split) * _MOST + n


def _scenes_of(counts: dict[str, int], what: str, progress: bool) -> Iterable[tuple[str, int]]:
    scenes = [(split, n) for split, count in counts.items() for n in range(count)]
    return tqdm(scenes, desc=f"Drawing {what}", unit="image", disable=not progress or None)


def _save(pixels: np.ndarray | Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def _write_once(root: str | Path | None, parameters: dict, fill: Callable[[Path], None]) -> Path:
    """The folder that contains the set of `parameters`; it is filled if it does not exist yet.

    The folder is either complete or absent, even after interruptions and with several processes at once: the first to
    finish wins, and the others use its folder.
    """
    manifest = {"generator_version": GENERATOR_VERSION, **parameters}
    if root is None:
        key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        root = Path(constants.HF_HOME) / "cps_hf" / "scenes" / f"{parameters['kind']}-{key}"
    root = Path(root).expanduser()
    if _holds(root, manifest):
        return root
    _check_free(root, manifest)
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filled_whole(root, replace=False) as partial:
            fill(partial)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except OSError:
        if not _holds(root, manifest):  # unless another process was faster
            _check_free(root, manifest)
            raise
    return root


def _holds(root: Path, manifest: dict) -> bool:
    return _read_manifest(root) == manifest


def _read_manifest(root: Path) -> dict | None:
    try:
        return json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_free(root: Path, manifest: dict) -> None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    found = _read_manifest(root)
    if isinstance(found, dict):
        differing = [key for key in {**manifest, **found} if manifest.get(key) != found.get(key)]
        what = "drawn scenes with other settings (" + ", ".join(
            f"{key} {found.get(key)}, requested {manifest.get(key)}" for key in differing
        ) + ")"  # fmt: skip
    else:
        what = f"something other than a set of drawn scenes (no readable {MANIFEST})"
    raise ValueError(f"{root} contains {what}. Nothing was overwritten. Choose another folder, or remove this one.")
