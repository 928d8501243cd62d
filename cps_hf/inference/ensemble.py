"""Loads trained branches, or other models, from folders or the Hub, and predicts images with them together."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from ..modeling.branches import Branch
from ..modeling.channels import check_channels
from ..modeling.classes import letters
from ..modeling.universal import auto_class, reject_other_universal
from .windows import class_ids, default_stride, predict_each, predict_logits, predict_rows

logger = logging.getLogger(__name__)

WINDOW = 512
"""Default height and width of the windows over a huge image."""


class Ensemble:
    """One or several models that support `Branch`, each with its own image processor.

    Args:
        models: must have the same classes.
        processors: the image processor of each.
        sources: their names in errors and reports.
        device: where to put the models. If `None`, a GPU if there is one.

    Raises:
        ValueError: there is no model, their classes differ or are more than 255 (class maps are uint8), a model does
            not accept RGB images, or the device does not exist.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        processors: Sequence[Any],
        sources: Sequence[str],
        *,
        device: str | torch.device | None = None,
    ):
        if not models:
            raise ValueError("An ensemble needs at least one model.")
        for model, source in zip(models, sources, strict=True):
            check_channels(model.config, str(source))
        self.device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.networks = [Branch(model).eval().to(self.device) for model in models]
        self.processors, self.sources = list(processors), [str(source) for source in sources]
        self.id2label = {int(i): str(name) for i, name in sorted(models[0].config.id2label.items())}
        if len(self.id2label) > 255:
            raise ValueError(f"{self.sources[0]} has {len(self.id2label)} classes; at most 255 fit into a PNG mask.")
        for model, source in zip(models[1:], self.sources[1:], strict=True):
            check_classes([*model.config.id2label.values()], self.id2label, f"{source} and {self.sources[0]}")

    @classmethod
    def from_pretrained(
        cls,
        sources: Sequence[str],
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Ensemble:
        """Load models and image processors from local folders or the Hub.

        Raises:
            ValueError: one cannot be loaded; the message says which, and what transformers said.
        """
        for source in sources:
            _check_source(source)
            _query_hub(source, revision)
        models, processors = [], []
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        for source in sources:
            try:
                config = AutoConfig.from_pretrained(source, **options)
                reject_other_universal(config, f"`{source}`")
                models.append(auto_class(config).from_pretrained(source, **options))
                processors.append(AutoImageProcessor.from_pretrained(source, **options))
            except (OSError, ValueError, KeyError, ImportError) as error:
                missing = "model" if len(models) == len(processors) else "image processor (preprocessor_config.json)"
                raise _unreadable(source, missing, "transformers", error) from error
        return cls(models, processors, sources, device=device)

    def logits(self, image: Tensor, *, own_size: bool = False, only: int | None = None, **options: Any) -> Tensor:
        """Compute logits (1, C, H, W) at the image's size.

        Args:
            image: uint8 (3, H, W).
            own_size: use the image at its own size even if a processor would resize it. Always the case with sliding
                windows. (Centre cropping is always skipped: every pixel is predicted.)
            only: the index of a single network to use. If `None`, the mean of all.
            options: those of `cps_hf.inference.predict_logits`.

        Raises:
            ValueError: options are invalid, or a network does not accept this size.
        """
        chosen = range(len(self.networks)) if only is None else [only]
        return self._run(predict_logits, image, chosen, own_size, options)

    def predict(self, image: Tensor, **options: Any) -> Tensor:
        """Class ids, uint8 (H, W) on the CPU, of an image uint8 (3, H, W). Options as in `logits`."""
        return class_ids(self.logits(image, **options))[0].to(torch.uint8).cpu()

    def predict_each(self, image: Tensor, *, own_size: bool = False, **options: Any) -> list[Tensor]:
        """Class ids, uint8 (H, W) on the CPU, of each network and, if there are several, of their mean as the last.

        Options as in `logits`.
        """
        options |= {"num_labels": len(self.id2label)}
        found = self._run(predict_each, image, range(len(self.networks)), own_size, options)
        return [ids[0].to(torch.uint8).cpu() for ids in found]

    def predict_rows(
        self, image_rows: Callable[[slice], Tensor], size: tuple[int, int], **options: Any
    ) -> Iterator[tuple[slice, Tensor]]:
        """Class ids of an image that does not fit into memory, from top to bottom: (rows, uint8 (rows, W) on the CPU).

        Args:
            image_rows: returns the image's rows, slice -> uint8 (3, rows, W); called from top to bottom, with overlap.
            size: height and width of the image.
            options: those of `cps_hf.inference.windows.predict_rows`.

        Raises:
            ValueError: options are invalid, or a network does not accept the windows' size.
        """

        def view_of(processor: Any) -> Callable[[slice], Tensor]:
            return lambda rows: _processed(processor, image_rows(rows), True).to(self.device)

        views = [view_of(processor) for processor in self.processors]
        try:
            for rows, ids in predict_rows(self.networks, views, size, **options):
                yield rows, ids.cpu()
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{', '.join(self.sources)} cannot predict windows of {options['crop_size']} pixels: {error} A "
                "network of one input size needs that `crop_size`."
            ) from error

    def default_windows(self) -> dict[str, Any]:
        """Default sliding windows: of the size that the first processor resizes to, or else of `WINDOW`."""
        processor = self.processors[0]
        size = getattr(processor, "size", None) if getattr(processor, "do_resize", False) else None
        height, width = (_field(size, "height"), _field(size, "width")) if size else (None, None)
        crop = (height, width) if height and width else (WINDOW, WINDOW)
        return {"mode": "sliding", "crop_size": crop, "stride": default_stride(crop)}

    def _run(self, function, image: Tensor, chosen: Sequence[int], own_size: bool, options: dict[str, Any]) -> Any:
        """`function` of the chosen networks and of the image as their processors make it."""
        own_size = own_size or options.get("mode") == "sliding"
        made = {}  # networks with equal processors share an image
        for processor in (self.processors[i] for i in chosen):
            if repr(processor) not in made:
                made[repr(processor)] = _processed(processor, image, own_size).to(self.device)
        networks, pixel_values = [self.networks[i] for i in chosen], [made[repr(self.processors[i])] for i in chosen]
        try:
            return function(networks, pixel_values, target_size=tuple(image.shape[-2:]), **options)
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{', '.join(self.sources[i] for i in chosen)} cannot predict an image of {image.shape[-2]} x "
                f"{image.shape[-1]} pixels: {error} A network of one input size needs `mode=sliding` with that "
                "`crop_size`, or its processor's resizing (no `own_size`)."
            ) from error


