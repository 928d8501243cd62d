"""Write a folder that is ready to be a Hugging Face Space: the page of `cps_hf.app` for some branches."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import yaml

from ..files import filled_whole
from .page import write_examples

GRADIO = "gradio>=6.31"  # the extra `app` of pyproject.toml
_APP = '''"""The page of cps_hf.app on {names}."""

from cps_hf.app import serve

if __name__ == "__main__":
    serve({branches}, examples="examples", title={title!r})
'''
_README = """---
{header}---

# {title}

Drop an image, or pick an example: the page shows the classes of its pixels and their shares{beside}.

Branches: {links}. The source of `cps_hf` is next to `app.py`. The example images are drawn, not photographs.
{private}"""
_PRIVATE = """
To read a private branch, the Space needs a secret `HF_TOKEN`: a token that may read it.
"""


def write_space(
    folder: str | os.PathLike,
    branches: Sequence[str],
    classes: Sequence[str],
    *,
    title: str | None = None,
    license: str | None = None,
    private: bool = False,
) -> Path:
    """Write a Space: app.py, requirements.txt, README.md with the Hub's header, examples/, and the package's source.

    The folder is the whole Space: `hf upload USER/SPACE FOLDER --repo-type space` publishes it, and `python app.py`
    in it serves the same page locally. It is filled under a temporary name and renamed, so it is never half-written.

    Args:
        folder: must not exist yet.
        branches: Hub ids (or folders, to try it locally); the first is shown first.
        classes: the branches' class names, which decide what the examples show.
        title: if None, "Segmentation with" and the first branch's name.
        license: a license identifier of the Hub for the header. If None, the header has none.
        private: explain what a Space needs to read a private branch.

    Raises:
        ValueError: `folder` exists, or `branches` is empty.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} already exists and would be overwritten. Choose a new folder for the Space.")
    if not branches:
        raise ValueError("A Space needs at least one branch: its Hub id or a folder.")
    names = [re.sub(r".*/", "", branch.rstrip("/")) for branch in branches]
    title = title or f"Segmentation with {names[0]}"
    app = _APP.format(names=", ".join(names), branches=[*branches], title=title)
    # This package's dependencies according to its metadata, without the extras.
    requirements = [line for line in requires("cps_hf") or [] if "extra ==" not in line] + [GRADIO]
    on_hub = [branch for branch in branches if not Path(branch).exists()]
    readme = _README.format(
        header=_header(title, license, on_hub),
        title=title,
        beside=", another branch's prediction, and where the two differ" if len(branches) > 1 else "",
        links=", ".join(f"[{name}](https://huggingface.co/{name})" if name in on_hub else name for name in branches),
        private=_PRIVATE if private else "",
    )
    package = Path(__file__).parents[1]
    with filled_whole(folder, replace=False) as space:
        shutil.copytree(package, space / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        write_examples(space / "examples", classes)
        (space / "app.py").write_text(app, encoding="utf-8")
        (space / "requirements.txt").write_text("\n".join([*requirements, ""]), encoding="utf-8")
        (space / "README.md").write_text(readme, encoding="utf-8")
    return folder


def write_space_of(
    directory: str | os.PathLike,
    address: str,
    folder: str | os.PathLike,
    *,
    license: str | None = None,
    private: bool | None = None,
) -> str:
    """`write_space` for a pushed branch. Returns the command that publishes the Space.

    Args:
        directory: the branch as it was exported.
        address: the commit's URL, as returned by `push_branch`.
    """
    repo_id = "/".join(address.partition("/commit/")[0].split("/")[-2:])
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    classes = [name for _, name in sorted(config["id2label"].items(), key=lambda item: int(item[0]))]
    write_space(folder, [repo_id], classes, license=license, private=bool(private))
    words = ["hf", "upload", f"{repo_id}-demo", str(folder), "--repo-type", "space", *(["--private"] * bool(private))]
    return f"The Space is in {folder}. To publish it: {shlex.join(words)}"


def _header(title: str, license: str | None, on_hub: list[str]) -> str:
    """The YAML header that tells the Hub how to run the Space."""
    fields = {
        "title": title,
        "emoji": "🖼️",
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": _installed_gradio() or GRADIO.split(">=")[1],
        "app_file": "app.py",
        "models": on_hub,
        "license": license,
    }
    fields = {name: value for name, value in fields.items() if value}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)


def _installed_gradio() -> str | None:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None
