"""Checkpoints as files: complete or not at all, verified by hashes, pruned without losing the last or the best."""

import contextlib
import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cps_hf import files
from cps_hf.checkpointing import checkpoints
from cps_hf.checkpointing.checkpoints import CheckpointError, checkpoints_in, problem_of, resolve_checkpoint
from cps_hf.files import flush, write_atomically


def save(out, step, *, limit=None, best=None, fill=None):
    def write(folder):
        (out / folder / "model.safetensors").write_bytes(b"%d" % step * 100)
        (out / folder / "random_states_0.pkl").write_bytes(b"state")

    return checkpoints.save_checkpoint(
        str(out),
        step,
        {"step": step, "best": {"step": best} if best else {}},
        save_state=fill or write,
        gather_errors=lambda errors: errors,
        is_main_process=True,
        save_total_limit=limit,
        best_step=best,
    )


def steps_in(out):
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints_in(out)]


def test_a_checkpoint_is_complete_and_lists_every_file(tmp_path):
    path = save(tmp_path, 7)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "random_states_0.pkl", "trainer_state.json"}
    # printf state | sha256sum
    sha256 = "4ba69735ca53765ed6a709edb56c6ea236b7193a3b29a6b390c346f0f4340e4e"
    assert files["random_states_0.pkl"] == {"bytes": 5, "sha256": sha256}
    assert problem_of(path) is None and [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]
    assert checkpoints.read_state(path)["step"] == 7


def test_weights_are_readable_as_the_umask_allows(tmp_path):
    def fill(folder):
        save_file({"a": torch.zeros(2)}, f"{folder}/model.safetensors")

    before = os.umask(0o027)
    try:
        path = save(tmp_path, 7, fill=fill)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {"0o640"}, modes
    assert problem_of(path) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "one bit": (lambda c: flip(c / "model.safetensors"), "model.safetensors has been modified"),
    "one bit of our state": (lambda c: flip(c / "trainer_state.json"), "trainer_state.json has been modified"),
    "truncated": (lambda c: (c / "model.safetensors").write_bytes(b"9"), "model.safetensors has 1 bytes, but had 100"),
    "a file gone": (lambda c: (c / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
    "killed before its end": (lambda c: (c / "manifest.json").unlink(), "has no manifest.json"),
    "the manifest itself": (lambda c: (c / "manifest.json").write_text('{"files": [1]}'), "manifest.json cannot be"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, caplog, damage):
    older, newest = save(tmp_path, 8), save(tmp_path, 9)
    hurt, said = DAMAGE[damage]
    hurt(newest)
    for wanted in ("auto", True, "true"):
        caplog.clear()
        assert resolve_checkpoint(wanted, str(tmp_path)) == older
        assert "checkpoint-9 is skipped" in caplog.text and said in caplog.text
    with pytest.raises(ValueError, match=rf"checkpoint-9 cannot be resumed from: .*{said}.*There are: .*checkpoint-8"):
        resolve_checkpoint(str(newest), str(tmp_path))
    hurt(older)
    assert resolve_checkpoint("auto", str(tmp_path)) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        resolve_checkpoint(True, str(tmp_path))


def test_only_auto_starts_without_a_checkpoint(tmp_path):
    assert resolve_checkpoint("auto", str(tmp_path / "new")) is None
    for wanted, said in ((True, "no complete checkpoint"), (str(tmp_path / "checkpoint-3"), "does not exist")):
        with pytest.raises(ValueError, match=said):
            resolve_checkpoint(wanted, str(tmp_path))
    for nothing in (None, False, "false"):
        save(tmp_path, 1)
        assert resolve_checkpoint(nothing, str(tmp_path)) is None


def test_auto_restarts_dead_runs_but_not_finished_ones(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="contains a run"):
        checkpoints.check_output_dir(str(tmp_path), overwrite=False, resuming=False)
    checkpoints.check_output_dir(str(tmp_path), overwrite=False, resuming=False, auto=True)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="contains a run"):
        checkpoints.check_output_dir(str(tmp_path), overwrite=False, resuming=False, auto=True)


def test_half_written_and_later_checkpoints_are_moved(tmp_path, caplog):
    for step in (2, 4, 6):
        save(tmp_path, step)
    (tmp_path / "tmp-checkpoint-8").mkdir()
    (tmp_path / "tmp-best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    checkpoints.prepare_output_dir(str(tmp_path), step=2, overwrite=False)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["aside-checkpoint-4", "aside-checkpoint-6", "checkpoint-2", "notes.txt"]
    assert "tmp-checkpoint-8 was half-written" in caplog.text and "now aside-checkpoint-4" in caplog.text
    assert problem_of(tmp_path / "aside-checkpoint-4") is None
    # A new run with "auto" renames what it cannot use; `--overwrite_output_dir` deletes it.
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    checkpoints.prepare_output_dir(str(tmp_path), step=None, overwrite=False)
    assert (tmp_path / "aside-checkpoint-2").is_dir() and (tmp_path / "aside-checkpoint-4").is_dir()
    (tmp_path / "ranking.json").write_text("{}")  # from `cps-hf rank`, of the old run's networks
    checkpoints.prepare_output_dir(str(tmp_path), step=None, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


SAID = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), "Is the disk full?.*: free some space"),
    "too many open files": (OSError(errno.EMFILE, "Too many open files"), r"Too many open files\).*`ulimit -n 65536`"),
}


