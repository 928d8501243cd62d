"""Walk a data set before training: counts, sizes, class shares, broken files, a contact sheet.

    python examples/check_dataset.py DIR --split train                       # DIR/train/{images,masks}
    python examples/check_dataset.py DIR --dataset cityscapes --split train
    python examples/check_dataset.py DIR --images_only                       # unlabeled images: DIR/images

Ends with status 1 when a sample cannot be read as it is, and 2 when the set cannot be opened at all or
the output cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cps_hf.commands.datasets import LOADERS, find_dataset, options_from_json
from cps_hf.data.check import check_dataset, format_report
from cps_hf.training.failures import one_line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_root", nargs="?", help="folder or Hub id; for the drawn scenes none")
    parser.add_argument("--dataset", choices=LOADERS, default="folder")
    parser.add_argument("--split", help="default: train; for folder: none")
    parser.add_argument("--images_only", action="store_true", help="leave labels unread")
    parser.add_argument("--load_options", default="{}", help="further arguments of the loader, as JSON")
    parser.add_argument("--output_dir", default="outputs/check", help="where report.json and contact_sheet.png go")
    options = parser.parse_args(argv)
    split = options.split or (None if options.dataset == "folder" else "train")
    output = Path(options.output_dir)
    try:
        extra = options_from_json(options.load_options) | ({"with_labels": False} if options.images_only else {})
        load, root = find_dataset(options.dataset, options.data_root, extra)
        dataset = load(root, split=split)
        output.mkdir(parents=True, exist_ok=True)  # before the walk, which may take long
        report = check_dataset(dataset, sheet=output / "contact_sheet.png")
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {one_line(error, output)}", file=sys.stderr)
        return 2
    print(format_report(report))
    try:
        (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    except OSError as error:  # a full disk
        print(f"error: {one_line(error, output / 'report.json')}", file=sys.stderr)
        return 2
    if "contact_sheet_error" in report:
        print(f"error: {report['contact_sheet_error']}", file=sys.stderr)
        return 2
    sheet = ", contact_sheet.png" if "contact_sheet" in report else ""  # none where nothing could be read
    print(f"\nWritten to {output}: report.json{sheet}")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
