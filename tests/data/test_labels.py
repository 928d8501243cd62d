"""How stored label maps become class ids, and that the coding travels with the column."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features, Image, load_dataset
from PIL import Image as PILImage

from cps_hf.data.labels import LabelEncoding, LabelError, LabelSizeError, reduced_values

NAMES = ("sky", "road", "car")
LABEL = np.array([[0, 1, 2, 255], [2, 2, 0, 1]], np.uint8)


def decode(encoding, image):
    return encoding.decode(image, name="'x' (x.png)")


def palette_image(indices):
    image = PILImage.new("P", indices.shape[::-1])
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    image.putdata(indices.flatten().tolist())
    return image


@pytest.mark.parametrize(
    "image",
    [
        PILImage.fromarray(LABEL),
        palette_image(LABEL),
        PILImage.fromarray(LABEL.astype(np.int32)),
        PILImage.fromarray(LABEL.astype(np.uint16)),
    ],
    ids=["grey", "palette", "32 bits", "16 bits"],
)
def test_masks_of_every_kind_keep_their_values(image):
    decoded = decode(LabelEncoding(NAMES), image)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, LABEL)


def test_a_bitmap_is_0_and_1():
    image = PILImage.fromarray(LABEL == 1)
    assert image.mode == "1"
    assert np.array_equal(decode(LabelEncoding(NAMES[:2]), image), (LABEL == 1).astype(np.uint8))


def test_values_beyond_8_bits_are_looked_up():
    stored = np.array([[0, 1000, 40000], [7, 7, 1000]], np.uint16)
    encoding = LabelEncoding(NAMES, values={0: 255, 7: 0, 1000: 1, 40000: 2})
    assert decode(encoding, PILImage.fromarray(stored)).tolist() == [[255, 1, 2], [0, 0, 1]]


def test_colors_are_looked_up():
    colors = {(0, 0, 0): 255, (70, 70, 70): 0, (70, 70, 71): 1, (255, 0, 1): 2}
    rgb = np.array([[(70, 70, 70), (70, 70, 71)], [(255, 0, 1), (0, 0, 0)]], np.uint8)
    encoding = LabelEncoding(NAMES, colors=colors)
    assert decode(encoding, PILImage.fromarray(rgb)).tolist() == [[0, 1], [2, 255]]
    rgba = np.concatenate([rgb, np.full((2, 2, 1), 255, np.uint8)], 2)
    assert decode(encoding, PILImage.fromarray(rgba)).tolist() == [[0, 1], [2, 255]]
    rgb[0, 0] = (1, 2, 3)
    with pytest.raises(ValueError, match=r"'x' \(x.png\) contains \(1, 2, 3\) \(1 pixels\).*4 colours of `colors`"):
        decode(encoding, PILImage.fromarray(rgb))


def test_unknown_values_are_named_with_their_counts():
    bad = LABEL.copy()
    bad[0, :2] = 33
    said = (
        r"'x' \(x.png\) contains 33 \(2 pixels\); expected class ids 0 to 2, or 255.*`--load_options '{\"reduce_labels"
    )
    with pytest.raises(ValueError, match=said):
        decode(LabelEncoding(NAMES), PILImage.fromarray(bad))
    with pytest.raises(ValueError, match=r"expected the stored values 0-2, 9"):
        decode(LabelEncoding(NAMES, values={0: 0, 1: 1, 2: 2, 9: 255}), PILImage.fromarray(bad))


def test_a_mask_of_three_channels_needs_a_color_table():
    with pytest.raises(ValueError, match=r"mode 'RGB' \(3 channels\).*`colors="):
        decode(LabelEncoding(NAMES), PILImage.new("RGB", (4, 2)))


def as_gif(image):
    file = io.BytesIO()
    image.save(file, "GIF")
    return PILImage.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("values", [[0, 2], [0, 255], [2, 2], [1, 2]])
@pytest.mark.parametrize("kind", ["grey", "palette"])
def test_a_gif_with_renumbered_indices_needs_colors(values, kind):
    stored = np.array([values, values], np.uint8)
    gif = as_gif(PILImage.fromarray(stored) if kind == "grey" else palette_image(stored))
    assert gif.mode == "P" and np.array(gif).max() < max(values)  # PIL has renumbered them
    with pytest.raises(ValueError, match=r"'x' \(x.png\) is a GIF with the colours .*`colors={\(.*convert the masks"):
        decode(LabelEncoding(NAMES), gif)
    color = (lambda v: (v, v, v)) if kind == "grey" else lambda v: (v, 255 - v, 7)
    encoding = LabelEncoding(NAMES, colors={color(v): v for v in (0, 1, 2, 255)})
    assert np.array_equal(decode(encoding, gif), stored)


@pytest.mark.parametrize("values", [[0, 1], [0, 1, 2], [2, 255, *range(255)]])
def test_a_gif_with_a_plain_gray_palette_is_read(values):
    stored = np.array([values], np.uint8)
    assert np.array_equal(decode(LabelEncoding([*map(str, range(255))]), as_gif(PILImage.fromarray(stored))), stored)


def test_integer_floats_are_read_and_nan_is_ignored():
    stored = np.array([[0, 1, 2, -1], [255, 2, 0, np.nan]], np.float32)
    assert decode(LabelEncoding(NAMES), PILImage.fromarray(stored)).tolist() == [[0, 1, 2, 255], [255, 2, 0, 255]]
    assert decode(LabelEncoding(NAMES), PILImage.fromarray(np.array([[-1, 2]], np.int32))).tolist() == [[255, 2]]
    with pytest.raises(ValueError, match=r"fractions in 50.0 % of its pixels, from 0 to 0.5; expected class ids"):
        decode(LabelEncoding(NAMES), PILImage.fromarray(np.array([[0, 0.5]], np.float32)))
    with pytest.raises(ValueError, match="values from 0 to inf; expected integers from -32768 to 65535"):
        decode(LabelEncoding(NAMES), PILImage.fromarray(np.array([[0, np.inf]], np.float32)))


def test_negative_values_may_be_mapped():
    mask = PILImage.fromarray(np.array([[-9999, 1], [-1, 0]], np.int32))
    with pytest.raises(ValueError, match=r"contains -9999 \(1 pixels\).*`values={-9999: 255, 0: 0, 1: 1, 2: 2}`"):
        decode(LabelEncoding(NAMES), mask)
    told = LabelEncoding(NAMES, values={-9999: 255, 0: 0, 1: 1, 2: 2})
    assert decode(told, mask).tolist() == [[255, 1], [255, 0]]
    as_class = LabelEncoding(NAMES, values={-1: 2, 0: 0, 1: 1, 7: 2})
    assert decode(as_class, PILImage.fromarray(np.array([[-1, 7, 0]], np.int32))).tolist() == [[2, 2, 0]]
    for encoding in (told, as_class):  # a PNG cannot store negative values
        again = encoding.encode(np.array([[0, 2, 255]], np.uint8))
        assert np.asarray(again).min() >= 0 and decode(encoding, again).tolist() == [[0, 2, 255]]


def test_reduced_labels_work_as_in_ade20k():
    encoding = LabelEncoding(NAMES, values=reduced_values(3))
    stored = np.array([[0, 1, 2, 3, 255]], np.uint8)
    assert decode(encoding, PILImage.fromarray(stored)).tolist() == [[255, 0, 1, 2, 255]]


def test_reduced_labels_keep_255_for_ignored_pixels():
    assert reduced_values(254)[254] == 253 and len(set(reduced_values(254).values())) == 255
    with pytest.raises(ValueError, match="`reduce_labels` supports up to 254 classes, got 255"):
        reduced_values(255)


ENCODINGS = [
    LabelEncoding(NAMES),
    LabelEncoding(("a|b", "{{ x }}", "ü"), values={7: 0, 300: 255}, palette=((1, 2, 3), (4, 5, 6), (7, 8, 9))),
    LabelEncoding(NAMES, colors={(0, 0, 0): 255, (1, 2, 3): 2}),
    LabelEncoding(NAMES, values={-9999: 255, 0: 0}, resize_masks=True),
]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_encoding_survives_data_set_operations(tmp_path, encoding):
    features = Features({"label": encoding.to_feature()})
    dataset = Dataset.from_dict({"label": [PILImage.fromarray(LABEL)] * 4}, features=features)
    dataset.select([0, 2]).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    for again in (
        dataset.select([1]),
        dataset.shard(2, 0),
        dataset.to_iterable_dataset().shuffle(seed=1),
        dataset.cast_column("label", Image(decode=False, id=dataset.features["label"].id)),
        load_dataset(str(tmp_path), split="train"),
        load_dataset(str(tmp_path), split="train", streaming=True),
    ):
        assert LabelEncoding.from_feature(again.features["label"]) == encoding


@pytest.mark.parametrize("text", [None, "", "my own", '{"a": 1}', "[1, 2]", "7"])
def test_a_foreign_id_is_not_an_encoding(text):
    assert LabelEncoding.from_feature(Image(id=text)) is None
    assert LabelEncoding.from_feature(None) is None


@pytest.mark.parametrize("text", ['{"cps_hf.label_encoding":2,"names":["a"]}', '{"cps_hf.label_encoding":1}'])
def test_an_unreadable_encoding_is_an_error(text):
    with pytest.raises(ValueError, match="this version of cps_hf cannot read"):
        LabelEncoding.from_feature(Image(id=text))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": ()}, "1 to 255 class names, got 0"),
        ({"names": tuple(map(str, range(256)))}, "got 256"),
        ({"names": ("a", "b", "a")}, "more than once: a"),
        ({"names": NAMES, "values": {0: 3}}, r"`values` must map to class ids 0 to 2.*\{0: 3\}"),
        ({"names": NAMES, "colors": {(0, 0, 0): -1}}, "`colors` must map to"),
        ({"names": "sky"}, "must be a sequence of class names"),
        ({"names": NAMES, "values": {-40000: 255}}, "stored values are -32768 to 65535, got -40000"),
        ({"names": NAMES, "colors": {(0, 0, 256): 0}}, r"each 0 to 255, got \(0, 0, 256\)"),
        ({"names": NAMES, "values": {0: 0}, "colors": {(0, 0, 0): 0}}, "not both"),
        ({"names": NAMES, "palette": ((0, 0, 0),)}, "1 colours for 3 classes"),
    ],
)
def test_an_invalid_encoding_is_an_error(options, said):
    with pytest.raises(ValueError, match=said):
        LabelEncoding(**options)


@pytest.mark.parametrize(
    "encoding",
    [
        LabelEncoding(names=("a", "b", "c")),
        LabelEncoding(names=("a", "b", "c"), values={7: 0, 3: 1, 4: 1, 1000: 2, 0: 255}),
        LabelEncoding(names=("a", "b", "c"), colors={(1, 2, 3): 0, (9, 9, 9): 1, (0, 0, 250): 2, (0, 0, 0): 255}),
    ],
    ids=["class ids", "values", "colours"],
)
def test_encoded_labels_decode_to_the_same_ids(encoding):
    ids = np.array([[0, 1, 2], [255, 1, 0]], np.uint8)
    np.testing.assert_array_equal(encoding.decode(encoding.encode(ids), name="x"), ids)


@pytest.mark.parametrize(
    ("table", "stored"),
    [
        ({"values": {0: 0, 255: 1}}, 65535),
        ({"values": {65535: 0, 65534: 1}}, 65533),
        ({"colors": {(0, 0, 0): 0, (255, 255, 255): 1}}, (0, 0, 1, 0)),
    ],
    ids=["values", "values that use the highest", "colours"],
)
def test_ignored_pixels_always_have_a_code(table, stored):
    encoding = LabelEncoding(("a", "b"), **table)
    file = io.BytesIO()
    encoding.encode(np.array([[0, 255, 1]], np.uint8)).save(file, "PNG")
    again = PILImage.open(file)
    assert np.asarray(again)[0, 1].tolist() == (list(stored) if isinstance(stored, tuple) else stored)
    assert decode(encoding, again).tolist() == [[0, 255, 1]]
    # Labels without ignored pixels are coded as before, and unknown values are still an error.
    plain = np.asarray(encoding.encode(np.array([[0, 1]], np.uint8)))
    assert plain[0].tolist() == [list(k) if isinstance(k, tuple) else k for k in next(iter(table.values()))]
    unknown = np.full((1, 1, 3), 254, np.uint8) if "colors" in table else np.array([[254]], np.uint8)
    with pytest.raises(ValueError, match="'x' .x.png. contains"):
        decode(encoding, PILImage.fromarray(unknown))


def test_transparent_pixels_of_known_colors_keep_their_class():
    rgba = np.array([[(1, 1, 1, 0), (9, 9, 9, 0)]], np.uint8)
    assert decode(LabelEncoding(("a",), colors={(1, 1, 1): 0}), PILImage.fromarray(rgba)).tolist() == [[0, 255]]
    with pytest.raises(ValueError, match=r"contains \(9, 9, 9\)"):
        decode(LabelEncoding(("a",), colors={(1, 1, 1): 0, (0, 0, 0): 255}), PILImage.fromarray(rgba))


def test_a_class_without_a_stored_value_cannot_be_encoded():
    with pytest.raises(ValueError, match=r"No stored value stands for \[1\]"):
        LabelEncoding(names=("a", "b"), values={0: 0}).encode(np.array([[0, 1]], np.uint8))


def test_a_data_worker_can_raise_label_errors_again_from_their_text():
    for kind in (LabelError, LabelSizeError):
        again = kind(str(kind("contains 7; set `values`.", "contains 7.")))
        assert str(again) == again.problem == "contains 7; set `values`."
