"""What a release rests on: the version, the lowest dependencies, and the files in the wheel and the source archive."""

import importlib.util
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import cps_hf

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_newest_entry_of_the_changelog_is_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == cps_hf.__version__


def test_the_lowest_python_is_the_first_that_is_named():
    named = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_each_dependency_has_a_lowest_version():
    pins = script("oldest").oldest(PROJECT["dependencies"])
    assert len(pins) == len(PROJECT["dependencies"]) > 10
    assert script("oldest").oldest(["torch>=2.9", "timm>=1.0.22"]) == [
        "torch==2.9",
        "timm==1.0.22",
    ]


@pytest.mark.parametrize("dependency", ["torch", "torch>=2.9,<3", "torch==2.9"])
def test_a_dependency_of_another_form_is_an_error(dependency):
    with pytest.raises(ValueError, match=f"the dependency `{dependency}` should have the form `name>=version`"):
        script("oldest").oldest([dependency])


def test_a_file_that_an_archive_lacks_is_named(tmp_path):
    tracked = ["README.md", "cps_hf/__init__.py", "cps_hf/py.typed", "tests/test_release.py"]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("cps_hf/__init__.py", "")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in tracked[:3]:
            archive.addfile(tarfile.TarInfo(f"x-1/{name}"))
    missing = script("check_archives").missing_files(tmp_path / "x.whl", tmp_path / "x.tar.gz", tracked)
    assert missing == [
        f"{tmp_path / 'x.whl'} lacks cps_hf/py.typed.",
        f"{tmp_path / 'x.tar.gz'} lacks tests/test_release.py: see MANIFEST.in.",
    ]
