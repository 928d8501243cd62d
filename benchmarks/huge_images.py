"""Peak memory of training on, cutting and predicting a TIFF of 20,000 x 20,000 pixels, above that of the imports.

    python benchmarks/huge_images.py [--size 20000 20000] [--folder DIR] [--way WAY]

Each way runs in a separate process, whose peak resident memory is read from the operating system. The network is one
convolution to logits at a quarter of the size, so only this package's memory is measured: rows of the image, sums of
logits over one row of windows, the mask before it is written. The files (0.6 GB) are removed at the end.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from inference_memory import Quarter, peak
from PIL import Image
from transformers import SegformerImageProcessor

from cps_hf.commands.huge import predict_huge
from cps_hf.config import AugmentationConfig
from cps_hf.data.bands import long_tag, short_tag, tiff_directory, tiff_header
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.order import Shard
from cps_hf.data.reading import read_image
from cps_hf.data.streams import TrainStream
from cps_hf.data.table import build
from cps_hf.data.tiles import cut_tiles
from cps_hf.inference.ensemble import Ensemble

CLASSES, TILE = 5, 256
WAYS = (
    "decoded as a whole",
    "50 training crops of 512",
    "cut into tiles of 1024",
    "predicted by rows",
    "predicted by rows, two networks, flip",
)


def write(path: Path, size: tuple[int, int], bands: int) -> None:
    """Write a deflated, tiled TIFF: noise over gradients, or for a mask blocks of classes."""
    random = np.random.default_rng(0)
    slopes = np.add.outer(np.arange(TILE), np.arange(TILE))[..., None] // 4
    if bands == 3:
        tiles = [(slopes + random.integers(0, 32, (TILE, TILE, 3))).astype(np.uint8) for _ in range(16)]
    else:
        tiles = [np.full((TILE, TILE), i % CLASSES, np.uint8) for i in range(16)]
    packed = [zlib.compress(tile.tobytes(), 1) for tile in tiles]
    height, width = size
    count = -(-height // TILE) * -(-width // TILE)
    chosen, offsets = random.integers(0, 16, count), []
    with open(path, "wb") as file:
        file.write(tiff_header("<", 0))
        for tile in chosen:
            offsets.append(file.tell())
            file.write(packed[tile])
        at = file.tell() + file.tell() % 2
        short = {258: [8] * bands, 259: [8], 262: [2 if bands == 3 else 1], 277: [bands], 284: [1]}
        long = {256: [width], 257: [height], 322: [TILE], 323: [TILE], 324: offsets}
        long |= {325: [len(packed[tile]) for tile in chosen]}
        tags = {tag: short_tag("<", values) for tag, values in short.items()}
        tags |= {tag: long_tag("<", values) for tag, values in long.items()}
        file.seek(at)
        file.write(tiff_directory("<", tags, at))
        file.seek(0)
        file.write(tiff_header("<", at))


def measure(way: str, folder: Path) -> None:
    torch.set_num_threads(1)
    image, out = folder / "in" / "images" / "scan.tif", folder / "out"
    models = [Quarter(CLASSES) for _ in range(2 if "two" in way else 1)]
    processors = [SegformerImageProcessor(do_resize=False) for _ in models]
    branches = Ensemble(models, processors, [f"network {i}" for i in range(len(models))], device="cpu")
    branches.predict(torch.zeros(3, 64, 64, dtype=torch.uint8))  # load what libraries load lazily
    before, started = peak(), time.process_time()
    if way == WAYS[0]:
        Image.MAX_IMAGE_PIXELS = None
        read_image({"path": str(image)}, name="scan")
    elif way == WAYS[1]:
        names = LabelEncoding(tuple(f"class {i}" for i in range(CLASSES)))
        scans = build(["scan"], [image], [folder / "in" / "masks" / "scan.tif"], names.to_feature())
        scales = AugmentationConfig(crop_size=(512, 512), random_scale=(0.75, 1.5), random_scale_mode="range")
        crops = TrainStream(scans, name="scans", shard=Shard(batch_size=1), augmentation=scales, seed=0)
        for _ in itertools.islice(crops, 50):
            pass
    elif way == WAYS[2]:
        cut_tiles(folder / "in", out, tile=1024, progress=False)
    else:
        how = branches.default_windows() | {"flip": "flip" in way}
        names, colors = [f"class {i}" for i in range(CLASSES)], [(50 * i, 0, 0) for i in range(CLASSES)]
        predict_huge(str(image), {"masks": out / "scan.png"}, branches, how, names, colors, 0.5)
    print(f"| {way} | {peak() - before:.2f} GB | {time.process_time() - started:.0f} s |", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(20_000, 20_000), help="height and width in pixels")
    folder = Path(tempfile.gettempdir()) / "cps_hf_huge"
    parser.add_argument("--folder", type=Path, default=folder, help="where temporary files go")
    parser.add_argument("--way", choices=WAYS, help="default: all")
    options = parser.parse_args(argv)
    made = options.folder / "in"
    if options.way is not None and made.is_dir():
        measure(options.way, options.folder)
        return
    options.folder.mkdir(parents=True)
    try:
        for name, bands in (("images", 3), ("masks", 1)):
            (made / name).mkdir(parents=True)
            write(made / name / "scan.tif", options.size, bands)
        print(
            f"| {options.size[0]} x {options.size[1]}, {CLASSES} classes | peak memory | CPU time |\n|---|---|---|",
            flush=True,
        )
        for way in WAYS if options.way is None else [options.way]:
            words = ["--way", way, "--folder", str(options.folder)]
            subprocess.run([sys.executable, __file__, *words], check=True)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
