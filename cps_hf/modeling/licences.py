"""Pretrained weights whose licence has conditions, by their names on the Hub. docs/licences.md lists all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger("cps_hf")

_CONDITIONS = (
    (
        r"dinov3",
        "the DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license). It must be accepted "
        "on the Hub first, and has conditions on use and on passing on networks that are trained from these weights",
    ),
    (
        r"^nvidia/(mit-|segformer)",
        "the NVIDIA Source Code License for SegFormer: research or evaluation only, no commercial use; that holds for "
        "networks that are trained from these weights, too",
    ),
    (
        r"^facebook/mask(2)?former-",
        "CC BY-NC 4.0, as the model zoo of its repository says: no commercial use",
    ),
)


def conditions(name: str) -> str | None:
    """The conditions of the licence of weights on the Hub.

    Args:
        name: a Hub id, with or without "timm/" for timm's. A path on this machine has none that are known.

    Returns:
        The licence and what it asks, for a sentence. `None`: no conditions beyond naming the authors are known.
    """
    if Path(name).exists():
        return None
    return next((said for pattern, said in _CONDITIONS if re.search(pattern, name.lower())), None)


def warn_of_conditions(names: Iterable[str]) -> None:
    """Logs a sentence for each of these weights whose licence has conditions."""
    for name in dict.fromkeys(names):
        if said := conditions(name):
            logger.warning("The weights %s have a licence with conditions: %s.", name, said)
