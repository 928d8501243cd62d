"""Read a row: an image and its label as arrays, by the same rules everywhere.

An image is always rotated according to its EXIF orientation. A mask that has the rotated image's size is taken as
displayed; one that has the stored size is rotated with its image. If both sizes are equal (180 degrees, mirrored,
square), it is taken as displayed, and `examine` reports it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from .labels import IGNORE_INDEX, LabelEncoding, LabelSizeError, stored_values
from .raster import Raster, open_raster, turn
from .table import as_typed

NO_ID = "a row without an id"
_UNDO = {6: 8, 8: 6}  # the other orientations are their own inverse


def read_image(value: Any, *, name: str) -> Tensor:
    """An image as displayed: uint8 (3, H, W), EXIF rotation applied, grey and RGBA converted to RGB (alpha dropped).

    Of 16 bits, the upper 8 are kept, also for colour. If no value exceeds 255 (8 bits stored in 16 or 32), values are
    kept unchanged. Of 12 bits stored in 16, only 4 remain, nearly black, which is logged once; multiply by 16. Of
    several pages or frames, the first is read.

    Args:
        value: {"bytes", "path"} of an undecoded `datasets` row, or a PIL image.
        name: its name in error messages.

    Raises:
        ValueError: it is missing, empty, truncated, not an image, of an unsupported kind, or has more pixels than the
            limit (`raster.MAX_PIXELS`).
    """
    return _upright(open_raster(value, name, "image"))


def read_label(value: Any, encoding: LabelEncoding | None, *, name: str) -> Tensor:
    """A label map as displayed: uint8 (H, W) of class ids, 255 where ignored.

    Args:
        encoding: its coding. If `None`, the stored values are class ids.

    Raises:
        ValueError: as for `read_image`; a lossy compression; values that the encoding does not define.
    """
    raster = open_raster(value, name, "label")
    ids = class_ids_of(raster, encoding)
    return torch.from_numpy(np.ascontiguousarray(ids if raster.is_upright else turn(ids, raster.orientation)))


def read_sample(
    row: dict[str, Any], encoding: LabelEncoding | None = None, *, with_label: bool
) -> tuple[Tensor, Tensor | None]:
    """Image (3, H, W) and label (H, W) of a row with undecoded image columns, both uint8.

    Raises:
        ValueError: a file cannot be read, or the sizes differ.
    """
    name, image = _opened_image(row)
    if not with_label:
        return _upright(image), None
    label = _fitted(open_raster(row["label"], name, "label"), encoding, image)
    pixels = _upright(image)
    assert pixels.shape[-2:] == label.ids.shape, (pixels.shape, label.ids.shape, name)
    return pixels, torch.from_numpy(label.ids)


@dataclass
class Examined:
    """The content of a row, for checks of a data set.

    Attributes:
        size: the image's height and width, upright.
        ids: the label's class ids (H, W); none if no label was read.
        unusual: what is read differently than it may look, for "image" and for "label": keys of `survey.UNUSUAL`.
        palette: the palette's colours for the mask's values, if it has a palette.
    """

    size: tuple[int, int]
    ids: np.ndarray | None = None
    unusual: list[tuple[str, str]] = field(default_factory=list)
    palette: dict[int, tuple[int, int, int]] | None = None


def examine(row: dict[str, Any], encoding: LabelEncoding | None, *, with_label: bool, whole: bool) -> Examined:
    """What `read_sample` would return, and what is unusual about it.

    Args:
        whole: also decode the image's pixels; otherwise only its header is read.

    Raises:
        ValueError: as for `read_sample`; for damaged pixels only with `whole`.
    """
    name, image = _opened_image(row)
    found = Examined(image.size)
    if whole:
        image.rgb()
        if image.becomes_nearly_black:
            found.unusual.append(("image", "few bits"))
    found.unusual += [("image", kind) for kind in image.unusual()]
    if with_label:
        raster = open_raster(row["label"], name, "label")
        label = _fitted(raster, encoding, image)
        found.ids, found.palette = label.ids, raster.palette()
        found.unusual += [("label", kind) for kind in label.unusual]
        found.unusual += [("label", kind) for kind in raster.unusual() if kind in ("pages", "white is zero")]
    return found


def _opened_image(row: dict[str, Any]) -> tuple[str, Raster]:
    """(the row's name in error messages, its image)."""
    name = repr(str(row.get("id", NO_ID)))
    return name, open_raster(row["image"], name, "image")


def _upright(raster: Raster) -> Tensor:
    """uint8 (3, H, W)."""
    pixels = raster.rgb()
    pixels = pixels if raster.is_upright else turn(pixels, raster.orientation)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def class_ids_of(raster: Raster, encoding: LabelEncoding | None) -> np.ndarray:
    """The class ids of a mask, uint8 (H, W), not rotated, except by PIL for a TIFF."""
    if encoding is not None and encoding.colors is not None:
        if raster.bits == 16:
            raise ValueError(
                f"The label of {raster.where} has 16 bits per channel, but `colors` have 8. Save it with 8 bits."
            )
        return encoding.decode(raster.shown(), name=raster.where)
    if encoding is not None:
        return encoding.decode(raster.stored(), name=raster.where)
    values = stored_values(raster.stored(), name=raster.where)
    values = np.where(values == -1, IGNORE_INDEX, values) if values.min(initial=0) < 0 else values
    if not 0 <= values.min(initial=0) <= values.max(initial=0) <= 255:
        raise ValueError(
            f"The label of {raster.where} contains values from {values.min()} to {values.max()}; expected class ids 0 "
            "to 254, or 255 or -1 for pixels to ignore. Set the coding of labels when loading the data set: "
            f"`class_names` and the class of each value, for instance {as_typed(values={0: 0, int(values.max()): 1})}."
        )
    return values.astype(np.uint8)


@dataclass
class _Fitted:
    ids: np.ndarray
    unusual: list[str]


def _fitted(raster: Raster, encoding: LabelEncoding | None, image: Raster) -> _Fitted:
    """The class ids of a mask on the upright pixels of its image, as described at the top of this module.

    If a mask has its own EXIF orientation, it is rotated, as in a viewer, unless only its stored size fits.

    Raises:
        ValueError: it has another size.
    """
    ids, own = class_ids_of(raster, encoding), raster.orientation
    drawn = ids if raster.is_upright else turn(ids, own)
    unusual = [] if own == 1 else ["turned itself"]
    resizes = encoding is not None and encoding.resize_masks
    if _fits(drawn.shape, image.size, resizes):
        if own == 1 and image.orientation != 1 and _fits(drawn.shape, image.stored_size, resizes):
            unusual.append("cannot tell")
    elif own == 1 and _fits(drawn.shape, image.stored_size, resizes):
        drawn = turn(drawn, image.orientation)
        unusual.append("turned with image")
    elif own >= 5 and _fits(drawn.shape[::-1], image.size, resizes):
        drawn = turn(drawn, _UNDO.get(own, own))
    else:
        raise _other_size(drawn.shape, raster, image)
    if drawn.shape != image.size:
        drawn = np.array(PILImage.fromarray(np.ascontiguousarray(drawn)).resize(image.size[::-1], PILImage.NEAREST))
        unusual.append("resized")
    return _Fitted(np.ascontiguousarray(drawn), unusual)


def _fits(shape: tuple[int, int], size: tuple[int, int], resizes: bool) -> bool:
    return tuple(shape) == size or (resizes and same_aspect(shape, size))


def same_aspect(shape: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether both sizes have the same aspect ratio, up to less than a pixel."""
    (a, b), (height, width) = shape, size
    return (a - 1) / height < (b + 1) / width and (b - 1) / width < (a + 1) / height


def _other_size(shape: tuple[int, int], raster: Raster, image: Raster) -> LabelSizeError:
    said = (
        f"Image and label differ in size: {image.where} is {image.size[0]} x {image.size[1]} (height x width), its "
        f"label {raster.where} is {shape[0]} x {shape[1]}."
    )
    if image.orientation >= 5:
        said += " (The image is rotated according to its EXIF orientation.)"
    if same_aspect(shape, image.size) or same_aspect(shape, image.stored_size):
        factor = max(image.size) / max(shape)
        how = f"{factor:.3g} times smaller" if factor > 1 else f"{1 / factor:.3g} times larger"
        return LabelSizeError(
            f"{said} Their proportions are equal; the label is {how}. To resize such labels to their images, by the "
            f"nearest pixel, set {as_typed(resize_masks=True)}.",
            said,
        )
    return LabelSizeError(f"{said} Each pixel needs a label: replace one of the files.", said)
