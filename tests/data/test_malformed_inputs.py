"""Hundreds of malformed files and rows, drawn by Hypothesis: each is read, or rejected with a ValueError naming it.

Nothing else may happen: no other exception, no hang, no file outside the output folder.
"""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from support.toy import NAMES, draw

from cps_hf.commands.parser import parse
from cps_hf.commands.settings import Settings
from cps_hf.config import AugmentationConfig, CPSConfig
from cps_hf.data.folder import load_folder
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.masks import output_path, write_mask
from cps_hf.data.order import Shard
from cps_hf.data.partitions import partition
from cps_hf.data.reading import read_image, read_label, read_sample
from cps_hf.data.streams import TrainStream
from cps_hf.data.voc import load_voc

pytestmark = [
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore:Truncated File Read"),
    pytest.mark.filterwarnings("ignore:.*EXIF.*"),
    pytest.mark.filterwarnings("ignore:Metadata Warning"),
    pytest.mark.timeout(120),
]


def examples(count):
    """The same examples each time: a failure here is a failure everywhere."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    """Reject headers that claim a gigapixel, as with PIL's own limit, without allocating a gigabyte."""
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1 << 16)


# ------------------------------------------------------------------------------------------------ images


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PIXELS, LABELS = draw(3, 12, 17)
RGB, MASK = PILImage.fromarray(PIXELS), PILImage.fromarray(LABELS)
WHOLE = [
    *(encoded(image, "PNG") for image in (RGB, MASK, RGB.convert("P"), RGB.convert("RGBA"), MASK.convert("1"))),
    *(encoded(RGB, format) for format in ("JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA")),
    *(encoded(RGB, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
    encoded(PILImage.fromarray(LABELS.astype(np.uint16) * 257), "PNG"),
    encoded(
        RGB, "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
]


@st.composite
def damaged(draw):
    """A complete file of some format after one to five random damages."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["flip", "cut", "drop", "repeat", "fill", "insert"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length]
            case "fill":
                data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"]))
            case "insert":
                data[at:at] = draw(st.binary(max_size=12))
    return bytes(data)


def with_checksums_mended(data: bytes) -> bytes:
    """A damaged PNG with recomputed checksums, so that the damage reaches the decoder."""
    parts, start = [data[:8]], 8
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        body = data[start + 4 : start + 8 + length]
        parts.append(struct.pack(">I", max(len(body) - 4, 0)) + body + struct.pack(">I", zlib.crc32(body)))
        start += 12 + length
    return b"".join(parts)


def read_or_rejected(read, *named):
    """The result of `read`; None if it is rejected with one of these words (by default the row's name)."""
    try:
        return read()
    except ValueError as error:
        assert any(word in str(error) for word in named or ("'the row'",)), error
        return None


@examples(120)
@given(data=st.one_of(damaged(), damaged().map(with_checksums_mended), st.binary(max_size=200)))
@example(b"")
def test_a_malformed_image_is_read_or_rejected_by_name(data):
    value = {"bytes": data, "path": None}
    image = read_or_rejected(lambda: read_image(value, name="'the row'"))
    if image is not None:
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and min(image.shape) > 0
    for encoding in (None, LabelEncoding(NAMES), LabelEncoding(NAMES, colors={(0, 0, 0): 1})):
        label = read_or_rejected(lambda encoding=encoding: read_label(value, encoding, name="'the row'"))
        if label is not None:
            assert label.dtype == torch.uint8 and label.dim() == 2
            assert encoding is None or ((label < 3) | (label == 255)).all()


SPECIAL = ["", ".", "/", "..", "/dev/zero", "/dev/null", "no/such/file.png", "a\0b.png", "x" * 5000, "~", "http:/x"]
FIELD = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "bytes": st.one_of(st.none(), damaged(), st.sampled_from(WHOLE)),
            "path": st.one_of(st.none(), st.sampled_from(SPECIAL)),
        },
    ),
)


@examples(80)
@given(image=FIELD, label=FIELD, with_label=st.booleans())
def test_any_row_is_read_or_rejected_by_name(image, label, with_label):
    row = {"id": "the row", "image": image, "label": label}
    sample = read_or_rejected(lambda: read_sample(row, LabelEncoding(NAMES), with_label=with_label))
    if sample is not None and with_label:
        assert sample[0].shape[-2:] == sample[1].shape


def test_a_path_to_a_pipe_or_device_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="'a'.*not a regular file"):
            read_image({"bytes": None, "path": str(path)}, name="'a'")


