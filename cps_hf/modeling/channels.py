"""Checks how many image channels a model expects; images are read as RGB."""

from __future__ import annotations

from typing import Any

RGB = 3


def check_channels(config: Any, name: str) -> None:
    """Reject a model that does not take 3 channels; its own error would be about the image's size.

    Args:
        config: the model's configuration. name: its name in the error.

    Raises:
        ValueError: the model takes another number of channels.
    """
    for part in (config, getattr(config, "backbone_config", None)):
        channels = getattr(part, "num_channels", None)
        if isinstance(channels, int) and channels != RGB:
            raise ValueError(
                f"{name} takes images of {channels} channel{'s' * (channels != 1)} (`num_channels`), but images are "
                "read as RGB, 3 channels: grey is repeated, extra bands are dropped. Build it with `num_channels=3`."
            )
