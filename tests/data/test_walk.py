"""The walk over a folder: links are followed; hidden files, thumbnails and other file types are skipped and
said; predicting goes by the same rule as training."""

import os

import numpy as np
import pytest
from PIL import Image

from cps_hf.data import walk as walking
from cps_hf.data.folder import load_folder, splits_of
from cps_hf.data.walk import IMAGE_SUFFIXES, find_images, walk


def picture(path, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 9, 3), value, np.uint8)).save(path)
    return path


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def album(tmp_path):
    """Two images of supported types, plus files left by systems, programs and people."""
    for name in ("a.png", "sub/b.JPG"):
        picture(tmp_path / "album" / name)
    for name in (
        *(".DS_Store", "Thumbs.db", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png"),
        *("@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/old.png", "sub/.hidden/c.png"),
        *("w.heic", "notes.txt", "raw.nef", "no_ending"),
    ):
        touch(tmp_path / "album" / name)
    return tmp_path / "album"


def test_system_and_program_files_are_skipped_and_counted(album, caplog):
    found = walk(album, IMAGE_SUFFIXES)
    assert [*found.files] == ["a.png", "sub/b.JPG"]
    hidden = found.passed_over[walking.HIDDEN]
    assert {*hidden} == {
        *(".DS_Store", "Thumbs.db", "._a.png", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "#recycle", "sub/.hidden"),
    }
    assert {*found.passed_over[walking.OTHER_KIND]} == {"w.heic", "notes.txt", "raw.nef", "no_ending"}
    lines = "\n".join(found.lines())
    assert "8 skipped, hidden or system files: " in lines
    assert "4 skipped, unsupported file types (.heic: 1, .nef: 1, .txt: 1, no suffix: 1): no_ending" in lines
    caplog.set_level("INFO")
    found.say()
    assert all(line in caplog.text for line in found.lines())


def test_only_possible_images_give_a_warning(tmp_path, caplog):
    picture(tmp_path / "a.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        touch(tmp_path / name)
    caplog.set_level("INFO", "cps_hf")  # an earlier test's command may have changed the level
    walk(tmp_path, IMAGE_SUFFIXES).say()
    assert {record.levelname for record in caplog.records} == {"INFO"}
    caplog.clear()
    touch(tmp_path / "b.heic")
    walk(tmp_path, IMAGE_SUFFIXES).say()
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "b.heic" in warning.getMessage()


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".gif", ".PNG", ".jp2", ".ppm", ".tga", ".Tiff"])
def test_images_of_every_supported_type_are_used(tmp_path, suffix):
    image = Image.fromarray(np.zeros((6, 9, 3), np.uint8))
    image.save(tmp_path / f"x{suffix}", "JPEG" if suffix == ".jfif" else None)
    assert load_folder(tmp_path, with_labels=False)["id"] == ["x"]
    assert [*find_images([str(tmp_path)])] == ["x"]


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path, caplog):
    elsewhere = picture(tmp_path / "elsewhere" / "s0.png").parent
    picture(tmp_path / "album" / "sub" / "a.png")
    os.symlink(elsewhere, tmp_path / "album" / "site1")
    os.symlink(elsewhere / "s0.png", tmp_path / "album" / "one.png")
    os.symlink(tmp_path / "album", tmp_path / "album" / "sub" / "above")
    os.symlink(tmp_path / "album" / "sub", elsewhere / "back")  # and from there back to itself
    os.symlink(tmp_path / "nowhere.png", tmp_path / "album" / "gone.png")
    found = walk(tmp_path / "album", IMAGE_SUFFIXES)
    assert [*found.files] == ["one.png", "site1/back/a.png", "site1/s0.png", "sub/a.png"]
    assert found.passed_over[walking.CIRCLE] == ["site1/back/above", "sub/above"]
    assert found.passed_over[walking.NOWHERE] == ["gone.png"]
    found.say()
    assert "1 skipped, broken links: gone.png" in caplog.text
    assert "2 skipped, links to a parent folder" in caplog.text


def test_a_folder_is_walked_once_for_each_link_to_it(tmp_path):
    elsewhere = picture(tmp_path / "elsewhere" / "s0.png").parent
    (tmp_path / "album" / "sub").mkdir(parents=True)
    for name in ("one", "two", "sub/three"):
        os.symlink(elsewhere, tmp_path / "album" / name)
    found = walk(tmp_path / "album", IMAGE_SUFFIXES)
    assert [*found.files] == ["one/s0.png", "sub/three/s0.png", "two/s0.png"] and not found.passed_over


