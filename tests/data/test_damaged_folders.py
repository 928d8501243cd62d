"""Hundreds of small folders, each with one defect: no crash, and no silent wrong result.

An oracle knows what was damaged. Each folder is loaded, checked and surveyed as before a run's first step. Then it
either contains exactly the images and class ids that were drawn (and the defect is reported if it should be), or it is
rejected with an error that names the problem. If the error suggests a solution, the test follows it.
"""

import io
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_files import as_stored, png, png_exif, png_palette, saved, tiff

from cps_hf.config import CPSConfig
from cps_hf.data.check import check_dataset
from cps_hf.data.folder import load_folder
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import read_sample
from cps_hf.data.streams import undecoded
from cps_hf.data.walk import find_images
from cps_hf.training.inspection import check_labels

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.timeout(900)]
COLORS = [(0, 0, 0), (200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


@dataclass
class Drawn:
    """A folder as it was meant to be, and its damage.

    Args:
        images, labels: what a reader should find, by id. files: path below the folder -> bytes.
        names: of the classes. options: of `load_folder`.
        error: a pattern for the error; None if the folder is read. then: options with which it can be read anyway.
        said: a pattern for the log or the report.
        lossy: pixels only approximate those that were drawn.
    """

    rng: np.random.Generator
    images: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    error: str | None = None
    then: dict | None = None
    said: str | None = None
    lossy: bool = False

    @classmethod
    def healthy(cls, rng: np.random.Generator) -> "Drawn":
        drawn = cls(rng)
        classes = int(rng.integers(2, 6))
        drawn.names = [f"class {c}" for c in range(classes)]
        side = sorted(rng.integers(24, 48, 2).tolist())
        size = (side[0], side[1] + 3) if rng.random() < 0.5 else (side[1] + 3, side[0])
        for i in range(int(rng.integers(3, 6))):
            name = f"{rng.choice(['', 'trip/', 'a b/'])}{rng.choice(['img', 'Ä', 'x.y'])}_{i}"
            label = np.zeros(size, np.uint8)
            for c in range(1, classes):
                top, left = (int(rng.integers(0, s - s // 3)) for s in size)
                label[top : top + size[0] // 3, left : left + size[1] // 3] = c
            label[: size[0] // 4, : size[1] // 4] = 1 if i == 0 else label[0, 0]  # class 1 occurs, in a corner
            image = (np.array(COLORS)[label] + rng.normal(0, 8, (*size, 3))).clip(0, 255).astype(np.uint8)
            drawn.images[name], drawn.labels[name] = image, label
            drawn.files[f"images/{name}.png"], drawn.files[f"masks/{name}.png"] = png(image), png(label)
        return drawn

    def pick(self) -> str:
        return str(self.rng.choice([*self.images]))

    def write(self, root: Path) -> None:
        for name, data in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        for name, target in self.links.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(target, root / name)


# ------------------------------------------------------------------------------------------------ the defects

DEFECTS: list[Callable[[Drawn], None]] = []


def defect(function: Callable[[Drawn], None]) -> Callable[[Drawn], None]:
    DEFECTS.append(function)
    return function


def part(drawn: Drawn, folder: str, name: str) -> str:
    return f"{folder}/{name}.png"


@defect
def nothing(drawn):
    pass


@defect
def a_file_is_cut(drawn):
    path = str(drawn.rng.choice([*drawn.files]))
    data = drawn.files[path]
    drawn.files[path] = data[: int(drawn.rng.integers(0, len(data) - 1))]
    drawn.error = re.escape(Path(path).stem)


@defect
def a_file_has_a_wrong_bit(drawn):
    path = str(drawn.rng.choice([*drawn.files]))
    data = bytearray(drawn.files[path])
    data[int(drawn.rng.integers(8, len(data)))] ^= 1 << int(drawn.rng.integers(8))
    drawn.files[path] = bytes(data)
    drawn.error = re.escape(Path(path).stem)


@defect
def a_file_is_no_image(drawn):
    path = str(drawn.rng.choice([*drawn.files]))
    contents = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n": "git lfs pull",
        b"<!DOCTYPE html><html>404</html>": "web page",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "HEIC",
        b"\x93NUMPY\x01\0": "NumPy",
        b"hello": "no kind that PIL knows",
        b"": "0 bytes",
    }
    drawn.files[path] = content = list(contents)[int(drawn.rng.integers(len(contents)))]
    drawn.error = f"{re.escape(Path(path).stem)}.*{contents[content]}"


@defect
def a_mask_is_missing(drawn):
    name = drawn.pick()
    del drawn.files[part(drawn, "masks", name)]
    drawn.error = f"1 of {len(drawn.images)} images .* no mask.*{re.escape(name)}"


@defect
def a_mask_belongs_to_no_image(drawn):
    drawn.files["masks/alone.png"] = png(np.zeros((4, 4), np.uint8))
    drawn.said = "1 masks belong to no image: alone"


@defect
def a_mask_has_another_aspect(drawn):
    name = drawn.pick()
    drawn.files[part(drawn, "masks", name)] = png(drawn.labels[name][:, : -int(drawn.rng.integers(3, 9))])
    drawn.error = f"differ in size.*{re.escape(name)}.*Each pixel needs a label"


@defect
def masks_are_smaller_by_one_factor(drawn):
    factor = int(drawn.rng.integers(2, 4))
    for name, label in drawn.labels.items():
        height, width = (s // factor * factor for s in label.shape)
        small = label[:height:factor, :width:factor]
        drawn.labels[name] = small.repeat(factor, 0).repeat(factor, 1)
        drawn.images[name] = drawn.images[name][:height, :width]
        drawn.files[part(drawn, "masks", name)] = png(small)
        drawn.files[part(drawn, "images", name)] = png(drawn.images[name])
    drawn.error, drawn.then = rf"the label is {factor} times smaller.*`resize_masks=True`", {"resize_masks": True}
    drawn.said = "masks resized to their images"


@defect
def an_image_is_turned_by_its_exif_and_its_mask_is_drawn_upright(drawn):
    name, orientation = drawn.pick(), int(drawn.rng.integers(2, 9))
    stored = as_stored(drawn.images[name], orientation)
    place = {str(drawn.rng.choice(["before", "after"])): png_exif(orientation)}
    drawn.files[part(drawn, "images", name)] = png(stored, **place)
    drawn.said = "do not show whether" if orientation <= 4 else "rotated according to their EXIF"


@defect
def an_image_and_its_mask_lie_on_their_side(drawn):
    name, orientation = drawn.pick(), int(drawn.rng.integers(5, 9))
    drawn.files[part(drawn, "images", name)] = png(
        as_stored(drawn.images[name], orientation), before=png_exif(orientation)
    )
    drawn.files[part(drawn, "masks", name)] = png(as_stored(drawn.labels[name], orientation))
    drawn.said = "masks of their images' stored size, rotated with them"


@defect
def metadata_was_copied_to_the_mask(drawn):
    name, orientation = drawn.pick(), int(drawn.rng.integers(2, 9))
    for folder, arrays in (("images", drawn.images), ("masks", drawn.labels)):
        stored = as_stored(arrays[name], orientation)
        drawn.files[part(drawn, folder, name)] = png(stored, before=png_exif(orientation))
    drawn.said = "masks with their own EXIF orientation"


def deeper(drawn, factor, said):
    name = drawn.pick()
    kind = drawn.rng.integers(4)
    values = drawn.images[name].astype(np.uint16) * factor
    values = values if kind < 2 else values[..., 0]
    if kind >= 2:
        drawn.images[name] = drawn.images[name][..., :1].repeat(3, 2)
    drawn.files[part(drawn, "images", name)] = png(values, 16)
    if kind % 2:
        del drawn.files[part(drawn, "images", name)]
        drawn.files[f"images/{name}.tif"] = tiff(values, big_endian=bool(drawn.rng.integers(2)))
    drawn.said = said
    return name


@defect
def an_image_has_16_bits(drawn):
    deeper(drawn, 257, "images of more than 8 bits per channel, reduced to 8")


@defect
def an_image_holds_8_bits_in_16(drawn):
    deeper(drawn, 1, "images of more than 8 bits per channel")


@defect
def an_image_holds_12_bits_in_16(drawn):
    name = deeper(drawn, 16, "become nearly black")
    drawn.images[name] = drawn.images[name] >> 4


@defect
def an_image_has_alpha_or_a_further_band(drawn):
    name = drawn.pick()
    more = np.dstack([drawn.images[name], drawn.rng.integers(0, 256, drawn.labels[name].shape).astype(np.uint8)])
    if drawn.rng.random() < 0.5:
        drawn.files[part(drawn, "images", name)], drawn.said = png(more), "images with transparency"
    else:
        del drawn.files[part(drawn, "images", name)]
        drawn.files[f"images/{name}.tif"] = tiff(more, photometric=2, extra=(0,))
        drawn.said = "images with further bands"


@defect
def an_image_has_bands_that_are_no_colours(drawn):
    name, bands = drawn.pick(), int(drawn.rng.choice([2, 4, 5, 8]))
    del drawn.files[part(drawn, "images", name)]
    drawn.files[f"images/{name}.tif"] = tiff(np.dstack([drawn.labels[name]] * bands))
    drawn.error = f"{re.escape(name)}.* TIFF of {bands} bands of 8 bits"


@defect
def an_image_has_further_pages(drawn):
    name = drawn.pick()
    first, second = Image.fromarray(drawn.images[name]), Image.fromarray(255 - drawn.images[name])
    format, suffix = [("TIFF", "tif"), ("PNG", "png")][int(drawn.rng.integers(2))]
    del drawn.files[part(drawn, "images", name)]
    drawn.files[f"images/{name}.{suffix}"] = saved(first, format, save_all=True, append_images=[second])
    drawn.said = "images with further pages or frames"


@defect
def an_image_is_of_another_kind(drawn):
    name = drawn.pick()
    image = Image.fromarray(drawn.images[name])
    kinds = [("JPEG", "jfif"), ("JPEG", "JPG"), ("AVIF", "avif"), ("PPM", "ppm"), ("WEBP", "webp")]
    format, suffix = kinds[int(drawn.rng.integers(len(kinds)))]
    drawn.lossy = format != "PPM"
    del drawn.files[part(drawn, "images", name)]
    drawn.files[f"images/{name}.{suffix}"] = saved(image, format, **({"quality": 95} if drawn.lossy else {}))


@defect
def an_image_is_of_a_kind_that_is_not_read(drawn):
    name = drawn.pick()
    drawn.files[f"images/{name}_2.heic"] = b"\0\0\0\x18ftypheic"
    drawn.said = r"1 skipped, unsupported file types \(.heic: 1\)"


@defect
def systems_left_their_files(drawn):
    name = drawn.pick()
    data = drawn.files[part(drawn, "images", name)]
    junk = [
        ".ipynb_checkpoints/x-checkpoint.png",
        "@eaDir/x.png/THUMB.png",
        "__MACOSX/x.png",
        "._x.png",
        "#recycle/x.png",
    ]
    for folder in ("images", "masks"):
        drawn.files[f"{folder}/{drawn.rng.choice(junk)}"] = data
        drawn.files[f"{folder}/.DS_Store"] = drawn.files[f"{folder}/Thumbs.db"] = b"x"
    drawn.said = "3 skipped, hidden or system files"


@defect
def a_sub_folder_is_a_link(drawn):
    name = drawn.pick()
    for folder in ("images", "masks"):
        drawn.files[f"elsewhere/{folder}/far.png"] = drawn.files[part(drawn, folder, name)]
        drawn.links[f"{folder}/site"] = f"../elsewhere/{folder}"
        drawn.links[f"elsewhere/{folder}/circle"] = "."
    drawn.images["site/far"], drawn.labels["site/far"] = drawn.images[name], drawn.labels[name]
    drawn.said = "1 skipped, links to a parent folder: site/circle"


@defect
def a_link_leads_nowhere(drawn):
    drawn.links["images/gone.png"] = "/nowhere/at/all.png"
    drawn.said = "1 skipped, broken links: gone.png"


@defect
def two_images_have_one_name(drawn):
    name = drawn.pick()
    drawn.files[f"images/{name}.jpg"] = saved(Image.fromarray(drawn.images[name]), "JPEG")
    drawn.error = f"Two files have the same name: .*{re.escape(name)}"


@defect
def a_mask_has_few_bits(drawn):
    for name, label in drawn.labels.items():
        bits = int(drawn.rng.choice([1, 2, 4] if label.max() < 2 else [2, 4] if label.max() < 4 else [4]))
        path, as_tiff = part(drawn, "masks", name), drawn.rng.random() < 0.5
        if as_tiff:
            del drawn.files[path]
            drawn.files[f"masks/{name}.tif"] = tiff(label, bits)
        else:
            drawn.files[path] = png(label, bits)


def as_tiff(drawn, name, values, **options):
    del drawn.files[part(drawn, "masks", name)]
    drawn.files[f"masks/{name}.tiff"] = tiff(values, **options)


@defect
def a_mask_is_of_another_type(drawn):
    name = drawn.pick()
    kinds = [np.uint16, np.int16, np.int32, np.uint32, np.float32, np.int8]
    as_tiff(drawn, name, drawn.labels[name].astype(kinds[int(drawn.rng.integers(len(kinds)))]))


@defect
def a_mask_has_missing_data(drawn):
    name = drawn.pick()
    missing = drawn.labels[name] == 1
    kind = int(drawn.rng.integers(4))
    values = np.where(missing, -1, drawn.labels[name]).astype(np.int16)
    if kind == 0:
        as_tiff(drawn, name, values)
    elif kind == 1:
        as_tiff(drawn, name, np.where(missing, np.nan, values).astype(np.float32))
    elif kind == 2:
        as_tiff(drawn, name, np.where(missing, -9999, values).astype(np.int16), tags={42113: (2, b"-9999\0")})
    else:
        as_tiff(drawn, name, np.where(missing, -9999, values).astype(np.int16))
        if missing.any():
            drawn.error = rf"{re.escape(name)}.* contains -9999 .*`values={{-9999: 255, 0: 0"
            drawn.then = {"values": {-9999: 255, **{c: c for c in range(len(drawn.names))}}}
    drawn.labels[name] = np.where(missing, 255, drawn.labels[name]).astype(np.uint8)


@defect
def a_mask_holds_fractions(drawn):
    name = drawn.pick()
    as_tiff(drawn, name, drawn.labels[name].astype(np.float32) + 0.25)
    drawn.error = f"{re.escape(name)}.* contains fractions"


@defect
def a_mask_is_of_a_type_that_is_not_read(drawn):
    name = drawn.pick()
    as_tiff(drawn, name, drawn.labels[name].astype([np.float64, np.int64][int(drawn.rng.integers(2))]))
    drawn.error = f"{re.escape(name)}.* TIFF of 1 band of 64 bits"


@defect
def a_mask_stores_white_as_0(drawn):
    name = drawn.pick()
    as_tiff(drawn, name, drawn.labels[name], photometric=0)
    drawn.error = f"{re.escape(name)}.* stores white as 0"


@defect
def a_mask_holds_another_class(drawn):
    name, value = drawn.pick(), int(drawn.rng.integers(len(drawn.names), 255))
    mask = drawn.labels[name].copy()
    mask[-1, -1] = value
    drawn.files[part(drawn, "masks", name)] = png(mask)
    drawn.error = rf"{re.escape(name)}.* contains {value} \(1 pixels\)"


@defect
def masks_are_lossy(drawn):
    name = drawn.pick()
    format = str(drawn.rng.choice(["JPEG", "WEBP", "AVIF", "JPEG2000"]))
    data = saved(Image.fromarray(drawn.labels[name]), format)
    if drawn.rng.random() < 0.5:  # with the suffix of another file type
        drawn.files[part(drawn, "masks", name)] = data
        drawn.error = f"{re.escape(name)}.* changes values"
    else:  # in a list
        drawn.files[f"masks/{name}.dat"] = data
        lines = [{"file_name": f"images/{n}.png", "mask_file_name": f"masks/{n}.png"} for n in drawn.images]
        lines[[*drawn.images].index(name)]["mask_file_name"] = f"masks/{name}.dat"
        drawn.files["metadata.jsonl"] = "\n".join(map(json.dumps, lines)).encode()
        drawn.error = f"{re.escape(name)}.* changes values"


@defect
def masks_are_jpegs_beside_the_images(drawn):
    for name, label in drawn.labels.items():
        del drawn.files[part(drawn, "masks", name)]
        drawn.files[f"masks/{name}.jpg"] = saved(Image.fromarray(label), "JPEG")
    drawn.files["masks/other.png"] = png(np.zeros((4, 4), np.uint8))
    drawn.error = r"have no mask.* There are .*\.jpg.*: masks are read as \.png"


@defect
def a_mask_is_coloured(drawn):
    name = drawn.pick()
    colored = np.array(COLORS, np.uint8)[drawn.labels[name]]
    drawn.files[part(drawn, "masks", name)] = png(colored)
    drawn.error = f"{re.escape(name)}.*mode 'RGB'.*`colors="


@defect
def palettes_differ(drawn):
    count = len(drawn.names)
    for i, (name, label) in enumerate(drawn.labels.items()):
        table = np.roll(np.arange(count), 1 if i == 0 else 0)  # class -> index of the first file
        palette = [COLORS[int(np.flatnonzero(table == index)[0])] for index in range(count)]
        drawn.files[part(drawn, "masks", name)] = png(table[label], color=3, before=png_palette(palette))
    drawn.error = "palettes of the masks of .* differ"
    drawn.then = {"colors": {COLORS[c]: c for c in range(count)}}


@defect
def a_palette_is_another_one_of_the_same_order(drawn):
    shades = [tuple(255 - v for v in color) for color in COLORS]
    for i, (name, label) in enumerate(drawn.labels.items()):
        palette = (shades if i == 0 else COLORS)[: len(drawn.names)]
        drawn.files[part(drawn, "masks", name)] = png(label, color=3, before=png_palette(palette))
    drawn.error = "palettes of the masks of .* differ"
    drawn.then = {"values": {c: c for c in range(len(drawn.names))}}


@defect
def all_masks_are_ignored(drawn):
    for name, label in drawn.labels.items():
        drawn.files[part(drawn, "masks", name)] = png(label * 0 + 255)
    drawn.error = "No pixel of .* is labeled"


@defect
def one_mask_is_ignored(drawn):
    name = [*drawn.labels][-1]
    drawn.labels[name] = drawn.labels[name] * 0 + 255
    drawn.files[part(drawn, "masks", name)] = png(drawn.labels[name])
    drawn.said = "1 masks without a labeled pixel"


@defect
def two_classes_are_black_and_white(drawn):
    drawn.names = drawn.names[:2]
    for name, label in drawn.labels.items():
        drawn.labels[name] = np.minimum(label, 1)
        drawn.files[part(drawn, "masks", name)] = png(drawn.labels[name] * np.uint8(255))
    drawn.said = "contain only 0 and 255, so 255 is 'class 1'"


@defect
def one_mask_of_two_classes_is_black_and_white(drawn):
    drawn.names = drawn.names[:2]
    for i, (name, label) in enumerate(drawn.labels.items()):
        drawn.labels[name] = label = np.minimum(label, 1)
        label[-3:, -3:], label[0, :3] = 1, 0
        if i == 1:  # what its white means is unknown: it is ignored and reported
            drawn.labels[name] = np.where(label == 1, 255, 0).astype(np.uint8)
        drawn.files[part(drawn, "masks", name)] = png(drawn.labels[name])
    drawn.said = "1 masks that contain only 0 and 255, where others contain 1"


@defect
def a_class_never_occurs(drawn):
    drawn.names = [*drawn.names, "nowhere to be seen"]
    drawn.said = f"1 of {len(drawn.names)} classes never occurs in training"


@defect
def a_mask_was_resized_with_interpolation(drawn):
    name = drawn.pick()
    drawn.names = [f"class {c}" for c in range(9)]
    label = np.zeros(drawn.labels[name].shape, np.uint8)
    label[6:-6, 6:-6] = 8
    small = Image.fromarray(label[::3, ::3] * 30)
    smooth = np.asarray(small.resize(label.shape[::-1], Image.BILINEAR))
    drawn.labels[name] = np.rint(smooth / 30).astype(np.uint8)
    drawn.files[part(drawn, "masks", name)] = png(drawn.labels[name])
    drawn.said = "masks that seem to have been resized with interpolation"


@defect
def a_gif_numbers_its_colours_anew(drawn):
    name = [*drawn.labels][0]
    drawn.labels[name][0, 0], drawn.labels[name][-1, -1] = len(drawn.names) - 1, 1
    file = io.BytesIO()
    Image.fromarray(np.array(COLORS, np.uint8)[drawn.labels[name]]).save(file, "GIF")
    del drawn.files[part(drawn, "masks", name)]
    drawn.files[f"masks/{name}.gif"] = file.getvalue()
    drawn.error = f"{re.escape(name)}.* is a GIF with the colours"


@defect
def a_portable_graymap_says_its_largest_value(drawn):
    name = drawn.pick()
    label = drawn.labels[name]
    largest = int(drawn.rng.integers(len(drawn.names) - 1, 300))
    wide = label.astype(">u2") if largest > 255 else label
    del drawn.files[part(drawn, "masks", name)]
    head = f"P5 {label.shape[1]} {label.shape[0]} {largest}\n".encode()
    drawn.files[f"masks/{name}.pgm"] = head + wide.tobytes()


@defect
def the_list_is_of_other_files(drawn):
    name = drawn.pick()
    lines = [{"file_name": f"images/{n}.png", "mask_file_name": f"masks/{n}.png"} for n in drawn.images]
    lines[[*drawn.images].index(name)]["file_name"] = f"images/{name}_2.png"
    drawn.files["metadata.jsonl"] = "\n".join(map(json.dumps, lines)).encode()
    drawn.error = f"metadata.jsonl, line .*no file .*{re.escape(name)}_2.png"


# ------------------------------------------------------------------------------------------------ the oracle


def judged(root: Path, drawn: Drawn, options: dict, caplog) -> tuple[str | None, dict, str]:
    """(the error or None, what is read by id, all log and report texts), from loading, check and a run's survey."""
    caplog.clear()
    try:
        dataset = load_folder(root, class_names=drawn.names, **options)
    except ValueError as error:
        return str(error), {}, caplog.text
    report = check_dataset(dataset, progress=False)
    said = [f"{note['count']} {note['what']}" for note in report["notes"]]
    problems = " ".join(f"{problem['id']}: {problem['problem']}" for problem in report["problems"])
    args = CPSConfig(dataloader_num_workers=0, disable_tqdm=True)
    try:
        check_labels(args, dataset, None, drawn.names)
        looked = None
    except ValueError as error:
        looked = str(error)
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    found = {}
    for row in undecoded(dataset, with_label=True, what="d"):
        try:
            image, label = read_sample(row, encoding, with_label=True)
            found[row["id"]] = image.permute(1, 2, 0).numpy(), label.numpy()
        except ValueError as error:
            assert str(error) in problems, "check and the reader agree"
    if (
        looked is None and problems
    ):  # problems of labels must be found before training; problems of pixels may be found later
        assert all(problem["id"] in dataset["id"] for problem in report["problems"])
    assert looked is None or problems, f"a run rejects what check accepts: {looked}"
    return problems or None, found, "\n".join([*said, caplog.text])


def expect(drawn: Drawn, found: dict) -> None:
    assert set(found) == set(drawn.images)
    for name, (image, label) in found.items():
        assert np.array_equal(label, drawn.labels[name]), f"the label of {name}"
        assert image.shape == drawn.images[name].shape, f"the size of {name}"
        off = np.abs(image.astype(int) - drawn.images[name])
        assert off.mean() < 15 if drawn.lossy else off.max() == 0, f"the pixels of {name}"


def goes_as_the_oracle_says(root: Path, seed: int, caplog) -> str:
    damage = DEFECTS[seed % len(DEFECTS)]
    drawn = Drawn.healthy(np.random.default_rng([17, seed]))
    damage(drawn)
    drawn.write(root)
    caplog.set_level(logging.INFO, logger="cps_hf")
    error, found, said = judged(root, drawn, drawn.options, caplog)
    what = f"{damage.__name__} (folder {seed})"
    if drawn.error is None:
        assert error is None, f"{what} is rejected: {error}"
    else:
        assert error and re.search(drawn.error, error, re.DOTALL), f"{what}: {error} is not {drawn.error}"
        if drawn.then is None:
            return "rejected"
        error, found, said = judged(root, drawn, drawn.then, caplog)  # as the error suggests
        assert error is None, f"{what}, after its advice: {error}"
    expect(drawn, found)
    assert drawn.said is None or re.search(drawn.said, said), f"{what} is not reported"
    assert {*find_images([str(root / "images")])} == set(drawn.images), f"{what}: predicting uses other files"
    return "fixed" if drawn.error else "read"


@pytest.mark.parametrize("number", range(20))
def test_a_damaged_folder_is_read_correctly_or_rejected(tmp_path, number, caplog):
    goes_as_the_oracle_says(tmp_path, number * len(DEFECTS) // 20 + 3 * len(DEFECTS), caplog)


@pytest.mark.exhaustive
def test_500_damaged_folders_are_read_correctly_or_rejected(tmp_path, caplog):
    ends = [goes_as_the_oracle_says(tmp_path / str(seed), seed, caplog) for seed in range(500)]
    assert {*ends} == {"read", "rejected", "fixed"} and ends.count("read") > 150 < ends.count("rejected")
