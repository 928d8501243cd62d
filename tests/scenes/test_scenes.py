"""The drawn data sets: their content, that the real loaders read them, and that they are complete or absent."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from torchvision.datasets import Cityscapes, VOCSegmentation

from cps_hf.data.cityscapes import LABELS, load_cityscapes
from cps_hf.data.voc import load_voc, voc_color
from cps_hf.scenes import write as scenes
from cps_hf.scenes.object_scenes import _borders
from cps_hf.scenes.write import draw_object_scene, draw_street_scene, write_object_scenes, write_street_scenes

FEW_STREETS = {"num_train": 9, "num_train_extra": 3, "num_val": 4, "size": (40, 72), "progress": False}
FEW_OBJECTS = {"num_train": 5, "num_val": 3, "progress": False}


@pytest.fixture(scope="module")
def street_root(tmp_path_factory):
    return write_street_scenes(tmp_path_factory.mktemp("streets") / "root", **FEW_STREETS)


@pytest.fixture(scope="module")
def object_root(tmp_path_factory):
    return write_object_scenes(tmp_path_factory.mktemp("objects") / "root", **FEW_OBJECTS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "cps_hf" / "scenes"


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("draw", [draw_street_scene, draw_object_scene])
def test_a_scene_depends_on_seed_and_index_alone(draw):
    image, labels = draw(3, seed=1)
    draw(8, seed=5)
    np.random.seed(0)
    again, labels_again = draw(3, seed=1)
    assert np.array_equal(image, again) and np.array_equal(labels, labels_again)
    assert image.dtype == labels.dtype == np.uint8 and image.shape == (*labels.shape, 3)
    for other in (draw(4, seed=1), draw(3, seed=2)):
        assert other[0].shape != image.shape or not np.array_equal(other[0], image)


def test_drawn_scenes_are_distinguished_from_other_files(street_root, object_root, tmp_path):
    drawn = next(street_root.rglob("*.png"))
    assert scenes.is_drawn(drawn) and scenes.is_drawn(next(object_root.rglob("*.jpg")))
    assert not scenes.is_drawn(shutil.copy(drawn, tmp_path))
    (tmp_path / "manifest.json").write_text('{"name": "of someone else"}')
    assert not scenes.is_drawn(tmp_path / drawn.name)


def test_a_street_has_the_given_size_even_if_odd():
    image, label_ids = draw_street_scene(0, size=(33, 71))
    assert image.shape == (33, 71, 3) and label_ids.shape == (33, 71)


def test_streets_contain_official_ids_all_classes_and_void():
    pixels = sum(np.bincount(draw_street_scene(i)[1].ravel(), minlength=256) for i in range(60))
    by_name = {label.name: pixels[label.id] for label in LABELS}
    assert pixels.sum() == 60 * 64 * 128 and pixels[34:].sum() == 0
    assert all(by_name[label.name] > 60 for label in LABELS if label.train_id != 255), by_name
    for name in ("ego vehicle", "out of roi", "static", "dynamic", "ground"):
        assert by_name[name] > 0, name


def test_objects_contain_every_class_separated_by_borders():
    drawn = [draw_object_scene(i)[1] for i in range(120)]
    assert set(np.unique(np.concatenate([labels.ravel() for labels in drawn]))) == {*range(21), 255}
    for labels in drawn:
        for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()  # classes never touch without a border
        assert 0 < (labels == 255).mean() < 0.35


def test_a_border_lies_on_both_sides_of_an_outline():
    instances = np.array([[0, 0, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 2, 2]], np.uint8)
    expected = [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert np.array_equal(_borders(instances), np.array(expected, bool))


def test_objects_come_in_many_sizes_and_every_orientation():
    sizes = {draw_object_scene(i)[1].shape for i in range(40)}
    assert len(sizes) > 20
    assert {int(np.sign(h - w)) for h, w in sizes} == {-1, 0, 1}
    assert any(h % 2 for h, _ in sizes) and any(w % 2 for _, w in sizes)


def test_torchvision_and_our_loader_read_the_streets(street_root):
    for split, count in (("train", 9), ("val", 4)):
        theirs = Cityscapes(street_root, split=split, mode="fine", target_type="semantic")
        assert len(theirs) == len(load_cityscapes(street_root, split)) == count
        image, labels = theirs[0]
        assert image.mode == "RGB" and labels.mode == "L" and image.size == labels.size == (72, 40)
    extra = load_cityscapes(street_root, "train_extra")
    assert len(extra) == 3 and "label" not in extra.column_names
    assert not (street_root / "gtFine" / "train_extra").exists()


def test_street_files_match_the_drawing_and_splits_are_disjoint(street_root):
    ids = sorted(path.name for path in street_root.glob("leftImg8bit/train/*/*.png"))
    first = next(street_root.glob("leftImg8bit/train/*/*_000000_*.png"))
    image, label_ids = draw_street_scene(0, size=(40, 72))
    assert np.array_equal(np.asarray(Image.open(first)), image)
    labels = str(first).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit.png", "_gtFine_labelIds.png")
    assert np.array_equal(np.asarray(Image.open(labels)), label_ids)
    assert len({name.split("_")[0] for name in ids}) > 3
    assert all(len(part) == 6 for name in ids for part in name.split("_")[1:3])
    images = [path.read_bytes() for path in street_root.glob("leftImg8bit/*/*/*.png")]
    assert len(set(images)) == len(images) == 16


def test_torchvision_and_our_loader_read_the_objects(object_root):
    for split, count in (("train", 5), ("val", 3), ("trainval", 8)):
        theirs = VOCSegmentation(object_root, year="2012", image_set=split, download=False)
        assert len(theirs) == len(load_voc(object_root, split)) == count
        image, labels = theirs[count - 1]
        assert image.mode == "RGB" and labels.mode == "P" and image.size == labels.size
        assert np.array(labels.getpalette()).reshape(-1, 3).tolist() == [list(voc_color(i)) for i in range(256)]
    labels = np.asarray(Image.open(object_root / "VOCdevkit/VOC2012/SegmentationClass/2007_000000.png"))
    assert np.array_equal(labels, draw_object_scene(0)[1]) and (labels == 255).any()


@pytest.mark.parametrize("write, few", [(write_street_scenes, FEW_STREETS), (write_object_scenes, FEW_OBJECTS)])
def test_a_second_call_finds_the_cache_and_draws_nothing(cache, monkeypatch, write, few):
    root = write(**few)
    assert root.parent == cache and root == write(**{**few, "num_train": few["num_train"]})
    other = write(**{**few, "seed": 1})
    assert other != root and contents(other) != contents(root)
    for name in ("draw_street_scene", "draw_object_scene"):
        monkeypatch.setattr(scenes, name, lambda *_, **__: pytest.fail("drew again"))
    assert write(**few) == root
    monkeypatch.setattr(scenes, "GENERATOR_VERSION", scenes.GENERATOR_VERSION + 1)
    with pytest.raises(pytest.fail.Exception, match="drew again"):
        write(**few)


def test_an_interrupted_drawing_leaves_nothing_behind(cache, monkeypatch):
    def breaks_down(index, **options):
        if index == 5:
            raise KeyboardInterrupt
        return draw_street_scene(index, **options)

    monkeypatch.setattr(scenes, "draw_street_scene", breaks_down)
    with pytest.raises(KeyboardInterrupt):
        write_street_scenes(**FEW_STREETS)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(scenes, "draw_street_scene", draw_street_scene)
    root = write_street_scenes(**FEW_STREETS)
    assert len(list(root.glob("leftImg8bit/*/*/*.png"))) == 16
    assert list(cache.iterdir()) == [root]


RACER = """
import json, sys
from cps_hf.scenes.write import write_street_scenes
print("ready", flush=True)
sys.stdin.readline()
print(write_street_scenes(sys.argv[1], **json.loads(sys.argv[2])))
"""


@pytest.mark.slow
def test_racing_processes_get_the_same_complete_folder(tmp_path, street_root):
    command = [sys.executable, "-c", RACER, str(tmp_path / "root"), json.dumps(FEW_STREETS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert {racer.communicate(timeout=240)[0] for racer in racers} == {f"{tmp_path / 'root'}\n"}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert contents(tmp_path / "root") == contents(street_root)
    assert os.listdir(tmp_path) == ["root"]


def test_the_slower_process_uses_the_folder_of_the_faster(tmp_path, monkeypatch, street_root):
    def overtaken(index, **options):
        if not (tmp_path / "root").exists():
            monkeypatch.setattr(scenes, "draw_street_scene", draw_street_scene)
            write_street_scenes(tmp_path / "root", **FEW_STREETS)
        return draw_street_scene(index, **options)

    monkeypatch.setattr(scenes, "draw_street_scene", overtaken)
    assert write_street_scenes(tmp_path / "root", **FEW_STREETS) == tmp_path / "root"
    assert contents(tmp_path / "root") == contents(street_root) and os.listdir(tmp_path) == ["root"]


def test_a_folder_with_other_content_is_never_changed(tmp_path, street_root):
    with pytest.raises(ValueError, match=r"num_val 4, requested 5.*Nothing was overwritten"):
        write_street_scenes(street_root, **{**FEW_STREETS, "num_val": 5})
    with pytest.raises(ValueError, match="kind street, requested object"):
        write_object_scenes(street_root, **FEW_OBJECTS)
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="other than a set of drawn scenes"):
        write_object_scenes(tmp_path, **FEW_OBJECTS)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_an_empty_folder_is_filled_and_has_a_manifest(tmp_path):
    assert write_object_scenes(str(tmp_path), **FEW_OBJECTS) == tmp_path
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {
        "generator_version": scenes.GENERATOR_VERSION, "kind": "object", "num_train": 5, "num_val": 3, "seed": 0
    }  # fmt: skip
    assert tmp_path.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_progress_shows_only_while_drawing_and_on_a_terminal(tmp_path, capfd, monkeypatch):
    write_object_scenes(tmp_path / "a_file", **{**FEW_OBJECTS, "progress": True})
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write_object_scenes(tmp_path / "root", **{**FEW_OBJECTS, "progress": True})
    assert "object scenes" in capfd.readouterr().err
    write_object_scenes(tmp_path / "root", **{**FEW_OBJECTS, "progress": True})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "write, wrong, message",
    [
        (write_street_scenes, {"num_train": 0}, "`num_train`.*from 1 to 999999, got 0"),
        (write_street_scenes, {"num_train_extra": -1}, "`num_train_extra`.*from 0"),
        (write_street_scenes, {"num_val": 2.0}, "`num_val`.*got 2.0"),
        (write_street_scenes, {"size": (31, 64)}, "`size`.*at least 32"),
        (write_street_scenes, {"size": (64,)}, "`size`"),
        (write_street_scenes, {"seed": -1}, "`seed`"),
        (write_object_scenes, {"num_train": True}, "`num_train`.*got True"),
        (write_object_scenes, {"seed": "a"}, "`seed`.*'a'"),
    ],
)
def test_invalid_numbers_fail_before_anything_is_created(tmp_path, write, wrong, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "root", **wrong)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("wrong", [{"index": -1}, {"index": 0, "seed": -1}, {"index": 1.5}])
def test_a_scene_needs_an_index_and_a_seed_of_0_or_more(wrong):
    for draw in (draw_street_scene, draw_object_scene):
        with pytest.raises(ValueError, match="integer of 0 or more"):
            draw(**wrong)
    with pytest.raises(ValueError, match="`size`"):
        draw_street_scene(0, size=(16, 64))


def test_the_drawings_match_the_frozen_version():
    """Counted coarsely, since rounding differs between versions of Pillow. If it fails, raise the version."""
    assert scenes.GENERATOR_VERSION == 1
    streets = [draw_street_scene(i) for i in range(3)]
    counts = [[int((ids == label).sum()) for label in (7, 11, 23)] for _, ids in streets]  # road, building, sky
    np.testing.assert_allclose(counts, [[1595, 492, 1535], [1072, 651, 802], [2266, 1422, 1142]], rtol=0.03)
    np.testing.assert_allclose([image.mean() for image, _ in streets], [118.4, 123.3, 108.2], atol=1)
    objects = [draw_object_scene(i) for i in range(3)]
    assert [labels.shape for _, labels in objects] == [(125, 167), (167, 111), (121, 121)]
    np.testing.assert_allclose([(labels == 0).sum() for _, labels in objects], [17178, 16698, 12739], rtol=0.03)
    np.testing.assert_allclose([image.mean() for image, _ in objects], [95.8, 106.2, 98.9], atol=1)
