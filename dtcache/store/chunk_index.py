"""Where the chunks of an array's shards lie: 4 bytes per chunk, for the shards used last."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dtcache.store.layout import PayloadArray
from dtcache.store.shard import ABSENT

INDEX_BYTES = 64 << 20
"""Bytes of the index of one array: those of 16 million chunks."""


class ChunkIndex:
    """Offsets and sizes of chunks by shard, within a budget. Safe to share between threads.

    The chunks of a shard that dtcache wrote follow each other, so that one offset per chunk gives
    the sizes too. Any other shard keeps the index of its file.
    """

    def __init__(self, array: PayloadArray) -> None:
        entries = array.shard_rows * array.payloads_per_row
        slots = min(array.num_shards, max(1, INDEX_BYTES // (4 * (entries + 1))))
        # The system allocates a page when it is first written, not here.
        self._edges = np.zeros((slots, entries + 1), np.uint32)
        self._slot_of = np.full(array.num_shards, -1, np.int32)
        self._shard_in = np.full(slots, -1, np.int64)
        self._used = np.zeros(slots, np.int64)
        self._clock = 0
        self._others: OrderedDict[int, NDArray[np.uint64]] = OrderedDict()
        self._most_others = max(1, INDEX_BYTES // (16 * entries))
        self._lock = threading.Lock()

    def find(
        self,
        shards: NDArray[np.int64],
        entries: NDArray[np.int64],
        load: Callable[[list[int]], dict[int, NDArray[np.uint64]]],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return offsets and sizes, int64, of entry `entries[i]` of shard `shards[i]`.

        The offset of an absent chunk is -1. `load` returns the indices of shards, (entries, 2)
        offsets and sizes, of which it reads and checks the files.
        """
        offsets = np.full(len(shards), -1, np.int64)
        sizes = np.zeros(len(shards), np.int64)
        numbers = np.unique(shards)
        most = min(len(self._shard_in), self._most_others)
        for start in range(0, len(numbers), most):
            some = numbers[start : start + most]
            here = np.flatnonzero(np.isin(shards, some)) if len(numbers) > most else slice(None)
            offsets[here], sizes[here] = self._find(shards[here], entries[here], some, load)
        return offsets, sizes

    def _find(
        self,
        shards: NDArray[np.int64],
        entries: NDArray[np.int64],
        numbers: NDArray[np.int64],
        load: Callable[[list[int]], dict[int, NDArray[np.uint64]]],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return offsets and sizes of entries of few shards, which all fit into the budget."""
        tables: dict[int, NDArray[np.uint64]] = {}
        while True:
            with self._lock:
                missing = self._missing(numbers)
                if all(number in tables for number in missing):
                    self._clock += 1
                    self._used[self._slot_of[numbers[self._slot_of[numbers] >= 0]]] = self._clock
                    for number in self._others.keys() & set(numbers.tolist()):
                        self._others.move_to_end(number)
                    for number in missing:
                        self._keep(number, tables[number])
                    return self._lookup(shards, entries)
            tables |= load([number for number in missing if number not in tables])

    def _missing(self, numbers: NDArray[np.int64]) -> list[int]:
        return [n for n in numbers[self._slot_of[numbers] < 0].tolist() if n not in self._others]

    def _keep(self, number: int, table: NDArray[np.uint64]) -> None:
        """Keep the index of a shard, in place of the one that was used least recently."""
        edges = _edges(table)
        if edges is None:
            self._others[number] = table
            if len(self._others) > self._most_others:
                self._others.popitem(last=False)
            return
        slot = int(np.argmin(self._used))
        if self._shard_in[slot] >= 0:
            self._slot_of[self._shard_in[slot]] = -1
        self._edges[slot] = edges
        self._shard_in[slot] = number
        self._slot_of[number] = slot
        self._used[slot] = self._clock

    def _lookup(
        self, shards: NDArray[np.int64], entries: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        slots = self._slot_of[shards]
        begin = self._edges[slots, entries].astype(np.int64)
        sizes = self._edges[slots, entries + 1].astype(np.int64) - begin
        begin[sizes == 0] = -1
        for place in np.flatnonzero(slots < 0).tolist():
            offset, size = self._others[int(shards[place])][entries[place]]
            begin[place] = -1 if offset == ABSENT else int(offset)
            sizes[place] = 0 if offset == ABSENT else int(size)
        return begin, sizes


def _edges(table: NDArray[np.uint64]) -> NDArray[np.uint32] | None:
    """Return where each chunk begins, and the last one ends; None if chunks do not follow so.

    Absent chunks at the end have no bytes.
    """
    present = table[:, 0] != ABSENT
    count = int(present.sum())
    ends = table[:count].sum(1)
    if not present[:count].all() or not count or int(ends[-1]) >= 1 << 32:
        return None
    if table[0, 0] != 0 or (table[1:count, 0] != ends[:-1]).any() or not table[:count, 1].all():
        return None
    edges = np.full(len(table) + 1, ends[-1], np.uint32)
    edges[:count] = table[:count, 0]
    return edges
