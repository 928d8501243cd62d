"""`cps-hf COMMAND ...`: which module of this room takes over. Nothing heavy is imported before that is known."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence

import cps_hf

from .console import print_any_text
from .errors import fail, nearest

# Each command is the module of that name: its `main` takes the words behind the name, and ends with SystemExit where
# the status is not 0.
COMMANDS = {
    "train": "train two networks on each other's pseudo labels; without options a demonstration on drawn data",
    "compare": "did the unlabeled images help? train with and without them for the same time, and score both",
    "check": "walk a data set before training: broken files, sizes, class shares, a contact sheet",
    "convert": "make masks of what an annotation tool exports: COCO, LabelMe, CVAT, YOLO, colours and others",
    "evaluate": "score a branch, or the mean of several, on a labeled set; or write predictions for a server",
    "predict": "predict images: masks, overlays with a legend and, on demand, the probability of every class",
    "rank": "which images to label next: those that the branches of a run disagree on, with a contact sheet",
    "prepare": "write a data set as parquet shards, to stream; or cut large images and masks into tiles",
    "report": "write a finished run's page anew: settings, curves, classes, the worst and best images",
    "export": "write a branch as an ONNX file that is checked against PyTorch",
    "app": "serve a page to try branches on: an image in, its classes out",
    "push": "put a branch on the Hub: weights, image processor and model card in one commit",
    "completion": "print the script by which a shell completes these words",
}
STARTED: float | None = None
"""When the command was called, by `time.monotonic`: what `--time` counts from, imports included."""
EPILOG = """\
`cps-hf COMMAND --help` shows a command's first options, `--help-all` all of them. `python -m cps_hf` is the same;
on several processes: `accelerate launch -m cps_hf train ...`."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv`: none: this process's."""
    global STARTED
    STARTED = time.monotonic()
    print_any_text()
    command, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help", "--help-all", "help"):
        print(help_text())
    elif command == "--version":
        print(f"cps_hf {cps_hf.__version__}")
    elif command in COMMANDS:
        try:
            importlib.import_module(f"{__package__}.{command}").main(words)
        except KeyboardInterrupt:
            sys.exit(130)  # as shells say of SIGINT; a run that trains saves first, and has a status of its own
    else:
        what = f"there is no command {command!r}." if command else "which command?"
        hint = nearest(command, COMMANDS, otherwise=f" There are {', '.join(COMMANDS)}.")
        fail(f"{what}{hint} See `cps-hf --help`.")


def help_text() -> str:
    """What `cps-hf --help` shows."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: cps-hf COMMAND [--option value ...]", "", "commands:", *lines, "", EPILOG])
