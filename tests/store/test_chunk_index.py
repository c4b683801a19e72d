"""The index of chunks gives what the shards' own indices hold, within its budget."""

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from dtcache.store import chunk_index
from dtcache.store.chunk_index import ChunkIndex
from dtcache.store.layout import PayloadArray
from dtcache.store.shard import ABSENT

SHARDS = 9
ENTRIES = 6


def tables(seed: int) -> dict[int, NDArray[np.uint64]]:
    """Return indices of shards: chunks in order, chunks in any order, gaps and absent chunks."""
    rng = np.random.default_rng(seed)
    found = {}
    for shard in range(SHARDS):
        sizes = rng.integers(1, 90, ENTRIES)
        order = rng.permutation(ENTRIES) if shard % 3 == 1 else np.arange(ENTRIES)
        gap = 5 if shard % 3 == 2 else 0
        offsets = np.empty(ENTRIES, np.int64)
        offsets[order] = np.cumsum(sizes[order] + gap) - sizes[order]
        offsets -= 0 if gap else offsets.min()
        table = np.stack([offsets, sizes], 1).astype(np.uint64)
        if shard == SHARDS - 1 or shard % 4 == 3:
            table[3:] = ABSENT
        if shard == 4:
            table[0] = ABSENT
        if shard == 6:
            table[:, 0] += 1 << 33
        found[shard] = table
    return found


@pytest.mark.parametrize("budget", [1, 80, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_are_those_of_the_shards(
    seed: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets and sizes in any order equal the tables; a shard that is kept is not loaded again."""
    monkeypatch.setattr(chunk_index, "INDEX_BYTES", budget)
    known = tables(seed)
    array = PayloadArray(
        name="t1", fingerprint="0" * 64, shape=(3 * SHARDS, 2, 16), shard_rows=ENTRIES // 2
    )
    index = ChunkIndex(array)
    loads: list[int] = []

    def load(numbers: list[int]) -> dict[int, NDArray[np.uint64]]:
        loads.extend(numbers)
        return {number: known[number] for number in numbers}

    def check(rng: np.random.Generator) -> None:
        shards = rng.integers(0, SHARDS, 20)
        entries = rng.integers(0, ENTRIES, 20)
        offsets, sizes = index.find(shards, entries, load)
        for place, (shard, entry) in enumerate(zip(shards, entries, strict=True)):
            offset, size = known[shard][entry]
            wanted = (-1, 0) if offset == ABSENT else (int(offset), int(size))
            assert (int(offsets[place]), int(sizes[place])) == wanted

    for number in range(10):
        check(np.random.default_rng([seed, number]))
    if budget == 1 << 20:
        assert sorted(loads) == sorted(set(loads))
    threads = [
        threading.Thread(target=check, args=(np.random.default_rng([seed, 99, n]),))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_chunk_takes_four_bytes() -> None:
    """Shards as dtcache writes them keep one uint32 per chunk, and one more per shard."""
    array = PayloadArray(name="t1", fingerprint="0" * 64, shape=(4096, 2, 16), shard_rows=1024)
    assert ChunkIndex(array)._edges.nbytes == 4 * (4096 * 2 + 4)
