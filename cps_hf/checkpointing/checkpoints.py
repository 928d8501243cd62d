"""Writes checkpoints completely or not at all, and chooses the one to resume from.

`OUT/checkpoint-<step>/` contains what Accelerate saves (the module with all branches, their averages and its teacher
as safetensors, the optimizer, every process's random states); our `trainer_state.json`; `best/`, the best branch so
far (hard links, so it takes no extra space); and `manifest.json`, the size and SHA-256 of each file, which is written
last: a folder without it is not a checkpoint. Everything is written to `tmp-checkpoint-<step>`, flushed and renamed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import flush, link_tree, replace_folder, sha256_of, share_weights

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
MANIFEST = "manifest.json"
# What a run writes into its output folder. `--overwrite_output_dir` deletes these and nothing else.
MARKER = "preempted.json"  # a signal stopped the run, which should be resumed
RUN_FILES = (
    *(MARKER, "config.yaml", "metrics.jsonl", "results.json", "bad_samples.jsonl"),
    *("evaluation.json", "plan.json", "ranking.json", "report.html"),
)
RUN_FOLDERS = (
    *("best", "teacher", "pictures", "branch_*", "supervised_*", "checkpoint-*", "aside-checkpoint-*"),
    *("bad_batch-*", "tmp-*", ".tmp-*"),
)


class CheckpointError(OSError):
    """A checkpoint could not be written. The earlier ones are unchanged."""


# ------------------------------------------------------------------------------------------------ the output folder


def check_place(output_dir: str) -> None:
    """Raise a ValueError if the folder is a file, is inside one, or is not writable."""
    folder = Path(output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"`output_dir` {output_dir} must be a folder, but {there} is a file. Choose another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {output_dir} cannot be written: no permission for {there}. Choose another.")


def check_output_dir(output_dir: str, *, overwrite: bool, resuming: bool, auto: bool = False) -> None:
    """Check, before any time is lost, that the folder can be used.

    Args:
        resuming: the run resumes from a checkpoint in this folder.
        auto: a run that died before its first checkpoint is started again: its files are not an obstacle.

    Raises:
        ValueError: it is a file or inside one, is not writable, or contains a run and neither `overwrite` nor
            `resuming` is set.
    """
    check_place(output_dir)
    folder = Path(output_dir)
    if auto and not (folder / "results.json").exists():
        return
    # A run that stopped before its first log only left its settings: nothing would be lost.
    traces = sorted(path.name for path in _run_paths(folder) if path.name not in ("config.yaml", "plan.json"))
    if traces and not overwrite and not resuming:
        newest = newest_checkpoint(output_dir)
        resume = (
            f"resume it with `--resume_from_checkpoint true` (its newest checkpoint is {newest})"
            if newest
            else "it has no checkpoint to resume from"
        )
        raise ValueError(
            f"`output_dir` {output_dir} contains a run ({', '.join(traces[:4])}{' ...' if len(traces) > 4 else ''}): "
            f"{resume}; delete it with `--overwrite_output_dir`, or choose another folder."
        )


def check_run_files(output_dir: str) -> None:
    """Check, before a run begins, that nothing is in the way of files and folders that it writes at its end.

    Raises:
        ValueError: there is a folder in place of a file or the reverse, or it is not writable.
    """
    for path in _run_paths(Path(output_dir)):
        if path.name.lstrip(".").startswith("tmp-"):
            continue
        kind, other = ("file", "folder") if path.name in RUN_FILES else ("folder", "file")
        if path.is_dir() != (kind == "folder"):
            raise ValueError(f"{path} must be a {kind} of the run, but there is a {other}. Move it away.")
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path} will be replaced by the run but is not writable. Change its permissions.")


def put_back(folder: Path) -> None:
    """Restore the name of a folder whose process was killed between the two renames of `replace_folder`: it is the
    only copy. A checkpoint that was being deleted stays deleted."""
    for path in sorted(folder.glob("tmp-old-*")):
        target = path.with_name(path.name.removeprefix("tmp-old-"))
        removed = target.name.startswith("checkpoint-") and problem_of(path, content=False) is not None
        if not target.exists() and not removed:
            logger.warning("%s was being replaced when the run ended: it has been restored.", target)
            os.replace(path, target)


def prepare_output_dir(output_dir: str, *, step: int | None, overwrite: bool) -> None:
    """Prepare the folder for a run; called by one process.

    Args:
        step: the step that the run resumes from. Half-written files are deleted, and checkpoints of later steps
            (damaged ones, or of an abandoned run) are renamed, so that no later start uses them for this run. If
            `None`, the run is new, and files of an earlier run are deleted.
        overwrite: whether a new run also deletes checkpoints; otherwise they are renamed.
    """
    folder = Path(output_dir)
    if step is not None or not overwrite:
        set_aside(folder, after=-1 if step is None else step)
    for path in _run_paths(folder):
        half_written = path.name.startswith(("tmp-", ".tmp-"))
        if half_written:
            logger.warning("%s was half-written when the run ended: deleted.", path)
        if half_written or (step is None and (overwrite or not path.name.startswith("aside-"))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def set_aside(folder: Path, *, after: int) -> None:
    """Rename each `checkpoint-N` with N > `after` to `aside-checkpoint-N`."""
    for step, path in _numbered(folder):
        if step > after:
            aside = path.with_name(f"aside-{path.name}")
            logger.warning("%s is beyond the step that the run resumes from: it is now %s.", path, aside.name)
            replace_folder(path, aside)


def _run_paths(folder: Path) -> list[Path]:
    """What a run wrote into its folder."""
    return [path for pattern in (*RUN_FILES, *RUN_FOLDERS) for path in folder.glob(pattern)]


# ------------------------------------------------------------------------------------------------ finding


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Each `checkpoint-<step>` folder, complete or not, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, without half-written or half-deleted ones.

    This checks that every file exists with its size; `problem_of` checks the content.
    """
    return [path for _, path in _numbered(Path(output_dir)) if problem_of(path, content=False) is None]


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    return next(reversed(checkpoints_in(output_dir)), None)