@pytest.mark.parametrize("what", SAID)
def test_a_failed_save_names_the_cause(tmp_path, what):
    error, said = SAID[what]

    def fill(folder):
        raise error

    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"step 2 could not be written .*{said}") as raised:
        save(tmp_path, 2, fill=fill)
    assert "checkpoint-1" in str(raised.value) and ("disk" in str(raised.value)) is (what == "a full disk")
    assert steps_in(tmp_path) == [1] and not [*tmp_path.glob("tmp-*")]


def test_a_worker_dying_during_a_save_is_no_disk_error(tmp_path):
    def fill(folder):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(RuntimeError, match="DataLoader worker .* Killed") as raised:
        save(tmp_path, 2, fill=fill)
    assert not isinstance(raised.value, OSError) and steps_in(tmp_path) == []


def test_the_limit_keeps_the_last_complete_and_the_best(tmp_path):
    save(tmp_path, 1, limit=1)
    save(tmp_path, 2, limit=1)
    assert steps_in(tmp_path) == [2]
    (tmp_path / "best").mkdir()
    save(tmp_path, 3, limit=1, best=2)
    save(tmp_path, 4, limit=1, best=2)
    assert steps_in(tmp_path) == [2, 4]
    save(tmp_path, 5, limit=1, best=5)
    assert steps_in(tmp_path) == [5]
    # A damaged one with a higher number does not count.
    (save(tmp_path, 9) / "manifest.json").unlink()
    save(tmp_path, 6, limit=1)
    assert steps_in(tmp_path) == [6]


def test_the_best_branch_is_linked_without_a_copy(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(b"weights")
    path = save(tmp_path, 3, best=3)
    assert (path / "best" / "model.safetensors").samefile(tmp_path / "best" / "model.safetensors")
    assert "best/model.safetensors" in json.loads((path / "manifest.json").read_text())["files"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")]
)
def test_a_failed_save_keeps_the_older_checkpoints(tmp_path, error):
    older = save(tmp_path, 5, limit=1)

    def full_disk(folder):
        (tmp_path / folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(
        CheckpointError, match=r"step 6 could not be written .*Is the disk full\?.*checkpoint-5"
    ) as got:
        save(tmp_path, 6, limit=1, fill=full_disk)
    assert str(error) in str(got.value)
    assert problem_of(older) is None and [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_saving_a_step_again_replaces_it_as_a_whole(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save(tmp_path, 5)
    (tmp_path / "checkpoint-5" / "stale").write_text("x")
    assert not (save(tmp_path, 5) / "stale").exists() and steps_in(tmp_path) == [5]


def test_on_windows_only_writable_files_are_flushed(tmp_path, monkeypatch):
    opened, flushed, system_open = {}, [], os.open
    monkeypatch.setattr(files.os, "name", "nt")

    def windows_open(path, mode):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        opened[system_open(path, mode)] = mode
        return [*opened][-1]

    def windows_fsync(descriptor):
        assert opened[descriptor] == os.O_RDWR
        flushed.append(descriptor)

    monkeypatch.setattr(files.os, "open", windows_open)
    monkeypatch.setattr(files.os, "fsync", windows_fsync)
    (tmp_path / "file").write_text("text")
    flush(tmp_path / "file")
    flush(tmp_path)
    assert len(flushed) == 1


@pytest.mark.parametrize("what", ["folder", "file"])
def test_only_a_failed_file_flush_fails_a_checkpoint(tmp_path, monkeypatch, what):
    path = tmp_path if what == "folder" else tmp_path / "file"
    (tmp_path / "file").write_text("text")

    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with contextlib.nullcontext() if what == "folder" else pytest.raises(OSError, match="Invalid argument"):
        flush(path)


def test_half_written_texts_of_a_killed_run_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: None)  # killed before
    monkeypatch.setattr(checkpoints.os, "replace", lambda *paths: None)
    write_atomically(tmp_path / "results.json", "text")
    monkeypatch.undo()
    assert len([*tmp_path.iterdir()]) == 1
    checkpoints.prepare_output_dir(str(tmp_path), step=4, overwrite=False)
    assert not [*tmp_path.iterdir()]
