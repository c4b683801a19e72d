"""A sealed cache as batches: the order is a pure function of (rows, seed, epoch), whoever reads which part of it."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import ConfigError
from dtcache.rng import permuted

SHUFFLES = ("full", "block")
LOOKAHEAD = 4
"""Batches read ahead of the student, at least: one more than there are threads, so that all of them are busy."""
BLOCK_ROWS = 256
"""Rows of a block: one stretch of a shard, which a cold disk reads in one go."""
MIXED_BLOCKS = 64
"""Blocks whose rows are mixed with each other."""


T_co = TypeVar("T_co", covariant=True)


class Readable(Protocol[T_co]):
    """What batches are read from, such as a Cache; threads share it."""

    @property
    def num_views(self) -> int:
        """Views of a row."""

    @property
    def shard_rows(self) -> int | None:
        """Rows of a shard, in which neighbours lie side by side; None where there are no shards to mix."""

    def will_need(self, rows: NDArray[np.int64], names: Sequence[str]) -> None:
        """Tell the disk of rows of shards that will be read soon."""

    def batch(
        self, rows: NDArray[np.int64], views: NDArray[np.int64], names: Sequence[str]
    ) -> T_co:
        """Return the batch of B (row, view) pairs, with the targets of some names."""


class EpochLoader(Generic[T_co]):
    """Batches of an epoch, read ahead in threads; each row once.

    The order and its cut into global batches hang on neither ranks nor threads: rank r of w takes the r-th of w equal
    slices of every global batch. So a run resumes from one number, the global batches done, under any world size.
    """

    def __init__(
        self,
        cache: Readable[T_co],
        rows: NDArray[np.int64],
        names: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        threads: int,
        shuffle: str = "full",
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ) -> None:
        """Serve `rows` of a cache in global batches of `batch_size`; `drop_last` leaves out a short last one.

        A rank's slice of a global batch comes as so many `parts`, one after the other. `shuffle` is full, or block:
        stretches of a cache's shards, mixed. Raises ConfigError for another one, where there are no rows, or too few
        for one full batch if only those are served, or where ranks and parts do not divide it.
        """
        if shuffle not in SHUFFLES:
            raise ConfigError(f"shuffle {shuffle}: expected one of {', '.join(SHUFFLES)}")
        if not drop_last and (batch_size < 1 or not len(rows)):
            raise ConfigError(
                f"batch_size {batch_size}: expected 1 or more, and samples to serve, got {len(rows)}"
            )
        if drop_last and not 0 < batch_size <= len(rows):
            raise ConfigError(
                f"--batch-size {batch_size}: expected 1 to {len(rows)}, the samples left for training; "
                "lower it or cache more images"
            )
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ConfigError(
                f"--batch-size {batch_size}: expected a multiple of the {world_size} processes that share it (this is "
                f"number {rank}, from 0)"
            )
        if batch_size % (world_size * parts):
            raise ConfigError(
                f"--batch-size {batch_size}: expected a multiple of {world_size * parts}, the {parts} parts "
                f"(--accumulate) of each of {world_size} processes"
            )
        if shuffle == "block" and cache.shard_rows is None:
            raise ConfigError(
                "--shuffle block: expected a cache, whose shards it mixes; leave it out"
            )
        self._cache = cache
        self._rows = rows
        self._names = list(names)
        self._batch_size = batch_size
        self._seed = seed
        self._threads = threads
        self._shuffle = shuffle
        self._rank = rank
        self._world_size = world_size
        self._parts = parts
        self.num_batches = len(rows) // batch_size if drop_last else -(-len(rows) // batch_size)

    def order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and views of an epoch, in order: a pure function of (rows, seed, epoch).

        A full shuffle permutes all rows. A block shuffle deals blocks to mixes, and permutes the rows of each mix.
        """
        rows = self._rows[permuted(len(self._rows), seed=self._seed, stream=f"epoch-{epoch}")]
        if self._shuffle == "block":
            rows = rows[np.argsort(self._mix_of(rows, epoch), kind="stable")]
        views = permuted(len(rows), seed=self._seed, stream=f"views-{epoch}")
        return rows, views % self._cache.num_views

    def _mix_of(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return the number of the mix that each row is dealt to, with all of its block."""
        shard_rows = self._cache.shard_rows
        assert shard_rows is not None, "checked at the start"
        shards, inner = np.divmod(rows, shard_rows)
        blocks = np.unique(shards * shard_rows + inner // BLOCK_ROWS, return_inverse=True)[1]
        dealt = permuted(int(blocks.max()) + 1, seed=self._seed, stream=f"blocks-{epoch}")
        mixes: NDArray[np.int64] = dealt[blocks] // MIXED_BLOCKS
        return mixes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[T_co]:
        """Yield this rank's slice of the global batches of an epoch, part by part, from global batch `start` on."""
        rows, views = self.order(epoch)
        ahead = self._ahead(rows, epoch, start) if self._shuffle == "block" else deque()

        def read(index: int, part: int) -> T_co:
            first = index * self._batch_size
            place = self._rank * self._parts + part
            size = min(self._batch_size, len(rows) - first)
            slices = self._world_size * self._parts
            begin, end = (first + size * edge // slices for edge in (place, place + 1))
            return self._cache.batch(rows[begin:end], views[begin:end], self._names)

        with ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix="cache") as pool:
            waiting: deque[Future[T_co]] = deque()
            try:
                for index, part in product(range(start, self.num_batches), range(self._parts)):
                    while ahead and ahead[0][0] <= index * self._batch_size:
                        # What fails here fails again, by name, when it is read.
                        pool.submit(self._cache.will_need, ahead.popleft()[1], self._names)
                    waiting.append(pool.submit(read, index, part))
                    if len(waiting) >= max(LOOKAHEAD, self._threads + 1):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _ahead(
        self, rows: NDArray[np.int64], epoch: int, start: int
    ) -> deque[tuple[int, NDArray[np.int64]]]:
        """Return the mixes that are still to come, each with the place in the order where the disk is told of it."""
        edges = np.flatnonzero(np.diff(self._mix_of(rows, epoch), prepend=-1, append=-1)).tolist()
        begun = [0, *edges]
        mixes = zip(begun, edges[:-1], edges[1:], strict=False)
        return deque(
            (told, rows[first:last])
            for told, first, last in mixes
            if last > start * self._batch_size
        )
