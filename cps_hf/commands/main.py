"""`cps-hf COMMAND ...`: choose the command's module. Imports nothing heavy before the command is known."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence

import cps_hf

from .console import print_any_text
from .errors import fail, nearest

# Each command is the module of that name. Its `main` takes the arguments after the name, and raises SystemExit if the
# status is not 0.
COMMANDS = {
    "train": "train two networks on each other's pseudo labels; without options, a demonstration on drawn data",
    "compare": "did the unlabeled images help? train with and without them for the same time, and score both",
    "check": "check a data set before training: broken files, sizes, class shares, a contact sheet",
    "convert": "turn exports of annotation tools into masks: COCO, LabelMe, CVAT, YOLO, colors and others",
    "evaluate": "score a branch, or the mean of several, on a labeled set; or write predictions for a server",
    "predict": "predict images: masks, overlays with a legend and, optionally, the probability of every class",
    "rank": "which images to label next: the images on which a run's branches disagree most, with a contact sheet",
    "prepare": "write a data set as parquet shards for streaming, or cut large images and masks into tiles",
    "report": "rewrite a finished run's page: settings, curves, classes, the worst and best images",
    "export": "export a branch to ONNX and check the file against PyTorch",
    "app": "serve a page for trying branches: an image in, its classes out",
    "push": "push a branch to the Hub: weights, image processor and model card in one commit",
    "completion": "print a script for shell completion of commands and options",
}
STARTED: float | None = None
"""When the command was called, by `time.monotonic`. `--time` counts from here and so includes imports."""
EPILOG = """\
`cps-hf COMMAND --help` shows a command's most common options, `--help-all` all of them. `python -m cps_hf` does the
same; on several processes: `accelerate launch -m cps_hf train ...`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. If `argv` is `None`, the arguments of this process."""
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
            sys.exit(130)  # as shells report SIGINT; training saves first and has its own status
    else:
        what = f"there is no command {command!r}." if command else "a command is missing."
        hint = nearest(command, COMMANDS, otherwise=f" The commands are {', '.join(COMMANDS)}.")
        fail(f"{what}{hint} See `cps-hf --help`.")


def help_text() -> str:
    """What `cps-hf --help` shows."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: cps-hf COMMAND [--option value ...]", "", "commands:", *lines, "", EPILOG])
