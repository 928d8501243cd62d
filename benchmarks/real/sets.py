"""The two real sets as folders that `cps-hf train` reads: split, scaled, and checked."""

from __future__ import annotations

import random
import shutil
import zipfile
from pathlib import Path

from PIL import Image

from cps_hf.files import write_atomically

COUNTS = {
    "camvid": {"train": 367, "val": 101, "test": 233},
    "steel": {"train": 3000, "val": 630, "test": 840},
}
"""Images per split. Steel has no validation split: 630 of its training images are held out."""


def prepare(real: Path, out: Path, name: str) -> Path:
    """The folder OUT/NAME with `<split>/images`, `<split>/masks` and `classes.json`; made once.

    Camvid is used unchanged (240 x 180). Steel is halved to 100 x 100: images averaged over 2 x 2 pixels, masks
    nearest. The split `timing` is eight images of val.

    Args:
        real: the folder that contains `camvid/` and `steel/` as published or halved, or a file made by `pack.py`.

    Raises:
        ValueError: a split does not contain the expected images.
    """
    root = out / name
    if (root / "complete").is_file():
        return root
    if real.is_file():
        with zipfile.ZipFile(real) as archive:
            members = [member for member in archive.namelist() if member.startswith(f"{name}/")]
            members.sort(key=lambda member: member == f"{name}/complete")  # last, as it says that all is there
            archive.extractall(out, members)
        return root
    folders = [real / name / split for split in ("train", "val", "test")]
    splits = {folder.name: _images(folder) for folder in folders if folder.is_dir()}
    if name == "steel":
        held_back = set(random.Random(0).sample(splits["train"], COUNTS[name]["val"]))
        splits["val"] = sorted(held_back)
        splits["train"] = [path for path in splits["train"] if path not in held_back]
    found = {split: len(paths) for split, paths in splits.items()}
    if found != COUNTS[name]:
        raise ValueError(f"{real / name} should hold {COUNTS[name]} images, found {found}.")
    splits["timing"] = splits["val"][:8]
    for split, paths in splits.items():
        for path in paths:
            mask = path.parents[1] / "masks" / f"{path.stem}.png"
            _write(path, root / split / "images" / f"{path.stem}.png", name, Image.Resampling.BOX)
            _write(mask, root / split / "masks" / f"{path.stem}.png", name, Image.Resampling.NEAREST)
    shutil.copyfile(real / name / "classes.json", root / "classes.json")
    write_atomically(root / "complete", "")
    return root


def _images(split: Path) -> list[Path]:
    return sorted(path for path in (split / "images").iterdir() if path.suffix in (".png", ".jpg"))


def _write(source: Path, target: Path, name: str, resample: Image.Resampling) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        if name == "steel":
            image = image.resize((100, 100), resample)
        image.save(target)