def _field(size: Any, name: str) -> int | None:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _check_source(source: str) -> None:
    """Check folders before a network is loaded; transformers would look for missing ones on the Hub."""
    folder = Path(source)
    if (folder / "config.json").is_file():
        return
    inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    if folder.is_dir() and inside:
        raise ValueError(
            f"`{source}`: no model could be read, since it contains several. Give one: {', '.join(inside)}."
        )
    if folder.exists():
        advice = " The run in it has exported no branch yet." if (folder / "metrics.jsonl").is_file() else ""
        raise ValueError(f"`{source}`: no model could be read, since there is no config.json in it.{advice}")
    if folder.is_absolute() or source.startswith((".", "~")) or len(folder.parts) > 2:  # not a Hub id
        raise ValueError(f"`{source}`: no model could be read, since there is no such folder.")


def _query_hub(source: str, revision: str | None) -> None:
    """Query the Hub once for a model that is neither a folder nor cached. Without a connection, transformers would
    try for half a minute.

    Raises:
        ValueError: the Hub has no such model, or does not respond.
    """
    if Path(source).exists():
        return
    try:
        hf_hub_download(source, "config.json", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        try:
            get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision), timeout=10)
        except HfHubHTTPError as error:
            raise _unreadable(source, "model", "The Hub", error) from error
        except Exception as error:  # the client and its dependencies raise many types without a connection
            offline = " (HF_HUB_OFFLINE=1 is set)" if constants.HF_HUB_OFFLINE else ""
            raise ValueError(
                f"`{source}`: no model could be read: there is no folder of that name here, and the Hub cannot be "
                f"reached{offline}. Check the path of the folder."
            ) from error
    except HFValidationError as error:
        raise _unreadable(source, "model", "The Hub", error) from error


def _unreadable(source: str, what: str, who: str, error: Exception) -> ValueError:
    absent = "" if Path(source).exists() else ": there is no such folder, and it was not found on the Hub"
    return ValueError(
        f"`{source}`: no {what} could be read{absent}. Give a folder that `save_pretrained` or this package wrote, or "
        "a Hub id; a private or gated one needs HF_TOKEN, one with its own code needs `trust_remote_code`. "
        f"{who} said: {' '.join(str(error).split())}"
    )


def _usable(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's: no such kind, not available here, no such number
        raise ValueError(
            f"`device` {str(name)!r} cannot be used here: {str(error).strip().splitlines()[0]} Give `cpu`, `cuda` or "
            "`cuda:NUMBER`. By default, a GPU is used if there is one."
        ) from error
    return device


def _processed(processor: Any, image: Tensor, own_size: bool) -> Tensor:
    """float (1, 3, h, w): the processor's output for an image, without steps that would lose pixels."""
    off = ["do_center_crop", "do_split_image", *(["do_resize", "do_pad"] if own_size else [])]
    kept_off = {name: False for name in off if getattr(processor, name, None)}
    made = processor(images=image, return_tensors="pt", input_data_format="channels_first", **kept_off)
    return made["pixel_values"].float()


def check_classes(found: Sequence[str], expected: Mapping[int, str], what: str) -> None:
    """Check that two lists of class names mean the same classes in the same order, as far as names can tell.

    Raises:
        ValueError: their numbers differ, or the same names are in another order.
    """
    names = [expected[i] for i in range(len(expected))]
    if len(found) != len(names):
        raise ValueError(
            f"{what} have different classes: {len(found)} ({', '.join(found[:3])}, ...) and {len(names)} "
            f"({', '.join(names[:3])}, ...)."
        )
    ours, theirs = ([letters(name) for name in some] for some in (found, names))
    if ours != theirs and sorted(ours) == sorted(theirs):
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise ValueError(
            f"{what} have the same classes in another order: class {first} is {found[first]!r} and {names[first]!r}."
        )
    if ours != theirs and not all(re.fullmatch(r"(label|class)?\d+", name) for name in ours):
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        logger.warning("%s name class %d %r and %r; assumed to be the same.", what, first, found[first], names[first])
