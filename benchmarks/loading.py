"""Images per CPU second of one worker, from encoded files to a batch, compared with the steps of the CPS release.

    python benchmarks/loading.py [--images 16] [--pairs 5]

Ours reads, crops the source box, resizes that box, flips and stacks bytes. The release's way (OpenCV): read, flip,
resize the whole image, normalise the whole image in floats, crop, pad, transpose. Both take the same files and sizes
on one thread, in alternating rounds of one process; seconds are the process's own CPU time, so that other jobs on the
machine count less, and the ratio is of the medians. Needs opencv-python-headless.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from cps_hf.data.labels import LabelEncoding
from cps_hf.data.order import Plan
from cps_hf.data.streams import SampleMaker, undecoded
from cps_hf.data.table import build
from cps_hf.data.transforms import Augmentation

SCALES = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CASES = {
    "Cityscapes PNG 1024 x 2048, crop 800": ((1024, 2048), "png", 800),
    "VOC JPEG 375 x 500, crop 512": ((375, 500), "jpg", 512),
}


def write_files(folder: Path, size: tuple[int, int], suffix: str, count: int):
    """Smooth shapes with noise: about as large on disk as photographs (a 1024 x 2048 PNG has 2 to 3 MB)."""
    height, width = size
    images, labels = [], []
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 255, (height // 32, width // 32, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)).astype(np.int16)
        image = np.clip(image + rng.integers(-4, 5, image.shape), 0, 255).astype(np.uint8)
        label = np.asarray(Image.fromarray(coarse[..., 0] % 19).resize((width, height), Image.NEAREST))
        images.append(folder / f"{i}.{suffix}")
        labels.append(folder / f"{i}_label.png")
        Image.fromarray(image).save(images[-1], **({"quality": 92} if suffix == "jpg" else {}))
        Image.fromarray(label).save(labels[-1])
    return images, labels


def release_sample(image_path: Path, label_path: Path, crop: int, rng: random.Random):
    image = cv2.cvtColor(cv2.imread(str(image_path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    label = cv2.imread(str(label_path), cv2.IMREAD_GRAYSCALE)
    if rng.random() >= 0.5:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    scale = rng.choice(SCALES)
    height, width = int(image.shape[0] * scale), int(image.shape[1] * scale)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
    image = (image.astype(np.float32) / 255.0 - MEAN) / STD
    top = rng.randint(0, height - crop) if height > crop else 0
    left = rng.randint(0, width - crop) if width > crop else 0
    image, label = image[top : top + crop, left : left + crop], label[top : top + crop, left : left + crop]
    missing = [crop - side for side in image.shape[:2]]
    border = [missing[0] // 2, missing[0] - missing[0] // 2, missing[1] // 2, missing[1] - missing[1] // 2]
    image = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=0)
    label = cv2.copyMakeBorder(label, *border, cv2.BORDER_CONSTANT, value=255)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float(), torch.from_numpy(label).long()


def seconds(function, *arguments) -> float:
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def measure(size, suffix: str, crop: int, count: int, pairs: int) -> tuple[float, float]:
    """(ours, the release's) images per second: medians over `pairs` alternating rounds over all files."""
    with tempfile.TemporaryDirectory() as folder:
        images, labels = write_files(Path(folder), size, suffix, count)
        encoding = LabelEncoding(tuple(f"class {i}" for i in range(19)))
        dataset = build([str(i) for i in range(count)], images, labels, encoding.to_feature())
        maker = SampleMaker(
            undecoded(dataset, with_label=True, what="benchmark"),
            name="benchmark",
            seed=0,
            augmentation=Augmentation(crop_size=(crop, crop), random_scale=SCALES),
            views=None,
            num_labels=19,
        )

        def ours(position: int) -> None:
            maker.batch(Plan([(position + i, i) for i in range(count)], []))

        def release(position: int) -> None:
            rng = random.Random(position)
            samples = [release_sample(*files, crop, rng) for files in zip(images, labels, strict=True)]
            torch.stack([image for image, _ in samples]), torch.stack([label for _, label in samples])

        ours(0), release(0)  # warm the file cache and the libraries
        rounds = [(seconds(ours, p * count), seconds(release, p * count)) for p in range(1, pairs + 1)]
    return tuple(count / statistics.median(column) for column in zip(*rounds, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=16, help="files per case")
    parser.add_argument("--pairs", type=int, default=5, help="alternating rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{'one worker, one thread':<40}{'ours, img/s':>14}{'OpenCV, img/s':>16}{'ratio':>8}")
    for title, (size, suffix, crop) in CASES.items():
        ours, release = measure(size, suffix, crop, options.images, options.pairs)
        print(f"{title:<40}{ours:>14.1f}{release:>16.1f}{ours / release:>8.2f}")


if __name__ == "__main__":
    main()
