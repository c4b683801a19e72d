"""The sample index and the shard index, as Parquet with one fixed encoding."""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dtcache.errors import CacheDamagedError
from dtcache.spec import FailedSample, Sample, sha256_json
from dtcache.store.commits import CommitRecord, ShardObject
from dtcache.store.layout import SHARDS

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("content_sha256", pa.binary(32)),
        pa.field("failure", pa.string()),
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


def hash_samples(samples: Sequence[Sample]) -> str:
    """Return the SHA-256 over keys and labels in row order."""
    return hash_keys([sample.key for sample in samples], [sample.label for sample in samples])


def hash_keys(keys: Sequence[str], labels: Sequence[int | None]) -> str:
    """Return the SHA-256 over keys and labels that run together."""
    digest = hashlib.sha256()
    for key, label in zip(keys, labels, strict=True):
        digest.update(f"{key}\0{label}\n".encode())
    return digest.hexdigest()


def samples_table(
    keys: Sequence[str], labels: Sequence[int | None], content: Sequence[bytes | None], failures: Sequence[str | None]
) -> pa.Table:
    """Return the sample index; content hashes and failures are null while the cache is being written."""
    return pa.Table.from_arrays(
        [
            pa.array(range(len(keys)), pa.int64()),
            pa.array(keys, pa.string()),
            pa.array(labels, pa.int32()),
            pa.array(content, pa.binary(32)),
            pa.array(failures, pa.string()),
        ],
        schema=SCHEMA,
    )


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table's Parquet file; the same table always gives the same bytes with one version of pyarrow."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file of the cache. Raises CacheDamagedError where it is missing or not one."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CacheDamagedError(
            f"{path}: missing or damaged ({error}); delete this cache and extract it again"
        ) from error


def sealed_samples(path: Path, samples_sha256: str, records: Sequence[CommitRecord]) -> pa.Table:
    """Return the finished sample index: the begun one at `path`, with what the records of all shards, in order, add.

    Raises CacheDamagedError where its keys and labels are not the ones that the recipe's `samples_sha256` names.
    """
    table = read_table(path)
    try:
        keys, labels = table["key"].to_pylist(), table["label"].to_pylist()
    except KeyError as error:
        raise CacheDamagedError(f"{path}: expected a column {error}; delete this cache and extract it again") from error
    if hash_keys(keys, labels) != samples_sha256:
        raise CacheDamagedError(
            f"{path}: not the samples that the recipe names; delete this cache and extract it again"
        )
    failures: list[str | None] = [None] * len(keys)
    for failed in (f for record in records for f in record.failures):
        failures[failed.row] = failed.reason
    content = [bytes.fromhex(sha) if sha else None for record in records for sha in record.content_sha256]
    return samples_table(keys, labels, content, failures)


def shards_table(objects: Iterable[tuple[int, ShardObject]]) -> pa.Table:
    """Return the shard index of (shard, object) pairs, given in shard order."""
    rows = [(shard, o.path, o.size, o.sha256) for shard, o in objects]
    return pa.Table.from_arrays([pa.array(column) for column in zip(*rows, strict=True)], schema=SHARD_SCHEMA)


def read_objects(root: Path) -> list[tuple[str, int, str]]:
    """Return (path, bytes, SHA-256) of every shard of a sealed cache. Raises CacheDamagedError."""
    table = read_table(root / SHARDS)
    return list(zip(*(table[name].to_pylist() for name in ("path", "bytes", "sha256")), strict=True))


def damaged_objects(root: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """Return those of some files that are missing or of another size than the one given, and what is there instead."""
    found = {}
    for name, size in sizes.items():
        path = root / name
        if not path.is_file():
            found[name] = "no file"
        elif path.stat().st_size != size:
            found[name] = f"{path.stat().st_size} bytes"
    return found


def read_failures(path: Path) -> list[FailedSample]:
    """Return the samples of an index that have a row but no features, in row order."""
    table = read_table(path)
    rows = zip(table["row"].to_pylist(), table["key"].to_pylist(), table["failure"].to_pylist(), strict=True)
    return [FailedSample(row=row, key=key, reason=reason) for row, key, reason in rows if reason is not None]


def held_out(keys: Sequence[str]) -> list[int]:
    """Return the places of the held-out samples: one per cent, at least 64 (but at most half), by hash of the key.

    A key's membership hangs on the set of keys only, never on their order.
    """
    count = min(max(64, len(keys) // 100), len(keys) // 2)
    ranked = sorted(range(len(keys)), key=lambda i: sha256_json(["held-out", keys[i]]))
    return sorted(ranked[:count])
