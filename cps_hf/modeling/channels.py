"""How many channels of an image a model looks at; images are read as RGB."""

from __future__ import annotations

from typing import Any

RGB = 3


def check_channels(config: Any, name: str) -> None:
    """Refuse a model of another number of channels by that number; its own error would speak of the image's size.

    Args:
        config: the model's. name: how the error calls it.

    Raises:
        ValueError: it takes one, four or more.
    """
    for part in (config, getattr(config, "backbone_config", None)):
        channels = getattr(part, "num_channels", None)
        if isinstance(channels, int) and channels != RGB:
            raise ValueError(
                f"{name} takes images of {channels} channel{'s' * (channels != 1)} (`num_channels`), and images are "
                "read as RGB, 3 channels: grey is repeated, further bands are dropped. Build it with `num_channels=3`."
            )
