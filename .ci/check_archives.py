"""Checks that the wheel and the source archive contain each tracked file that belongs in them.

python .ci/check_archives.py dist/*.whl dist/*.tar.gz
"""

import subprocess
import sys
import tarfile
import zipfile


def missing_files(wheel: str, archive: str, tracked: list[str]) -> list[str]:
    """Sentences: the wheel should contain all of cps_hf/, the archive all tracked files.

    Args:
        wheel: Path of the wheel.
        archive: Path of the source archive.
        tracked: Paths relative to the repository's root.
    """
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(archive) as opened:
        in_archive = {name.partition("/")[2] for name in opened.getnames()}
    package = [name for name in tracked if name.startswith("cps_hf/")]
    return [
        *(f"{wheel} lacks {name}." for name in package if name not in in_wheel),
        *(f"{archive} lacks {name}: see MANIFEST.in." for name in tracked if name not in in_archive),
    ]


if __name__ == "__main__":
    files = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    sys.exit("\n".join(missing_files(*sys.argv[1:], files.strip("\0").split("\0"))) or None)
