"""`cps-hf convert`: turn exports of annotation tools into masks for `cps-hf check` and `cps-hf train`.

    cps-hf convert EXPORT OUT                    # COCO, LabelMe, CVAT, YOLO, ...: the format is detected
    cps-hf convert EXPORT OUT --format colors --colors table.json
    cps-hf convert EXPORT OUT --images PHOTOS --map map.json --background ignored

Written to OUT: images/ (links if the disk supports them), masks/ (PNGs of class ids, 255 ignored), classes.json,
contact_sheet.png and report.json. Run again, it resumes and converts what has been relabeled. docs/labels.md describes
each tool. Exits with status 1 if an image on the contact sheet cannot be read, and with 2 on other errors, before
anything is written.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..annotations.classes import class_table, read_map
from ..annotations.convert import AREA, ORDER, SHEET, convert, format_report
from ..annotations.project import ReadOptions, clean
from ..annotations.readers import CLASSES_ARE_THE_MASKS, READERS, read_project
from ..data.folder import read_class_names
from .arguments import ArgumentParser
from .errors import user_errors
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    first = ("format", "images", "classes", "background", "map", "colors", "overlap", "overwrite")
    parser = ArgumentParser("convert", COMMANDS["convert"], first=first, usage="SOURCE OUT [--option value ...]")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the unpacked export: a folder or a single file")
    parser.add_argument("out", metavar="OUT", type=Path, help="where images/ and masks/ are written")
    group = parser.add_argument_group("what is read")
    group.add_argument("--format", choices=READERS, help="default: detected; masks must be named")
    group.add_argument("--images", metavar="DIR", type=Path, help="the folder of images, if it is not in SOURCE")
    group.add_argument("--masks", metavar="NAME", default="masks", help="for masks: their folder in SOURCE")
    group.add_argument(
        "--image_suffix", metavar="TEXT", default="", help="for masks: a suffix of image names that masks lack"
    )
    group.add_argument(
        "--mask_suffix", metavar="TEXT", default="", help="for masks: a suffix of mask names that images lack"
    )
    group.add_argument(
        "--colors", metavar="FILE", type=Path, help="for RGB masks: the colour table as JSON, CSV or labelmap.txt"
    )
    group.add_argument("--first_id", type=int, default=0, help="for masks of ids: first class id; 1: 0 is no label")
    group.add_argument("--attribute", metavar="NAME", help="for VIA: the region attribute that contains the label")
    group.add_argument(
        "--line_width",
        metavar="PIXELS",
        type=float,
        default=10,
        help="width of drawn lines and points, in pixels",
    )
    group.add_argument("--boxes", action="store_true", help="draw the box of an object that has no outline")
    group.add_argument(
        "--crowds", action="store_true", help="for COCO: draw crowds as objects (brush masks from CVAT)"
    )
    group.add_argument("--skip_bad_images", action="store_true", help="skip labels whose image is missing")
    group.add_argument("--skip_empty", action="store_true", help="skip images without shapes, as not yet labeled")
    group = parser.add_argument_group("what it becomes")
    group.add_argument(
        "--classes", metavar="NAME", nargs="+", help="in the order of their ids, or a JSON file; default: the tool's"
    )
    group.add_argument(
        "--background", metavar="NAME", help="the class of unlabeled pixels, or ignored; default: background"
    )
    group.add_argument(
        "--map", metavar="FILE", type=Path, help='what labels become, as JSON: {"car": "vehicle", "glare": null}'
    )
    group.add_argument("--overlap", choices=(ORDER, AREA), help="later or smaller shapes on top; default: the tool's")
    group.add_argument("--overwrite", action="store_true", help="first remove this command's earlier output")
    return parser


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Convert as the command line says. Returns the report."""
    options = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with user_errors(options.out):
        if options.line_width <= 0:
            raise ValueError(f"`--line_width` must be above 0, got {options.line_width:g}.")
        if options.first_id < 0:
            raise ValueError(f"`--first_id` must be 0 or more, got {options.first_id}.")
        if options.out.resolve().is_relative_to(options.source.resolve()):
            raise ValueError(f"{options.out} is inside {options.source}, all of which is read. Choose another OUT.")
        given = options.classes
        is_file = given is not None and len(given) == 1 and given[0].lower().endswith(".json")
        classes = None if given is None else tuple(map(clean, read_class_names(given[0] if is_file else given)))
        names = ("images", "masks", "image_suffix", "mask_suffix", "colors", "first_id", "attribute", "line_width")
        names += ("boxes", "crowds", "skip_bad_images", "skip_empty")
        how = ReadOptions(classes=classes, **{name: getattr(options, name) for name in names})
        project = read_project(options.source, how, format=options.format)
        if not project.uses and not any(image.shapes() for image in project.images):
            raise ValueError(
                f"{options.source} contains no shape: none of its {len(project.images)} images has a label. Label "
                "some in the tool and export again."
            )
        table = class_table(
            project,
            classes=None if project.format in CLASSES_ARE_THE_MASKS else classes,
            background=options.background,
            mapping=read_map(options.map) if options.map else None,
        )
        report = convert(project, table, options.out, overlap=options.overlap, overwrite=options.overwrite)
    print(format_report(report))
    print(f"Written to {options.out}. Look at {SHEET} there, then run `cps-hf check {options.out}`.")
    if report["unreadable"]:
        sys.exit(1)
    return report
