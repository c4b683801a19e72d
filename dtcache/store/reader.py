"""Random access to a cache's payloads.

Small files are hashed when the cache is opened, a shard file when it is first read, and the tag of
a payload is compared at each read.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dtcache.errors import AGAIN, CacheDamagedError, CacheError, CacheIncompleteError
from dtcache.hashing import file_problem, sha256_json
from dtcache.payloads import SLACK, Payloads
from dtcache.recipe import Json
from dtcache.row_set import RowSet
from dtcache.store.chunk_index import ChunkIndex
from dtcache.store.commits import ShardObject
from dtcache.store.layout import SAMPLES, PayloadArray
from dtcache.store.manifest import CacheManifest, look_at
from dtcache.store.open_files import OpenFile, open_limit
from dtcache.store.remote import (
    Location,
    RemoteCache,
    damaged_remote_objects,
    local_copy,
)
from dtcache.store.row_groups import EAGER_BYTES
from dtcache.store.sample_index import SampleIndex, committed, read_samples
from dtcache.store.shard import index_bytes, parse_index, unpack_chunk
from dtcache.store.shard_check import CheckedShards
from dtcache.store.shard_index import damaged_objects, read_objects
from dtcache.store.tag import TAG_BYTES, untagged
from dtcache.store.zstd_frame import BLOCK_HEADER, frame_header

HELD_FILES = 64
"""Shard files that one call holds open at a time, beyond those that OpenFiles keeps.

