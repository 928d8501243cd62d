"""Shards contain the files' bytes, are read back with class names, and an interrupted call resumes."""

from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import RepositoryNotFoundError
from support.toy import NAMES, write_world

from cps_hf.data.hub_dataset import load_hub
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.reading import read_sample
from cps_hf.data.shards import push_shards, write_shards
from cps_hf.data.streams import undecoded

SIZES = [(20, 31), (33, 18), (25, 25), (12, 40), (31, 20)]


def test_shards_contain_the_exact_bytes_of_the_files(tmp_path):
    dataset = write_world(tmp_path / "w", SIZES)
    shards, written = write_shards(dataset, tmp_path / "shards", rows_per_shard=2, progress=False)
    assert [s.name for s in shards] == [f"train-0000{i}-of-00003.parquet" for i in range(3)] and written == 3
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert [row["id"] for row in rows] == [f"w-{i}" for i in range(5)]
    for i, row in enumerate(rows):
        assert row["image"]["bytes"] == (tmp_path / "w" / f"{i}.png").read_bytes()
        assert row["label"]["bytes"] == (tmp_path / "w" / f"{i}_label.png").read_bytes()
        assert str(tmp_path) not in str(row["image"]["path"])


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_read_back_to_the_same_pixels_and_names(tmp_path, streaming):
    dataset = write_world(tmp_path / "w", SIZES)
    write_shards(dataset, tmp_path / "shards", rows_per_shard=2, progress=False)
    for path in (tmp_path / "w").iterdir():
        path.unlink(missing_ok=True) if not path.name.startswith("0") else None
    again = load_hub(tmp_path / "shards", streaming=streaming)
    encoding = LabelEncoding.from_feature(again.features["label"])
    assert encoding.names == NAMES
    fresh = undecoded(write_world(tmp_path / "v", SIZES), with_label=True, what="d")
    for row, expected in zip(undecoded(again, with_label=True, what="d"), fresh, strict=True):
        for a, b in zip(*(read_sample(r, encoding, with_label=True) for r in (row, expected)), strict=True):
            assert torch.equal(a, b)


def test_splits_in_one_folder_stay_separate(tmp_path):
    """`load_dataset` alone would treat all but "val" as parts of "train"."""
    counts = {"train": 3, "train_extra": 4, "train_aug": 2, "trainval": 1, "val": 2}
    for split, count in counts.items():
        dataset = write_world(tmp_path / split, SIZES[:count])
        write_shards(dataset, tmp_path / "s", split=split, rows_per_shard=2, progress=False)
    for split, count in counts.items():
        for streaming in (False, True):
            rows = load_hub(tmp_path / "s", split, streaming=streaming)
            assert [row["id"] for row in rows] == [f"{split}-{i}" for i in range(count)]
    assert load_hub(tmp_path / "s", "train[1:]+val[:1]")["id"][:] == ["train-1", "train-2", "val-0"]
    with pytest.raises(ValueError, match="No split 'test' in .*; there are: train, train_aug, train_extra, trainval"):
        load_hub(tmp_path / "s", "test")


