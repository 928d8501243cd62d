"""One table of kinds of files through every entry point: an image is the same array wherever it is read, a mask the
same classes, or each is refused for the same reason. It is the table of docs/data.md."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.formats import HEIGHT, IDS, NAMES, WIDTH, images, masks
from support.image_files import png

from cps_hf.app.page import Page
from cps_hf.config import AugmentationConfig
from cps_hf.data.check import check_dataset
from cps_hf.data.folder import load_folder
from cps_hf.data.order import Shard
from cps_hf.data.streams import EvaluationStream, TrainStream
from cps_hf.data.table import build
from cps_hf.data.walk import IMAGE_SUFFIXES, find_images

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
IMAGES, MASKS = images(), masks()
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


def as_array(image):
    return image.permute(1, 2, 0).numpy()


def first_of(dataset, views=None):
    """What the labeled stream (no views) or the unlabeled one makes of a set of one, neither scaled nor flipped."""
    plain = AugmentationConfig(crop_size=[HEIGHT, WIDTH], random_scale=[1.0], horizontal_flip=0.0)
    name = "unlabeled_dataset" if views else "train_dataset"
    stream = TrainStream(dataset, name=name, shard=Shard(batch_size=1), augmentation=plain, seed=0, views=views)
    return next(iter(stream))


def on_the_page(path):
    page, seen = object.__new__(Page), []
    page.max_pixels = page.predicted_pixels = 10**6
    page.names, page.classes, page.palette = ["it"], ["a"], [(0, 0, 0)]
    page._predict = lambda image, name: seen.append(image) or torch.zeros(image.shape[-2:], dtype=torch.long)
    message = page.segment(str(path), "it", None).message
    if not seen:
        raise ValueError(message)
    return as_array(seen[0])


def image_entries(folder, path):
    """By entry point, a call that gives the image as it is seen there."""

    def labeled():
        return load_folder(folder, class_names=NAMES)

    def predict():
        [(name, file)] = find_images([str(folder / "images")]).items()
        [[sample]] = EvaluationStream(build([name], [file]), name="dataset", with_label=False)
        return as_array(sample["image"])

    def evaluation():
        [[sample]] = EvaluationStream(labeled())
        return as_array(sample["image"])

    return {
        "labeled": lambda: as_array(first_of(labeled())["pixel_values"][0]),
        "unlabeled": lambda: as_array(first_of(load_folder(folder, with_labels=False), ("weak",))["weak"][0]),
        "evaluation": evaluation,
        "predict": predict,
        "page": lambda: on_the_page(path),
    }


def mask_entries(folder, options):
    def dataset():
        return load_folder(folder, class_names=NAMES, **(options or {}))

    def evaluation():
        [[sample]] = EvaluationStream(dataset())
        return sample["label"].numpy()

    def check():
        report = check_dataset(dataset(), progress=False)
        if report["problems"]:
            raise ValueError(report["problems"][0]["problem"])
        [shares] = [[row["pixel_share"] for row in report["classes"]]]
        return np.array([*shares, report["ignored_share"]])

    return {"training": lambda: first_of(dataset())["labels"][0].numpy(), "evaluation": evaluation, "check": check}


def shares(ids):
    labeled = max((ids != 255).sum(), 1)
    return np.array([*((ids == c).sum() / labeled for c in range(len(NAMES))), (ids == 255).mean()])


def outcome(kind, call, *, of_mask=False, shared=False):
    """What the table says: what becomes of the file, or "refused". The test fails where it is neither."""
    try:
        found = call()
    except ValueError as error:
        assert kind.expected is None, f"{kind.name}: {error}"
        assert kind.error in str(error) or "cannot be read" in str(error), f"{kind.name}: {error}"
        return "refused"
    assert kind.expected is not None, f"{kind.name} is read"
    expected = shares(kind.expected) if shared else kind.expected
    assert found.shape == expected.shape, f"{kind.name}: {found.shape}"
    off = np.abs(found.astype(float) - expected).max()
    assert off <= (1e-9 if of_mask else kind.about), f"{kind.name} is off by {off}"
    return kind.becomes


@cache
def row_of_image(number, root):
    kind, folder = IMAGES[number], root / f"image_{number}"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    path = folder / "images" / f"x{kind.suffix}"
    path.write_bytes(kind.data)
    (folder / "masks" / "x.png").write_bytes(png(IDS))
    return kind.name, {entry: outcome(kind, call) for entry, call in image_entries(folder, path).items()}


@cache
def row_of_mask(number, root):
    kind, folder = MASKS[number], root / f"mask_{number}"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "images" / "x.png").write_bytes(png(np.zeros((*IDS.shape, 3), np.uint8)))
    (folder / "masks" / f"x{kind.suffix}").write_bytes(kind.data)
    line = {"file_name": "images/x.png", "mask_file_name": f"masks/x{kind.suffix}"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))  # which also names kinds that are not looked for
    entries = mask_entries(folder, kind.options).items()
    cells = {entry: outcome(kind, call, of_mask=True, shared=entry == "check") for entry, call in entries}
    return kind.name, cells


@pytest.mark.parametrize("number", range(len(IMAGES)), ids=lambda i: IMAGES[i].name)
def test_an_image_is_the_same_array_wherever_it_is_read(number, roots):
    _, cells = row_of_image(number, roots)
    assert len(set(cells.values())) == 1 and IMAGES[number].suffix in IMAGE_SUFFIXES


@pytest.mark.parametrize("number", range(len(MASKS)), ids=lambda i: MASKS[i].name)
def test_a_mask_is_the_same_classes_wherever_it_is_read(number, roots):
    _, cells = row_of_mask(number, roots)
    assert len(set(cells.values())) == 1


def test_every_kind_is_there_once():
    for kinds in (IMAGES, MASKS):
        assert len({(kind.name, kind.suffix) for kind in kinds}) == len(kinds)


def table(kinds, rows):
    """Markdown; rows that differ in the orientation alone are one."""
    merged = {}
    for kind, (name, cells) in zip(kinds, rows, strict=True):
        found = re.fullmatch(r"(.*, EXIF orientation) \d", name)
        read = tuple("rejected" if cell == "refused" else "read" for cell in cells.values())
        merged[f"{found[1]} 2 to 8" if found else name, read, kind.becomes or kind.error] = None
    columns = ["file", *rows[0][1], "as what, or why not"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(read)} | {becomes} |" for name, read, becomes in merged)])


def test_the_page_shows_the_table(roots, request):
    tables = {
        "images": table(IMAGES, [row_of_image(i, roots) for i in range(len(IMAGES))]),
        "masks": table(MASKS, [row_of_mask(i, roots) for i in range(len(MASKS))]),
    }
    page = DOCS.read_text(encoding="utf-8")
    for what, found in tables.items():
        block = rf"(<!-- {what}: written by tests/data/test_formats.py -->\n).*?(\n<!-- end -->)"
        wanted = re.sub(block, lambda m, found=found: m[1] + found + m[2], page, flags=re.DOTALL)
        if request.config.getoption("--write-docs"):
            DOCS.write_text(wanted, encoding="utf-8")
            page = wanted
        assert page == wanted, f"docs/data.md shows other {what}: `pytest {Path(__file__).name} --write-docs` mends it"
        assert page.count(f"<!-- {what}: written by") == 1
