"""Find out how a folder's masks code their classes: from the masks themselves, and from a class table if any.

Each mask is read once to count its values. Their meaning is then decided once, for all masks.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from .bands import TiffBands
from .class_tables import ClassTable, without_ignored
from .folder import label_feature
from .labels import BLACK_AND_WHITE, IGNORE_INDEX, LabelEncoding, stored_values
from .raster import open_raster
from .table import first_few
from .windowed import open_mask_bands

MOST_LISTED, LINE = 64, 100  # colours in an error, and characters in a line of it
MOST_COLORS = 1024  # in a mask; pictures have more
FEW_VALUES = 20  # values with gaps that still count as classes without a table
BETWEEN = 10  # number of values between black and white from which a mask counts as smoothed
Color = tuple[int, int, int]


@dataclass
class MaskLook:
    """The stored values of one mask.

    Attributes:
        values: pixels by stored value, if it has one channel.
        colors: pixels by displayed colour.
        has_palette: whether its values are indices of a palette.
        void: the displayed colour of the value 255, if it occurs.
        problem: why it cannot be read.
    """

    values: dict[int, int] | None = None
    colors: dict[Color, int] = field(default_factory=dict)
    has_palette: bool = False
    void: Color | None = None
    problem: str | None = None


@dataclass
class Coding:
    """The classes, their coding in masks, and notes: sentences."""

    encoding: LabelEncoding
    notes: list[str] = field(default_factory=list)


def look_at_masks(names: Sequence[str], masks: Sequence[Path], *, num_threads: int = 2) -> list[MaskLook]:
    """The stored values of each mask. `names`: their names in error messages."""
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(_look, names, masks))


def _look(name: str, path: Path) -> MaskLook:
    try:
        large = open_mask_bands(path, name=repr(name))
        if large is not None:
            return _look_at_bands(large, name)
        raster = open_raster({"path": str(path), "bytes": None}, repr(name), "label")
        shown = raster.shown()
        if len(shown.getbands()) > 1:
            return _look_at_colors(np.asarray(shown.convert("RGB")), name)
        palette = raster.palette()
        values, counts = np.unique(stored_values(raster.stored(), name=raster.where), return_counts=True)
    except ValueError as error:
        return MaskLook(problem=str(error))
    return _look_of_values(dict(zip(values.tolist(), counts.tolist(), strict=True)), palette)


def _look_of_values(by_value: dict[int, int], palette: Mapping[int, Color] | None) -> MaskLook:
    shown_as = {value: (palette or {}).get(value, (value, value, value)) for value in by_value}
    colors: Counter[Color] = Counter()
    for value, count in by_value.items():
        colors[shown_as[value]] += count
    return MaskLook(by_value, dict(colors), palette is not None, shown_as.get(IGNORE_INDEX))


def _look_at_bands(mask: TiffBands, name: str) -> MaskLook:
    """As `_look`, some rows at a time."""
    values: Counter[int] = Counter()
    colors: Counter[Color] = Counter()
    for start, stop in mask.row_ranges():
        rows = mask.mask_rows(start, stop)
        if rows.ndim == 3:
            look = _look_at_colors(rows[..., :3] if rows.shape[2] >= 3 else rows[..., [0, 0, 0]], name)
            if look.problem is not None:
                return look
            colors.update(look.colors)
        else:
            found = np.unique(stored_values(PILImage.fromarray(rows), name=repr(name)), return_counts=True)
            values.update(dict(zip(*(part.tolist() for part in found), strict=True)))
    if colors:
        return MaskLook(None, dict(colors))
    shown = {v: tuple(mask.palette[3 * v : 3 * v + 3]) for v in values} if mask.palette else {}
    return _look_of_values(dict(values), None if all(color == (v, v, v) for v, color in shown.items()) else shown)


def _look_at_colors(pixels: np.ndarray, name: str) -> MaskLook:
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    values, counts = np.unique(packed, return_counts=True)
    if len(values) > MOST_COLORS:
        return MaskLook(
            problem=f"The mask of {name!r} has {len(values)} colours, like a picture, not a mask. Use masks of "
            "class ids, PNGs without anti-aliasing. Photos in place of masks, or JPEGs saved as PNG, look like this."
        )
    colors = [(v >> 16, v >> 8 & 255, v & 255) for v in values.tolist()]
    return MaskLook(None, dict(zip(colors, counts.tolist(), strict=True)))


def settle(
    names: Sequence[str],
    looks: Sequence[MaskLook],
    tables: Sequence[ClassTable],
    *,
    given: ClassTable | None = None,
    coding: Mapping[str, Any] | None = None,
) -> Coding:
    """Decide how the masks are read.

    Args:
        names: of the masks, for error messages.
        tables: the class files next to the masks.
        given: the user's classes, which override `tables`.
        coding: a coding from the user, as `label_feature` takes it.

    Raises:
        ValueError: no mask can be read, or their meaning is unclear; the message says what was found and what to do.
    """
    readable = [(name, look) for name, look in zip(names, looks, strict=True) if look.problem is None]
    if not readable:
        raise ValueError(f"No mask can be read. {looks[0].problem}")
    table = given or next(iter(tables), None)
    if coding:
        feature = label_feature(None if table is None else table.names, **coding)
        return Coding(LabelEncoding.from_feature(feature))
    with_colors = next((t for t in ([given] if given else []) + [*tables] if t.colors), None)
    if with_colors and _is_colored(readable, with_colors):
        return _by_colors(readable, with_colors, given)
    colored = [(name, look) for name, look in readable if look.values is None]
    if not colored:
        values = _total([look.values for _, look in readable])
        return _by_values(readable, values, table, in_grey=False)
    shown = _total([look.colors for _, look in readable])
    if all(r == g == b for r, g, b in shown) and not any(look.has_palette for _, look in readable):
        return _by_values(readable, {r: count for (r, _, _), count in shown.items()}, table, in_grey=True)
    raise _no_color_table([name for name, _ in colored], len(readable), shown, table)


def class_pixels(look: MaskLook, encoding: LabelEncoding) -> np.ndarray:
    """Pixels by class id (256,); 255 counts ignored pixels. Zero for a mask with values that the encoding lacks."""
    found = np.zeros(256, np.int64)
    if look.problem is not None or (look.values is None and encoding.colors is None):
        return found
    if encoding.colors is not None:
        ids = {color: encoding.colors.get(color) for color in look.colors}
    elif encoding.values is not None:
        ids = {value: encoding.values.get(value, IGNORE_INDEX if value < 0 else None) for value in look.values}
    else:
        known = {*range(len(encoding.names)), IGNORE_INDEX}
        ids = {value: value if value in known else IGNORE_INDEX if value < 0 else None for value in look.values}
    if None in ids.values():
        return found
    counts = look.colors if encoding.colors is not None else look.values
    for code, class_id in ids.items():
        found[class_id] += counts[code]
    return found


# ------------------------------------------------------------------------------------------------ by colours


def _is_colored(readable: Sequence[tuple[str, MaskLook]], table: ClassTable) -> bool:
    """Whether the masks use the table's colours. Colour pictures do; others only if all their colours are listed."""
    if any(look.values is None for _, look in readable):
        return True
    shown = {color for _, look in readable for color in look.colors} - {look.void for _, look in readable}
    return len(shown) > 1 and shown <= {*table.colors}