def problem_of(checkpoint: Path, *, content: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file. `None` if it is as it was written.

    Args:
        content: also compare each file's SHA-256, which reads all of it.
    """
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in _files_of(checkpoint).items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written completely" if checkpoint.is_dir() else "it does not exist"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, sha256) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, but had {size} when it was written"
        if content and sha256_of(path) != sha256:
            return f"{name} has been modified: its SHA-256 has changed"
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> Path | None:
    """The folder to resume from; `None` if not resuming, or with "auto" if there is none.

    Incomplete checkpoints in `output_dir` are skipped with a warning. A checkpoint that is named must be complete.

    Raises:
        ValueError: true or a path is given, and there is no checkpoint or it is incomplete.
    """
    if resume_from_checkpoint in (None, False, "false", "False"):
        return None
    if resume_from_checkpoint in (True, "true", "True", "auto"):
        for _, path in reversed(_numbered(Path(output_dir))):
            problem = problem_of(path)
            if problem is None:
                return path
            logger.warning("%s is skipped: %s.", path, problem)
        if resume_from_checkpoint == "auto":
            return None
        raise ValueError(
            f"`resume_from_checkpoint=true`, but {output_dir} has no complete checkpoint-<step> folder. "
            "Check `output_dir`, or start from scratch: `--resume_from_checkpoint auto`, or none."
        )
    path = Path(resume_from_checkpoint)
    problem = problem_of(path)
    if problem is not None:
        nearby = [str(p) for p in checkpoints_in(path.parent) if p != path] if path.parent.is_dir() else []
        raise ValueError(
            f"`resume_from_checkpoint` {path} cannot be resumed from: {problem}"
            + (f". There are: {', '.join(nearby)}." if nearby else ". There is no other checkpoint next to it.")
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that was passed to `save_checkpoint`."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ writing


def save_checkpoint(
    output_dir: str,
    step: int,
    state: dict[str, Any],
    *,
    save_state: Callable[[str], Any],
    gather_errors: Callable[[list[str | None]], list[str | None]],
    is_main_process: bool,
    save_total_limit: int | None,
    best_step: int | None = None,
) -> Path:
    """Write `checkpoint-<step>`; called by every process.

    Args:
        state: our own state, as JSON values.
        save_state: Accelerate's function, called with the folder to fill.
        gather_errors: gives every process the concatenated lists of all; waits for all.
        save_total_limit: keep this many of the newest checkpoints, and that of `best_step`.

    Raises:
        CheckpointError: on every process, if one could not write (a full disk); the earlier checkpoints are unchanged.
        RuntimeError: on every process, if a data worker of one died meanwhile.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = final.with_name(f"tmp-{final.name}")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while saving
        temporary.mkdir(parents=True)

    def finish() -> None:
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        _link_best(state, temporary)
        share_weights(temporary, like=temporary / STATE_FILE)
        seal(temporary)
        replace_folder(temporary, final)

    for everyone, phase in ((False, begin), (True, lambda: save_state(str(temporary))), (False, finish)):
        error = None
        if everyone or is_main_process:
            try:
                phase()
            except Exception as caught:  # safetensors and torch.save have their own errors for a full disk
                error = caught
        errors = [e for e in gather_errors([None if error is None else f"{type(error).__name__}: {error}"]) if e]
        if errors:
            if is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            if "DataLoader worker" in errors[0]:  # torch raises this anywhere in its process when a worker dies
                raise RuntimeError(errors[0]) from error
            files = "Too many open files" in errors[0]
            advice = "raise the limit on open files (`ulimit -n 65536`)" if files else "free some space"
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {output_dir} ({errors[0]})."
                f"{'' if files else ' Is the disk full?'} The newest complete one is "
                f"{newest_checkpoint(output_dir) or 'none yet'}: {advice} and resume with "
                "`--resume_from_checkpoint auto`."
            ) from error
    if is_main_process:
        _prune(final, save_total_limit, best_step)
    return final