@examples(12)
@given(images=st.lists(st.one_of(damaged(), st.sampled_from(WHOLE[:3])), min_size=8, max_size=8))
def test_unreadable_samples_are_skipped_and_counted(images):
    images = [WHOLE[0], *images]  # at least one can replace the others
    good = [
        read_or_rejected(lambda d=data: read_image({"bytes": d, "path": None}, name="'the row'")) for data in images
    ]
    rows = {"image": [{"bytes": data, "path": None} for data in images], "id": [str(i) for i in range(len(images))]}
    dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "id": Value("string")}))
    stream = TrainStream(
        dataset,
        name="unlabeled_dataset",
        shard=Shard(batch_size=9),
        augmentation=AugmentationConfig(crop_size=[8, 8]),
        seed=0,
        views=("weak",),
        skip_bad_samples=True,
        max_bad_sample_share=1.0,
    )
    try:
        batch = next(iter(stream))
    except ValueError as error:
        assert "in a row could not be read" in str(error)
        return
    first_tries = {bad["id"] for bad in batch["bad_samples"] if bad["attempt"] == 0}
    assert first_tries == {str(i) for i, image in enumerate(good) if image is None}
    assert batch["weak"].shape == (9, 3, 8, 8) and not first_tries & set(batch["ids"])


# ------------------------------------------------------------------------------------------------ lists

IDS = ["img_001", "img_002", "city/img_003"]
LINE = st.one_of(
    st.sampled_from([*IDS, "img_001.png", "a/img_002.png b/img_002.png", "../img_001", "/etc/passwd", "..\\img_002"]),
    st.text(max_size=20),
)
LIST = st.one_of(st.binary(max_size=60), st.lists(LINE, max_size=6).map(lambda lines: "\n".join(lines).encode()))


@examples(120)
@given(content=LIST)
def test_a_malformed_partition_list_names_no_other_image(tmp_path, content):
    path = tmp_path / "labeled.txt"
    path.write_bytes(content)
    try:
        labeled, unlabeled = partition(str(path), IDS)
    except ValueError as error:
        assert "labeled.txt" in str(error)
    else:
        assert set(labeled) | set(unlabeled) == set(IDS) and labeled


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """An own folder and a VOC folder, and next to them files that belong to neither."""
    root = tmp_path_factory.mktemp("roots")
    for folder in ("own/images", "own/masks", "voc/JPEGImages", "voc/SegmentationClass", "voc/ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, folder, image in (("a.png", "own/images", RGB), ("a.png", "own/masks", MASK), ("a.png", ".", RGB)):
        image.save(root / folder / name)
    RGB.save(root / "voc/JPEGImages/a.jpg")
    RGB.save(root / "secret.jpg")
    MASK.save(root / "voc/SegmentationClass/a.png")
    MASK.save(root / "secret.png")
    return root


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
FILE_NAME = st.one_of(
    st.sampled_from(["images/a.png", "../a.png", "/etc/passwd", "", ".", "a\0", "masks/a.png"]), JSON
)
ROW = st.one_of(
    st.fixed_dictionaries({}, optional={"file_name": FILE_NAME, "mask_file_name": FILE_NAME}).map(json.dumps),
    JSON.map(json.dumps),
    st.text(max_size=20),
)


def loaded_with(file, content, load, *named):
    """`read_or_rejected` while this file exists."""
    file.write_bytes(content)
    try:
        return read_or_rejected(load, *named)
    finally:
        file.unlink()


@examples(120)
@given(
    content=st.one_of(
        st.lists(ROW, max_size=4).map(lambda rows: "\n".join(rows).encode("utf-8", "replace")), st.binary(max_size=40)
    )
)
@example(b"[" * 100_000)
@example(b'{"file_name": "../a.png", "mask_file_name": "masks/a.png"}')
def test_malformed_metadata_stays_inside_the_folder(roots, content):
    own = roots / "own"
    dataset = loaded_with(own / "metadata.jsonl", content, lambda: load_folder(own), "metadata.jsonl")
    for path in (row[column]["path"] for row in rows_of(dataset) for column in ("image", "label")):
        assert Path(path).resolve().is_relative_to(own)


def rows_of(dataset):
    if dataset is None:
        return ()
    return dataset.cast_column("image", Image(decode=False)).cast_column("label", Image(decode=False))


@examples(80)
@given(
    content=st.one_of(
        st.lists(st.one_of(st.sampled_from(["a", "../../secret", "b"]), st.text(max_size=10)), max_size=4).map(
            lambda names: "\n".join(names).encode("utf-8", "replace")
        ),
        st.binary(max_size=40),
    )
)
@example(b"a\n../../secret\n")
def test_a_malformed_voc_list_stays_inside_the_folder(roots, content):
    listing = roots / "voc/ImageSets/Segmentation/train.txt"
    dataset = loaded_with(listing, content, lambda: load_voc(roots / "voc"), "train")
    assert dataset is None or set(dataset["id"]) == {"a"}


@examples(80)
@given(content=st.one_of(JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40)))
@example(b"[" * 100_000)
@example(b'{"0": "a", "0.5": "b"}')
def test_malformed_class_names_are_read_or_rejected_by_name(roots, content):
    own, named = roots / "own", ("classes.json", "class names", "Class names")
    dataset = loaded_with(own / "classes.json", content, lambda: load_folder(own), *named)
    assert dataset is None or LabelEncoding.from_feature(dataset.features["label"]).names


