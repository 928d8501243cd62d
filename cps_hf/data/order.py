"""The global order of a training stream: which sample is at which position, and which process gets it.

A training stream never ends and is counted in *positions* of one global order. The sample at position p depends only
on the seed and p: not on workers, processes or where the run was resumed. Step k takes the positions
[k * G, (k + 1) * G), where G is the global batch. Process r and micro-batch m take the B consecutive positions from
k * G + (r * accumulation steps + m) * B, where B is the batch per process.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

logger = logging.getLogger(__name__)

Source = int | dict[str, Any]  # an index into a map-style data set, or the row itself if rows are streamed


class Plan(NamedTuple):
    """One micro-batch: (position, source) of its samples, and of CutMix partners outside of it."""

    samples: list[tuple[int, Source]]
    partners: list[tuple[int, Source]]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This process's part of the global order: its batch size, its rank, and its number of accumulation steps."""

    batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    num_processes: int = 1

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulation_steps * self.num_processes

    def micro_batches(self, start: int) -> Iterator[range]:
        """The positions of this process's micro-batches, without end, from the global batch that begins at `start`."""
        for first in itertools.count(start, self.global_batch_size):
            for micro in range(self.accumulation_steps):
                begin = first + (self.rank * self.accumulation_steps + micro) * self.batch_size
                yield range(begin, begin + self.batch_size)


def check_length(length: int, shard: Shard, name: str) -> None:
    """Warn if an optimizer step takes more samples than the data set has.

    Raises:
        ValueError: the data set is empty.
    """
    if length == 0:
        raise ValueError(f"`{name}` is empty.")
    if length < shard.global_batch_size and shard.rank == 0:
        logger.warning(
            "`%s` has %d image%s, but an optimizer step takes %d (%d per process x %d processes x %d accumulation "
            "steps): a step uses images more than once, each time with another crop.",
            *(name, length, "" if length == 1 else "s", shard.global_batch_size),
            *(shard.batch_size, shard.num_processes, shard.accumulation_steps),
        )


def seeded_generator(seed: int, stream: str, *keys: int) -> torch.Generator:
    """A generator that depends only on its arguments, the same on every machine."""
    # The lengths distinguish (1, 2) from (1,) + (2,); the final 1 is needed as SeedSequence ignores trailing zeros.
    entropy = [seed, len(stream), *stream.encode(), len(keys), *keys, 1]
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


class MapReader:
    """The global order of a map-style data set: a new permutation per pass, or the same if `reshuffle=False`."""

    def __init__(self, dataset: Dataset, seed: int, stream: str, *, reshuffle: bool = True):
        self.length = len(dataset)
        self._ids = dataset.select_columns(["id"])  # to name a row without reading its image
        self.seed, self.stream, self.reshuffle = seed, stream, reshuffle
        self._permutations: dict[int, Tensor] = {}

    def source_at(self, position: int) -> int:
        epoch, index = divmod(position, self.length)
        epoch = epoch if self.reshuffle else 0
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if abs(e - epoch) <= 1}
            generator = seeded_generator(self.seed, self.stream + "/order", epoch)
            self._permutations[epoch] = torch.randperm(self.length, generator=generator)
        return int(self._permutations[epoch][index])

    def plans(self, positions_and_partners: Iterator[tuple[range, list[int]]]) -> Iterator[Plan]:
        for positions, partners in positions_and_partners:
            yield Plan([(p, self.source_at(p)) for p in positions], [(p, self.source_at(p)) for p in partners])

    def rows(self, start: int, count: int) -> list[dict[str, Any]]:
        """The ids of the rows at `count` positions."""
        return [self._ids[self.source_at(position)] for position in range(start, start + count)]

    def spares(self, count: int) -> list[Source]:
        """Sources that may replace samples that cannot be read: any."""
        return list(range(self.length))