def _by_colors(readable: Sequence[tuple[str, MaskLook]], table: ClassTable, given: ClassTable | None) -> Coding:
    names, colors = without_ignored(table)
    if given is not None and given.colors is None:
        if len(given.names) != len(names):
            raise ValueError(
                f"`class_names` has {len(given.names)} names, but {table.path} has {len(names)} classes. Give as "
                "many, in its order."
            )
        names = given.names
    colors |= {look.void: IGNORE_INDEX for _, look in readable if look.void and look.void not in colors}
    strange: dict[Color, str] = {}
    for name, look in readable:
        for color in look.colors.keys() - colors.keys():
            strange.setdefault(color, name)
    if strange:
        (color, name), *_ = strange.items()
        raise ValueError(
            f"Masks contain {len(strange)} colours that {table.path} does not list: {first_few([*strange], 3)}, e.g. "
            f"{color} in {name!r}. Add them there, or save the masks without smoothed edges."
        )
    palette = {class_id: color for color, class_id in reversed(colors.items()) if class_id != IGNORE_INDEX}
    shown = tuple(palette[i] for i in range(len(names)))
    ignored = [f"{n} {c}" for n, c in zip(table.names, table.colors, strict=True) if colors.get(c) == IGNORE_INDEX]
    notes = [f"Classes and their colours are from {table.path.name}."]
    notes += [f"Ignored because of their names there: {', '.join(ignored)}."] if ignored else []
    return Coding(LabelEncoding(names, colors=colors, palette=shown), notes)


