"""A cache as batches, read ahead in threads. The order is a pure function of (rows, seed, epoch).

Shape suffix: B rows of a batch.
"""

from collections import deque
from collections.abc import Generator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtcache.cache.order import (
    AscendingOrder,
    BlockOrder,
    EpochOrder,
    FullOrder,
    Rows,
    blocks_of,
)
from dtcache.errors import ConfigError
from dtcache.row_set import RowSet

SHUFFLES = ("full", "block", "none")
LOOKAHEAD = 4
"""Least number of batches read ahead; one more than `threads` keeps every thread busy."""


T_co = TypeVar("T_co", covariant=True)


class Readable(Protocol[T_co]):
    """A source of batches, such as a Cache. Threads share one source."""

    @property
    def num_views(self) -> int:
        """Views per row."""

    @property
    def shard_rows(self) -> int | None:
        """Rows per shard, which lie side by side on disk; None if there are no shards."""

    def will_need(self, rows: NDArray[np.int64], names: Sequence[str]) -> None:
        """Prefetch some arrays of rows that will be read soon, into the page cache."""

    def batch(
        self, rows: NDArray[np.int64], views: NDArray[np.int64], names: Sequence[str]
    ) -> T_co:
        """Return the batch of B (row, view) pairs with the targets `names`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How the rows of an epoch become the batches of one process."""

    batch_size: int
    """Rows of a global batch, over all processes and micro-batches."""
    seed: int
    """Seed of the order."""
    threads: int
    """Threads that read."""
    shuffle: str = "full"
    """full: all rows are permuted. block: contiguous blocks of rows are permuted and mixed.

    none: rows ascend, each in view 0.
    """
    drop_last: bool = True
    """Whether a short last batch is left out."""
    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """Processes that share every global batch."""
    micro_batches: int = 1
    """Batches that this process reads per global batch, one after the other."""


class EpochLoader(Generic[T_co]):
    """The batches of an epoch, read ahead in threads. Each row comes once.

    Order and global batches depend neither on the number of processes nor on threads: process r of
    w reads the r-th of w equal slices of every global batch. So the number of finished global
    batches is enough to resume, also with a different number of processes.
    """

    def __init__(
        self,
        cache: Readable[T_co],
        rows: RowSet | NDArray[np.int64],
        names: Sequence[str],
        batching: Batching,
    ) -> None:
        """Serve `rows` of a cache, which ascend, with the targets `names`.

        Raises ConfigError if `shuffle` is unknown or does not fit the source, if there are too few
        rows for a batch, or if processes and micro-batches do not divide the batch.
        """
        _check(cache, rows, batching)
        self._cache = cache
        self._rows = rows if isinstance(rows, RowSet) else RowSet.of(rows)
        self._names = list(names)
        self._batching = batching
        full, short = divmod(len(rows), batching.batch_size)
        self.num_batches = full if batching.drop_last or not short else full + 1

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch: a pure function of (rows, seed, epoch).

        A full shuffle permutes all rows. A block shuffle deals blocks to mixes at random, and
        permutes the rows of each mix. Without a shuffle, rows ascend and every view is 0.
        """
        if self._batching.shuffle == "none":
            return AscendingOrder(rows=self._rows)
        if self._batching.shuffle == "block":
            return self._block_order(epoch)
        return FullOrder(self._rows, self._cache.num_views, self._batching.seed, epoch)

    def _block_order(self, epoch: int) -> BlockOrder:
        return BlockOrder(
            self._rows,
            blocks_of(self._rows, self._cache.shard_rows or len(self._rows)),
            num_views=self._cache.num_views,
            seed=self._batching.seed,
            epoch=epoch,
        )

    def epoch(self, epoch: int, start: int = 0) -> Generator[T_co, None, None]:
        """Yield this process's micro-batches of an epoch, from global batch `start` on."""
        order = self._block_order(epoch) if self._batching.shuffle == "block" else None
        served: EpochOrder = order or self.order(epoch)
        batch_size = self._batching.batch_size
        parts = self._batching.micro_batches
        slices = self._batching.world_size * parts
        ahead = order.mix_at(start * batch_size) if order is not None else 0

        def pairs(index: int, part: int) -> tuple[Rows, Rows]:
            """Return the rows and views of a micro-batch of this process."""
            first = index * batch_size
            number = self._batching.rank * parts + part
            size = min(batch_size, len(self._rows) - first)
            begin, end = (first + size * edge // slices for edge in (number, number + 1))
            return served.between(begin, end)

        threads = self._batching.threads
        with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="cache") as pool:
            waiting: deque[Future[T_co]] = deque()
            try:
                for index, part in product(range(start, self.num_batches), range(parts)):
                    # A mix is prefetched where the previous one begins. A read that fails here
                    # fails again, with the sample's name, in `batch`.
                    while order is not None and (
                        ahead < len(order.ends) and order.begin(ahead - 1) <= index * batch_size
                    ):
                        pool.submit(self._cache.will_need, order.mix(ahead)[0], self._names)
                        ahead += 1
                    rows, views = pairs(index, part)
                    waiting.append(pool.submit(self._cache.batch, rows, views, self._names))
                    if len(waiting) >= max(LOOKAHEAD, threads + 1):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def _check(cache: Readable[object], rows: Sized, batching: Batching) -> None:
    """Raise ConfigError if `batching` does not fit the source or the number of its rows."""
    batch_size = batching.batch_size
    world_size = batching.world_size
    if batching.shuffle not in SHUFFLES:
        raise ConfigError(
            f"`shuffle` {batching.shuffle}: expected one of {', '.join(SHUFFLES)}; use full"
        )
    if not batching.drop_last and (batch_size < 1 or not len(rows)):
        raise ConfigError(
            f"`batch_size` {batch_size}: expected 1 or more, and samples to serve, got {len(rows)}"
        )
    if batching.drop_last and not 0 < batch_size <= len(rows):
        raise ConfigError(
            f"`batch_size` {batch_size}: expected 1 to {len(rows)}, the samples left for training; "
            "pass a smaller `batch_size` or cache more images"
        )
    if not 0 <= batching.rank < world_size or batch_size % world_size:
        raise ConfigError(
            f"`batch_size` {batch_size}: expected a multiple of the {world_size} processes that "
            f"share it (this is number {batching.rank}, from 0)"
        )
    if batch_size % (world_size * batching.micro_batches):
        raise ConfigError(
            f"`batch_size` {batch_size}: expected a multiple of "
            f"{world_size * batching.micro_batches}, the {batching.micro_batches} micro-batches of "
            f"each of {world_size} processes"
        )
    if batching.shuffle == "block" and cache.shard_rows is None:
        raise ConfigError(
            "`shuffle='block'`: expected a cache, whose blocks of rows it mixes; "
            "use `shuffle='full'`"
        )
