"""Convert a tool's export to a folder that `load_folder` reads: images/, masks/ and classes.json.

All masks are painted once before anything is written, so that an error in a label leaves the output as it was. Each
mask is written to a temporary file and renamed, and its image is linked (or copied, to another disk).
`converted.jsonl` lists finished images, so that a second call resumes and converts relabeled images again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.check import WHOLE_SET, check_dataset
from ..data.folder import CLASSES, load_folder
from ..data.masks import output_path, write_mask
from ..data.palettes import palette_of
from ..data.raster import Raster, open_raster, turn
from ..data.table import first_few
from ..files import append_record, link_file, read_records, stamp_of, write_atomically, written_whole
from ..functional import IGNORE_INDEX
from .classes import IGNORED, ClassTable
from .project import LabeledImage, Project, Shape

SETTINGS, INDEX, SHEET, REPORT = "convert.json", "converted.jsonl", "contact_sheet.png", "report.json"
ORDER, AREA = "order", "area"
RULES = ("background", "overlap")
ON_SHEET = 24  # images


@dataclass
class Painted:
    """A mask, with statistics from painting it.

    Attributes:
        ids: uint8 (H, W).
        shapes: how many were drawn, by label; ignored ones count as "".
        contested: pixels covered by shapes of different classes.
        cut: shapes that extend beyond the image. lost: shapes that contain no pixel centre.
    """

    ids: np.ndarray
    shapes: Counter[str] = field(default_factory=Counter)
    contested: int = 0
    cut: int = 0
    lost: int = 0


def paint(shapes: Sequence[Shape], table: ClassTable, height: int, width: int, *, overlap: str) -> Painted:
    """Paint the shapes of one image on top of each other.

    Args:
        overlap: "order": by their z, then in file order; "area": smaller shapes on top.

    Raises:
        ValueError: a shape cannot be drawn.
    """
    painted = Painted(np.full((height, width), table.background, np.uint8))
    labeled = np.zeros((height, width), bool)
    regions = [(shape, shape.draw(height, width)) for shape in shapes]
    if overlap == AREA:
        regions.sort(key=lambda pair: (not pair[0].under, -pair[1].area))
    else:
        regions.sort(key=lambda pair: (not pair[0].under, pair[0].z))
    for shape, region in regions:
        painted.shapes[shape.label or ""] += 1
        painted.cut += region.cut
        painted.lost += not region.pixels.any()
        id_ = IGNORE_INDEX if shape.label is None else table.ids[shape.label]
        window, inside = painted.ids[region.window], region.pixels
        painted.contested += int(np.count_nonzero(labeled[region.window] & inside & (window != id_)))
        window[inside] = id_
        if not shape.under:
            labeled[region.window] |= inside
    return painted


def paint_image(image: LabeledImage, raster: Raster, table: ClassTable, *, overlap: str) -> Painted:
    """The mask of an image in its display orientation.

    Shapes that were drawn on the stored image are rotated with it, according to its EXIF orientation.

    Raises:
        ValueError: the shapes were drawn on an image of another size.
    """
    size = image.size or raster.size
    if size not in (raster.size, raster.stored_size):
        raise ValueError(
            f"{image.where}: its shapes were drawn on {size[0]} x {size[1]} pixels (height x width), but "
            f"{image.image} has {raster.size[0]} x {raster.size[1]}. Give the images that were labeled: "
            "`--images DIR`."
        )
    painted = paint(image.shapes(), table, *size, overlap=overlap)
    if size != raster.size:
        painted.ids = np.ascontiguousarray(turn(painted.ids, raster.orientation))
    return painted


def convert(
    project: Project, table: ClassTable, out: Path, *, overlap: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a project's images and masks.

    Args:
        out: receives images/, masks/, classes.json, contact_sheet.png and report.json.
        overlap: "order" or "area". If `None`, as the tool draws.
        overwrite: first remove what an earlier call wrote there.

    Returns:
        The report: counts of "images" ("written", "done before"), of "shapes" by label, "contested" pixels, shapes
        "cut" and "lost", images that are "empty", and "notes"; how many images were "drawn" on the contact sheet, and
        those of them that are "unreadable": {"id", "problem"}.

    Raises:
        ValueError: `out` contains something else or was made with other settings, or an image or label cannot be read.
            Then nothing was written.
    """
    overlap = overlap or project.overlap
    outputs = Outputs(out, project, table, overlap, overwrite=overwrite)
    palette = palette_of(None, table.names)
    todo = [image for image in project.images if not outputs.is_done(image)]

    def painted(image: LabeledImage) -> Painted:
        raster = open_raster({"path": str(image.image)}, repr(image.name), "image")
        return paint_image(image, raster, table, overlap=overlap)

    for image in tqdm(todo, desc="checking labels", unit="image", dynamic_ncols=True, disable=None):
        painted(image)
    outputs.begin()
    for image in tqdm(todo, desc="converting", unit="image", dynamic_ncols=True, disable=None):
        outputs.write(image, painted(image), palette)
    report = outputs.report(project) | {"written": len(todo), "done before": len(project.images) - len(todo)}
    report |= _contact_sheet(out)
    write_atomically(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    return report


def _contact_sheet(out: Path) -> dict[str, Any]:
    """Draw some of the images and masks. Returns those of them that cannot be decoded, as "unreadable"."""
    dataset = load_folder(out)
    step = max(1, -(-len(dataset) // ON_SHEET))
    drawn = dataset.select(range(0, len(dataset), step))
    check = check_dataset(drawn, sheet=out / SHEET, progress=False)
    if "contact_sheet_error" in check:
        raise ValueError(check["contact_sheet_error"])
    # The masks are sound, and problems of the whole set cannot be judged by some of its images.
    problems = [problem for problem in check["problems"] if problem["id"] != WHOLE_SET]
    return {"drawn": len(drawn), "unreadable": problems}


class Outputs:
    """The files of one output folder, and which of them are done. Nothing is changed before `begin`.

    Raises:
        ValueError: the folder contains files of another command, or files written with other settings.
    """

    def __init__(self, folder: Path, project: Project, table: ClassTable, overlap: str, *, overwrite: bool):
        self.folder = folder
        self._settings = settings = {"classes": [*table.names], **_rules(project, table, overlap)}
        settings["labels"] = dict(table.ids)
        about = folder / SETTINGS
        strange = [n for n in ("images", "masks", CLASSES) if not about.is_file() and (folder / n).exists()]
        if strange:
            raise ValueError(f"{folder / strange[0]} was not written by this command. Choose another OUT.")
        there = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else settings
        before = {entry["name"]: entry for entry in read_records(folder / INDEX)}
        self.done, self._replaced = ({}, before) if overwrite else (before, {})
        if self.done:
            _check_settings(folder, there, settings)
            settings["labels"] = there["labels"] | settings["labels"]
            settings |= {rule: settings[rule] or there[rule] for rule in RULES}
        for image in project.images:  # a name may be invalid
            self._files(image.name, image.image.suffix)

    def begin(self) -> None:
        """Remove what is overwritten, and write the settings."""
        for entry in self._replaced.values():
            for path in self._files(entry["name"], entry["suffix"]):
                path.unlink(missing_ok=True)
        if self._replaced:
            (self.folder / INDEX).unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / SETTINGS, json.dumps(self._settings, indent=1, ensure_ascii=False))
        write_atomically(self.folder / CLASSES, json.dumps(self._settings["classes"], ensure_ascii=False))

    def _files(self, name: str, suffix: str) -> tuple[Path, Path]:
        return output_path(self.folder / "images", name, suffix), output_path(self.folder / "masks", name, ".png")

    def is_done(self, image: LabeledImage) -> bool:
        """Whether both files are there and neither image nor labels have changed since."""
        entry = self.done.get(image.name)
        return (
            entry is not None
            and entry["stamp"] == _stamp(image)
            and all(path.is_file() for path in self._files(image.name, image.image.suffix))
        )

    def write(self, image: LabeledImage, painted: Painted, palette: Sequence[tuple[int, int, int]]) -> None:
        link, mask = self._files(image.name, image.image.suffix)
        before = self.done.get(image.name)
        if before is not None and before["suffix"] != image.image.suffix:  # a.jpg was replaced by a.png
            self._files(image.name, before["suffix"])[0].unlink(missing_ok=True)
        write_mask(mask, painted.ids, palette)
        link.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(link) as temporary:
            link_file(image.image.resolve(), temporary)
        self.done[image.name] = entry = {
            "name": image.name,
            "suffix": image.image.suffix,
            "stamp": _stamp(image),
            "source": str(image.image),
            "shapes": dict(painted.shapes),
            "contested": painted.contested,
            "cut": painted.cut,
            "lost": painted.lost,
        }
        append_record(self.folder / INDEX, entry)

    def report(self, project: Project) -> dict[str, Any]:
        """Counts over all images of the project, including those written by earlier calls."""
        names = [image.name for image in project.images]
        entries = [self.done[name] for name in names]
        shapes = sum((Counter(entry["shapes"]) for entry in entries), Counter())
        found: dict[str, Any] = {"format": project.format, "source": str(project.source), "images": len(entries)}
        found["shapes"] = {name or "(ignored)": count for name, count in shapes.most_common()}
        for key in ("contested", "cut", "lost"):
            found[key] = sum(entry[key] for entry in entries)
            found[f"{key} in"] = [entry["name"] for entry in entries if entry[key]]
        found["empty"] = [entry["name"] for entry in entries if not entry["shapes"]]
        gone = sorted(self.done.keys() - {*names})
        notes = list(project.notes)
        if gone:
            notes.append(
                f"{len(gone)} images of an earlier call are no longer in this export and are kept: "
                f"{first_few(gone, 3)}"
            )
        return found | {"notes": notes}


def _rules(project: Project, table: ClassTable, overlap: str) -> dict[str, str | None]:
    """What pixels with no label or several labels become; `None`, which fits any rule, if each pixel has one label."""
    if project.background is None:
        return dict.fromkeys(RULES)
    background = IGNORED if table.background == IGNORE_INDEX else table.names[table.background]
    return {"background": background, "overlap": overlap}


def _check_settings(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    other = "Choose another OUT, or replace it with `--overwrite`"
    if there["classes"] != now["classes"]:
        raise ValueError(
            f"{folder} contains masks of the classes {', '.join(there['classes'])}; now they are "
            f"{', '.join(now['classes'])}, so that ids would change their meaning. {other}; or fix them: `--classes`."
        )
    for key in RULES:
        if there[key] != now[key] and None not in (there[key], now[key]):
            raise ValueError(
                f"{folder} was made with `--{key}` {there[key]}, now it is {now[key]}. Set `--{key} {there[key]}`, or "
                "choose another OUT, or replace it with `--overwrite`."
            )
    for label, id_ in now["labels"].items():
        if there["labels"].get(label, id_) != id_:
            raise ValueError(f"{folder} contains masks in which {label!r} is another class than now. {other}.")


def _stamp(image: LabeledImage) -> list[Any]:
    return [image.stamp, *stamp_of(image.image)]


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"{report['images']} images: {report['written']} written, {report['done before']} done before"]
    if report["shapes"]:
        lines.append("shapes: " + ", ".join(f"{name} {count}" for name, count in report["shapes"].items()))
    said = {
        "contested": "pixels have two labels (choose with `--overlap`), in",
        "cut": "shapes extend beyond their image and are cut at its edge, in",
        "lost": "shapes cover no pixel, in",
    }
    for key, what in said.items():
        if report[key]:
            lines.append(f"{report[key]} {what} {first_few(report[f'{key} in'], 3)}")
    if report["empty"]:
        lines.append(
            f"{len(report['empty'])} images have no label (omit them with `--skip_empty`): "
            f"{first_few(report['empty'], 3)}"
        )
    lines += report["notes"]
    if report["unreadable"]:
        bad = report["unreadable"]
        lines.append(
            f"{len(bad)} of the {report['drawn']} images on the contact sheet cannot be read, first "
            f"{bad[0]['id']!r}: {bad[0]['problem']}"
        )
    return "\n".join(lines)
