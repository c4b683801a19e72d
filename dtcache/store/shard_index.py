"""The shard index: path, bytes and SHA-256 of every shard file of a sealed cache."""

import os
import re
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.store.commits import ShardObject
from dtcache.store.layout import DATA, SHARDS, PayloadArray
from dtcache.store.manifest import CacheManifest
from dtcache.store.parquet_tables import read_table
from dtcache.store.shard import shard_bounds

MAX_DIGITS = 10
"""Most digits of a shard's number in a file name."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


def shards_table(objects: Iterable[tuple[int, ShardObject]]) -> pa.Table:
    """Return the shard index of (shard, object) pairs that are in shard order."""
    rows = [(shard, o.path, o.size, o.sha256) for shard, o in objects]
    return pa.Table.from_arrays(
        [pa.array(column) for column in zip(*rows, strict=True)], schema=SHARD_SCHEMA
    )


class ShardObjects(Mapping[str, ShardObject]):
    """The shard files of a sealed cache by path, held as columns: 40 bytes per file."""

    def __init__(
        self, arrays: Sequence[PayloadArray], sizes: NDArray[np.int64], digests: NDArray[np.uint8]
    ) -> None:
        """Take sizes (files,) and SHA-256 (files, 32), by shard, then in the order of `arrays`."""
        self._arrays = arrays
        self._number_of = {array.name: number for number, array in enumerate(arrays)}
        self._sizes = sizes
        self._digests = digests

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[str]:
        """Yield the paths, shard by shard."""
        around = [array.around_shard for array in self._arrays]
        for shard in range(len(self) // len(self._arrays)):
            for before, after in around:
                yield f"{before}{shard}{after}"

    def items(self) -> ItemsView[str, ShardObject]:
        """Return paths and records; unlike `self[path]`, no path is parsed."""
        return _Items(self)

    def __getitem__(self, path: str) -> ShardObject:
        """Return the record of a file. Raises KeyError for a path that the index does not list."""
        folder, _, name = path.removeprefix(f"{DATA}/").rpartition("/")
        number = self._number_of.get(folder)
        shard = name.split(".")[1] if name.startswith("c.") else ""
        if number is None or not shard.isdecimal() or len(shard) > MAX_DIGITS:
            raise KeyError(path)
        place = int(shard) * len(self._arrays) + number
        if place >= len(self) or self._arrays[number].object_path(int(shard)) != path:
            raise KeyError(path)
        return ShardObject(
            path=path, size=int(self._sizes[place]), sha256=self._digests[place].tobytes().hex()
        )


class _Items(ItemsView[str, ShardObject]):
    def __init__(self, objects: ShardObjects) -> None:
        super().__init__(objects)
        self._objects = objects

    def __iter__(self) -> Iterator[tuple[str, ShardObject]]:
        sizes = self._objects._sizes.tolist()
        for path, size, digest in zip(self._objects, sizes, self._objects._digests, strict=True):
            yield path, ShardObject(path=path, size=size, sha256=digest.tobytes().hex())


def read_objects(root: Path, manifest: CacheManifest) -> ShardObjects:
    """Return every shard file of a sealed cache by path, in shard order.

    Raises CacheDamagedError, naming the first difference, if the index does not list exactly the
    files of the manifest's arrays, each with a possible size.
    """
    table = read_table(root / SHARDS, SHARD_SCHEMA)
    arrays = list(manifest.arrays.values())
    if len(table) != manifest.num_shards * len(arrays):
        raise CacheDamagedError(
            f"{root / SHARDS}: expected one row per shard and array, "
            f"{manifest.num_shards * len(arrays)}, got {len(table)}; {AGAIN}"
        )
    sizes = table["bytes"].to_numpy()
    is_sha256 = (
        pc.match_substring_regex(table["sha256"], _SHA256.pattern).to_numpy()
        & pc.equal(pc.binary_length(table["sha256"]), 64).to_numpy()
    )
    numbers = pa.array(np.arange(manifest.num_shards)).cast(pa.string())
    for first, array in enumerate(arrays):
        here = slice(first, None, len(arrays))
        bounds = shard_bounds(array)
        before, after = array.around_shard
        expected = pc.binary_join_element_wise(before, numbers, after, "")
        of_array = pa.array(np.arange(first, len(table), len(arrays)))
        is_listed = pc.equal(table["path"].take(of_array), expected).to_numpy()
        if not is_listed.all():
            lacking = expected[int(np.argmin(is_listed))]
            raise CacheDamagedError(f"{root / SHARDS}: it does not list {lacking}; {AGAIN}")
        is_possible = is_sha256[here] & (sizes[here] >= bounds.start) & (sizes[here] < bounds.stop)
        if not is_possible.all():
            wrong = table.slice(first + len(arrays) * int(np.argmin(is_possible)), 1).to_pylist()[0]
            listed = ShardObject(path=wrong["path"], size=wrong["bytes"], sha256=wrong["sha256"])
            require_possible(root / SHARDS, listed, array)
    digests = np.frombuffer(bytes.fromhex("".join(table["sha256"].to_pylist())), np.uint8)
    return ShardObjects(arrays, sizes.astype(np.int64), digests.reshape(-1, 32))


def require_possible(source: Path, listed: ShardObject, array: PayloadArray) -> None:
    """Raise CacheDamagedError if a shard's file cannot have the recorded size or SHA-256."""
    bounds = shard_bounds(array)
    if listed.size not in bounds or not _SHA256.fullmatch(listed.sha256):
        raise CacheDamagedError(
            f"{source}: {listed.path}: expected {bounds.start} to {bounds.stop - 1} bytes and a "
            f"SHA-256, got {listed.size} and {listed.sha256[:64]!r}; {AGAIN}"
        )


def damaged_objects(root: Path, objects: Mapping[str, ShardObject]) -> dict[str, str]:
    """Return the files that are missing or not of their recorded size, with their actual size.

    Each folder is listed once.
    """
    sizes: dict[str, dict[str, int]] = {}
    damaged = {}
    for path, recorded in objects.items():
        folder, _, name = path.rpartition("/")
        if folder not in sizes:
            sizes[folder] = _file_sizes(root / folder)
        size = sizes[folder].get(name)
        if size is None:
            damaged[path] = "no file"
        elif size != recorded.size:
            damaged[path] = f"{size} bytes"
    return damaged


def _file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder, by name; none without the folder."""
    sizes = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        pass  # then every file in it is missing
    return sizes
