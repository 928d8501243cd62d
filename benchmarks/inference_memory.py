"""Peak memory of predicting one image of 4000 x 6000 pixels with 19 classes, above that of the loaded network.

    python benchmarks/inference_memory.py

Each way of predicting runs in a separate process, whose peak resident memory is read from the operating system. The
network is one convolution to logits at a quarter of the size, so only this package's memory is measured: the image as
uint8 and as floats, windows, maps of logits, the class map. Sliding windows of 800 x 800 pixels every 534. A real
network's activations are added: many times larger for whole images, small with windows.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

from cps_hf.data.transforms import normalize
from cps_hf.inference.ensemble import Ensemble
from cps_hf.inference.windows import as_logits_fn, predict
from cps_hf.metrics.boundary_iou import BoundaryIoU
from cps_hf.metrics.mean_iou import MeanIoU

HEIGHT, WIDTH, CLASSES = 4000, 6000, 19
SLIDING = {"mode": "sliding", "crop_size": (800, 800), "stride": (534, 534), "window_batch_size": 2}
SCALES = {"scales": (0.5, 1.0, 1.75), "flip": True}
WAYS = {
    "whole image": {},
    "whole image, label of 4200 x 6300": {"target_size": (4200, 6300)},
    "whole image, flip": {"flip": True},
    "whole image, two networks": {"networks": 2},
    "whole image, scales 0.5, 1, 1.75, flip": SCALES,
    "whole image, two networks, scales, flip": SCALES | {"networks": 2},
    "sliding windows": SLIDING,
    "sliding windows, label of 4200 x 6300": SLIDING | {"target_size": (4200, 6300)},
    "sliding windows, flip": SLIDING | {"flip": True},
    "sliding windows, two networks": SLIDING | {"networks": 2},
    "sliding windows, scales 0.5, 1, 1.75, flip": SLIDING | SCALES,
    "sliding windows, two networks, scales, flip": SLIDING | SCALES | {"networks": 2},
    "scored as evaluate_branch.py does": {"score": True},
    "scored as evaluate_branch.py --each does, two networks": {"score": True, "networks": 2},
    "the same, scales 0.5, 1, 1.75, flip": {"score": True, "networks": 2} | SCALES,
    "the same, sliding windows": {"score": True, "networks": 2} | SLIDING,
    "the same, sliding windows, scales 0.5, 1, 1.75, flip": {"score": True, "networks": 2} | SLIDING | SCALES,
}


class Quarter(nn.Module):
    """One convolution of stride 4: a network that takes almost no memory itself."""

    def __init__(self, num_labels: int = CLASSES):
        super().__init__()
        self.config = PreTrainedConfig(num_labels=num_labels)
        self.convolution = nn.Conv2d(3, num_labels, 4, stride=4)

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=self.convolution(pixel_values))


def peak() -> float:
    """Peak memory of this process so far, in GB (10^9 bytes); Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(way: str) -> None:
    torch.set_num_threads(1)
    options = dict(WAYS[way])
    models = [Quarter() for _ in range(options.pop("networks", 1))]
    networks = [as_logits_fn(model) for model in models]
    # Run a real network once, to load what libraries load lazily.
    warm = SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, depths=[1] * 4))
    predict([as_logits_fn(warm), *networks], torch.zeros(1, 3, 64, 64), flip=True)
    score(models, torch.zeros(3, 64, 64, dtype=torch.uint8), {})
    before, started = peak(), time.process_time()
    image = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    if options.pop("score", False):
        score(models, image, options)
    else:
        pixel_values = normalize(image[None], torch.full((3,), 0.45), torch.full((3,), 0.22))
        ids = predict(networks if len(networks) > 1 else networks[0], pixel_values, **options)
        assert ids.shape == (1, *options.get("target_size", (HEIGHT, WIDTH)))
    print(f"| {way} | {peak() - before:.2f} GB | {time.process_time() - started:.0f} s |", flush=True)


def score(models: list[nn.Module], image: torch.Tensor, options: dict) -> None:
    """What `cps-hf evaluate` does with an image, including the image processor."""
    processors = [SegformerImageProcessor(do_resize=False) for _ in models]
    branches = Ensemble(models, processors, [f"network {i}" for i in range(len(models))], device="cpu")
    maps = branches.predict_each(image, **options)
    label = torch.randint(CLASSES, image.shape[1:], dtype=torch.uint8)
    for guess in maps:
        MeanIoU(num_labels=CLASSES).add_batch(predictions=guess, references=label)
        BoundaryIoU(CLASSES).add_batch(predictions=guess[None], references=label[None])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", metavar="WAY", nargs="?", choices=WAYS, help=f"one of {'; '.join(WAYS)} (default: all)")
    way = parser.parse_args(argv).way
    if way is not None:
        measure(way)
    else:
        print("| 4000 x 6000, 19 classes | peak memory above the network | CPU time |\n|---|---|---|", flush=True)
        for name in WAYS:
            subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == "__main__":
    main()
