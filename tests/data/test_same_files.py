"""Files are compared by identity: links and copies with the same name are the same image, others are not."""

import os
import shutil

from cps_hf.data.same_files import KnownFiles


def test_links_and_copies_are_known_and_others_are_not(tmp_path):
    for folder in ("photos", "links", "copies", "others"):
        (tmp_path / folder).mkdir()
    original = tmp_path / "photos" / "a.png"
    original.write_bytes(b"one image")
    known = KnownFiles([original])
    os.link(original, tmp_path / "links" / "hard.png")
    (tmp_path / "links" / "soft.png").symlink_to(original)
    shutil.copy(original, tmp_path / "copies" / "a.png")
    assert original in known and str(original) in known
    assert tmp_path / "links" / "hard.png" in known and tmp_path / "links" / "soft.png" in known
    assert tmp_path / "copies" / "a.png" in known
    (tmp_path / "others" / "a.png").write_bytes(b"two images")  # the same name
    (tmp_path / "others" / "b.png").write_bytes(b"one image")  # the same content: a frame that did not change
    assert tmp_path / "others" / "a.png" not in known and tmp_path / "others" / "b.png" not in known


def test_a_copy_of_the_same_size_and_time_is_compared_by_its_content(tmp_path):
    for folder, content in (("a", b"1111"), ("b", b"2222")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(content)
        os.utime(tmp_path / folder / "x.png", (1, 1))
    assert tmp_path / "b" / "x.png" not in KnownFiles([tmp_path / "a" / "x.png"])