Of a cache in an object store, OpenFiles keeps as many: the disk space of a local copy that was
deleted to make room is free only when it is closed.
"""
STRETCH_GAP = 1 << 16
"""Two chunks at most this many bytes apart are prefetched as one range."""


Allowed = Literal["nothing", "incomplete", "damage"]
"""The parts of a cache that may be missing when it is opened; damage includes incomplete."""


class CacheReader:
    """Random access to the payloads of a cache. Safe to share between threads."""

    def __init__(self, location: Location, *, allow: Allowed = "nothing") -> None:
        """Open a cache and check that every file in its manifest exists, with the recorded size.

        If `allow` is incomplete, an unfinished cache opens with the shards committed so far;
        samples of other shards count as failed. If `allow` is damage, shards may also be lost;
        `usable_rows` leaves out their rows. A cache in an object store must be sealed. Raises
        CacheNotFoundError, CacheIncompleteError or CacheDamagedError, and StorageError if the
        object store fails.
        """
        copy = None
        if isinstance(location, RemoteCache):
            copy = local_copy(location)
            root = copy.root
        else:
            # A later chdir or a moved link changes nothing.
            root = location = location.resolve()
        self.location: Location = location
        """Where the cache is; a local path is resolved."""
        self.root = root
        self._allow = allow
        self.manifest: CacheManifest
        self.samples: SampleIndex
        self.manifest, self.samples, self._objects = look_at(root, partial(_look, root, allow))
        self.damaged: dict[str, str] = (
            damaged_remote_objects(copy, self._objects)
            if copy is not None
            else damaged_objects(root, self._objects)
        )
        """Shard files that are missing or of the wrong size, with a description of the actual file.

        Empty unless `allow` is damage.
        """
        arrays = self.manifest.arrays
        if allow != "damage":
            for name, got in self.damaged.items():
                raise CacheDamagedError(
                    f"{root / name}: expected {self._objects[name].size} bytes, got {got}; {AGAIN}"
                )
        is_sealed = self.manifest.state == "sealed"
        lost = {
            shard
            for array in arrays.values()
            for shard in (range(array.num_shards) if self.damaged or not is_sealed else ())
            if (path := array.object_path(shard)) not in self._objects or path in self.damaged
        }
        rows = [self.manifest.rows_of(shard) for shard in sorted(lost)]
        failed = self.samples.failed
        self.usable = RowSet.all_but(
            self.manifest.num_samples,
            np.append(failed, [r.start for r in rows]),
            np.append(failed + 1, [r.stop for r in rows]),
        )
        """Rows that have features: their images did not fail, and their shards exist."""
        most = open_limit() if copy is None else HELD_FILES
        self._shards = CheckedShards(root, self._objects, most, copy)
        self._indices = {name: ChunkIndex(array) for name, array in arrays.items()}
        self._process = os.getpid()
        self._closed = False

    def __reduce__(self) -> tuple[Any, tuple[Location]]:
        """Pickle as a location: the other process opens and checks the cache again."""
        return partial(CacheReader, allow=self._allow), (self.location,)

    def close(self) -> None:
        """Close the shard files. Later reads raise CacheError; the manifest and samples stay."""
        self._closed = True
        self._shards.close()

    def require_open(self) -> None:
        """Raise CacheError if the cache was closed."""
        if self._closed:
            raise CacheError(f"{self.root}: the cache was closed; open it again")

    @property
    def usable_rows(self) -> NDArray[np.int64]:
        """The rows of `usable` as an array."""
        return self.usable.array()

    @property
    def data_identity(self) -> Json:
        """The identity of the data to train on: the recipe's fingerprint and a hash of the samples.

        An unfinished cache may have more samples when a run resumes; its hash is of the rows.
        """
        sealed = self.manifest.state == "sealed"
        samples = self.manifest.files[SAMPLES] if sealed else sha256_json(self.usable_rows.tolist())
        return {"cache": self.manifest.fingerprint, "samples": samples}

    def payloads(self, name: str, rows: ArrayLike, views: ArrayLike) -> Payloads:
        """Return the payloads of B (row, view) pairs of one array, without their tags.

        Images have only view 0. The payload of a failed sample is empty. Raises CacheDamagedError
        with sample and array if a byte is wrong, IndexError for a row or view that the array does
        not have, and CacheError if the cache is closed.
        """
        self.require_open()
        if os.getpid() != self._process:
            # A forked process opens the files again: locks may have been held when it was forked.
            self._shards = self._shards.in_this_process()
            self._indices = {n: ChunkIndex(a) for n, a in self.manifest.arrays.items()}
            self._process = os.getpid()
        chunks = self._locate(
            self.manifest.arrays[name], np.asarray(rows, np.int64), np.asarray(views, np.int64)
        )
        return self._gather(chunks)

    def will_need(self, name: str, rows: NDArray[np.int64]) -> None:
        """Prefetch all views of rows that will be read soon, in ranges of neighbouring chunks."""
        array = self.manifest.arrays[name]
        views = np.tile(np.arange(array.payloads_per_row), len(rows))
        chunks = self._locate(array, np.repeat(rows, array.payloads_per_row), views)
        for places, shards, counts in chunks.by_shards(HELD_FILES):
            for shard, part in zip(shards, np.split(places, np.cumsum(counts)[:-1]), strict=True):
                begin = chunks.offsets[part]
                end = begin + chunks.sizes[part]
                first = np.flatnonzero(begin > np.append(-STRETCH_GAP, end[:-1]) + STRETCH_GAP - 1)
                last = np.append(first[1:], len(part)) - 1
                self._open(array, shard).will_need(begin[first], end[last] - begin[first])

    def _locate(
        self, array: PayloadArray, rows: NDArray[np.int64], views: NDArray[np.int64]
    ) -> "_Chunks":
        """Return the chunks of (row, view) pairs; the index of a shard is read when it is used."""
        _require_within(array, rows, views)
        shards, inner = np.divmod(rows, array.shard_rows)

        def load(numbers: list[int]) -> dict[int, NDArray[np.uint64]]:
            """Return the indices of shards, whose files are checked first."""
            for number in numbers:
                if array.object_path(number) not in self._objects:
                    first = int(np.argmax(shards == number))
                    reason = "the shard was not committed yet when the cache was opened"
                    raise self._damaged(array, rows[first], views[first], reason)
            self._shards.check(array, numbers)
            return {number: self._read_index(array, number) for number in numbers}

        entries = inner * array.payloads_per_row + views
        offsets, sizes = self._indices[array.name].find(shards, entries, load)
        for place in np.flatnonzero(offsets < 0):
            raise self._damaged(array, rows[place], views[place], "the shard holds no such chunk")
        return _Chunks(
            array=array, rows=rows, views=views, shards=shards, offsets=offsets, sizes=sizes
        )

    def _read_index(self, array: PayloadArray, shard: int) -> NDArray[np.uint64]:
        """Return offsets and sizes of a shard's chunks. Raises CacheDamagedError with the path."""
        file = self._open(array, shard)
        size = file.identity.size
        tail = index_bytes(array.shard_rows * array.payloads_per_row)
        try:
            return parse_index(file.read(max(0, size - tail), tail), array, size)
        except CacheDamagedError as error:
            path = self.root / array.object_path(shard)
            raise CacheDamagedError(f"{path}: {error}; {AGAIN}") from error

    def _gather(self, chunks: "_Chunks") -> Payloads:
        """Read chunks: with the kernel if it knows their frames, else by the slower path."""
        from dtcache.store.read_kernel import gather

        length = chunks.array.length
        head = np.frombuffer(frame_header(length), np.uint8)
        skip = len(head) + BLOCK_HEADER
        # Every chunk begins `skip` bytes before a multiple of 8, so that payloads are aligned.
        ends = _aligned(skip) + np.cumsum(_aligned(np.maximum(chunks.sizes, skip)))
        starts = np.concatenate([np.full(1, _aligned(skip)), ends])
        data = np.empty(int(starts[-1]) + SLACK, np.uint8)
        starts = starts[:-1]
        done = np.zeros(len(starts), np.bool_)
        used = np.zeros(len(starts), np.int64)
        for todo, shards, counts in chunks.by_shards(HELD_FILES):
            files = [self._open(chunks.array, shard) for shard in shards]
            handles = np.repeat(np.array([file.handle for file in files], np.int32), counts)
            gather(
                todo,
                handles,
                chunks.offsets,
                chunks.sizes,
                starts - skip,
                chunks.rows,
                chunks.views,
                chunks.array.tag_seed,
                head,
                length,
                data,
                done,
                used,
            )
        rest = np.flatnonzero(~done)
        if len(rest):
            starts[rest] = len(data) + _aligned(length) * np.arange(len(rest))
            unpacked, used[rest] = self._unpack(chunks, rest)
            data = np.concatenate([data, unpacked, np.empty(SLACK, np.uint8)])
        return Payloads(data=data, starts=starts + TAG_BYTES, sizes=used)

    def _unpack(
        self, chunks: "_Chunks", rest: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Read chunks with any frame, one after the other.

        Returns the payloads with their tags, and the sizes without the tags. Raises
        CacheDamagedError.
        """
        length = chunks.array.length
        seed = chunks.array.tag_seed
        out = np.empty((len(rest), _aligned(length)), np.uint8)
        sizes = np.empty(len(rest), np.int64)
        for index, place in enumerate(rest.tolist()):
            payload = out[index, :length]
            row = int(chunks.rows[place])
            view = int(chunks.views[place])
            file = self._open(chunks.array, int(chunks.shards[place]))
            try:
                unpack_chunk(
                    file.read(int(chunks.offsets[place]), int(chunks.sizes[place])), payload
                )
                sizes[index] = len(untagged(seed, row, view, payload))
            except CacheDamagedError as error:
                raise self._damaged(chunks.array, row, view, str(error)) from error
        return out.reshape(-1), sizes

    def _open(self, array: PayloadArray, shard: int) -> OpenFile:
        """Return the open file of a shard, with the bytes that were written.

        If damage is allowed, only the chunks that are read must be intact; but the file must not be
        another shard's. Raises CacheDamagedError, for a damaged chunk with its sample.
        """
        path = array.object_path(shard)
        file, difference = self._shards.open(array, shard)
        if difference is None or (self._allow == "damage" and difference.bad != {}):
            return file
        if difference.bad:
            entry = min(difference.bad)
            inner, view = divmod(entry, array.payloads_per_row)
            raise self._damaged(array, array.rows_of(shard)[inner], view, difference.bad[entry])
        raise CacheDamagedError(f"{self.root / path}: {difference.reason}; {AGAIN}")

    def _damaged(
        self, array: PayloadArray, row: int | np.int64, view: int | np.int64, reason: str
    ) -> CacheDamagedError:
        path = self.root / array.object_path(int(row) // array.shard_rows)
        key = self.samples.key(int(row))
        return CacheDamagedError(
            f"{path}: sample {key} of {array.name}, view {view}: {reason}; {AGAIN}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunks:
    """The files, offsets and sizes of the chunks of B (row, view) pairs of an array."""

    array: PayloadArray
    rows: NDArray[np.int64]
    views: NDArray[np.int64]
    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def by_shards(
        self, most: int
    ) -> Iterator[tuple[NDArray[np.int64], list[int], NDArray[np.int64]]]:
        """Yield indices of chunks in disk order, their shards, and the number of chunks per shard.

        Each item covers at most `most` shards.
        """
        order = np.lexsort((self.offsets, self.shards))
        numbers, first = np.unique(self.shards[order], return_index=True)
        ends = np.append(first, len(order))
        for start in range(0, len(numbers), most):
            stop = min(start + most, len(numbers))
            some = numbers[start:stop].tolist()
            yield order[ends[start] : ends[stop]], some, np.diff(ends[start : stop + 1])


def _aligned(size: Any) -> Any:
    """Return a size, or an array of sizes, rounded up to a multiple of 8 bytes."""
    return (size + 7) // 8 * 8


def _require_within(array: PayloadArray, rows: NDArray[np.int64], views: NDArray[np.int64]) -> None:
    if rows.shape != views.shape or rows.ndim != 1:
        raise IndexError(
            f"{array.name}: expected as many views as rows, got {views.shape} and {rows.shape}"
        )
    for what, found, count in (
        ("rows", rows, array.shape[0]),
        ("views", views, array.payloads_per_row),
    ):
        if len(found) and not 0 <= found.min() <= found.max() < count:
            wrong = found.min() if found.min() < 0 else found.max()
            raise IndexError(f"{array.name} has {what} 0 to {count - 1}, got {wrong}")


def _look(
    root: Path, allow: Allowed, manifest: CacheManifest
) -> tuple[CacheManifest, SampleIndex, Mapping[str, ShardObject]]:
    """Return a cache's manifest, sample index and shard files by path.

    All other files are checked.
    """
    if manifest.state != "sealed" and allow == "nothing":
        raise CacheIncompleteError(
            f"{root}: the cache is not complete; run its dtcache extract command again to finish it"
        )
    # A large sample index is checked by row groups when they are read.
    is_large = sum(part.bytes for part in manifest.samples) > EAGER_BYTES
    for name, sha256 in manifest.files.items():
        if not (name == SAMPLES and is_large) and file_problem(root / name, sha256) is not None:
            raise CacheDamagedError(f"{root / name}: missing or not as the manifest says; {AGAIN}")
    if manifest.state == "sealed":
        return manifest, read_samples(root, manifest), read_objects(root, manifest)
    return manifest, *committed(root, manifest)
