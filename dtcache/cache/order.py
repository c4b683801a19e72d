"""The order of an epoch: which row, in which view, is served at each position.

Each order is a pure function of (rows, seed, epoch). The memory of a block order does not grow with
the number of rows, except for 32 bytes per block.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dtcache.rng import permuted
from dtcache.row_set import RowSet

BLOCK_ROWS = 256
"""Rows of a block: a contiguous range of a shard, which a cold disk reads in one request."""
MIXED_BLOCKS = 64
"""Blocks whose rows are shuffled together: a mix."""
KEPT_MIXES = 3
"""Mixes whose order is kept: one that ends, one that begins and one that is prefetched."""

Rows = NDArray[np.int64]


class EpochOrder(Protocol):
    """The rows and views of an epoch, by position."""

    def between(self, begin: int, end: int) -> tuple[Rows, Rows]:
        """Return rows and views, int64, of the positions begin <= position < end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AscendingOrder:
    """Rows ascend, each in view 0."""

    rows: RowSet

    def between(self, begin: int, end: int) -> tuple[Rows, Rows]:
        """Return rows and views of some positions."""
        return self.rows.take(np.arange(begin, end)), np.zeros(end - begin, np.int64)


class FullOrder:
    """All rows are permuted. Takes 16 bytes per row."""

    def __init__(self, rows: RowSet, num_views: int, seed: int, epoch: int) -> None:
        count = len(rows)
        self._rows = rows.array()[permuted(count, seed=seed, stream=f"epoch-{epoch}")]
        self._views = permuted(count, seed=seed, stream=f"views-{epoch}") % num_views

    def between(self, begin: int, end: int) -> tuple[Rows, Rows]:
        """Return rows and views of some positions."""
        return self._rows[begin:end], self._views[begin:end]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Ranges of a row set that do not cross a shard, each with at least one row."""

    first: Rows
    """Position in the row set of each block's first row."""
    counts: Rows
    """Rows of each block."""


def blocks_of(rows: RowSet, shard_rows: int) -> Blocks:
    """Return the blocks of BLOCK_ROWS rows, of every shard that has one of `rows`."""
    shards = np.arange(rows[0] // shard_rows, rows[-1] // shard_rows + 1)
    inner = np.arange(0, shard_rows, BLOCK_ROWS)
    starts = (shards[:, None] * shard_rows + inner).ravel()
    stops = (shards[:, None] * shard_rows + np.minimum(inner + BLOCK_ROWS, shard_rows)).ravel()
    first = rows.rank(starts)
    counts = rows.rank(stops) - first
    return Blocks(first=first[counts > 0], counts=counts[counts > 0])


class BlockOrder:
    """Blocks are dealt to mixes at random, and the rows of each mix are permuted."""

    def __init__(
        self, rows: RowSet, blocks: Blocks, *, num_views: int, seed: int, epoch: int
    ) -> None:
        dealt = permuted(len(blocks.counts), seed=seed, stream=f"blocks-{epoch}")
        self._rows = rows
        self._first = blocks.first[dealt]
        self._counts = blocks.counts[dealt]
        ends = np.cumsum(self._counts)
        self.ends: Rows = np.append(ends[MIXED_BLOCKS - 1 : -1 : MIXED_BLOCKS], ends[-1])
        """The position after the last row of each mix."""
        self._num_views = num_views
        self._seed = seed
        self._epoch = epoch
        self._kept: OrderedDict[int, tuple[Rows, Rows]] = OrderedDict()

    def mix_at(self, position: int) -> int:
        """Return the number of the mix that a position lies in."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def begin(self, number: int) -> int:
        """Return the position of a mix's first row; 0 for a number below 1."""
        return int(self.ends[number - 1]) if number > 0 else 0

    def mix(self, number: int) -> tuple[Rows, Rows]:
        """Return rows and views of a mix, in order."""
        if number not in self._kept:
            some = slice(number * MIXED_BLOCKS, (number + 1) * MIXED_BLOCKS)
            counts = self._counts[some]
            before = np.cumsum(counts) - counts
            count = int(counts.sum())
            places = np.repeat(self._first[some] - before, counts) + np.arange(count)
            stream = f"{self._epoch}-{number}"
            order = permuted(count, seed=self._seed, stream=f"rows-{stream}")
            views = permuted(count, seed=self._seed, stream=f"views-{stream}") % self._num_views
            self._kept[number] = self._rows.take(places[order]), views
            if len(self._kept) > KEPT_MIXES:
                self._kept.popitem(last=False)
        return self._kept[number]

    def between(self, begin: int, end: int) -> tuple[Rows, Rows]:
        """Return rows and views of some positions."""
        parts = []
        for number in range(self.mix_at(begin), self.mix_at(end - 1) + 1):
            start = self.begin(number)
            here = slice(max(begin - start, 0), end - start)
            parts.append([values[here] for values in self.mix(number)])
        rows, views = (np.concatenate(values) for values in zip(*parts, strict=True))
        return rows, views
