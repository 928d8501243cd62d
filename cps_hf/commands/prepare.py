"""`cps-hf prepare`: write a data set as parquet shards for streaming from disk or from the Hub; or cut large images.

    cps-hf prepare --dataset cityscapes --data_root DIR --split train --output_dir shards
    cps-hf prepare --dataset folder --data_root DIR --split train --push_to_hub USER/NAME

    cps-hf prepare --tile 1024 [--overlap 128] DIR OUT
        cut the images and masks of a folder into tiles, which `cps-hf train OUT` reads like DIR.

Images and labels are embedded byte for byte, together with class names and codes. Run again, it resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..data.shards import push_shards, write_shards
from ..data.tiles import cut_tiles, said
from .arguments import ArgumentParser
from .datasets import LOADERS, find_dataset, options_from_json
from .errors import user_errors
from .main import COMMANDS

_OF_LAYOUT = ("images", "masks", "image_suffix", "mask_suffix")
_USAGE = "--dataset NAME [--option value ...] | --tile PIXELS [--overlap PIXELS] DIR OUT"
CITYSCAPES_TERMS = (
    "Cityscapes may be used for research, teaching and personal experiments only, and may not be passed on to others, "
    "in whole or in part. Pushing it, even privately, gives copies to everyone who can read the repository. If your "
    "license allows that, add `--i_may_share`."
)


def make_parser() -> ArgumentParser:
    first = ("tile", "overlap", "dataset", "data_root", "split", "images_only", "output_dir", "push_to_hub")
    parser = ArgumentParser("prepare", COMMANDS["prepare"], first=first, usage=_USAGE)
    parser.add_argument("folders", nargs="*", metavar="DIR OUT", help="with --tile: source and target folder")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=LOADERS, help="what is read")
    group.add_argument("--data_root", help="folder or Hub id; not needed for drawn scenes")
    group.add_argument("--split", help="default: train; for folder: none, and the shards are named train")
    group.add_argument("--images_only", action="store_true", help="omit labels, without reading them")
    group.add_argument("--load_options", default="{}", help="additional loader arguments, as JSON")
    group = parser.add_argument_group("tiles")
    group.add_argument("--tile", type=int, metavar="PIXELS", help="side of the square tiles, a multiple of 16")
    group.add_argument("--overlap", type=int, metavar="PIXELS", help="overlap of neighboring tiles; default: 0")
    group.add_argument(
        "--ignored", type=int, nargs="+", metavar="VALUE", help="mask values that are not a class; default: 255"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", help="where shards are written")
    group.add_argument("--rows_per_shard", type=int, default=500, help="images per file")
    group.add_argument("--push_to_hub", metavar="USER/NAME", help="push instead of writing to a folder")
    group.add_argument("--public", action="store_true", help="push to a public repository; default: private")
    group.add_argument("--i_may_share", action="store_true", help="required to push Cityscapes")
    return parser


def main(argv: Sequence[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.tile is not None:
        _cut(parser, options)
        return
    for name in ("overlap", "ignored", "folders"):
        if getattr(options, name):
            parser.error(f"{'DIR OUT' if name == 'folders' else f'--{name}'} requires --tile")
    if options.dataset is None:
        parser.error("give --dataset NAME, or --tile PIXELS DIR OUT")
    split = options.split or (None if options.dataset == "folder" else "train")
    if (options.output_dir is None) == (options.push_to_hub is None):
        parser.error("give either --output_dir or --push_to_hub")
    if options.public and not options.push_to_hub:
        parser.error("--public requires --push_to_hub")
    if options.dataset == "cityscapes" and options.push_to_hub and not options.i_may_share:
        parser.error(CITYSCAPES_TERMS)
    with user_errors(options.output_dir or options.push_to_hub, (ValueError, TypeError, OSError)):
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
    print(
        f"{len(dataset)} rows ({', '.join(dataset.column_names)}) in {len(shards)} shards in {options.output_dir}: "
        f"{written} written, {len(shards) - written} there already."
    )


def _cut(parser: ArgumentParser, options: argparse.Namespace) -> None:
    others = ("dataset", "data_root", "split", "output_dir", "push_to_hub", "public", "i_may_share")
    given = [name for name in others if getattr(options, name)]
    if given:
        parser.error(f"--{given[0]} cannot be combined with --tile")
    if len(options.folders) != 2:
        parser.error(f"--tile needs two folders, DIR and OUT, got {len(options.folders)}")
    root, out = options.folders
    with user_errors(out):
        layout_options = options_from_json(options.load_options)
        unknown = [name for name in layout_options if name not in _OF_LAYOUT]
        if unknown:
            raise ValueError(f"`--load_options` with --tile: no {unknown[0]!r}, only {', '.join(_OF_LAYOUT)}.")
        more = {} if options.ignored is None else {"ignored": options.ignored}
        shape = {"tile": options.tile, "overlap": options.overlap or 0, "images_only": options.images_only}
        result = cut_tiles(root, out, **shape, layout_options=layout_options, **more)
        print(said(result, out))
