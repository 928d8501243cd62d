"""Check a data set before training: its content, and everything that is wrong with it, by file."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image, ImageDraw

from ..files import written_whole
from ..functional import IGNORE_INDEX
from ..visualization import lettering
from ..visualization.colors import BLACK, WHITE, Color, overlay_name
from .palettes import palette_of
from .reading import read_sample
from .streams import id_of, undecoded
from .survey import Survey, survey

THUMBNAIL = 160  # pixels of the longer side on the contact sheet
LINE = 16  # height in pixels of a caption and of a line of the legend
SHEET_COLUMNS = 6
WHOLE_SET = "the whole set"  # for problems that concern no single sample


def check_dataset(
    dataset: Dataset, *, sheet: str | Path | None = None, progress: bool = True, num_workers: int = 0
) -> dict[str, Any]:
    """Read every sample as training would, and check the whole set.

    Args:
        dataset: from a `load_*` function, with or without "label".
        sheet: where to write a contact sheet (PNG) of some samples, with labels overlaid and ignored pixels in white.
        num_workers: processes that read images.

    Returns:
        "samples", "readable", "sizes" (height and width: smallest, median, largest), "orientations", "classes" (name,
        share of labeled pixels, share of images with the class; "stored" if 255 in the masks is that class),
        "ignored_share", "notes" (what is unusual or may be a mistake but is read correctly: "what", "count", "first"
        ids), "contact_sheet" (its path) or, if it could not be written, "contact_sheet_error", and "problems": a list
        of {"id", "problem"}, one per sample that cannot be read and one per problem of the whole set.

    Raises:
        ValueError: the data set is streamed, or lacks a column.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("A stream cannot be checked. Load the data set with `streaming=False`.")
    found = survey(dataset, what="the set", whole=True, num_workers=num_workers, progress=progress)
    problems = [*found.problems, *({"id": WHOLE_SET, "problem": sentence} for sentence in found.faults())]
    rows = undecoded(dataset, with_label=found.with_label, what="dataset")
    repeated = [name for name, count in Counter(map(str, rows["id"])).items() if count > 1]
    problems += [{"id": name, "problem": "this id occurs more than once"} for name in repeated]
    report: dict[str, Any] = {"samples": len(rows), "readable": found.readable}
    report |= _sizes(found.sizes) | (_classes(found) if found.with_label else {})
    report["notes"] = [{"what": note.what, "count": note.count, "first": note.first} for note in found.notes()]
    if sheet is not None:
        report |= _contact_sheet(dataset, rows, found, Path(sheet))
    return {**report, "problems": problems}


def check_splits(load: Callable[[str], Dataset], splits: Sequence[str], **options: Any) -> dict[str, Any]:
    """`check_dataset` of each split.

    Args:
        load: returns the data set of a split.
        options: of `check_dataset`. The name of `sheet` gets the split's name before its suffix.

    Returns:
        "splits": the result of `check_dataset` by split; and "problems" of all, each with its "split". A split that
        cannot be opened is a problem.
    """
    sheet, reports, problems = options.pop("sheet", None), {}, []
    for split in splits:
        own = {} if sheet is None else {"sheet": Path(sheet).with_stem(f"{Path(sheet).stem}_{split}")}
        try:
            reports[split] = check_dataset(load(split), **options, **own)
        except ValueError as error:
            reports[split] = {"samples": 0, "readable": 0, "problems": [{"id": WHOLE_SET, "problem": str(error)}]}
        problems += [{"split": split, **problem} for problem in reports[split]["problems"]]
    return {"splits": reports, "problems": problems}


