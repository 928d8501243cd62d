"""`cps-hf check`: walk a data set before training: counts, sizes, class shares, broken files, a contact sheet.

    cps-hf check DIR --split train                       # DIR/train/{images,masks}
    cps-hf check DIR --dataset cityscapes --split train
    cps-hf check DIR --images_only                       # unlabeled images: DIR/images

Ends with status 1 when a sample cannot be read as it is, and 2 when the set cannot be opened at all or the output
cannot be written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.check import check_dataset, format_report
from .arguments import ArgumentParser
from .datasets import LOADERS, find_dataset, options_from_json
from .errors import fail, mendable
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    first = ("dataset", "split", "images_only", "output_dir")
    parser = ArgumentParser("check", COMMANDS["check"], first=first, usage="[DIR] [--option value ...]")
    parser.add_argument("data_root", metavar="DIR", nargs="?", help="folder or Hub id; for the drawn scenes none")
    parser.add_argument("--dataset", choices=LOADERS, default="folder", help="what lies there")
    parser.add_argument("--split", help="default: train; for folder: none")
    parser.add_argument("--images_only", action="store_true", help="leave labels unread")
    parser.add_argument("--load_options", default="{}", help="further arguments of the loader, as JSON")
    parser.add_argument("--output_dir", default="outputs/check", help="where report.json and contact_sheet.png go")
    return parser


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The report, where nothing is wrong."""
    options = make_parser().parse_args(argv)
    split = options.split or (None if options.dataset == "folder" else "train")
    output = Path(options.output_dir)
    with mendable(output, (ValueError, TypeError, OSError)):
        extra = options_from_json(options.load_options) | ({"with_labels": False} if options.images_only else {})
        load, root = find_dataset(options.dataset, options.data_root, extra)
        dataset = load(root, split=split)
        output.mkdir(parents=True, exist_ok=True)  # before the walk, which may take long
        report = check_dataset(dataset, sheet=output / "contact_sheet.png")
    print(format_report(report))
    with mendable(output / "report.json"):  # on a full disk
        (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    if "contact_sheet_error" in report:
        fail(report["contact_sheet_error"])
    sheet = ", contact_sheet.png" if "contact_sheet" in report else ""  # none where nothing could be read
    print(f"\nWritten to {output}: report.json{sheet}")
    if report["problems"]:
        sys.exit(1)
    return report
