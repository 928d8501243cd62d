"""Walking a data set before training: what is in it, and all that is wrong with it, by file."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from .labels import IGNORE_INDEX, LabelEncoding
from .reading import read_sample
from .streams import undecoded

THUMBNAIL = 160  # pixels of the longer side on the contact sheet
SHEET_COLUMNS = 6


def check_dataset(dataset: Dataset, *, sheet: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Read every sample as training would.

    Args:
        dataset: as the `load_*` functions give it, with or without "label".
        sheet: where to write a contact sheet (PNG) of some samples, labels laid over them.

    Returns:
        "samples", "readable", "sizes" (height and width: smallest, median, largest), "orientations", "classes" (name,
        share of labeled pixels, share of images that have it), "ignored_share", and "problems": a list of
        {"id", "problem"}, one for every sample that cannot be read.

    Raises:
        ValueError: the data set is streamed, or lacks a column.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("A data set is checked whole, not as a stream: load it with `streaming=False`.")
    with_label = "label" in dataset.features
    encoding = LabelEncoding.from_feature(dataset.features["label"]) if with_label else None
    rows = undecoded(dataset, with_label=with_label, what="dataset")
    step = max(1, len(rows) // (4 * SHEET_COLUMNS))
    sizes, problems, thumbnails = [], [], []
    pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for index in tqdm(range(len(rows)), desc="checking", disable=not progress):
        row = rows[index]
        try:
            image, label = read_sample(row, encoding, with_label=with_label)
        except ValueError as error:
            problems.append({"id": str(row["id"]), "problem": str(error)})
            continue
        sizes.append(tuple(image.shape[-2:]))
        if label is not None:
            counts = np.bincount(label.numpy().reshape(-1), minlength=256)
            pixels, images = pixels + counts, images + (counts > 0)
        if sheet is not None and index % step == 0 and len(thumbnails) < 4 * SHEET_COLUMNS:
            thumbnails.append(_thumbnail(image, label, encoding, str(row["id"])))
    repeated = [name for name, count in Counter(map(str, rows["id"])).items() if count > 1]
    problems += [{"id": name, "problem": "this id stands more than once"} for name in repeated]
    report: dict[str, Any] = {"samples": len(rows), "readable": len(sizes)}
    report |= _sizes(sizes) | (_classes(pixels, images, len(sizes), encoding) if with_label else {})
    if thumbnails:
        _write_sheet(thumbnails, Path(sheet))
        report["contact_sheet"] = str(sheet)
    return {**report, "problems": problems}


def _sizes(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {}
    array = np.array(sizes)
    found = {"min": array.min(0).tolist(), "median": np.median(array, 0).tolist(), "max": array.max(0).tolist()}
    wide, tall = int((array[:, 1] > array[:, 0]).sum()), int((array[:, 1] < array[:, 0]).sum())
    return {"sizes": found, "orientations": {"landscape": wide, "portrait": tall, "square": len(sizes) - wide - tall}}


def _classes(pixels, images, readable: int, encoding: LabelEncoding | None) -> dict[str, Any]:
    last = len(encoding.names) if encoding else int(np.flatnonzero(pixels[:IGNORE_INDEX]).max(initial=-1)) + 1
    labeled = max(int(pixels[:IGNORE_INDEX].sum()), 1)
    rows = [
        {
            "name": encoding.names[c] if encoding else f"class {c}",
            "pixel_share": float(pixels[c] / labeled),
            "image_share": float(images[c] / max(readable, 1)),
        }
        for c in range(last)
    ]
    return {"classes": rows, "ignored_share": float(pixels[IGNORE_INDEX] / max(int(pixels.sum()), 1))}


def _thumbnail(image, label, encoding: LabelEncoding | None, name: str) -> Image.Image:
    """The image, and below it the same with its label laid over; the id as a caption."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    height, width = image.shape[-2:]
    scale = THUMBNAIL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    parts = [picture.resize(size)]
    if label is not None:
        colors = np.array((encoding.palette if encoding and encoding.palette else _spread_colors()), np.uint8)
        table = np.full((256, 3), 255, np.uint8)  # ignored: white
        table[: len(colors)] = colors[:255]
        overlay = Image.blend(picture, Image.fromarray(table[label.numpy()]), 0.6)
        parts.append(overlay.resize(size, Image.NEAREST if scale > 1 else Image.BILINEAR))
    tile = Image.new("RGB", (THUMBNAIL, len(parts) * THUMBNAIL + 16), (40, 40, 40))
    for i, part in enumerate(parts):
        tile.paste(part, ((THUMBNAIL - part.width) // 2, i * THUMBNAIL + (THUMBNAIL - part.height) // 2))
    caption = name if len(name) <= 26 else "..." + name[-23:]
    ImageDraw.Draw(tile).text((3, tile.height - 14), caption, fill=(230, 230, 230))
    return tile


def _spread_colors() -> list[tuple[int, int, int]]:
    """255 colours, neighbours far apart: the golden angle around the hue circle."""
    import colorsys

    hues = [(index * 0.381966) % 1 for index in range(255)]
    return [
        tuple(round(255 * v) for v in colorsys.hsv_to_rgb(h, 0.8, 0.95 - 0.4 * (i % 3) / 2))
        for i, h in enumerate(hues)
    ]


def _write_sheet(tiles: list[Image.Image], path: Path) -> None:
    columns = min(SHEET_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = THUMBNAIL + 6, tiles[0].height + 6
    sheet = Image.new("RGB", (columns * width + 6, rows * height + 6), (20, 20, 20))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (6 + i % columns * width, 6 + i // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    sheet.save(temporary, "PNG")
    os.replace(temporary, path)


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal; at most twenty problems are spelled out."""
    lines = [f"{report['samples']} samples, {report['readable']} readable"]
    if "sizes" in report:
        low, middle, high = (" x ".join(str(int(v)) for v in report["sizes"][key]) for key in ("min", "median", "max"))
        lines.append(f"height x width: smallest {low}, median {middle}, largest {high}")
        lines.append("orientation: " + ", ".join(f"{v} {k}" for k, v in report["orientations"].items()))
    if "classes" in report:
        width = max([len(row["name"]) for row in report["classes"]] + [5])
        lines.append(f"\n{'class':<{width}}{'pixels, %':>12}{'images, %':>12}")
        for row in report["classes"]:
            absent = "   never occurs" if row["pixel_share"] == 0 else ""
            shares = f"{100 * row['pixel_share']:>12.2f}{100 * row['image_share']:>12.1f}"
            lines.append(f"{row['name']:<{width}}{shares}{absent}")
        lines.append(f"ignored: {100 * report['ignored_share']:.2f} % of all pixels")
    problems = report["problems"]
    lines.append(f"\n{len(problems)} problems" if problems else "\nno problems")
    lines += [f"  {p['id']}: {p['problem']}" for p in problems[:20]]
    if len(problems) > 20:
        lines.append(f"  ... and {len(problems) - 20} more; the report file lists all")
    return "\n".join(lines)