def test_a_link_to_itself_is_broken_and_skipped(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("loop", "loop.png"):
        os.symlink(name, tmp_path / name)
    found = walk(tmp_path, IMAGE_SUFFIXES)
    assert [*found.files] == ["a.png"]
    assert found.passed_over == {walking.OTHER_KIND: ["loop"], walking.NOWHERE: ["loop.png"]}


def test_a_linked_subfolder_has_its_masks(tmp_path):
    for kind in ("images", "masks"):
        Image.fromarray(np.zeros((6, 9), np.uint8)).save(tmp_path / f"{kind}.png")
        for folder in (tmp_path / "set" / kind, tmp_path / "more" / kind):
            folder.mkdir(parents=True)
            (folder / f"{'a' if 'set' in folder.parts else 's0'}.png").write_bytes(
                (tmp_path / f"{kind}.png").read_bytes()
            )
        os.symlink(tmp_path / "more" / kind, tmp_path / "set" / kind / "site1")
    assert load_folder(tmp_path / "set", class_names=["a", "b", "c"])["id"] == ["a", "site1/s0"]


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    picture(tmp_path / "locked" / "a.png")
    look = os.scandir

    def denies(folder):
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied")
        return look(folder)

    monkeypatch.setattr(os, "scandir", denies)
    with pytest.raises(ValueError, match="Cannot read the folder .*locked: Permission denied"):
        walk(tmp_path, IMAGE_SUFFIXES)


def test_predicting_takes_the_same_files_as_training(album):
    taken = load_folder(album.parent, images="album", with_labels=False)["id"]
    assert [*find_images([str(album)])] == taken == ["a", "sub/b"]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*", ["a"]),
        ("**/*", ["a", "sub/b"]),
        ("**", ["a", "sub/b"]),
        ("*/*", ["sub/b"]),
        ("**/*.png", ["a"]),
        ("**/sub/*.JPG", ["sub/b"]),
        ("[a-b].*", ["a"]),
        (".*/*", []),
    ],
)
def test_a_glob_follows_the_same_rules(album, caplog, pattern, wanted):
    os.symlink(album, album / "sub" / "above")
    os.symlink(album / "sub", album / "sub" / "again")  # two circles: glob itself would never end
    if wanted:
        assert [*find_images([str(album / pattern)])] == wanted
    else:
        with pytest.raises(ValueError, match="No image in .*Skipped: .*1 skipped, hidden.*a-checkpoint.png"):
            find_images([str(album / pattern)])
    if pattern == "*":
        assert "1 skipped, folders or devices, not files: sub" in "\n".join(walking._matching(album / "*").lines())


def test_an_error_without_images_lists_skipped_files(tmp_path):
    touch(tmp_path / "images" / "a.heic")
    touch(tmp_path / "images" / ".hidden.png")
    for read in (lambda: load_folder(tmp_path, with_labels=False), lambda: find_images([str(tmp_path / "images")])):
        with pytest.raises(ValueError, match=r"No image in .*Skipped: .*hidden or system files.*\(.heic: 1\)"):
            read()


def test_lossy_masks_are_named_if_masks_are_missing(tmp_path):
    for folder, suffix in (("images", "png"), ("masks", "jpg")):
        picture(tmp_path / folder / f"a.{suffix}")
        picture(tmp_path / folder / f"b.{suffix}")
    picture(tmp_path / "masks" / "b.png")
    with pytest.raises(ValueError, match=r"1 of 2 images .* no mask .*There are a.jpg: masks are read as .png"):
        load_folder(tmp_path, class_names=["a", "b"])


def test_the_splits_of_a_folder_are_those_with_images(tmp_path):
    picture(tmp_path / "train" / "images" / "a.png")
    picture(tmp_path / "val" / "images" / "a.png")
    touch(tmp_path / "listed" / "metadata.jsonl", b"{}")
    picture(tmp_path / "docs" / "a.png")
    picture(tmp_path / "@eaDir" / "images" / "a.png")
    assert splits_of(tmp_path) == ["listed", "train", "val"]
    picture(tmp_path / "images" / "a.png")
    assert splits_of(tmp_path) == [None, "listed", "train", "val"]
    assert splits_of(tmp_path / "train") == splits_of(tmp_path / "docs") == splits_of(tmp_path / "none") == [None]
