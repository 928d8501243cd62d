"""Shared by the tests of converting."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cps_hf.annotations.classes import class_table
from cps_hf.annotations.convert import paint_image
from cps_hf.annotations.project import ReadOptions
from cps_hf.annotations.readers import read_project
from cps_hf.commands.convert import main
from cps_hf.data.raster import open_raster


def picture(path: Path, height: int = 20, width: int = 30, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path, **options)
    return path


def masks_of(source: Path, *, overlap: str | None = None, format: str | None = None, table=None, **options):
    """(class names, {image: mask}) without writing a file."""
    project = read_project(source, ReadOptions(**options), format=format)
    table = class_table(project, **(table or {}))
    found = {}
    for image in project.images:
        raster = open_raster({"path": str(image.image)}, image.name, "image")
        found[image.name] = paint_image(image, raster, table, overlap=overlap or project.overlap).ids
    return table.names, found


def assert_error(source: Path, said: str, **options) -> None:
    """Reading the source raises a `ValueError` that matches `said`."""
    with pytest.raises(ValueError, match=said):
        masks_of(source, **options)


def fails(capsys, *words) -> str:
    """The standard error of `cps-hf convert` when it exits with status 2."""
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, words)])
    said = capsys.readouterr().err
    error = re.search(r"^error: .*", said, re.M | re.S)[0]
    assert exit_.value.code == 2 and error.count("\n") == 1 and "Traceback" not in said
    return error
