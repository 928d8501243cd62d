"""How a stored label map becomes class ids, and how that coding travels with the data.

`datasets.Image` has a free text field, `id`, which survives select, filter, map, parquet and the Hub. The label
feature of a data set stores its `LabelEncoding` there, as JSON, so that shards, subsets and streams keep it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from datasets import Image
from PIL import Image as PILImage

from ..functional import IGNORE_INDEX
from .table import as_typed

_KEY = "cps_hf.label_encoding"
_UNKNOWN = -1
LOWEST, HIGHEST = -32768, 65535  # of stored values
BLACK_AND_WHITE = {0: 0, 255: 1}  # the meaning of masks of two classes that contain only 0 and 255


class LabelError(ValueError):
    """A label image that cannot be read with its coding.

    Attributes:
        problem: the message without its advice. The advice names options of the loaders; code with other options gives
            its own.
    """

    def __init__(self, message: str, problem: str = ""):  # one argument must suffice: data workers pass on only that
        super().__init__(message)
        self.problem = problem or message


class LabelSizeError(LabelError):
    """A label image of another size than its image."""


@dataclass(frozen=True)
class LabelEncoding:
    """The classes of a data set, and their coding in its label images.

    Args:
        names: class names; the index is the class id. At most 255, since 255 means ignored.
        values: stored value -> class id or 255. If None, stored values are class ids, and 255 is ignored.
        colors: for RGB-coded masks: colour -> class id or 255.
        palette: the display colour of each class.
        resize_masks: a mask with its image's aspect ratio but another size is resized to it (nearest pixel).

    -1 and NaN are ignored unless `values` maps them: they cannot be classes, and stand for missing data.

    If no value (colour) maps to 255, ignored pixels, e.g. of pseudo labels, still need a code that does not occur in
    masks of 8 bits: the highest 16-bit value that is not in `values`, 65535; with `colors`, a fully transparent pixel
    of a colour that is not in it.

    Raises:
        ValueError: names repeat, a value or colour is invalid or maps to no class, or the palette has another length.
    """

    names: tuple[str, ...]
    values: Mapping[int, int] | None = None
    colors: Mapping[tuple[int, int, int], int] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    resize_masks: bool = False

    def __post_init__(self):
        if isinstance(self.names, str):
            raise ValueError(f"`names` must be a sequence of class names, got the text {self.names!r}.")
        if not 1 <= len(self.names) <= IGNORE_INDEX:
            raise ValueError(f"A label encoding needs 1 to {IGNORE_INDEX} class names, got {len(self.names)}.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"Class names must differ; these appear more than once: {', '.join(repeated[:5])}.")
        if self.values is not None and self.colors is not None:
            raise ValueError(
                "A label encoding has either `values` (grey or palette masks) or `colors` (RGB masks), not both."
            )
        for field, table in (("values", self.values), ("colors", self.colors)):
            bad = {k: v for k, v in (table or {}).items() if not (0 <= v < len(self.names) or v == IGNORE_INDEX)}
            if bad:
                raise ValueError(
                    f"`{field}` must map to class ids 0 to {len(self.names) - 1} or to {IGNORE_INDEX} (ignored), "
                    f"found {dict(list(bad.items())[:5])}."
                )
        for value in self.values or ():
            if not LOWEST <= value <= HIGHEST:
                raise ValueError(f"`values`: stored values are {LOWEST} to {HIGHEST}, got {value}.")
        for color in self.colors or ():
            if len(color) != 3 or not all(0 <= v <= 255 for v in color):
                raise ValueError(f"`colors`: a colour is (red, green, blue), each 0 to 255, got {color}.")
        if self.palette is not None and len(self.palette) != len(self.names):
            raise ValueError(f"`palette` has {len(self.palette)} colours for {len(self.names)} classes.")

    @property
    def has_table(self) -> bool:
        """Whether `values` or `colors` define the coding; otherwise stored values are class ids."""
        return self.values is not None or self.colors is not None

    @property
    def id2label(self) -> dict[int, str]:
        """The mapping for a model's configuration."""
        return dict(enumerate(self.names))

    def to_feature(self, decode: bool = True) -> Image:
        """The `datasets` feature of a label column with this coding."""
        value = {
            "names": list(self.names),
            "values": None if self.values is None else [[int(k), int(v)] for k, v in self.values.items()],
            "colors": None if self.colors is None else [[*map(int, k), int(v)] for k, v in self.colors.items()],
            "palette": None if self.palette is None else [[*map(int, color)] for color in self.palette],
            "resize_masks": True if self.resize_masks else None,
        }
        text = json.dumps({_KEY: 1, **{k: v for k, v in value.items() if v is not None}}, separators=(",", ":"))
        return Image(decode=decode, id=text)

    @classmethod
    def from_feature(cls, feature) -> LabelEncoding | None:
        """The encoding stored in a label feature; `None` if it has none of ours.

        Raises:
            ValueError: this version cannot read it; reading the labels without it would be wrong.
        """
        try:
            value = json.loads(getattr(feature, "id", None) or "")
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or _KEY not in value:
            return None
        try:
            if value[_KEY] != 1:
                raise ValueError(f"version {value[_KEY]!r}")
            return cls(
                names=tuple(value["names"]),
                values=None if "values" not in value else dict(value["values"]),
                colors=None if "colors" not in value else {(r, g, b): v for r, g, b, v in value["colors"]},
                palette=None if "palette" not in value else tuple((r, g, b) for r, g, b in value["palette"]),
                resize_masks=bool(value.get("resize_masks", False)),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The label column has a coding that this version of cps_hf cannot read ({error}); "
                "expected version 1. Update cps_hf, or write the data set again."
            ) from error

    def decode(self, image: PILImage.Image, *, name: str) -> np.ndarray:
        """A label image as uint8 (H, W): class ids, and 255 where ignored.

        Args:
            name: the image's name in error messages.

        Raises:
            LabelError: the image contains values or colours that this encoding does not define.
        """
        if self.colors is not None:
            return self._decode_colors(image, name)
        stored = stored_values(image, name=name)
        lowest = min(int(stored.min(initial=0)), 0)
        table = np.full(max(int(stored.max(initial=0)) + 1, 256) - lowest, _UNKNOWN, np.int16)
        if lowest < 0:
            table[-1 - lowest] = IGNORE_INDEX
        for value, class_id in self._values.items() if self.values is not None else enumerate(range(len(self.names))):
            if 0 <= value - lowest < len(table):
                table[value - lowest] = class_id
        if self.values is None:
            table[IGNORE_INDEX - lowest] = IGNORE_INDEX
        decoded = table[stored if lowest == 0 else stored - lowest]
        if decoded.min(initial=0) == _UNKNOWN:
            unknown, counts = np.unique(stored[decoded == _UNKNOWN], return_counts=True)
            raise self._unknown_error(name, unknown.tolist(), counts.tolist())
        return decoded.astype(np.uint8)

    def encode(self, ids: np.ndarray) -> PILImage.Image:
        """A label image that `decode` turns into these class ids, uint8 (H, W) with 255 where ignored.

        Raises:
            ValueError: a class that occurs has no stored value or colour.
        """
        if not self.has_table:
            return PILImage.fromarray(ids)
        table = self._values if self.values is not None else self._colors
        table = {code: class_id for code, class_id in table.items() if isinstance(code, tuple) or code >= 0}
        stored = {class_id: code for code, class_id in reversed(table.items())}  # the first one if there are several
        occurring = np.unique(ids).tolist()
        missing = [i for i in occurring if i not in stored]
        if missing:
            raise ValueError(f"No {'stored value' if self.values is not None else 'colour'} stands for {missing[:5]}.")
        codes = np.array([stored[i] for i in occurring])
        if codes.ndim == 2 and codes[:, 3].all():
            codes = codes[:, :3]
        lookup = np.zeros((256, *codes.shape[1:]), np.uint8 if codes.max(initial=0) < 256 else np.uint16)
        lookup[occurring] = codes
        return PILImage.fromarray(lookup[ids])

    @cached_property
    def _values(self) -> dict[int, int]:
        """`values`, with one for ignored pixels."""
        if any(class_id == IGNORE_INDEX and value >= 0 for value, class_id in self.values.items()):
            return dict(self.values)
        return {**self.values, next(v for v in range(65535, -1, -1) if v not in self.values): IGNORE_INDEX}

    @cached_property
    def _colors(self) -> dict[tuple[int, int, int, int], int]:
        """`colors` with their alpha (255), and one for ignored pixels."""
        colors = {(*color, 255): class_id for color, class_id in self.colors.items()}
        if IGNORE_INDEX not in colors.values():
            spare = next(color for color in itertools.product(range(256), repeat=3) if color not in self.colors)
            colors[(*spare, 0)] = IGNORE_INDEX
        return colors

    def _decode_colors(self, image: PILImage.Image, name: str) -> np.ndarray:
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"):
            raise ValueError(
                f"The label of {name} has mode {image.mode!r}; `colors` reads RGB, palette and grey masks of 8 bits. "
                "Save it as such a PNG."
            )
        # Four bytes per pixel, read as one number; alpha, the highest byte, only counts if a colour is unknown.
        rgba = np.asarray(image.convert("RGBA")).view("<u4")[..., 0]
        packed = rgba & 0xFFFFFF
        decoded = self._color_table[packed]
        if decoded.min(initial=0) == _UNKNOWN and IGNORE_INDEX not in self.colors.values():
            decoded[(decoded == _UNKNOWN) & (rgba >> 24 == 0)] = IGNORE_INDEX
        if decoded.min(initial=0) == _UNKNOWN:
            unknown, counts = np.unique(packed[decoded == _UNKNOWN], return_counts=True)
            colors = [(v & 255, v >> 8 & 255, v >> 16) for v in unknown.tolist()]
            raise self._unknown_error(name, colors, counts.tolist())
        return decoded.astype(np.uint8)

    @cached_property
    def _color_table(self) -> np.ndarray:
        """Class ids by red + 256 green + 65536 blue: 32 MB, created once."""
        table = np.full(1 << 24, _UNKNOWN, np.int16)
        for (r, g, b), class_id in self.colors.items():
            table[r | g << 8 | b << 16] = class_id
        return table

    def _unknown_error(self, name: str, found: list, counts: list[int]) -> LabelError:
        first = ", ".join(f"{value} ({count} pixels)" for value, count in list(zip(found, counts, strict=True))[:5])
        if self.colors is not None:
            expected = f"the {len(self.colors)} colours of `colors`"
        elif self.values is not None:
            expected = f"the stored values {_ranges(self.values)}"
        else:
            expected = f"class ids 0 to {len(self.names) - 1}, or {IGNORE_INDEX} for pixels to ignore"
        hint = (
            "set the coding of labels when loading the data set: `class_names`, `reduce_labels`, `values` or "
            f"`colors`, for instance {as_typed(reduce_labels=True)}"
        )
        if self.colors is None and any(value < 0 for value in found):
            table = {min(found): IGNORE_INDEX} | (dict(self.values or {}) or {i: i for i in range(len(self.names))})
            hint = f"if it means missing data, set {as_typed(values=table)}"
        elif self.values == BLACK_AND_WHITE and 1 in found:
            hint = f"define each value, for instance {as_typed(values={0: 0, 1: 1, 255: 1})}; 255: 255 ignores it"
        problem = f"The label of {name} contains {first}{' ...' if len(found) > 5 else ''}"
        return LabelError(f"{problem}; expected {expected}. Fix the file, or {hint}.", f"{problem}.")


