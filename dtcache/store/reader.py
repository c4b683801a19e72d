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
from dtcache.store.layout import SAMPLES, PayloadArray
from dtcache.store.manifest import CacheManifest, read_manifest
from dtcache.store.samples import damaged_objects, read_objects, read_table
from dtcache.store.shard import ABSENT, index_bytes, parse_index, unpack_chunk

MAX_OPEN_FILES = 256
AGAIN = "delete this cache and extract it again"


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
                raise CacheDamagedError(f"{path}: missing or not as the manifest says; {AGAIN}")
        self.samples: pa.Table = read_table(root / SAMPLES)
        self._objects = {path: size for path, size, _ in read_objects(root)}
        for name, got in damaged_objects(root, self._objects).items():
            raise CacheDamagedError(f"{root / name}: expected {self._objects[name]} bytes, got {got}; {AGAIN}")
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._indices: dict[str, NDArray[np.uint64]] = {}
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
            path = array.object_path(shard)
            try:
                self._read(path, array, inner * array.payloads_a_row + int(view), out[place])
            except CacheDamagedError as error:
                key = self.samples["key"][int(row)]
                raise CacheDamagedError(
                    f"{self.root / path}: sample {key} of {name}, view {view}: {error}; {AGAIN}"
                ) from error
        return out

    def _read(self, path: str, array: PayloadArray, entry: int, out: NDArray[np.uint8]) -> None:
        file = self._open(path)
        index = self._indices.get(path)
        if index is None:
            # 16 bytes a chunk, kept for good: two threads that race here read the same index.
            entries = array.shard_rows * array.payloads_a_row
            size, tail = self._objects[path], index_bytes(entries)
            index = self._indices[path] = parse_index(file.read(max(0, size - tail), tail), entries, size)
        offset, size = (int(value) for value in index[entry])
        if offset == ABSENT:
            raise CacheDamagedError("the shard holds no such chunk")
        unpack_chunk(file.read(offset, size), out)

    def _open(self, path: str) -> "_OpenFile":
        """Return an open shard, keeping the most recently used ones open."""
        with self._lock:
            found = self._files.get(path)
            if found is None:
                found = self._files[path] = _OpenFile(self.root / path)
                if len(self._files) > MAX_OPEN_FILES:
                    # Not closed here: another thread may be reading it; it closes when the last user lets go.
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return found


class _OpenFile:
    """A file for reading at places; it closes when nobody holds it."""

    def __init__(self, path: Path) -> None:
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CacheDamagedError(f"{error.strerror}, but it was there when the cache was opened") from error

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._handle, size, offset)
        except OSError as error:
            raise CacheDamagedError(f"{error.strerror} at byte {offset}; check the disk") from error
