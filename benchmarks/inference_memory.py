"""Peak memory of predicting one image of 4000 x 6000 pixels with 19 classes, above what the loaded network takes.

    python benchmarks/inference_memory.py

Each way of predicting runs in a process of its own, whose peak resident memory is read from the operating system. The
network is a small one, so that what is measured is this package's: the image as uint8 and as floats, windows, maps of
logits, the class map. Sliding windows of 800 x 800 pixels every 534.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cps_hf.data.transforms import normalize
from cps_hf.inference import as_logits_fn, predict

HEIGHT, WIDTH, CLASSES = 4000, 6000, 19
SLIDING = {"mode": "sliding", "crop_size": (800, 800), "stride": (534, 534), "window_batch_size": 2}
WAYS = {
    "whole image": {},
    "sliding windows": SLIDING,
    "sliding windows, label of 4200 x 6300": SLIDING | {"target_size": (4200, 6300)},
    "sliding windows, flip": SLIDING | {"flip": True},
    "sliding windows, two networks": SLIDING | {"networks": 2},
    "sliding windows, scales 0.5, 1, 1.75, flip": SLIDING | {"scales": (0.5, 1.0, 1.75), "flip": True},
}


class Stripes(nn.Module):
    """One convolution of stride 16, resized: a network that takes next to no memory itself."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, CLASSES, 16, stride=16)

    def forward(self, pixel_values):
        logits = self.convolution(pixel_values)
        return nn.functional.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear")


def peak() -> float:
    """Of this process so far, in GB (10^9 bytes); Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(way: str) -> None:
    torch.set_num_threads(1)
    options = dict(WAYS[way])
    networks = [Stripes().eval() for _ in range(options.pop("networks", 1))]
    # A real network of the library has run once, so that what libraries load lazily is loaded.
    warm = SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, depths=[1] * 4))
    predict([as_logits_fn(warm), *networks], torch.zeros(1, 3, 64, 64), flip=True)
    before, started = peak(), time.perf_counter()
    images = torch.randint(256, (1, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    pixel_values = normalize(images, torch.full((3,), 0.45), torch.full((3,), 0.22))
    ids = predict(networks if len(networks) > 1 else networks[0], pixel_values, **options)
    assert ids.shape == (1, *options.get("target_size", (HEIGHT, WIDTH)))
    print(f"| {way} | {peak() - before:.2f} GB | {time.perf_counter() - started:.0f} s |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        print("| 4000 x 6000, 19 classes | peak memory beside the network | time |\n|---|---|---|")
        for name in WAYS:
            subprocess.run([sys.executable, __file__, name], check=True)