def reduced_values(num_labels: int) -> dict[int, int]:
    """`reduce_labels`: 0 is background and ignored, k is class k - 1, 255 stays ignored (as in ADE20K).

    Raises:
        ValueError: there are 255 classes; the last one's value would be 255.
    """
    if num_labels >= IGNORE_INDEX:
        raise ValueError(
            f"`reduce_labels` supports up to {IGNORE_INDEX - 1} classes, got {num_labels}: the stored value 255 is "
            "for ignored pixels, so none is left for the last class. Use `values` for masks of 16 bits."
        )
    return {0: IGNORE_INDEX, **{k + 1: k for k in range(num_labels)}, IGNORE_INDEX: IGNORE_INDEX}


def stored_values(image: PILImage.Image, *, name: str) -> np.ndarray:
    """The integers in a label image (H, W): palette indices, grey values, 16-bit values, 0/1 of a bitmap.

    Floating-point numbers are accepted if they are integers; NaN becomes -1. The indices of a GIF are accepted only if
    they equal its grey values: programs that write GIFs may renumber the palette (PIL does), so that the index, the
    grey value, or neither may be the class, and the file does not say which.

    Raises:
        LabelError: the image has several channels, or is a GIF whose palette shows other values than it stores.
        ValueError: it has fractions or values that no class can have.
    """
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode not in ("P", "L", "I", "I;16", "I;16B", "I;16L", "F"):
        problem = (
            f"The label of {name} has mode {image.mode!r} ({len(image.getbands())} channels); expected one channel of "
            "class ids (grey or palette)."
        )
        raise LabelError(
            f"{problem} For masks that code classes by RGB colours, give the table: "
            "`colors={(r, g, b): class id, ...}`.",
            problem,
        )
    values = np.asarray(image)
    if image.mode == "P" and image.format == "GIF":
        _check_gif(image, name)
    if image.mode == "F":
        values = np.where(np.isnan(values), -1, values)
        if (values != np.floor(values)).any():
            share = 100 * float((values != np.floor(values)).mean())
            raise ValueError(
                f"The label of {name} contains fractions in {share:.1f} % of its pixels, from {values.min():g} to "
                f"{values.max():g}; expected class ids. If they are probabilities or scaled to 0 to 1, save the class "
                "ids instead, as a PNG of 8 bits."
            )
    if values.min(initial=0) < LOWEST or values.max(initial=0) > HIGHEST:
        raise ValueError(
            f"The label of {name} contains values from {values.min():.10g} to {values.max():.10g}; expected integers "
            f"from {LOWEST} to {HIGHEST}. Save class ids as a PNG of 8 bits, with 255 for missing data."
        )
    return values if values.dtype == np.uint8 else values.astype(np.int32)


def _check_gif(image: PILImage.Image, name: str) -> None:
    palette = image.getpalette()
    shown = {i: tuple(palette[3 * i : 3 * i + 3]) for _, i in image.getcolors()}
    other = {i: color for i, color in sorted(shown.items()) if color != (i, i, i)}
    if other:
        found = ", ".join(f"{color} at index {i}" for i, color in list(other.items())[:3])
        table = ", ".join(f"{color}: class id" for color in [*shown.values()][:3])
        problem = (
            f"The label of {name} is a GIF with the colours {found}{' ...' if len(other) > 3 else ''}: GIF indices "
            "may have been renumbered when the file was written, so they do not tell the class."
        )
        raise LabelError(
            f"{problem} Define the colours, `colors={{{table}, ...}}`, or convert the masks to PNG.", problem
        )


def _ranges(values: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
