"""The streams: the same samples for any number of workers and processes, exact resuming, no hidden labels read."""

import itertools
import re
import threading
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, load_dataset
from support.toy import write_world

from cps_hf.config import AugmentationConfig
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.order import Shard
from cps_hf.data.reading import NO_ID
from cps_hf.data.streams import EvaluationStream, TrainStream, check_label_range, label_name
from cps_hf.data.survey import survey

SIZES = [(40, 56), (56, 40), (48, 48), (37, 61), (64, 33), (30, 30), (41, 47)]
AUGMENTATION = AugmentationConfig(crop_size=(24, 32), random_scale=(0.5, 1.0, 1.5))
VIEWS = ("weak", "strong", "cutmix_mask")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A map-style set, and the same rows streamed from parquet shards."""
    root = tmp_path_factory.mktemp("streams")
    dataset = write_world(root / "world", SIZES)
    from datasets.table import embed_table_storage

    for i in range(3):
        shard = dataset.shard(3, i, contiguous=True).with_format("arrow").map(embed_table_storage, batched=True)
        shard.with_format(None).to_parquet(root / "shards" / f"train-{i:05d}-of-00003.parquet")
    streamed = load_dataset(str(root / "shards"), split="train", streaming=True)
    return {"map": dataset, "stream": streamed, "unlabeled": dataset.remove_columns("label")}


def stream(dataset, *, batch=3, views=VIEWS, **options):
    shard = Shard(
        batch_size=batch,
        rank=options.pop("rank", 0),
        num_processes=options.pop("num_processes", 1),
        accumulation_steps=options.pop("accumulation_steps", 1),
    )
    options = {"name": "s", "augmentation": AUGMENTATION, "seed": 5, "shuffle_buffer_size": 4} | options
    return TrainStream(dataset, shard=shard, views=views, **options)


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]) if torch.is_tensor(x[key]) else x[key] == y[key], key


@pytest.fixture(scope="module")
def without_workers(sets):
    """The first batches of a stream without workers, read once for all tests that compare with them."""

    @cache
    def taken(kind, count, batch=3, views=VIEWS):
        return take(stream(sets[kind], batch=batch, views=views), count)

    return taken


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_streamed_rows_are_read_by_a_separate_thread(sets, kind):
    one, threads = stream(sets[kind]), set()
    plans = one.plans

    def noting():
        for plan in plans():
            threads.add(threading.current_thread())
            yield plan

    one.plans = noting
    take(one, 2)
    assert (threading.main_thread() in threads) == (kind == "map") and len(threads) == 1


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("views", [None, VIEWS], ids=["labeled", "unlabeled"])
@pytest.mark.parametrize("workers", [1, 4])
def test_nothing_depends_on_the_number_of_workers(sets, without_workers, kind, views, workers):
    alone = without_workers(kind, 9, views=views)
    same(take(stream(sets[kind], views=views, num_workers=workers), 9), alone)
    assert len({tuple(b["ids"]) for b in alone}) > 5


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_one_global_order(sets, kind, world):
    """Batches of 4 on one process are the 4 / world of each process, combined: same ids, crops and masks."""
    alone = take(stream(sets[kind], batch=4), 6)
    parts = [take(stream(sets[kind], batch=4 // world, rank=r, num_processes=world), 6) for r in range(world)]
    for whole, *pieces in zip(alone, *parts, strict=True):
        assert whole["ids"] == [i for piece in pieces for i in piece["ids"]]
        for key in ("weak", "strong", "valid", "cutmix_mask"):
            assert torch.equal(whole[key], torch.cat([piece[key] for piece in pieces])), key


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize(("start", "workers"), [(3, 0), (6, 0), (7, 2), (12, 2), (27, 0)])
def test_a_resumed_stream_continues_with_the_next_sample(sets, without_workers, kind, start, workers):
    unbroken = without_workers(kind, 34, batch=1)
    length = len(SIZES) if kind == "map" or start >= len(SIZES) else None
    resumed = stream(sets[kind], batch=1, start=start, length=length, num_workers=workers)
    same(take(resumed, 34 - start), unbroken[start:])


def test_each_pass_has_every_sample_once_in_a_new_order(sets):
    for kind in ("map", "stream"):
        ids = [i for batch in take(stream(sets[kind], batch=7), 4) for i in batch["ids"]]
        passes = [ids[i : i + 7] for i in range(0, 28, 7)]
        assert all(len(set(p)) == 7 for p in passes) and len({tuple(p) for p in passes}) == 4


def test_a_sample_gets_a_new_crop_in_each_pass(sets):
    batches = take(stream(sets["map"], batch=1), 14)
    by_id = {}
    for batch in batches:
        by_id.setdefault(batch["ids"][0], []).append(batch["weak"])
    assert sum(not torch.equal(a, b) for a, b in by_id.values()) >= 6


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_odd_batch_includes_its_partners(sets, kind, batch):
    """The partner of position p is p ^ 1, exactly as it looks in its own batch."""
    weak = torch.cat([b["weak"] for b in take(stream(sets[kind], batch=1), 20)])
    valid = torch.cat([b["valid"] for b in take(stream(sets[kind], batch=1), 20)])
    odd = take(stream(sets[kind], batch=batch), 18 // batch)
    positions = torch.arange(18) ^ 1
    assert torch.equal(torch.cat([b["partner_weak"] for b in odd]), weak[positions])
    assert torch.equal(torch.cat([b["partner_valid"] for b in odd]), valid[positions])


def test_an_even_batch_or_no_cutmix_includes_no_partners(sets):
    assert "partner_weak" not in take(stream(sets["map"], batch=2), 1)[0]
    assert "partner_weak" not in take(stream(sets["map"], batch=3, views=("weak",)), 1)[0]


def test_samples_leave_the_workers_as_uint8(sets):
    (labeled,) = take(stream(sets["map"], views=None, num_workers=1), 1)
    assert labeled["pixel_values"].dtype == labeled["labels"].dtype == torch.uint8
    assert labeled["pixel_values"].shape == (3, 3, 24, 32) and labeled["valid"].dtype == torch.bool


def test_the_global_generator_is_unchanged(sets):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    take(stream(sets["map"]), 3)
    take(stream(sets["map"], num_workers=1), 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_unlabeled_stream_never_opens_a_label(tmp_path):
    dataset = write_world(tmp_path / "w", SIZES)
    for path in (tmp_path / "w").glob("*_label.png"):
        path.write_bytes(b"unreadable")
    batches = take(stream(dataset), 5)  # the label column exists but is not read
    assert "labels" not in batches[0]
    with pytest.raises(ValueError, match=r"Cannot decode 'w-\d' .*_label.png"):
        take(stream(dataset, views=None), 1)


def broken_world(tmp_path, which):
    dataset = write_world(tmp_path / "w", SIZES * 3)
    for index in which:
        path = tmp_path / "w" / f"{index}.png"
        path.write_bytes(path.read_bytes()[:200])
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_an_error_that_names_its_file(tmp_path, workers):
    dataset = broken_world(tmp_path, [4])
    with pytest.raises(ValueError, match=r"Cannot decode 'w-4' .*4.png.*200 bytes"):
        take(stream(dataset, num_workers=workers), 7)


def test_a_replacement_depends_only_on_the_position(tmp_path):
    dataset = broken_world(tmp_path, [4])
    runs = [
        take(stream(dataset, skip_bad_samples=True, batch=b, num_workers=w, max_bad_sample_share=1.0), 42 // b)
        for b, w in ((3, 0), (3, 2), (1, 0))
    ]
    ids = [[i for batch in run for i in batch["ids"]] for run in runs]
    assert ids[0] == ids[1] == ids[2] and "w-4" not in ids[0]
    bad = [entry for batch in runs[0] for entry in batch["bad_samples"]]
    assert [entry["id"] for entry in bad] == ["w-4", "w-4"] and len({entry["position"] for entry in bad}) == 2
    assert "4.png" in bad[0]["error"] and bad[0]["attempt"] == 0
    assert len({ids[0][entry["position"]] for entry in bad}) == 2  # each has its own replacement
    healthy = [i for batch in take(stream(write_world(tmp_path / "h", SIZES * 3)), 14) for i in batch["ids"]]
    assert sum(a[2:] != b[2:] for a, b in zip(ids[0], healthy, strict=True)) == 2  # the others are unchanged


def test_a_streamed_set_replaces_bad_samples_too(tmp_path):
    streamed = broken_world(tmp_path, [4, 9]).to_iterable_dataset(num_shards=2)
    options = {"skip_bad_samples": True, "max_bad_sample_share": 1.0}
    runs = [take(stream(streamed, batch=b, **options), 21 // b) for b in (1, 3)]
    ids = [[i for batch in run for i in batch["ids"]] for run in runs]
    assert ids[0] == ids[1] and not {"w-4", "w-9"} & set(ids[0])


def test_too_many_bad_samples_stop_the_run(tmp_path):
    dataset = broken_world(tmp_path, range(8))
    with pytest.raises(ValueError, match=r"samples could not be read, more than `max_bad_sample_share=0.05`"):
        take(stream(dataset, skip_bad_samples=True), 50)
    with pytest.raises(ValueError, match="10 samples in a row could not be read"):
        take(stream(broken_world(tmp_path / "all", range(21)), skip_bad_samples=True), 1)


def test_a_label_outside_the_classes_is_named_on_every_read(tmp_path):
    dataset = write_world(tmp_path / "w", SIZES, encoding=False)
    from PIL import Image

    label = np.zeros(SIZES[2], np.uint8)
    label[3, :7] = 9
    Image.fromarray(label).save(tmp_path / "w" / "2_label.png")
    with pytest.raises(
        ValueError, match=r"'w-2' \(.*2_label.png\) contains the values 9 \(7 pixels\), but the models have 3 classes"
    ):
        take(stream(dataset, views=None, num_labels=3), 3)
    with pytest.raises(
        ValueError,
        match=r"'w-2' \(.*2_label.png\) contains the values 9 \(7 pixels\).*`--load_options '.\"reduce_labels\": true",
    ):
        list(EvaluationStream(dataset, num_labels=3))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_evaluation_reads_every_image_once_over_all_processes(sets, kind, world):
    seen = [
        (sample["id"], tuple(sample["image"].shape[1:]), tuple(sample["label"].shape))
        for rank in range(world)
        for batch in EvaluationStream(sets[kind], batch_size=2, rank=rank, num_processes=world, num_workers=rank)
        for sample in batch
    ]
    assert sorted(seen) == [(f"world-{i}", size, size) for i, size in enumerate(SIZES)]


def test_evaluation_without_labels_and_without_images(sets):
    (batch, *_) = EvaluationStream(sets["unlabeled"], with_label=False)
    assert set(batch[0]) == {"image", "id"}
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        EvaluationStream(sets["map"].select([]))
    nothing = sets["stream"].filter(lambda row: False)
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        list(EvaluationStream(nothing))
    few = EvaluationStream(sets["stream"].take(1), rank=1, num_processes=2)  # the only one belongs to another process
    assert list(few) == []


def test_rows_without_ids_are_numbered(sets):
    ids = [i for b in take(stream(sets["map"].remove_columns("id"), batch=7), 1) for i in b["ids"]]
    assert sorted(ids) == [str(i) for i in range(7)]
    # Streamed rows are not numbered, as shuffling would renumber them in each shard: they are named by file or not.
    (batch,) = take(stream(sets["stream"].remove_columns("id"), batch=7), 1)
    assert batch["ids"] == ["a row without an id"] * 7
    (batch,) = take(stream(sets["map"].remove_columns("id").to_iterable_dataset(), batch=7), 1)
    assert sorted(name[-5:] for name in batch["ids"]) == [f"{i}.png" for i in range(7)]


def test_a_streamed_row_without_id_and_image_is_a_bad_sample(sets):
    rows = [{"image": None}, *({"image": row["image"]} for row in sets["map"])]
    features = Features({"image": Image()})
    dataset = Dataset.from_list(rows, features=features).to_iterable_dataset()
    assert survey(dataset, progress=False).problems[0]["id"] == NO_ID
    batches = take(stream(dataset, batch=8, skip_bad_samples=True), 1)
    assert {sample["id"] for batch in batches for sample in batch["bad_samples"]} == {NO_ID}
    with pytest.raises(ValueError, match="'a row without an id' has no image"):
        take(stream(dataset, batch=8), 1)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_an_odd_batch_includes_the_partners_of_every_view(sets, kind):
    views = ("weak", "strong", "strong_2", "cutmix_mask")
    single = take(stream(sets[kind], batch=1, views=views), 20)
    odd = take(stream(sets[kind], batch=3, views=views), 6)
    positions = torch.arange(18) ^ 1
    for view in ("weak", "strong", "strong_2"):
        alone = torch.cat([b[view] for b in single])
        assert torch.equal(torch.cat([b[f"partner_{view}"] for b in odd]), alone[positions])


def test_a_second_crop_is_another_part_of_the_same_image(sets):
    for batch in take(stream(sets["map"], batch=2, views=("weak", "second_crop", "cutmix_mask")), 4):
        assert batch["second_crop"].shape == batch["weak"].shape and batch["second_valid"].dtype == torch.bool
        assert not torch.equal(batch["second_crop"], batch["weak"])
    # The other views are the same without it.
    plain = take(stream(sets["map"], batch=2, views=("weak",)), 1)[0]
    both = take(stream(sets["map"], batch=2, views=("weak", "second_crop")), 1)[0]
    assert torch.equal(plain["weak"], both["weak"])


def test_masks_are_drawn_with_the_objectives_options(sets):
    never = take(stream(sets["map"], batch=2, cutmix_masks={"boxes": 1, "probability": 0.0}), 8)
    assert not any(batch["cutmix_mask"].any() for batch in never)
    small = take(stream(sets["map"], batch=2, cutmix_masks={"boxes": 1, "area": (0.05, 0.06)}), 8)
    shares = torch.cat([batch["cutmix_mask"].float().mean((1, 2)) for batch in small])
    assert 0.02 < shares.min() and shares.max() < 0.09


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("buffer", [4, 100])
def test_without_reshuffling_order_repeats_but_crops_vary(sets, kind, buffer):
    options = {"batch": 1, "shuffle_buffer_size": buffer}
    batches = take(stream(sets[kind], reshuffle=False, **options), 21)
    ids = [batch["ids"][0] for batch in batches]
    assert ids[:7] == ids[7:14] == ids[14:]
    assert any(not torch.equal(batches[i]["weak"], batches[i + 7]["weak"]) for i in range(7))
    fresh = [batch["ids"][0] for batch in take(stream(sets[kind], **options), 21)]
    assert fresh[:7] == ids[:7] and fresh[7:14] != ids[:7]
    resumed = take(stream(sets[kind], reshuffle=False, start=10, length=7, **options), 5)
    same(resumed, batches[10:15])


def test_an_unnamed_class_error_suggests_where_to_name_it():
    label = torch.tensor([[0, 1, 255], [3, 3, 2]])
    row = {"id": "a", "image": None, "label": {"bytes": b"", "path": "masks/a.png"}}
    check_label_range(label, 4, label_name(row))
    assert label_name({"id": "a", "label": {"bytes": b"", "path": None}}) == "'a'"
    said = (
        r"'a' \(masks/a.png\) contains the values 2 \(1 pixels\), 3 \(2 pixels\).*`classes.json`.* for each of 0 to 3,"
    )
    with pytest.raises(ValueError, match=said):
        check_label_range(label, 2, label_name(row))


def test_the_advice_for_a_mapped_stream_keeps_the_coding(sets):
    coding = LabelEncoding(("bar", "disc", "ground"), values={0: 2, 1: 1, 2: 0, 255: 255})
    loaded = sets["map"].cast_column("label", coding.to_feature())
    wanted = [sample["label"] for [sample] in EvaluationStream(loaded)]
    stream = loaded.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`stream.map\(..., features=stream.features\)`"):
        EvaluationStream(stream.map(dict))
    mapped = stream.map(dict, features=stream.features)  # as the message suggests
    assert all(torch.equal(a, b["label"]) for a, [b] in zip(wanted, EvaluationStream(mapped), strict=True))


def test_the_advice_for_a_renamed_column_keeps_the_coding(sets):
    coding = LabelEncoding(("bar", "disc", "ground"), values={0: 2, 1: 1, 2: 0, 255: 255})
    loaded = sets["map"].cast_column("label", coding.to_feature())
    wanted = [sample["label"] for [sample] in EvaluationStream(loaded)]
    dataset = loaded.cast_column("label", Image(decode=False)).map(lambda row: {"mask": row["label"]["path"]})
    with pytest.raises(ValueError) as error:
        EvaluationStream(dataset.remove_columns("label"))
    advice = re.search(r"`dataset(\.rename_column.*?)`", str(error.value))[1].replace("<yours>", "mask")
    fixed = eval(f"dataset{advice}", {"dataset": dataset.remove_columns("label"), "loaded": loaded})
    assert all(torch.equal(a, b["label"]) for a, [b] in zip(wanted, EvaluationStream(fixed), strict=True))
