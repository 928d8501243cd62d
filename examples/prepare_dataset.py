"""Write a data set as parquet shards, to stream from a disk or from the Hub.

    python examples/prepare_dataset.py --dataset cityscapes --data_root DIR --split train --output_dir shards
    python examples/prepare_dataset.py --dataset folder --data_root DIR --split train --push_to_hub USER/NAME

Images and labels are embedded byte for byte; class names and codes ride along. A call that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import sys

from cps_hf.commands.datasets import LOADERS, find_dataset, options_from_json
from cps_hf.data.shards import push_shards, write_shards
from cps_hf.training.failures import one_line

CITYSCAPES_TERMS = (
    "Cityscapes may be used for research, teaching and personal experiments only, and may not be passed on to others, "
    "in whole or in part. Pushing it, even privately, gives copies to whoever can read the repository. If your "
    "licence allows that, add `--i_may_share`."
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", choices=LOADERS, required=True)
    parser.add_argument("--data_root", help="folder or Hub id; for the drawn scenes none")
    parser.add_argument("--split", help="default: train; for folder: none, and the shards are called train")
    parser.add_argument("--images_only", action="store_true", help="leave labels out, unread")
    parser.add_argument("--load_options", default="{}", help="further arguments of the loader, as JSON")
    parser.add_argument("--output_dir", help="where shards are written")
    parser.add_argument("--rows_per_shard", type=int, default=500)
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="push instead of writing to a folder")
    parser.add_argument("--public", action="store_true", help="a public repository; it is private otherwise")
    parser.add_argument("--i_may_share", action="store_true", help="needed to push Cityscapes")
    options = parser.parse_args(argv)
    split = options.split or (None if options.dataset == "folder" else "train")
    if (options.output_dir is None) == (options.push_to_hub is None):
        parser.error("give either --output_dir or --push_to_hub")
    if options.public and not options.push_to_hub:
        parser.error("--public goes with --push_to_hub")
    if options.dataset == "cityscapes" and options.push_to_hub and not options.i_may_share:
        parser.error(CITYSCAPES_TERMS)
    try:
        extra = options_from_json(options.load_options) | ({"with_labels": False} if options.images_only else {})
        load, root = find_dataset(options.dataset, options.data_root, extra)
        dataset = load(root, split=split)
        shape = {"split": split or "train", "rows_per_shard": options.rows_per_shard}
        if options.push_to_hub:
            count = push_shards(dataset, options.push_to_hub, private=not options.public, **shape)
            seen = "public" if options.public else "private"
            print(f"{len(dataset)} rows pushed to {options.push_to_hub} ({seen}) in {count} shards.")
            return
        shards, written = write_shards(dataset, options.output_dir, **shape)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {one_line(error, options.output_dir or options.push_to_hub)}", file=sys.stderr)
        sys.exit(2)
    kept = len(shards) - written
    print(
        f"{len(dataset)} rows ({', '.join(dataset.column_names)}) in {len(shards)} shards in {options.output_dir}: "
        f"{written} written, {kept} there already."
    )


if __name__ == "__main__":
    main()