def _no_color_table(
    colored: Sequence[str], count: int, shown: Mapping[Color, int], table: ClassTable | None
) -> ValueError:
    common = [color for color, _ in sorted(shown.items(), key=lambda item: -item[1])]
    names = list(table.names) if table else [f"NAME_{i}" for i in range(len(common[:MOST_LISTED]))]
    typed = {"class_names": names, "colors": {", ".join(map(str, c)): i for i, c in enumerate(common[: len(names)])}}
    mixed = "" if len(colored) == count else f" (the other {count - len(colored)} have one channel)"
    return ValueError(
        f"{len(colored)} of {count} masks{mixed} are colour pictures, e.g. {colored[0]!r}; together they use "
        f"{len(shown)} colours:{_wrapped(common)}Define the class of each colour in a `labelmap.txt` next to "
        "the folders, with a line `name:red,green,blue` for each, or with `--load_options "
        f"'{json.dumps(typed, ensure_ascii=False)}'`."
    )


def _wrapped(colors: Sequence[Color]) -> str:
    """A sentence's end: all of them, or the first `MOST_LISTED`; on separate lines if they do not fit into one."""
    text = first_few(colors, MOST_LISTED)
    if len(text) < LINE:
        return f" {text}. "
    whole = re.sub(r", (?=\d)", ",\xa0", text)  # no line ends within a colour
    lines = textwrap.wrap(whole, LINE, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    return "\n".join(["", *lines, ""]).replace("\xa0", " ")


# ------------------------------------------------------------------------------------------------ by values


def _by_values(
    readable: Sequence[tuple[str, MaskLook]], pixels: Mapping[int, int], table: ClassTable | None, *, in_grey: bool
) -> Coding:
    """For masks of one channel; or (`in_grey`) for grey pictures, whose colours then stand for the values."""
    found = {value for value in pixels if value >= 0} - {IGNORE_INDEX}
    _reject_smoothed(pixels)
    notes: list[str] = []
    values: dict[int, int] | None = None
    if found == {0} and IGNORE_INDEX in pixels and (table is None or len(table.names) == 2):
        names = table.names if table else ("class_0", "class_1")
        values = dict(BLACK_AND_WHITE)
        notes.append(
            f"The masks contain only 0 and 255: 255 is {names[1]!r}, and nothing is ignored. If 255 means ignored: "
            '`--load_options \'{"values": {"0": 0, "1": 1, "255": 255}}\'`.'
        )
    elif table is None:
        names, values = _numbered(found)
    else:
        names = table.names
        values = None if table.values is None else {v: i for i, v in enumerate(table.values)}
        _reject_unnamed(readable, found - {*(values or range(len(names)))}, table)
    if values is not None and IGNORE_INDEX in pixels:
        values.setdefault(IGNORE_INDEX, IGNORE_INDEX)
    if len(names) < 2:
        raise ValueError(
            f"{table.path} names one class, {names[0]!r}, but the masks contain {first_few(sorted(pixels))}: name the "
            "background too, e.g. `--class_names background "
            f"{names[0]}`."
        )
    if table is None:
        notes.append(
            f"No class names were found, so classes are called {first_few(names, 3)}. Name them with "
            "`--class_names NAME NAME ...`, or in a file classes.txt, one name per line, in this order."
        )
    if IGNORE_INDEX in pixels and (values is None or values[IGNORE_INDEX] == IGNORE_INDEX):
        share = 100 * pixels[IGNORE_INDEX] / sum(pixels.values())
        notes.append(f"255 is ignored: {share:.1f} % of the masks' pixels.")
    if in_grey:
        table_of = values or {i: i for i in range(len(names))}
        colors = {(v, v, v): class_id for v, class_id in ({IGNORE_INDEX: IGNORE_INDEX} | table_of).items()}
        return Coding(LabelEncoding(names, colors=colors), ["The masks are grey, saved as RGB.", *notes])
    return Coding(LabelEncoding(names, values=values), notes)


def _numbered(found: set[int]) -> tuple[tuple[str, ...], dict[int, int] | None]:
    """(names, values) for masks without class names. Values with few gaps are class ids; others, such as 0, 128 and
    200, each stand for one class."""
    if len(found) < 2:
        raise ValueError(
            f"The masks contain {', '.join(map(str, found)) or 'no value but 255, which is ignored'}"
            f"{' alone' if found else ''}: at least two classes are needed, one of which may be the background."
        )
    if len(found) > IGNORE_INDEX:
        raise ValueError(
            f"The masks contain {len(found)} values, but at most {IGNORE_INDEX} classes are possible. "
            "Are these numbers of objects? Save masks of class ids."
        )
    if 2 * len(found) > max(found):
        return tuple(f"class_{i}" for i in range(max(found) + 1)), None
    if len(found) > FEW_VALUES:
        raise ValueError(
            f"The masks contain {len(found)} values with gaps between them: {first_few(sorted(found), 9)}. Without "
            f"names, up to {FEW_VALUES} such values count as classes. If masks were smoothed or resized, save "
            'them without that; otherwise name the classes, and set with `--load_options` (`{"values": {"7": 0}}`) '
            "which class each value is."
        )
    return tuple(f"class_{v}" for v in sorted(found)), {v: i for i, v in enumerate(sorted(found))}


def _reject_smoothed(pixels: Mapping[int, int]) -> None:
    """Raise an error for black and white with many values in between, from lossy compression or interpolation."""
    between = {v: count for v, count in pixels.items() if v not in (0, 255)}
    ends = pixels.get(0, 0) + pixels.get(255, 0)
    if len(between) >= BETWEEN and pixels.get(0) and pixels.get(255) and ends > 0.8 * sum(pixels.values()):
        raise ValueError(
            f"{100 * ends / sum(pixels.values()):.1f} % of the masks' pixels are 0 or 255, and the others have "
            f"{len(between)} values in between: masks of two classes with smoothed edges. Save them with a threshold, "
            "e.g. values from 128 on as 255, the others as 0."
        )


def _reject_unnamed(readable: Sequence[tuple[str, MaskLook]], unnamed: set[int], table: ClassTable) -> None:
    if unnamed:
        codes = [look.values if look.values is not None else {r for r, _, _ in look.colors} for _, look in readable]
        name = next(name for (name, _), held in zip(readable, codes, strict=True) if unnamed & {*held})
        example = {value: i for i, value in enumerate(table.values or range(len(table.names)))}
        example |= dict.fromkeys(sorted(unnamed)[:5], IGNORE_INDEX)
        names = "`class_names`" if str(table.path) == "class_names" else table.path
        known = f"the values {first_few(table.values)}" if table.values else f"classes 0 to {len(table.names) - 1}"
        raise ValueError(
            f"Masks contain {first_few(sorted(unnamed))}, e.g. {name!r}, but {names} names {known}: "
            f"{first_few(table.names)}. Name all classes, including the background (0); or set with `--load_options` "
            f"(`{json.dumps({'values': example})}`) which class each value is, 255 for none."
        )


def _total(counts: Sequence[Mapping | None]) -> dict:
    total: Counter = Counter()
    for one in counts:
        total.update(one or {})
    return dict(total)
