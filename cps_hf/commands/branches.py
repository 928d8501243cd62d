"""Branches named on a command line, and their prediction options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..inference.ensemble import Ensemble
from ..inference.windows import check_options, default_stride


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that choose branches and how they predict. `required`: whether `--branches` must be given."""
    group = parser.add_argument_group("branches")
    group.add_argument("--branches", nargs="+", required=required, help="folders or Hub ids; several are averaged")
    _add_prediction_options(group)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the prediction options of `add_arguments` to a command that names its branches in another way."""
    _add_prediction_options(parser.add_argument_group("how branches predict"))


def _add_prediction_options(group: Any) -> None:
    group.add_argument("--mode", choices=("whole", "sliding"), default="whole", help="whole images or sliding windows")
    group.add_argument("--crop_size", type=int, nargs=2, metavar=("H", "W"), help="window size in pixels")
    group.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="default: two thirds of the window")
    group.add_argument("--sum_windows", action="store_true", help="sum overlapping logits, as the CPS release does")
    group.add_argument("--window_batch_size", type=int, default=4, help="windows per forward pass")
    group.add_argument("--scales", type=float, nargs="+", default=[1.0], help="predict at these scales and average")
    group.add_argument("--flip", action="store_true", help="also predict mirrored images and average")
    group.add_argument("--own_size", action="store_true", help="keep the image size; skip the processor's resizing")
    group.add_argument("--device", help="default: a GPU if available")
    group.add_argument("--revision", help="revision of the Hub ids")
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with a branch")


def branch_of(run: str) -> str:
    """The better branch of a run's output folder. Any other path or id is returned unchanged, as a branch itself."""
    best = Path(run) / "best"
    return str(best) if (best / "config.json").is_file() else run


def settle_run(options: argparse.Namespace, *, what: str) -> None:
    """Use RUN as `--branches`.

    Raises:
        ValueError: both or neither are given.
    """
    if options.run and options.branches:
        raise ValueError("Give RUN or `--branches`, not both.")
    if options.run:
        options.branches = [branch_of(options.run)]
    if not options.branches:
        raise ValueError(f"Which branch {what}? Give RUN, a run's output folder or a branch, or `--branches`.")


def from_arguments(arguments: argparse.Namespace) -> tuple[Ensemble, dict[str, Any]]:
    """The ensemble and the options of `Ensemble.logits`, from the options that `add_arguments` added.

    Raises:
        ValueError: the options contradict each other, or a branch cannot be read.
    """
    options: dict[str, Any] = {"mode": arguments.mode, "scales": arguments.scales, "flip": arguments.flip}
    windows = {
        "--crop_size": arguments.crop_size,
        "--stride": arguments.stride,
        "--sum_windows": arguments.sum_windows,
    }
    if arguments.mode == "sliding":
        if arguments.crop_size is None:
            raise ValueError("`--mode sliding` needs `--crop_size H W`, ideally the crop size used in training.")
        options |= {"crop_size": tuple(arguments.crop_size), "average": not arguments.sum_windows}
        options |= {"stride": tuple(arguments.stride or default_stride(arguments.crop_size))}
    else:
        given = [name for name, value in windows.items() if value]
        if given:
            raise ValueError(f"`{given[0]}` requires `--mode sliding`.")
    check_options(**options, window_batch_size=arguments.window_batch_size)
    if arguments.mode == "sliding":
        options |= {"window_batch_size": arguments.window_batch_size}
    else:
        options |= {"own_size": arguments.own_size}
    ensemble = Ensemble.from_pretrained(
        arguments.branches,
        device=arguments.device,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    return ensemble, options
