"""What is saved when, whole or not at all, and which checkpoint a run goes on from.

`OUT/checkpoint-<step>/` holds what Accelerate saves (the module with all branches, their averages and its teacher as
safetensors, the optimizer, every process's random states), `trainer_state.json`, which is ours, `best/`, the best
branch so far (hard links: no second copy on the disk), and `manifest.json`, the size and SHA-256 of each file, written
last: a folder without it is no checkpoint. All is written beside as `tmp-checkpoint-<step>`, flushed and renamed.
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
# What a run writes into its output folder, and so what `--overwrite_output_dir` may remove: nothing else.
MARKER = "preempted.json"  # a signal stopped the run: it is to go on
RUN_FILES = (
    *(MARKER, "config.yaml", "metrics.jsonl", "results.json", "bad_samples.jsonl"),
    *("evaluation.json", "plan.json", "report.html"),
)
RUN_FOLDERS = (
    *("best", "teacher", "pictures", "branch_*", "supervised_*", "checkpoint-*", "aside-checkpoint-*"),
    *("bad_batch-*", "tmp-*", ".tmp-*"),
)


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are as they were."""


# ------------------------------------------------------------------------------------------------ the output folder


def check_place(output_dir: str) -> None:
    """Raise a ValueError where the folder is or lies below a file, or may not be written to."""
    folder = Path(output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"`output_dir` {output_dir} must be a folder, but {there} is a file. Choose another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {output_dir} cannot be written: no permission for {there}. Choose another.")


def check_output_dir(output_dir: str, *, overwrite: bool, resuming: bool, auto: bool = False) -> None:
    """Say before any time is lost why the folder cannot be used.

    Args:
        resuming: the run goes on from a checkpoint in this folder.
        auto: a run that died before its first checkpoint is started anew: what it left is no reason to stop.

    Raises:
        ValueError: it is or lies below a file, may not be written to, or holds a run and neither `overwrite` nor
            `resuming` is asked for.
    """
    check_place(output_dir)
    folder = Path(output_dir)
    if auto and not (folder / "results.json").exists():
        return
    # A run that stopped before its first log left its settings alone: nothing that would be lost.
    traces = sorted(path.name for path in _run_paths(folder) if path.name not in ("config.yaml", "plan.json"))
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


def check_run_files(output_dir: str) -> None:
    """What is in the way of a file or folder that a run writes at its end, said before it begins.

    Raises:
        ValueError: a folder is where a file is to be, or the other way round; or it may not be written to.
    """
    for path in _run_paths(Path(output_dir)):
        if path.name.lstrip(".").startswith("tmp-"):
            continue
        kind, other = ("file", "folder") if path.name in RUN_FILES else ("folder", "file")
        if path.is_dir() != (kind == "folder"):
            raise ValueError(f"{path} is to be a {kind} of the run, but a {other} is there. Move it away.")
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path}, which the run is to replace, may not be written to. Change its permissions.")


def put_back(folder: Path) -> None:
    """Give what a process that was killed between the two renames of `replace_folder` left its name back: it is the
    only one of its kind. A checkpoint that was being removed stays what it is."""
    for path in sorted(folder.glob("tmp-old-*")):
        target = path.with_name(path.name.removeprefix("tmp-old-"))
        removed = target.name.startswith("checkpoint-") and problem_of(path, content=False) is not None
        if not target.exists() and not removed:
            logger.warning("%s was being replaced when the run ended: it is back as it was.", target)
            os.replace(path, target)