# ------------------------------------------------------------------------------------------------ configurations

FIELDS = [*CPSConfig.__dataclass_fields__, "weight", "cutmix", "objective", "no_field"]
YAML_VALUE = st.one_of(JSON, st.sampled_from(["1e-3", "true", ".nan", "9" * 400, "-1", "1.5", "[", "!!int x", "none"]))
CONFIG = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), YAML_VALUE, max_size=4).map(lambda d: yaml.safe_dump(d).encode()),
    st.dictionaries(st.sampled_from(FIELDS), st.text(max_size=12), max_size=3).map(
        lambda d: "\n".join(f"{key}: {value}" for key, value in d.items()).encode("utf-8", "replace")
    ),
    st.binary(max_size=60),
)
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@examples(80)
@given(content=CONFIG)
@example(b"output_dir: !!python/object/apply:os.system [touch pwned]")
@example(b"a: !!python/name:os.system")
@example(b"[" * 20_000)
@example(BOMB.encode())
@example(("max_steps: *a9\n" + BOMB).encode())
@example((BOMB + "max_steps: *a29\n").encode())
@example((BOMB + "lr_scheduler_kwargs: {x: *a29}\n").encode())
@example((BOMB + "report_to: *a29\n").encode())
def test_a_malformed_configuration_is_read_or_a_one_line_error(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_bytes(content)
    try:
        settings = parse(Settings, ["--config", "c.yaml"])
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and "error: " in said and "Traceback" not in said and len(said) < 3000
    else:
        assert isinstance(settings.args, CPSConfig)
        assert all(value == value for value in settings.flat().values()), "a NaN is no setting"
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


# ------------------------------------------------------------------------------------------------ what is written


@examples(120)
@given(
    name=st.one_of(
        st.text(max_size=12), st.lists(st.sampled_from(["..", ".", "a", "", "/", "~", "\0"]), max_size=5).map("/".join)
    )
)
def test_a_mask_with_a_hostile_id_is_written_inside_or_rejected(tmp_path, name):
    folder = tmp_path / "out"
    outside = tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    try:
        write_mask(output_path(folder, name, ".png"), LABELS, [(0, 0, 0)])
    except ValueError as error:
        assert repr(name) in str(error) or "null" in str(error)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "outside"} and not any(outside.iterdir())
