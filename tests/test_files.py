"""Files and folders are written completely or not at all: full disks, crashes, several writers."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.full_disk import full_disk

from cps_hf import files
from cps_hf.files import (
    append_record,
    filled_whole,
    link_tree,
    read_records,
    replace_folder,
    sha256_of,
    stamp_of,
    write_atomically,
    written_whole,
)


class StopHere(BaseException):
    """Like Ctrl-C, which is not an Exception."""


def write_text(path, text):
    with written_whole(path) as temporary:
        temporary.write_text(text)


def fill(folder, names, replace):
    with filled_whole(folder, replace=replace) as temporary:
        for name in names:
            (temporary / name).write_text(name)


def in_folder(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_unchanged_until_the_block_ends(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("old")
    with written_whole(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png" and temporary.name.startswith(".")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and in_folder(tmp_path) == ["picture.png"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("x"), StopHere()])
def test_a_failed_write_leaves_only_the_old_file(tmp_path, error):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(type(error)), written_whole(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and in_folder(tmp_path) == ["results.json"]


def test_a_rename_that_fails_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="quota"):
        write_text(tmp_path / "a", "new")
    with pytest.raises(OSError, match="quota"):
        fill(tmp_path / "b", "xy", replace=True)
    assert in_folder(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with full_disk(path), pytest.raises(OSError, match="No space left") as got:
        write_text(path, "new")
    assert got.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and in_folder(tmp_path) == ["results.json"] and Path("/dev/full").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from files import filled_whole, written_whole  # not the package, which takes seconds
context = written_whole(Path(sys.argv[1])) if sys.argv[2] == "file" else filled_whole(Path(sys.argv[1]), replace=True)
with context as temporary:
    (temporary if sys.argv[2] == "file" else temporary / "new").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_writer_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "out" / "thing"
    path.parent.mkdir()
    write_text(path, "old") if kind == "file" else fill(path, ["old"], replace=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], env=environment)
    assert done.returncode == -signal.SIGKILL
    hidden, kept = in_folder(path.parent)
    assert hidden.startswith(".tmp-") and kept == "thing"
    assert (path if kind == "file" else path / "old").read_text() == "old"
    write_text(path, "new") if kind == "file" else fill(path, ["new"], replace=True)
    assert path.read_text() == "new" if kind == "file" else in_folder(path) == ["new"]


def test_concurrent_writers_do_not_disturb_each_other(tmp_path, monkeypatch):
    both_have_written, replace = threading.Barrier(2, timeout=60), os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (both_have_written.wait(), replace(*paths)))
    path = tmp_path / "manifest.json"
    with ThreadPoolExecutor(2) as pool:
        [*pool.map(lambda text: write_atomically(path, text), ["a" * 9, "b" * 9])]
    assert path.read_text() in ("a" * 9, "b" * 9) and [*tmp_path.iterdir()] == [path]


def test_a_failed_text_leaves_only_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def full_disk(self, text, encoding):
        with open(self, "w") as file:
            file.write(text[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_very_long_names_work(tmp_path):
    write_text(tmp_path / ("n" * 240), "text")
    assert in_folder(tmp_path) == ["n" * 240]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    fill(tmp_path / "best", ["old", "both"], replace=True)
    fill(tmp_path / "best", ["new", "both"], replace=True)
    assert in_folder(tmp_path / "best") == ["both", "new"] and in_folder(tmp_path) == ["best"]


def test_only_empty_folders_are_filled_without_replace(tmp_path):
    fill(tmp_path / "deep" / "set", ["first"], replace=False)
    with pytest.raises(OSError):
        fill(tmp_path / "deep" / "set", ["second"], replace=False)
    assert in_folder(tmp_path / "deep" / "set") == ["first"] and in_folder(tmp_path / "deep") == ["set"]
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", ["first"], replace=False)
    assert in_folder(tmp_path / "empty") == ["first"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), StopHere()])
@pytest.mark.parametrize("replace", [True, False])
def test_a_failed_folder_is_removed(tmp_path, replace, error):
    with pytest.raises(type(error)), filled_whole(tmp_path / "set", replace=replace) as temporary:
        (temporary / "half").write_text("h")
        raise error
    assert in_folder(tmp_path) == []


def test_one_of_two_concurrent_folders_wins(tmp_path):
    both_have_filled = threading.Barrier(2, timeout=60)

    def write(name):
        with filled_whole(tmp_path / "set", replace=False) as temporary:
            for i in range(20):
                (temporary / f"{name}{i}").write_text(name)
            both_have_filled.wait()

    with ThreadPoolExecutor(2) as pool:
        failed = [future.exception() for future in [pool.submit(write, name) for name in "ab"]]
    assert sorted(error is None for error in failed) == [False, True]
    winner = "ab"[failed.index(None)]
    assert in_folder(tmp_path / "set") == sorted(f"{winner}{i}" for i in range(20)) and in_folder(tmp_path) == ["set"]


def test_a_failed_second_rename_restores_the_old_folder(tmp_path, monkeypatch):
    for name in ("new", "target"):
        fill(tmp_path / name, [name], replace=True)
    renames, replace = [], os.replace

    def full_at_the_second(*paths):
        renames.append(paths)
        if len(renames) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full_at_the_second)
    with pytest.raises(OSError, match="No space"):
        replace_folder(tmp_path / "new", tmp_path / "target")
    assert in_folder(tmp_path) == ["new", "target"] and in_folder(tmp_path / "target") == ["target"]


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_tree_has_the_files_and_replacing_one_leaves_the_other(tmp_path, monkeypatch, links):
    def no_links(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    fill(tmp_path / "a", ["one", "two"], replace=True)
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "deep" / "three").write_text("three")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    link_tree(tmp_path / "a", tmp_path / "b")
    for name in ("one", "two", "deep/three"):
        a, b = tmp_path / "a" / name, tmp_path / "b" / name
        assert a.samefile(b) == links and sha256_of(a) == sha256_of(b)
    write_text(tmp_path / "a" / "one", "changed")
    assert (tmp_path / "b" / "one").read_text() == "one"


@pytest.mark.parametrize("system, failures", [("nt", 3), ("nt", 99), ("posix", 1)])
def test_renames_are_only_retried_on_windows(tmp_path, monkeypatch, system, failures):
    source, target, calls, replace = tmp_path / "new", tmp_path / "old", [], os.replace
    source.write_text("new")

    def failing(*paths):
        calls.append(paths)
        if len(calls) <= failures:
            raise PermissionError(errno.EACCES, "it is being used by another process")
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", failing)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(files.os, "name", system)
    if system == "nt" and failures == 3:
        files.rename(source, target)
        monkeypatch.undo()
        assert target.read_text() == "new" and len(calls) == 4
    else:
        with pytest.raises(PermissionError):
            files.rename(source, target)
        assert len(calls) == (6 if system == "nt" else 1)


def test_a_cut_off_record_is_removed(tmp_path):
    path = tmp_path / "done.jsonl"
    assert read_records(path) == [] and not path.exists()
    for name in ("ä", "b"):
        append_record(path, {"name": name})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name": "c')
    assert read_records(path) == [{"name": "ä"}, {"name": "b"}] and path.read_bytes() == whole
    append_record(path, {"name": "d"})
    assert [record["name"] for record in read_records(path)] == ["ä", "b", "d"]


def test_a_stamp_changes_with_size_or_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    os.utime(path, ns=(0, 1))
    before = stamp_of(path)
    os.utime(path, ns=(0, 2))
    assert before == [3, 1] and stamp_of(path) == [3, 2]
