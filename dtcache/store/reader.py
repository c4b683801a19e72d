"""Reading a cache: checked at open, every chunk checked when it is read."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtcache.errors import CacheDamagedError, CacheIncompleteError
from dtcache.storage import file_sha256
from dtcache.store.layout import SAMPLES, SHARDS, PayloadArray
from dtcache.store.manifest import CacheManifest, read_manifest
from dtcache.store.samples import read_table
from dtcache.store.shard import ABSENT, index_bytes, parse_index, unpack_chunk

MAX_OPEN_FILES = 128


class CacheReader:
    """Random access to the payloads of a sealed cache; safe to share between threads."""

    def __init__(self, root: Path) -> None:
        """Open a cache and check that every file that its manifest names is there, at its size.

        Raises CacheNotFoundError, CacheIncompleteError or CacheDamagedError.
        """
        self.root = root
        self.manifest: CacheManifest = read_manifest(root)
        if self.manifest.state != "sealed":
            raise CacheIncompleteError(
                f"{root}: the cache is not complete; run its dtcache extract command again to finish it"
            )
        for name, sha256 in self.manifest.files.items():
            path = root / name
            if not path.is_file() or file_sha256(path) != sha256:
                raise CacheDamagedError(f"{path}: missing or not as the manifest says; extract this cache again")
        self.samples: pa.Table = read_table(root / SAMPLES)
        self._sizes = _check_sizes(root)
        self._shards: OrderedDict[tuple[str, int], _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Refuse to travel: open a cache in the process that reads it."""
        raise TypeError("a CacheReader holds open files; open the cache again in the other process")

    @property
    def usable_rows(self) -> NDArray[np.int64]:
        """Rows whose image did not fail."""
        return np.flatnonzero(self.samples["failure"].is_null().to_numpy()).astype(np.int64)

    def payloads(self, name: str, rows: Sequence[int], views: Sequence[int]) -> NDArray[np.uint8]:
        """Return the padded payloads (B, L) of (row, view) pairs of one array; images have the one view 0.

        Raises CacheDamagedError naming the sample and array where a byte is not the one written, IndexError for a
        view that the array does not have.
        """
        array = self.manifest.arrays[name]
        if any(not 0 <= view < array.payloads_a_row for view in views):
            raise IndexError(f"{name} has views 0 to {array.payloads_a_row - 1}, got {max(views)}")
        out = np.empty((len(rows), array.length), np.uint8)
        for place, (row, view) in enumerate(zip(rows, views, strict=True)):
            shard, inner = divmod(int(row), array.shard_rows)
            opened = self._open(array, shard)
            entry = inner * array.payloads_a_row + int(view)
            opened.read(entry, out[place], where=f"{opened.path} sample {self._key(row)} of {name}, view {view}")
        return out

    def _key(self, row: int) -> str:
        return str(self.samples["key"][int(row)])

    def _open(self, array: PayloadArray, shard: int) -> "_OpenShard":
        """Return an open shard with its index, keeping the most recently used ones open."""
        with self._lock:
            found = self._shards.get((array.name, shard))
            if found is not None:
                self._shards.move_to_end((array.name, shard))
                return found
            path = array.object_path(shard)
            entries = array.shard_rows * array.payloads_a_row
            opened = _OpenShard(self.root / path, self._sizes[path], entries)
            self._shards[(array.name, shard)] = opened
            if len(self._shards) > MAX_OPEN_FILES:
                # Not closed here: another thread may be reading it; it closes when the last user lets go.
                self._shards.popitem(last=False)
            return opened


class _OpenShard:
    """One shard's file and index."""

    def __init__(self, path: Path, size: int, entries: int) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CacheDamagedError(f"{path}: {error.strerror}, but it was there when the cache was opened") from error
        tail = index_bytes(entries)
        self._index = parse_index(self._pread(tail, max(0, size - tail)), entries, size, str(path))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, entry: int, out: NDArray[np.uint8], where: str) -> None:
        offset, size = self._index[entry]
        if offset == ABSENT:
            raise CacheDamagedError(f"{where}: the shard holds no such chunk; extract this cache again")
        unpack_chunk(self._pread(int(size), int(offset)), out, where)

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._handle, size, offset)
        except OSError as error:
            raise CacheDamagedError(f"{self.path}: {error.strerror} at byte {offset}; check the disk") from error


def _check_sizes(root: Path) -> dict[str, int]:
    """Return every shard's size by path. Raises CacheDamagedError where a file is missing or of another size."""
    table = read_table(root / SHARDS)
    sizes = dict(zip(table["path"].to_pylist(), table["bytes"].to_pylist(), strict=True))
    for name, size in sizes.items():
        path = root / name
        if not path.is_file() or path.stat().st_size != size:
            got = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
            raise CacheDamagedError(f"{path}: expected {size} bytes, got {got}; extract this cache again")
    return sizes
