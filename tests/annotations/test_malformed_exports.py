"""Malformed exports: every error is one sentence."""

import copy
import json
import random
import warnings

import pytest
from support.convert import masks_of
from support.exports import coco, cvat, label_studio, labelme, supervisely, via, write_json

ODD = (None, True, -1, 0, 3, 1e308, float("nan"), "", "x", "\ud800", [], [[]], [3], {}, {"x": 1}, [None] * 3)
EXPORTS = {
    "coco": (coco, "annotations/instances_default.json"),
    "coco, runs": (lambda folder: coco(folder, "runs"), "annotations/instances_default.json"),
    "labelme": (labelme, "a.json"),
    "label_studio": (label_studio, "project-1.json"),
    "label_studio, brush": (lambda folder: label_studio(folder, "brushlabels"), "project-1.json"),
    "supervisely": (supervisely, "ds0/ann/a.png.json"),
    "supervisely, meta": (supervisely, "meta.json"),
    "via": (via, "via.json"),
}


def places(content, way=()):
    """The paths to all nested values."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*way, key)
        yield from places(value, (*way, key))


def changed(content, rng):
    content = copy.deepcopy(content)
    *way, last = rng.choice([*places(content)])
    inner = content
    for key in way:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[last]
    else:
        inner[last] = rng.choice(ODD)
    return content


@pytest.mark.parametrize("name", EXPORTS)
def test_values_of_other_types_are_read_or_a_clear_error(tmp_path, name):
    write, file = EXPORTS[name]
    write(tmp_path)
    path, format = tmp_path / file, name.split(",")[0]
    whole = json.loads(path.read_text(encoding="utf-8"))
    rng, refusals = random.Random(0), set()
    for _ in range(40):
        content = changed(whole, rng)
        path.write_text(json.dumps(content), encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                masks_of(tmp_path, format=format)
            except ValueError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error), content
                refusals.add(str(error))
    assert len(refusals) > 3


def test_attributes_of_other_types_are_read_or_an_error(tmp_path):
    cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    whole, rng = path.read_text(encoding="utf-8"), random.Random(0)
    for _ in range(40):
        parts = whole.split('"')
        at = rng.randrange(5, len(parts) - 1, 2)  # after the XML declaration
        parts[at] = rng.choice(["", "x", "-1", "nan", "1e308", "1,2;3", ",;,"])
        path.write_text('"'.join(parts), encoding="utf-8")
        try:
            masks_of(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)


def test_a_truncated_file_is_named_in_the_error(tmp_path):
    for name, (write, file) in EXPORTS.items():
        source = tmp_path / name
        source.mkdir()
        write(source)
        text = (source / file).read_text(encoding="utf-8")
        for share in (0, 0.3, 0.9, 0.999):
            (source / file).write_text(text[: int(share * len(text))], encoding="utf-8")
            with pytest.raises(
                ValueError, match=f"{file.rpartition('/')[2]} is not a complete JSON file: .*Export it again"
            ):
                masks_of(source, format=name.split(",")[0])
        write_json(source / file, json.loads(text))