def amend_checkpoint(
    output_dir: str, step: int, state: dict[str, Any], *, save_total_limit: int | None, best_step: int | None
) -> None:
    """Replace the `state` and the best branch in `checkpoint-<step>`, which this run has just written.

    Called by the main process. Like all files, the new checkpoint is made separately, of hard links, and replaces the
    old one when it is complete. Other files are unchanged and are not read again.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = final.with_name(f"tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        link_tree(final, temporary)
        shutil.rmtree(temporary / "best", ignore_errors=True)
        (temporary / STATE_FILE).unlink()  # it is a link: writing into it would change the checkpoint
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        _link_best(state, temporary)
        share_weights(temporary, like=temporary / STATE_FILE)
        seal(temporary, known=_files_of(final))
        replace_folder(temporary, final)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # it would take up the little space of a full disk
        raise
    _prune(final, save_total_limit, best_step)  # another step may be the best now


def _link_best(state: Mapping[str, Any], checkpoint: Path) -> None:
    """Link the best branch so far into a checkpoint, unless the user has deleted it."""
    best = checkpoint.with_name("best")
    if state.get("best") and best.is_dir():
        link_tree(best, checkpoint / "best")


def _prune(newest: Path, limit: int | None, best_step: int | None) -> None:
    """Delete checkpoints older than the `limit` newest, except that of the best step. A failure to delete costs space,
    but no training."""
    keep = {newest, newest.with_name(f"checkpoint-{best_step}")}
    for old in checkpoints_in(newest.parent)[:-limit] if limit is not None else ():
        if old not in keep:
            leaving = old.with_name(f"tmp-old-{old.name}")  # half-deleted, it is no longer a checkpoint
            try:
                os.replace(old, leaving)
                shutil.rmtree(leaving)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", old, error)


def seal(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write a checkpoint's manifest, for the files as they are now, and flush everything to disk.

    Args:
        known: entries of an earlier manifest for files that are hard links to its files. They are not read again.
    """
    (folder / MANIFEST).unlink(missing_ok=True)  # it may be a link to another checkpoint's
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    unchanged = {name for name in known or {} if name != STATE_FILE and not name.startswith("best/")}
    manifest = {
        "files": {
            name: dict(known[name]) if name in unchanged else {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path, name in names.items()
        }
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    changed = [path for path, name in names.items() if name not in unchanged]
    for path in [*changed, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def _files_of(checkpoint: Path) -> dict[str, dict[str, Any]]:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