def test_incomplete_shards_are_an_error(tmp_path):
    dataset = write_world(tmp_path / "w", SIZES)
    shards, _ = write_shards(dataset, tmp_path / "s", rows_per_shard=2, progress=False)
    shards[1].rename(tmp_path / "aside.parquet")
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards of 'train': 1\."):
        load_hub(tmp_path / "s")
    (tmp_path / "aside.parquet").rename(shards[1].with_name("train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="'train' both in 1 and in 3 shards"):
        load_hub(tmp_path / "s")


def test_a_fixed_file_is_written_with_its_new_content(tmp_path):
    """Even with a data set from the cache of `datasets`, which must not return the old bytes."""
    folder = tmp_path / "set" / "train"
    write_world(folder, SIZES[:2])
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "label_file_name": "0_label.png"}\n')
    dataset = load_hub(tmp_path / "set")
    (shard,), _ = write_shards(dataset, tmp_path / "s", progress=False)
    shard.unlink()
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    write_shards(dataset, tmp_path / "s", progress=False)
    assert pq.read_table(shard).to_pylist()[0]["image"]["bytes"] == (folder / "1.png").read_bytes()


def test_an_interrupted_call_resumes_and_writes_nothing_twice(tmp_path):
    dataset = write_world(tmp_path / "w", SIZES)

    def stop(path, rows):
        if "00001" in path.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(dataset, tmp_path / "s", rows_per_shard=2, progress=False, on_shard=stop)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*.parquet")}
    assert len(before) == 2
    shards, written = write_shards(dataset, tmp_path / "s", rows_per_shard=2, progress=False)
    assert written == 1 and len(shards) == 3 and all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert len(load_hub(tmp_path / "s")) == 5


def test_a_truncated_shard_does_not_count(tmp_path, monkeypatch):
    dataset = write_world(tmp_path / "w", SIZES)
    (tmp_path / "w" / "3.png").unlink()
    with pytest.raises((FileNotFoundError, OSError)):
        write_shards(dataset, tmp_path / "s", rows_per_shard=2, progress=False)
    assert [p.name for p in (tmp_path / "s").iterdir() if p.suffix == ".parquet"] == ["train-00000-of-00003.parquet"]


@pytest.mark.parametrize("damage", ["cut", "rows"])
def test_a_damaged_shard_is_rewritten_with_a_warning(tmp_path, caplog, damage):
    dataset = write_world(tmp_path / "w", SIZES)
    shards, _ = write_shards(dataset, tmp_path / "s", rows_per_shard=2, progress=False)
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:100] if damage == "cut" else shards[2].read_bytes())
    _, written = write_shards(dataset, tmp_path / "s", rows_per_shard=2, progress=False)
    assert written == 1 and shards[0].read_bytes() == whole
    assert "train-00000-of-00003.parquet is damaged" in caplog.text and "writing it again" in caplog.text


def test_shards_of_other_data_are_never_mixed(tmp_path):
    write_shards(write_world(tmp_path / "w", SIZES), tmp_path / "s", rows_per_shard=2, progress=False)
    with pytest.raises(ValueError, match="shards of another 'train': rows is 5 there and 4 here"):
        write_shards(write_world(tmp_path / "v", SIZES[:4]), tmp_path / "s", rows_per_shard=2, progress=False)
    write_shards(write_world(tmp_path / "v", SIZES[:4]), tmp_path / "s", split="val", progress=False)
    (tmp_path / "s" / "manifest-train.json").unlink()
    with pytest.raises(ValueError, match="files of another program"):
        write_shards(write_world(tmp_path / "w", SIZES), tmp_path / "s", rows_per_shard=2, progress=False)
    with pytest.raises(ValueError, match=r"letters, digits and underscores, got 'train\[:2\]'"):
        write_shards(write_world(tmp_path / "w", SIZES), tmp_path / "t", split="train[:2]")
    with pytest.raises(ValueError, match="is empty"):
        write_shards(write_world(tmp_path / "w", SIZES).select([]), tmp_path / "t")


class FakeHub:
    """Has one public and one private repository; records the arguments of `push_to_hub`."""

    def __init__(self, monkeypatch):
        self.pushed = []
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: self)
        monkeypatch.setattr(Dataset, "push_to_hub", lambda dataset, repo_id, **o: self.pushed.append((repo_id, o)))

    def repo_info(self, repo_id, repo_type):
        assert repo_type == "dataset"
        if repo_id == "me/new":
            answer = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404", response=answer)
        return SimpleNamespace(private=repo_id == "me/private")


def test_private_data_never_goes_into_a_public_repository(tmp_path, monkeypatch):
    """`push_to_hub(private=True)` alone writes to an existing public repository."""
    hub, dataset = FakeHub(monkeypatch), write_world(tmp_path / "w", SIZES[:1])
    with pytest.raises(ValueError, match="me/public exists and is public"):
        push_shards(dataset, "me/public", split="train")
    assert hub.pushed == []
    for name, private in (("me/new", True), ("me/private", True), ("me/public", False)):
        assert push_shards(dataset.select([0] * 5), name, split="train", rows_per_shard=2, private=private) == 3
        repo_id, options = hub.pushed.pop()
        assert options["split"] == "train" and options["num_shards"] == 3
        assert repo_id == name and options["private"] is private and options["embed_external_files"]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a token"):
        push_shards(dataset, "me/new", split="train")