def prepare_output_dir(output_dir: str, *, step: int | None, overwrite: bool) -> None:
    """Make the folder ready; to be called by one process.

    Args:
        step: the run goes on from this step: half-written files are removed, and checkpoints of later steps (damaged
            ones, or those of a run that is left) are set aside, so that no later start takes them for this run's.
            None: a new run, for which what an earlier one left is removed.
        overwrite: whether a new run removes checkpoints too; else they are set aside.
    """
    folder = Path(output_dir)
    if step is not None or not overwrite:
        set_aside(folder, after=-1 if step is None else step)
    for path in _run_paths(folder):
        half_written = path.name.startswith(("tmp-", ".tmp-"))
        if half_written:
            logger.warning("%s was half-written when the run ended: removed.", path)
        if half_written or (step is None and (overwrite or not path.name.startswith("aside-"))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def set_aside(folder: Path, *, after: int) -> None:
    """Rename each `checkpoint-N` with N > `after` to `aside-checkpoint-N`."""
    for step, path in _numbered(folder):
        if step > after:
            aside = path.with_name(f"aside-{path.name}")
            logger.warning("%s is beyond the step that the run goes on from: it is now %s.", path, aside.name)
            replace_folder(path, aside)


def _run_paths(folder: Path) -> list[Path]:
    """What a run wrote into its folder."""
    return [path for pattern in (*RUN_FILES, *RUN_FOLDERS) for path in folder.glob(pattern)]


# ------------------------------------------------------------------------------------------------ finding


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Each `checkpoint-<step>` folder, whole or not, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, without those that are half-written or half-removed.

    That every file is there with its size is looked at here, their content in `problem_of`.
    """
    return [path for _, path in _numbered(Path(output_dir)) if problem_of(path, content=False) is None]


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    return next(reversed(checkpoints_in(output_dir)), None)


def problem_of(checkpoint: Path, *, content: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; none: it is as it was written.

    Args:
        content: compare each file's SHA-256 too, which reads all of it.
    """
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in _files_of(checkpoint).items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to its end" if checkpoint.is_dir() else "it does not exist"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, sha256) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, it had {size} when it was written"
        if content and sha256_of(path) != sha256:
            return f"{name} is not what was written: its SHA-256 has changed"
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> Path | None:
    """The folder to resume from; `None` when no resuming is asked for, or with "auto" when there is none.

    A checkpoint in `output_dir` that is not whole is passed over with a warning; one that is named is not.

    Raises:
        ValueError: it is asked for by true or a path and there is none, or it is not whole.
    """
    if resume_from_checkpoint in (None, False, "false", "False"):
        return None
    if resume_from_checkpoint in (True, "true", "True", "auto"):
        for _, path in reversed(_numbered(Path(output_dir))):
            problem = problem_of(path)
            if problem is None:
                return path
            logger.warning("%s is passed over: %s.", path, problem)
        if resume_from_checkpoint == "auto":
            return None
        raise ValueError(
            f"`resume_from_checkpoint=true`, but {output_dir} holds no whole checkpoint-<step> folder. "
            "Check `output_dir`, or start anew: `--resume_from_checkpoint auto`, or none."
        )
    path = Path(resume_from_checkpoint)
    problem = problem_of(path)
    if problem is not None:
        nearby = [str(p) for p in checkpoints_in(path.parent) if p != path] if path.parent.is_dir() else []
        raise ValueError(
            f"`resume_from_checkpoint` {path} cannot be resumed from: {problem}"
            + (f". There are: {', '.join(nearby)}." if nearby else f". {path.parent} holds no other checkpoint.")
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`."""
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
        state: what we add: JSON values only.
        save_state: Accelerate's, called with the folder to fill.
        gather_errors: gives every process the lists of all, joined; waits for all.
        save_total_limit: keep the newest so many, and that of `best_step`.

    Raises:
        CheckpointError: on every process, when one could not write (a full disk); the earlier ones stay as they were.
        RuntimeError: on every process, when a data worker of one ended meanwhile.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = final.with_name(f"tmp-{final.name}")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while it saved
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
            except Exception as caught:  # safetensors and torch.save have errors of their own for a full disk
                error = caught
        errors = [e for e in gather_errors([None if error is None else f"{type(error).__name__}: {error}"]) if e]
        if errors:
            if is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            if "DataLoader worker" in errors[0]:  # torch says so wherever its process is when a worker ends
                raise RuntimeError(errors[0]) from error
            files = "Too many open files" in errors[0]
            advice = "raise the limit on open files (`ulimit -n 65536`)" if files else "make room"
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {output_dir} ({errors[0]})."
                f"{'' if files else ' Is the disk full?'} The newest whole one is "
                f"{newest_checkpoint(output_dir) or 'none yet'}: {advice} and go on with "
                "`--resume_from_checkpoint auto`."
            ) from error
    if is_main_process:
        _prune(final, save_total_limit, best_step)
    return final


def amend_checkpoint(
    output_dir: str, step: int, state: dict[str, Any], *, save_total_limit: int | None, best_step: int | None
) -> None:
    """Give `checkpoint-<step>`, which this run has just written, another `state` and the present best branch.

    Called by the main process. As everything it is made beside, of hard links, and takes the old one's place when it
    is whole; other files are as they were, and are not read again.
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
        shutil.rmtree(temporary, ignore_errors=True)  # it would hold what room a full disk has
        raise
    _prune(final, save_total_limit, best_step)  # another step may be the best now


def _link_best(state: Mapping[str, Any], checkpoint: Path) -> None:
    """The best branch so far into a checkpoint, unless its user took it away."""
    best = checkpoint.with_name("best")
    if state.get("best") and best.is_dir():
        link_tree(best, checkpoint / "best")


def _prune(newest: Path, limit: int | None, best_step: int | None) -> None:
    """Remove older checkpoints than the `limit` newest, but for that of the best step. What cannot be removed costs
    space and no training."""
    keep = {newest, newest.with_name(f"checkpoint-{best_step}")}
    for old in checkpoints_in(newest.parent)[:-limit] if limit is not None else ():
        if old not in keep:
            leaving = old.with_name(f"tmp-old-{old.name}")  # half-removed, it is no checkpoint any more
            try:
                os.replace(old, leaving)
                shutil.rmtree(leaving)
            except OSError as error:
                logger.warning("%s could not be removed: %s", old, error)


def seal(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write a checkpoint's manifest, of the files as they are now, and bring everything onto the disk.

    Args:
        known: entries of an earlier manifest, for files that are links to those that it is of, and not read again.
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
