"""The shard index: path, bytes and SHA-256 of every shard file of a sealed cache."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.store.commits import ShardObject
from dtcache.store.layout import SHARDS, PayloadArray
from dtcache.store.manifest import CacheManifest
from dtcache.store.parquet_tables import read_table
from dtcache.store.shard import shard_bounds

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


def read_objects(root: Path, manifest: CacheManifest) -> dict[str, ShardObject]:
    """Return every shard file of a sealed cache by path, in shard order.

    Raises CacheDamagedError, naming the first difference, if the index does not list exactly the
    files of the manifest's arrays, each with a possible size.
    """
    table = read_table(root / SHARDS, SHARD_SCHEMA)
    arrays = manifest.arrays.values()
    if len(table) != manifest.num_shards * len(arrays):
        raise CacheDamagedError(
            f"{root / SHARDS}: expected one row per shard and array, "
            f"{manifest.num_shards * len(arrays)}, got {len(table)}; {AGAIN}"
        )
    columns = (table[name].to_pylist() for name in ("path", "bytes", "sha256"))
    listed = {
        path: ShardObject(path=path, size=size, sha256=sha256)
        for path, size, sha256 in zip(*columns, strict=True)
    }
    objects = {}
    for shard in range(manifest.num_shards):
        for array in arrays:
            path = array.object_path(shard)
            if path not in listed:
                raise CacheDamagedError(f"{root / SHARDS}: it does not list {path}; {AGAIN}")
            require_possible(root / SHARDS, listed[path], array)
            objects[path] = listed[path]
    return objects


def require_possible(source: Path, listed: ShardObject, array: PayloadArray) -> None:
    """Raise CacheDamagedError if a shard's file cannot have the recorded size or SHA-256."""
    bounds = shard_bounds(array)
    if listed.size not in bounds or not _SHA256.fullmatch(listed.sha256):
        raise CacheDamagedError(
            f"{source}: {listed.path}: expected {bounds.start} to {bounds.stop - 1} bytes and a "
            f"SHA-256, got {listed.size} and {listed.sha256[:64]!r}; {AGAIN}"
        )


def damaged_objects(root: Path, objects: Mapping[str, ShardObject]) -> dict[str, str]:
    """Return the files that are missing or not of their recorded size, with their actual size."""
    damaged = {}
    for name, recorded in objects.items():
        path = root / name
        if not path.is_file():
            damaged[name] = "no file"
        elif path.stat().st_size != recorded.size:
            damaged[name] = f"{path.stat().st_size} bytes"
    return damaged