class IterableReader:
    """The global order of a streamed data set.

    A pass is `shuffle(seed, buffer)` with a seed drawn from the run's seed, the stream's name and the pass. If the
    whole set fits into the buffer, its rows are kept, still encoded, from the second pass on and permuted: opening a
    stream takes seconds, and a pass over a labeled set may last only a few steps. Every process reads all rows and
    keeps its own; only decoding and transforms run in workers. `length`, the number of rows per pass, is known once a
    pass has ended. A resumed run is given it, since it determines the pass of a position. With `reshuffle=False`,
    every pass is like the first.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        seed: int,
        buffer_size: int,
        length: int | None,
        shard: Shard,
        stream: str,
        *,
        reshuffle: bool = True,
    ):
        self.dataset, self.seed, self.buffer_size, self.length = dataset, seed, buffer_size, length
        self.shard, self.stream, self.reshuffle = shard, stream, reshuffle
        self._first_rows: list[dict[str, Any]] | None = None

    def rows_from(self, position: int) -> Iterator[dict[str, Any]]:
        """The rows of the global order from `position` on, without end.

        Raises:
            ValueError: the set is empty, or its length has changed since it was first read.
        """
        epoch, offset = (0, position) if self.length is None else divmod(position, self.length)
        if offset or epoch:
            logger.info("%s: resuming in pass %d after %d rows.", self.stream, epoch, offset)
        began, first = time.perf_counter(), True
        while True:
            rows = self._pass(epoch, offset)
            seen = offset
            for row in rows:
                if first and (offset or epoch):
                    logger.info("%s: resumed after %.1f s.", self.stream, time.perf_counter() - began)
                first = False
                yield row
                seen += 1
            if self.length is None and seen:
                self.length = seen
                check_length(seen, self.shard, self.stream)
            if seen == 0 or seen != self.length:
                raise ValueError(
                    f"`{self.stream}` gave {seen} rows in pass {epoch}, "
                    + (f"but {self.length} before: it must not change." if self.length else "so it is empty.")
                )
            epoch, offset = epoch + 1, 0

    def _pass(self, epoch: int, offset: int) -> Iterator[dict[str, Any]]:
        if epoch and self.length <= self.buffer_size:
            if self._first_rows is None:
                self._first_rows = list(self._shuffled(0))
            generator = seeded_generator(self.seed, self.stream + "/order", epoch)
            permutation = torch.randperm(len(self._first_rows), generator=generator).tolist()
            if not self.reshuffle:
                permutation = range(len(self._first_rows))
            yield from (self._first_rows[index] for index in permutation[offset:])
        else:
            shuffled = self._shuffled(epoch)
            yield from shuffled.skip(offset) if offset else shuffled

    def _shuffled(self, epoch: int) -> IterableDataset:
        # Shuffle again for each pass: `repeat()` after a shuffle would repeat the same order.
        generator = seeded_generator(self.seed, self.stream + "/order", epoch if self.reshuffle else 0)
        return self.dataset.shuffle(seed=generator.initial_seed(), buffer_size=self.buffer_size)

    def plans(self, positions_and_partners: Iterator[tuple[range, list[int]]]) -> Iterator[Plan]:
        rows: dict[int, dict[str, Any]] = {}
        stream, next_position = None, 0
        for positions, partners in positions_and_partners:
            wanted = [*positions, *partners]
            if stream is None:
                next_position = min(wanted)
                stream = self.rows_from(next_position)
            while next_position <= max(wanted):
                rows[next_position] = next(stream)
                next_position += 1
            yield Plan([(p, rows[p]) for p in positions], [(p, rows[p]) for p in partners])
            # The next batch's first sample may have its partner just before it, hence one extra position.
            rows = {p: row for p, row in rows.items() if p >= positions[-1]}

    def rows(self, start: int, count: int) -> list[dict[str, Any]]:
        """The rows at `count` positions, read again."""
        if self.length is None:  # the pass of `start` is only known after reading up to it
            return list(itertools.islice(self.rows_from(0), start, start + count))
        return list(itertools.islice(self.rows_from(start), count))

    def spares(self, count: int) -> list[Source]:
        """Sources that may replace samples that cannot be read: the first rows of the first pass."""
        return list(itertools.islice(self._shuffled(0), count))


def read_ahead(plans: Iterator[Plan], count: int) -> Iterator[Plan]:
    """The plans, with `count` of them read in advance by a thread: the rows of a streamed set come over the network,
    and the training loop would have to wait for them."""
    with ThreadPoolExecutor(1, "rows ahead") as thread:
        ahead = deque(thread.submit(next, plans) for _ in range(count))
        try:
            while True:
                plan = ahead.popleft().result()
                ahead.append(thread.submit(next, plans))
                yield plan
        finally:
            for one in ahead:
                one.cancel()
