"""The global order: a function of seed and position, for any number of processes."""

import itertools
import threading

import pytest
from datasets import Dataset

from cps_hf.data.order import IterableReader, MapReader, Shard, read_ahead, seeded_generator


def rows(n):
    return Dataset.from_dict({"id": [str(i) for i in range(n)]})


def positions(shard, steps, start=0):
    return list(itertools.islice(shard.micro_batches(start), steps * shard.accumulation_steps))


@pytest.mark.parametrize(("world", "accumulation", "batch"), [(1, 1, 12), (2, 1, 6), (4, 1, 3), (1, 4, 3), (2, 2, 3)])
def test_any_split_of_the_global_batch_takes_the_same_positions_each_step(world, accumulation, batch):
    taken = [[] for _ in range(3)]
    for rank in range(world):
        shard = Shard(batch_size=batch, accumulation_steps=accumulation, rank=rank, num_processes=world)
        assert shard.global_batch_size == 12
        for i, micro in enumerate(positions(shard, 3, start=24)):
            taken[i // accumulation] += micro
    assert [sorted(t) for t in taken] == [list(range(24 + 12 * k, 36 + 12 * k)) for k in range(3)]


def test_two_processes_make_the_micro_batches_of_two_accumulation_steps():
    alone = positions(Shard(batch_size=3, accumulation_steps=2), 4)
    pair = [positions(Shard(batch_size=3, rank=r, num_processes=2), 4) for r in (0, 1)]
    assert alone == [batch for step in zip(*pair, strict=True) for batch in step]


def test_the_micro_batches_of_a_process_are_consecutive():
    shards = [Shard(batch_size=2, accumulation_steps=2, rank=rank, num_processes=2) for rank in (0, 1)]
    assert [[*map(list, positions(shard, 2))] for shard in shards] == [
        [[0, 1], [2, 3], [8, 9], [10, 11]],
        [[4, 5], [6, 7], [12, 13], [14, 15]],
    ]


def test_a_map_style_order_is_a_new_permutation_per_pass():
    reader = MapReader(rows(7), seed=3, stream="s")
    passes = [[reader.source_at(7 * e + i) for i in range(7)] for e in range(5)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) == 5
    again = MapReader(rows(7), seed=3, stream="s")
    assert [again.source_at(p) for p in (30, 3, 17)] == [reader.source_at(p) for p in (30, 3, 17)]
    assert passes[0] != [MapReader(rows(7), seed=4, stream="s").source_at(i) for i in range(7)]
    assert passes[0] != [MapReader(rows(7), seed=3, stream="t").source_at(i) for i in range(7)]


def iterable_reader(n, *, shard=None, seed=3, length=None, num_shards=3, buffer=4, stream="s"):
    shard = shard or Shard(batch_size=2)
    return IterableReader(rows(n).to_iterable_dataset(num_shards=num_shards), seed, buffer, length, shard, stream)


BUFFERS = pytest.mark.parametrize("buffer", [4, 100], ids=["larger than the buffer", "fits into the buffer"])


def test_a_set_that_fits_into_the_buffer_is_read_once():
    reader, reads = iterable_reader(11, buffer=11), []
    shuffled = reader._shuffled
    reader._shuffled = lambda epoch: reads.append(epoch) or shuffled(epoch)
    ids = [row["id"] for row in itertools.islice(reader.rows_from(0), 110)]
    assert reads == [0, 0] and len(set(ids)) == 11  # the first pass, and once more to cache it


@BUFFERS
def test_a_streamed_order_reshuffles_each_pass_and_loses_nothing(buffer):
    ids = [row["id"] for row in itertools.islice(iterable_reader(11, buffer=buffer).rows_from(0), 44)]
    passes = [ids[i : i + 11] for i in range(0, 44, 11)]
    assert all(sorted(p, key=int) == [str(i) for i in range(11)] for p in passes)
    assert len({tuple(p) for p in passes}) == 4


@BUFFERS
def test_every_seed_stream_and_pass_has_its_own_order(buffer):
    def passes(**keys):
        ids = [row["id"] for row in itertools.islice(iterable_reader(11, buffer=buffer, **keys).rows_from(0), 44)]
        return {tuple(ids[i : i + 11]) for i in range(0, 44, 11)}

    orders = [passes(seed=3), passes(seed=4), passes(seed=5), passes(seed=3, stream="t"), passes(seed=4, stream="t")]
    assert len(set.union(*orders)) == 5 * 4


@BUFFERS
@pytest.mark.parametrize("start", [0, 5, 10, 11, 12, 27, 33])
def test_a_resumed_streamed_order_continues_with_the_next_row(start, buffer):
    unbroken = [row["id"] for row in itertools.islice(iterable_reader(11, buffer=buffer).rows_from(0), 60)]
    length = 11 if start >= 11 else None  # not known yet in the first pass
    reader = iterable_reader(11, length=length, buffer=buffer)
    resumed = [row["id"] for row in itertools.islice(reader.rows_from(start), 60 - start)]
    assert resumed == unbroken[start:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_streamed_order_is_the_same_for_any_number_of_processes(world):
    def ids(rank, world, batch):
        shard = Shard(batch_size=batch, rank=rank, num_processes=world)
        reader = iterable_reader(11, shard=shard)
        plans = reader.plans((p, []) for p in shard.micro_batches(0))
        return [{p: row["id"] for p, row in plan.samples} for plan in itertools.islice(plans, 6)]

    alone = {p: i for batch in ids(0, 1, 8) for p, i in batch.items()}
    together = {p: i for rank in range(world) for batch in ids(rank, world, 8 // world) for p, i in batch.items()}
    assert together == alone and sorted(alone) == list(range(48))


def test_a_streamed_set_that_is_empty_or_shrinks_is_an_error():
    with pytest.raises(ValueError, match="gave 0 rows in pass 0, so it is empty"):
        nothing = rows(3).to_iterable_dataset().filter(lambda row: False)
        next(IterableReader(nothing, 0, 4, None, Shard(batch_size=1), "s").rows_from(0))
    with pytest.raises(ValueError, match="gave 8 rows in pass 0, but 11 before"):
        next(iterable_reader(5, length=11).rows_from(8))


@pytest.mark.parametrize("buffer", [2, 100])
@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_set_smaller_than_a_step_is_repeated(n, buffer, caplog):
    small = iterable_reader(n, shard=Shard(batch_size=4), buffer=buffer, num_shards=1)
    plans = itertools.islice(small.plans((p, []) for p in small.shard.micro_batches(0)), 6)
    ids = [row["id"] for plan in plans for _, row in plan.samples]
    passes = [ids[i : i + n] for i in range(0, 24, n)]
    assert all(sorted(p) == [str(i) for i in range(n)] for p in passes)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"`s` has {n} image") and "takes 4 (4 per process x 1 processes x 1" in said
    resumed = iterable_reader(n, shard=Shard(batch_size=4), buffer=buffer, length=n, num_shards=1)
    assert [row["id"] for row in itertools.islice(resumed.rows_from(8), 12)] == ids[8:20]


def test_a_generator_depends_on_every_key():
    def draw(*keys):
        return seeded_generator(*keys).initial_seed()

    seeds = [draw(0, "a", 0), draw(1, "a", 0), draw(0, "b", 0), draw(0, "a", 1), draw(0, "a", 0, 1), draw(0, "a")]
    assert len(set(seeds)) == 6 and draw(0, "a", 0) == draw(0, "a", 0)


def test_rows_are_prefetched_in_order_by_another_thread():
    read, fourth = [], threading.Event()

    def plans():
        for number in itertools.count():
            read.append((number, threading.current_thread()))
            if number == 3:
                fourth.set()
            yield number

    ahead = read_ahead(plans(), 3)
    assert next(ahead) == 0
    assert fourth.wait(60), "three plans are ready beyond the one that was taken"
    assert [next(ahead) for _ in range(5)] == [1, 2, 3, 4, 5]
    ahead.close()  # waits for pending reads
    assert len(read) <= 9 and threading.current_thread() not in {thread for _, thread in read}
    assert not any(thread.is_alive() for _, thread in read)


def test_the_error_of_a_row_is_raised_in_its_place():
    def plans():
        yield from "abc"
        raise ValueError("the fourth")

    ahead = read_ahead(plans(), 8)
    assert [next(ahead) for _ in range(3)] == [*"abc"]
    with pytest.raises(ValueError, match="the fourth"):
        next(ahead)
