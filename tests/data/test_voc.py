"""Small handmade VOC trees; train_aug from VOC and SBD's .mat files."""

import numpy as np
import pytest
from PIL import Image as PILImage
from support.toy import run_python

from cps_hf.data import voc
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import read_sample
from cps_hf.data.streams import undecoded
from cps_hf.data.voc import build_train_aug, load_voc

TRAIN, VAL, MORE = ["2007_000001", "2007_000002"], ["2007_000003"], ["2008_000004", "2008_000005"]


def palette_png(path, label):
    image = PILImage.fromarray(label).convert("P")
    image.putdata(label.flatten().tolist())
    image.putpalette([v for index in range(256) for v in voc.voc_color(index)])
    image.save(path)


def write_voc(root, below="VOCdevkit/VOC2012"):
    folder = root / below
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    label = np.arange(21, dtype=np.uint8).reshape(3, 7)
    label[0, 0] = 255
    for name in TRAIN + VAL + MORE:
        PILImage.fromarray(np.full((3, 7, 3), 90, np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
        if name not in MORE:
            palette_png(folder / "SegmentationClass" / f"{name}.png", label)
    for split, ids in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return folder


def write_sbd(root):
    import scipy.io

    (root / "cls").mkdir(parents=True)
    for i, name in enumerate(TRAIN[:1] + VAL + MORE):
        segmentation = np.full((3, 7), 5 + i, np.uint8)
        scipy.io.savemat(root / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": segmentation, "Boundaries": 0}})
    return root


def labels_of(dataset):
    encoding = LabelEncoding.from_feature(dataset.features["label"])
    rows = undecoded(dataset, with_label=True, what="d")
    return {row["id"]: read_sample(row, encoding, with_label=True)[1].numpy() for row in rows}


@pytest.mark.parametrize("below", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_palette_labels_keep_their_indices(tmp_path, below):
    write_voc(tmp_path, below)
    dataset = load_voc(tmp_path, "train")
    assert dataset["id"] == TRAIN and dataset.column_names == ["image", "label", "id"]
    expected = np.arange(21, dtype=np.uint8).reshape(3, 7)
    expected[0, 0] = 255
    for label in labels_of(dataset).values():
        assert np.array_equal(label, expected)  # luminance would turn 15 into 147


def test_the_color_map_is_vocs():
    assert [voc.voc_color(i) for i in (0, 1, 2, 15, 20)] == [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (192, 128, 128),
        (0, 64, 128),
    ]
    assert voc.voc_color(255) == (224, 224, 192)
    assert LabelEncoding.from_feature(voc.ENCODING.to_feature()) == voc.ENCODING


def test_train_aug_prefers_vocs_labels_and_excludes_val(tmp_path, caplog):
    folder, sbd = write_voc(tmp_path / "voc"), write_sbd(tmp_path / "sbd")
    assert build_train_aug(tmp_path / "voc", sbd, progress=False) == 4
    assert "train_aug has 4 images, the published one 10582" in caplog.text
    dataset = load_voc(tmp_path / "voc", "train_aug")
    labels = labels_of(dataset)
    assert dataset["id"] == sorted(TRAIN + MORE) and not set(VAL) & set(labels)
    own = labels_of(load_voc(tmp_path / "voc", "train"))
    assert all(np.array_equal(labels[name], own[name]) for name in TRAIN)
    assert (labels[MORE[0]] == 7).all() and (labels[MORE[1]] == 8).all()
    assert PILImage.open(folder / "SegmentationClassAug" / f"{TRAIN[0]}.png").mode == "L"
    again = labels_of(load_voc(tmp_path / "voc", "val", annotations="SegmentationClassAug"))
    assert np.array_equal(again[VAL[0]], own[TRAIN[0]])


def test_missing_inputs_of_train_aug_are_named(tmp_path):
    folder, sbd = write_voc(tmp_path / "voc"), write_sbd(tmp_path / "sbd")
    path = folder / "SegmentationClass" / f"{TRAIN[1]}.png"
    PILImage.new("RGB", (7, 3)).save(path)
    with pytest.raises(ValueError, match=rf"{TRAIN[1]}.png\) has mode 'RGB'"):
        build_train_aug(tmp_path / "voc", sbd, progress=False)
    path.unlink()
    with pytest.raises(ValueError, match=f"VOC's own labels are missing, 1 of 3: .*{TRAIN[1]}.png"):
        build_train_aug(tmp_path / "voc", sbd, progress=False)
    (folder / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(ValueError, match="VOC's own lists of images are missing, 1 of 2: .*val.txt"):
        build_train_aug(tmp_path / "voc", sbd, progress=False)


def test_an_interrupted_build_resumes(tmp_path):
    folder, sbd = write_voc(tmp_path / "voc"), write_sbd(tmp_path / "sbd")
    bad = sbd / "cls" / f"{MORE[1]}.mat"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    with pytest.raises(ValueError, match=f"{MORE[1]}.mat"):
        build_train_aug(tmp_path / "voc", sbd, progress=False)
    assert not (folder / "ImageSets" / "Segmentation" / "train_aug.txt").exists()
    with pytest.raises(ValueError, match="train_aug.*cps_hf.data.voc --help"):
        load_voc(tmp_path / "voc", "train_aug")
    kept = folder / "SegmentationClassAug" / f"{TRAIN[0]}.png"
    before = kept.stat().st_mtime_ns
    bad.write_bytes(whole)
    assert build_train_aug(tmp_path / "voc", sbd, progress=False) == 4 and kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_command_builds_and_prints_the_count(tmp_path, capsys):
    write_voc(tmp_path / "voc")
    write_sbd(tmp_path / "sbd")
    words = ["--voc_root", str(tmp_path / "voc"), "--sbd_root"]
    done = run_python("-m", "cps_hf.data.voc", *words, str(tmp_path / "sbd"))  # as from a shell
    assert done.returncode == 0 and "4 ids written" in done.stdout, done.stderr
    with pytest.raises(SystemExit, match="2"):
        voc.main([*words, str(tmp_path / "nowhere")])
    assert "contains cls/*.mat" in capsys.readouterr().err


def test_images_alone_never_open_a_label(tmp_path):
    folder = write_voc(tmp_path)
    for path in (folder / "SegmentationClass").iterdir():
        path.unlink()
    assert load_voc(tmp_path, "train", with_labels=False).column_names == ["image", "id"]
    assert [row["id"] for row in load_voc(tmp_path, "train", with_labels=False, streaming=True)] == TRAIN
    with pytest.raises(ValueError, match=r"labels of SegmentationClass are missing, 2 of 2: .*2007_000001.png"):
        load_voc(tmp_path, "train")


def test_skipped_images_need_no_label(tmp_path):
    folder = write_voc(tmp_path)
    (folder / "SegmentationClass" / f"{TRAIN[0]}.png").unlink()
    with pytest.raises(ValueError, match="labels of SegmentationClass are missing, 1 of 2"):
        load_voc(tmp_path, "train")
    assert load_voc(tmp_path, "train", only_ids={TRAIN[1], "elsewhere"})["id"] == [TRAIN[1]]


def test_what_is_missing_is_named(tmp_path):
    folder = write_voc(tmp_path)
    with pytest.raises(ValueError, match="'training' has no file .*there are: train, trainval, val"):
        load_voc(tmp_path, "training")
    with pytest.raises(ValueError, match="No VOC2012 at .*no such folder"):
        load_voc(tmp_path / "nowhere")
    (folder / "JPEGImages" / f"{TRAIN[1]}.jpg").unlink()
    with pytest.raises(ValueError, match="images that train.txt lists are missing, 1 of 2"):
        load_voc(tmp_path, "train")
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no images"):
        load_voc(tmp_path, "train")


def test_the_splits_are_the_lists_with_distinct_images(tmp_path):
    write_voc(tmp_path, ".")
    lists = tmp_path / "ImageSets" / "Segmentation"
    for name in ("train", "val", "trainval", "train_aug", "test"):
        (lists / f"{name}.txt").write_text("2007_000032\n")
    assert voc.splits_of(tmp_path) == ["train", "train_aug", "val"]
    (lists / "val.txt").unlink()
    assert voc.splits_of(tmp_path) == ["train", "train_aug", "trainval"]
