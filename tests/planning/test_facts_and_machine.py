"""What a plan knows about the images and the machine."""

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from support.toy import NAMES, write_world

from cps_hf.planning import DataFacts, Machine, machine
from cps_hf.planning.facts import LOOKED_AT


def test_counts_sizes_and_class_shares(tmp_path):
    labeled = write_world(tmp_path / "a", [(40, 56), (40, 56), (80, 90)])
    unlabeled = write_world(tmp_path / "b", [(40, 56)] * (LOOKED_AT + 3), first=50, labels=False)
    facts = DataFacts.of(labeled, unlabeled, None, NAMES)
    assert (facts.num_labeled, facts.num_unlabeled, facts.num_evaluation) == (3, LOOKED_AT + 3, 0)
    assert (facts.height, facts.width, facts.largest) == (40, 56, (80, 90))
    counts = np.zeros(len(NAMES))
    for row in labeled:
        label = np.asarray(row["label"])
        counts += [(label == index).sum() for index in range(len(NAMES))]
    assert facts.class_shares == pytest.approx(dict(zip(NAMES, counts / counts.sum(), strict=True)))
    assert not facts.grey


def test_unreadable_training_samples_are_omitted_on_request(tmp_path):
    labeled = write_world(tmp_path / "a", [(40, 56), (48, 64), (48, 64)])
    evaluation = write_world(tmp_path / "b", [(40, 56)])
    for name in ("0.png", "1_label.png"):
        (tmp_path / "a" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="'a-0'"):
        DataFacts.of(labeled, None, evaluation, NAMES)
    facts = DataFacts.of(labeled, None, evaluation, NAMES, skip_bad_samples=True)
    assert facts.largest == (48, 64) and sum(facts.class_shares.values()) == pytest.approx(1)
    (tmp_path / "b" / "0.png").write_bytes(b"no picture")  # no score without it
    with pytest.raises(ValueError, match="'b-0'"):
        DataFacts.of(labeled, None, evaluation, NAMES, skip_bad_samples=True)
    with pytest.raises(ValueError, match="'a-0'"):
        DataFacts.of(labeled.select([0]), None, None, NAMES, skip_bad_samples=True)


def test_streams_have_no_count(tmp_path):
    labeled = write_world(tmp_path / "a", [(40, 56)] * 3).to_iterable_dataset()
    facts = DataFacts.of(labeled, labeled.remove_columns("label"), None, NAMES)
    assert (facts.num_labeled, facts.num_unlabeled, facts.num_evaluation) == (None, None, 0)
    assert (facts.height, facts.width) == (40, 56) and sum(facts.class_shares.values()) == pytest.approx(1)


def test_gray_images_are_detected(tmp_path):
    labeled = write_world(tmp_path / "a", [(40, 56)] * 2)
    for row in labeled.to_list():
        path = row["image"]["path"]
        Image.open(path).convert("L").save(path)
    assert DataFacts.of(labeled, None, None, NAMES).grey


def test_larger_gpus_get_larger_backbones():
    def first(memory):
        return machine.candidates(Machine(device="cuda", memory=memory))[0]

    assert "resnet101s" in first(80) and "resnet50s" in first(12) and "lite0" in first(4)
    assert "lite0" in machine.candidates(Machine())[0]


def test_the_first_available_backbone_is_used(monkeypatch):
    asked = []

    def fetch(name):
        asked.append(name)
        if name != "timm/there":
            raise OSError("no connection")

    monkeypatch.setattr(machine, "_fetch", fetch)
    monkeypatch.setattr(machine.offline_backbone, "is_installed", lambda: True)
    assert machine.first_available(["timm/there", "package:efficientnet-lite0"]) == "timm/there"
    assert machine.first_available(["timm/gone", "timm/there", "package:efficientnet-lite0"]) == (
        "package:efficientnet-lite0"
    )
    assert asked == ["timm/there", "timm/gone"]  # after one failed download, no other is tried
    monkeypatch.setattr(machine.offline_backbone, "is_installed", lambda: False)
    assert machine.first_available(["timm/gone", "package:efficientnet-lite0"]) is None


def test_offline_a_cached_backbone_is_used_after_one_request(monkeypatch):
    asked, cached = [], set()

    def download(name, file, *, local_files_only=False):
        asked.append((name, local_files_only))
        if name not in cached:
            raise LocalEntryNotFoundError("not in the cache")

    def no_answer(url, timeout):
        asked.append((url.split("/resolve")[0].split("/", 3)[3], "header"))
        raise ConnectionError("no connection")

    monkeypatch.setattr(machine, "hf_hub_download", download)
    monkeypatch.setattr(machine, "get_hf_file_metadata", no_answer)
    monkeypatch.setattr(machine.offline_backbone, "is_installed", lambda: False)
    assert machine.first_available(["timm/a", "timm/b"]) is None
    assert asked == [("timm/a", True), ("timm/a", "header")]  # no download is retried
    cached.add("timm/a")
    assert machine.first_available(["timm/a", "timm/b"]) == "timm/a"