def _contact_sheet(dataset: Dataset, rows: Dataset, found: Survey, path: Path) -> dict[str, Any]:
    """Draw some samples, read again. "contact_sheet" or "contact_sheet_error"; empty if no sample can be read."""
    colors = palette_of(dataset.features["label"], found.names) if found.with_label else ()
    step = max(1, len(rows) // (4 * SHEET_COLUMNS))
    thumbnails = []
    for index in range(0, len(rows), step):
        row = rows[index]
        if len(thumbnails) == 4 * SHEET_COLUMNS:
            break
        try:
            image, label = read_sample(row, found.encoding, with_label=found.with_label)
        except ValueError:
            continue  # already a problem
        thumbnails.append(_thumbnail(image, label, colors, id_of(row)))
    if not thumbnails:
        return {}
    legend = [
        (overlay_name(found.names[c], colors[c]), tuple(colors[c]))
        for c in np.flatnonzero(found.pixels[: len(colors)])
    ]
    legend += [("ignored", WHITE)] if found.pixels[IGNORE_INDEX] else []
    try:
        _write_sheet(thumbnails, legend, path)
        return {"contact_sheet": str(path)}
    except OSError as error:  # a full disk: keep the results of the check
        return {"contact_sheet_error": f"{path}: {error.strerror or error}."}


def _sizes(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {}
    array = np.array(sizes)
    found = {"min": array.min(0).tolist(), "median": np.median(array, 0).tolist(), "max": array.max(0).tolist()}
    wide, tall = int((array[:, 1] > array[:, 0]).sum()), int((array[:, 1] < array[:, 0]).sum())
    return {"sizes": found, "orientations": {"landscape": wide, "portrait": tall, "square": len(sizes) - wide - tall}}


def _classes(found: Survey) -> dict[str, Any]:
    encoding, pixels, images = found.encoding, found.pixels, found.images
    last = len(encoding.names) if encoding else int(np.flatnonzero(pixels[:IGNORE_INDEX]).max(initial=-1)) + 1
    labeled = max(int(pixels[:IGNORE_INDEX].sum()), 1)
    rows = [
        {
            "name": found.names[c],
            "pixel_share": float(pixels[c] / labeled),
            "image_share": float(images[c] / max(found.readable, 1)),
        }
        for c in range(last)
    ]
    if found.white_is_a_class:
        rows[1]["stored"] = IGNORE_INDEX
    return {"classes": rows, "ignored_share": float(pixels[IGNORE_INDEX] / max(int(pixels.sum()), 1))}


def _thumbnail(image, label, colors: Sequence[Color], name: str) -> Image.Image:
    """The image, and below it the same image with its label overlaid (except black classes); the id as a caption."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    height, width = image.shape[-2:]
    scale = THUMBNAIL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    parts = [picture.resize(size)]
    if label is not None:
        table = np.full((256, 3), 255, np.uint8)  # ignored: white
        table[: len(colors)] = colors
        flat = table[label.numpy()]
        tinted = Image.fromarray((flat != BLACK).any(-1))
        overlay = Image.composite(Image.blend(picture, Image.fromarray(flat), 0.6), picture, tinted)
        parts.append(overlay.resize(size, Image.NEAREST if scale > 1 else Image.BILINEAR))
    tile = Image.new("RGB", (THUMBNAIL, len(parts) * THUMBNAIL + LINE), (40, 40, 40))
    for i, part in enumerate(parts):
        tile.paste(part, ((THUMBNAIL - part.width) // 2, i * THUMBNAIL + (THUMBNAIL - part.height) // 2))
    font = lettering.font(LINE - 5)
    caption = _shortened(" ".join(name.split()), lambda text: font.getlength(text) <= THUMBNAIL - 6)
    ImageDraw.Draw(tile).text((3, tile.height - LINE // 2), caption, fill=(230, 230, 230), font=font, anchor="lm")
    return tile


def _shortened(name: str, fits: Callable[[str], bool]) -> str:
    """The end of a name. If the file's own name is too long, its beginning and end: Roboflow's names end in a hash."""
    if fits(name):
        return name
    own = name.rpartition("/")[2]
    if fits(f"…{own}"):
        while not fits(name):
            name = "…" + name[2:]
        return name
    begin, end = own[: len(own) // 2], own[len(own) // 2 :]
    while not fits(f"{begin}…{end}"):
        begin, end = begin[:-1], end[1:]
    return f"{begin}…{end}"


def _write_sheet(tiles: list[Image.Image], legend: list[tuple[str, Color]], path: Path) -> None:
    """The tiles in rows, and below them the classes that occur in the data set."""
    columns = min(SHEET_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = THUMBNAIL + 6, tiles[0].height + 6
    font = lettering.font(LINE - 4)
    entry = max((LINE + 12 + math.ceil(font.getlength(name)) for name, _ in legend), default=1)
    page = max(columns * width, entry) + 6
    per_line, top = (page - 6) // entry, rows * height + 6
    lines = math.ceil(len(legend) / per_line)
    sheet = Image.new("RGB", (page, top + lines * (LINE + 4)), (20, 20, 20))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (6 + i % columns * width, 6 + i // columns * height))
    draw = ImageDraw.Draw(sheet)
    for i, (name, color) in enumerate(legend):
        x, y = 6 + i % per_line * entry, top + i // per_line * (LINE + 4)
        draw.rectangle((x, y, x + LINE - 4, y + LINE - 4), fill=color, outline=(150, 150, 150))
        draw.text((x + LINE, y + LINE // 2 - 2), name, fill=(230, 230, 230), font=font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        sheet.save(temporary, format="PNG")


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `check_dataset` or `check_splits` as text for a terminal, with at most twenty problems per set
    in full."""
    if "splits" in report:
        return "\n\n".join(f"== {split} ==\n{format_report(part)}" for split, part in report["splits"].items())
    lines = [f"{_counted(report['samples'], 'sample')}, {report['readable']} readable"]
    if "sizes" in report:
        low, middle, high = (" x ".join(str(int(v)) for v in report["sizes"][key]) for key in ("min", "median", "max"))
        lines.append(f"height x width: smallest {low}, median {middle}, largest {high}")
        lines.append("orientation: " + ", ".join(f"{v} {k}" for k, v in report["orientations"].items()))
    if "classes" in report:
        width = max([len(row["name"]) for row in report["classes"]] + [5])
        lines.append(f"\n{'class':<{width}}{'pixels, %':>12}{'images, %':>12}")
        for row in report["classes"]:
            said = "   never occurs" if row["pixel_share"] == 0 else ""
            said += f"   {row['stored']} in the masks" if "stored" in row else ""
            shares = f"{100 * row['pixel_share']:>12.2f}{100 * row['image_share']:>12.1f}"
            lines.append(f"{row['name']:<{width}}{shares}{said}")
        lines.append(f"ignored: {100 * report['ignored_share']:.2f} % of all pixels")
    notes = report.get("notes", [])
    lines += ["", *(_note(note) for note in notes)] if notes else []
    problems = report["problems"]
    lines.append(f"\n{_counted(len(problems), 'problem')}" if problems else "\nno problems")
    lines += _problem_lines(problems[:20])
    if len(problems) > 20:
        lines.append(f"  ... and {len(problems) - 20} more; the report file lists all")
    return "\n".join(lines)


def _problem_lines(problems: Sequence[Mapping[str, str]]) -> list[str]:
    """A line per problem. Advice that several problems share is printed once below them."""
    by_advice: dict[str, list[tuple[str, str]]] = {}
    for problem in problems:
        found, *advice = re.split(r"(?<=\.) (?=[A-Z])", problem["problem"], maxsplit=1)  # first sentence, the rest
        by_advice.setdefault(" ".join(advice), []).append((problem["id"], found))
    lines = []
    for advice, alike in by_advice.items():
        if len(alike) == 1:
            [(name, found)] = alike
            lines.append(f"  {name}: {found} {advice}".rstrip())
            continue
        lines += [f"  {name}: {found}" for name, found in alike]
        lines += [f"  For these {len(alike)}: {advice}"] if advice else []
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _note(note: Mapping[str, Any]) -> str:
    more = ", ..." if note["count"] > len(note["first"]) else ""
    return f"{note['count']} {note['what']}" + (f": {', '.join(note['first'])}{more}" if note["first"] else "")
