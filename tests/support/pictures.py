"""Pictures made and read for tests."""

import numpy as np
from PIL import Image


def blocks(height, width, classes, seed=0):
    """A class map of blocks in which every class of `classes` occurs, and a picture of the same size."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, (height, width)).astype(np.uint8)
    labels.flat[: len(classes)] = classes
    return labels, rng.integers(100, 156, (height, width, 3), dtype=np.uint8)


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))
