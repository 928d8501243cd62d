"""What is saved when, whole or not at all, and what resuming needs.

`OUT/checkpoint-<step>/` holds what Accelerate saves (the module with all branches and its teacher as safetensors, the
optimizer, every process's random states) and `trainer_state.json`, which is ours and is written last: a folder without
it is no checkpoint. All is written beside and renamed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
# What a run writes into its output folder, and so what `--overwrite_output_dir` may remove: nothing else.
MARKER = "preempted.json"  # a signal stopped the run: it is to go on
RUN_FILES = (MARKER, "config.yaml", "metrics.jsonl", "results.json", "bad_samples.jsonl")
RUN_FOLDERS = ("best", "teacher", "pictures", "branch_*", "checkpoint-*", "bad_batch-*", "tmp-*")


def check_output_dir(output_dir: str, *, overwrite: bool, resuming: bool) -> None:
    """Say before any time is lost why the folder cannot be used.

    Raises:
        ValueError: it is a file, or it holds a run and neither `overwrite` nor `resuming` is asked for.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` must be a folder, but {output_dir} is a file. Choose another name.")
    # A run that stopped before its first log left its settings alone: nothing that would be lost.
    traces = sorted(path.name for path in _run_paths(folder) if path.name != "config.yaml")
    if traces and not overwrite and not resuming:
        newest = newest_checkpoint(output_dir)
        resume = (
            f"resume it with `--resume_from_checkpoint true` (its newest checkpoint is {newest})"
            if newest
            else "it has no checkpoint to resume from"
        )
        raise ValueError(
            f"`output_dir` {output_dir} holds a run ({', '.join(traces[:4])}{' ...' if len(traces) > 4 else ''}): "
            f"{resume}; remove it with `--overwrite_output_dir`, or choose another folder."
        )


def prepare_output_dir(output_dir: str, *, resuming: bool) -> None:
    """Make the folder; what an earlier run left there is removed unless it goes on. To be called by one process."""
    if not resuming:
        for path in _run_paths(Path(output_dir)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (Path(output_dir) / MARKER).unlink(missing_ok=True)
    Path(output_dir).mkdir(parents=True, exist_ok=True)


def _run_paths(folder: Path) -> list[Path]:
    """What a run wrote into its folder."""
    return [path for pattern in (*RUN_FILES, *RUN_FOLDERS) for path in folder.glob(pattern)]


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    return next(reversed(checkpoints_in(output_dir)), None)


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> Path | None:
    """The folder to resume from; `None` when no resuming is asked for.

    Raises:
        ValueError: it is asked for and there is no (whole) checkpoint.
    """
    if resume_from_checkpoint in (None, False, "false", "False"):
        return None
    if resume_from_checkpoint in (True, "true", "True"):
        newest = newest_checkpoint(output_dir)
        if newest is None:
            raise ValueError(
                f"`resume_from_checkpoint=true`, but {output_dir} holds no whole checkpoint-<step> folder. "
                "Check `output_dir`, or leave `resume_from_checkpoint` out to start anew."
            )
        return newest
    path = Path(resume_from_checkpoint)
    if not (path / STATE_FILE).is_file():
        nearby = [str(p) for p in checkpoints_in(path.parent)] if path.parent.is_dir() else []
        raise ValueError(
            f"`resume_from_checkpoint` {path} "
            + ("is no whole checkpoint: it has no " + STATE_FILE if path.is_dir() else "does not exist")
            + (f". There are: {', '.join(nearby)}." if nearby else f". {path.parent} holds no checkpoint.")
        )
    return path


def save_checkpoint(
    output_dir: str,
    step: int,
    state: dict[str, Any],
    *,
    save_state: Callable[[str], Any],
    wait_for_everyone: Callable[[], None],
    is_main_process: bool,
    save_total_limit: int | None,
) -> Path:
    """Write `checkpoint-<step>`; called by every process.

    Args:
        state: what we add: JSON values only.
        save_state: Accelerate's, called with the folder to fill.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(output_dir) / f"tmp-checkpoint-{step}"
    if is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while it saved
        temporary.mkdir(parents=True)
    wait_for_everyone()
    save_state(str(temporary))
    wait_for_everyone()  # all random states are written
    if is_main_process:
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        _flush(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _flush_folder(final.parent)
        if save_total_limit is not None:
            for old in checkpoints_in(output_dir)[:-save_total_limit]:
                shutil.rmtree(old)
    wait_for_everyone()
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`."""
    try:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint / STATE_FILE} cannot be read: {error}. Resume from an older one.") from error


def write_atomically(path: Path, text: str) -> None:
    """The file has the old text or the new one, whatever happens meanwhile."""
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
