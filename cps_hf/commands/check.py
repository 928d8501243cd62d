"""`cps-hf check`: check a data set before training: counts, sizes, class shares, broken files, a contact sheet.

    cps-hf check DIR                                     # every split: DIR/train/{images,masks}, DIR/val/...
                                                         # some images without masks: as `cps-hf train DIR` reads them
    cps-hf check DIR --split train                       # a single split
    cps-hf check DIR --dataset cityscapes --split train
    cps-hf check DIR --images_only                       # unlabeled images: DIR/images

Exits with status 1 if a sample cannot be read, and with 2 if the data set cannot be opened or the output cannot be
written.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.check import check_dataset, check_splits, format_report
from ..data.discover import discover
from ..data.discovered import Discovered
from ..data.layout import find_layout
from .arguments import ArgumentParser
from .datasets import LOADERS, SPLITS, find_dataset, options_from_json
from .errors import fail, for_command_line, user_errors
from .main import COMMANDS


def make_parser() -> ArgumentParser:
    first = ("dataset", "split", "images_only", "output_dir")
    parser = ArgumentParser("check", COMMANDS["check"], first=first, usage="[DIR] [--option value ...]")
    parser.add_argument("data_root", metavar="DIR", nargs="?", help="folder or Hub id; not needed for drawn scenes")
    parser.add_argument("--dataset", choices=LOADERS, help="type of the data set; default: folder")
    parser.add_argument("--split", help="default: every split")
    parser.add_argument("--images_only", action="store_true", help="do not read labels")
    parser.add_argument("--load_options", default="{}", help="additional loader arguments, as JSON")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read images")
    parser.add_argument("--output_dir", default="outputs/check", help="where report.json and contact_sheet.png go")
    return parser


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Check the data set. Returns the report if nothing is wrong."""
    options = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("cps_hf").setLevel(logging.INFO)  # also list skipped files
    output = Path(options.output_dir)
    told = options.dataset or options.split or options.images_only or options.load_options != "{}"
    options.dataset = options.dataset or "folder"
    if options.data_root is None and not options.dataset.endswith("_scenes"):
        fail(f"DIR is missing. Give the folder or Hub id of `--dataset {options.dataset}` as the first argument.")
    with user_errors(output, (ValueError, TypeError, OSError)):
        extra = options_from_json(options.load_options) | ({"with_labels": False} if options.images_only else {})
        load, root = find_dataset(options.dataset, options.data_root, extra)
        own = {"images": extra["images"]} if options.dataset == "folder" and "images" in extra else {}
        found = None if told else partly_labeled(root)
        if found is None:
            splits = [options.split] if options.split else SPLITS[options.dataset](root, **own)
        else:
            sets = {"labeled": found.labeled, "validation": found.evaluation, "unlabeled": found.unlabeled}
            sets = {name: dataset for name, dataset in sets.items() if dataset is not None}
            splits, load = [*sets], lambda root, split: sets[split]
        several = len(splits) > 1
        dataset = None if several else load(root, split=splits[0])
        output.mkdir(parents=True, exist_ok=True)  # before the check, which may take long
        sheet = output / "contact_sheet.png"
        if several:
            how = {"sheet": sheet, "num_workers": options.num_workers}
            report = check_splits(lambda split: load(root, split=split), splits, **how)
        else:
            report = check_dataset(dataset, sheet=sheet, num_workers=options.num_workers)
    if found is not None and found.notes:  # an unused split is not checked
        print(*found.notes, sep="\n", end="\n\n")
    print(for_command_line(format_report(report)))
    with user_errors(output / "report.json"):  # the disk may be full
        (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    parts = [*report["splits"].values()] if several else [report]
    for part in parts:
        if "contact_sheet_error" in part:
            fail(part["contact_sheet_error"])
    sheets = [Path(part["contact_sheet"]).name for part in parts if "contact_sheet" in part]  # may be empty
    print(f"\nWritten to {output}: {', '.join(['report.json', *sheets])}")
    if report["problems"]:
        sys.exit(1)
    return report


def partly_labeled(root: str | Path) -> Discovered | None:
    """What `cps-hf train DIR` finds. `None` if every image has a mask or the folder's layout is not recognized."""
    try:
        complete = all(pair.mask is not None for pair in find_layout(root).pairs)
    except ValueError:
        return None
    return None if complete else discover(root)
