"""The sample index and the shard index: Parquet files with one fixed encoding."""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.names import normal_form
from dtcache.recipe import FailedSample, Sample
from dtcache.samples import Column, SampleList
from dtcache.store.commits import ANEW, CommitRecord, ShardObject, commit_path, read_commits
from dtcache.store.layout import SAMPLES, SHARDS
from dtcache.store.manifest import CacheManifest

AT_ONCE = 1 << 16
NOT_YET = "not extracted yet"
"""Failure reason of the rows that an unfinished cache does not have yet."""
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
    """Return the SHA-256 over keys and labels, in row order."""
    return hash_keys((sample.key, sample.label) for sample in samples)


def hash_keys(pairs: Iterable[tuple[str, int | None]]) -> str:
    """Return the SHA-256 over (key, label) pairs."""
    digest = hashlib.sha256()
    for key, label in pairs:
        digest.update(f"{key}\0{label}\n".encode())
    return digest.hexdigest()


def changed_samples(was: pa.Table, samples: SampleList) -> str:
    """Return how samples differ from a cache's index, in words for an error message.

    The words name added and removed images and changed labels, or else a changed order.
    """
    now = samples_table((s.key for s in samples), (s.label for s in samples))
    both = min(len(was), len(now))
    if was["key"][:both].equals(now["key"][:both]) and was["label"][:both].equals(
        now["label"][:both]
    ):
        return f"the cache has {len(was)} of the images, {len(now)} are selected now (`limit`)"
    limited = len(samples) < len(samples.source_keys)
    removed = was["key"].filter(
        pc.invert(pc.is_in(was["key"], pa.array(samples.source_keys, pa.string())))
    )
    added = now["key"].filter(pc.invert(pc.is_in(now["key"], was["key"])))
    changes = []
    if len(added) == len(removed) and len(added) and _same_but_form(added, removed):
        return f"{_named('renamed', added)}, from one Unicode form to another"
    if len(added) and not limited:
        changes.append(_named("added", added))
    if len(removed):
        changes.append(_named("removed", removed))
    place = pc.index_in(now["key"], was["key"])
    before = was["label"].take(place)
    other = pc.and_(
        place.is_valid(), pc.not_equal(pc.fill_null(before, -1), pc.fill_null(now["label"], -1))
    )
    if pc.any(other).as_py():
        key, old, new = (column.filter(other)[0] for column in (now["key"], before, now["label"]))
        changes.append(
            f"labels changed, of {pc.sum(other)} images (such as {key}: {old} in the cache, "
            f"{new} now)"
        )
    if not changes and limited:
        changes.append(
            f"`limit` selects other images of the {len(samples.source_keys)} that the source has "
            "now"
        )
    return " and ".join(changes) or "the order of the images changed"


def _same_but_form(first: pa.ChunkedArray, second: pa.ChunkedArray) -> bool:
    """Return whether both have the same names in different Unicode forms."""
    forms = (sorted(map(normal_form, keys.to_pylist())) for keys in (first, second))
    return next(forms) == next(forms)


def _named(change: str, keys: pa.ChunkedArray) -> str:
    count = "1 image was" if len(keys) == 1 else f"{len(keys)} images were"
    return f"{count} {change} (first {min(keys.to_pylist())})"


def samples_table(
    keys: Iterable[str],
    labels: Iterable[int | None],
    content: Iterable[bytes | None] | None = None,
    failures: Iterable[str | None] | None = None,
) -> pa.Table:
    """Return the sample index. Content hashes and failures are null while the cache is written."""
    names = _column(keys, pa.string())
    rest = [labels, content, failures]
    columns = [
        pa.nulls(len(names), field.type) if values is None else _column(values, field.type)
        for values, field in zip(rest, list(SCHEMA)[2:], strict=True)
    ]
    return pa.Table.from_arrays([pa.array(np.arange(len(names))), names, *columns], schema=SCHEMA)


def _column(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    """Return values as one array.

    A list of all values would take twice the memory, so they are converted in parts.
    """
    remaining = iter(values)
    parts = iter(lambda: pa.array(islice(remaining, AT_ONCE), kind), pa.array([], kind))
    return pa.chunked_array(list(parts), kind).combine_chunks()


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as a Parquet file: always the same bytes with one version of pyarrow."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file of the cache. Raises CacheDamagedError if it is missing or invalid."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CacheDamagedError(
            f"{path}: missing or damaged ({error}); delete this cache and extract it again"
        ) from error


def read_samples(root: Path, manifest: CacheManifest) -> pa.Table:
    """Read a cache's sample index.

    Raises CacheDamagedError if it does not have one row per sample of the recipe.
    """
    table = read_table(root / SAMPLES)
    if len(table) != manifest.num_samples:
        raise CacheDamagedError(
            f"{root / SAMPLES}: expected {manifest.num_samples} rows, got {len(table)}; {AGAIN}"
        )
    return table


def sealed_samples(path: Path, samples_sha256: str, records: Sequence[CommitRecord]) -> pa.Table:
    """Return the finished sample index: the index at `path`, completed from the commit records.

    `records` are those of all shards, in shard order. Raises CacheDamagedError if keys and labels
    are not those whose hash the recipe records.
    """
    table = read_table(path)
    try:
        keys = Column[str](table["key"])
        labels = Column[int | None](table["label"])
    except KeyError as error:
        raise CacheDamagedError(
            f"{path}: expected a column {error}; delete this cache and extract it again"
        ) from error
    if hash_keys(zip(keys, labels, strict=True)) != samples_sha256:
        raise CacheDamagedError(
            f"{path}: not the samples of the recipe; delete this cache and extract it again"
        )
    failures: list[str | None] = [None] * len(keys)
    for failed in (f for record in records for f in record.failures):
        failures[failed.row] = failed.reason
    content = (
        bytes.fromhex(sha) if sha else None for record in records for sha in record.content_sha256
    )
    return samples_table(keys, labels, content, failures)


def committed(root: Path, manifest: CacheManifest) -> tuple[pa.Table, dict[str, int]]:
    """Return the sample index and the shard file sizes of an unfinished cache.

    Rows of shards without a commit record count as failed, with reason NOT_YET. Raises
    CacheDamagedError if a record is damaged or belongs to another cache.
    """
    table = read_samples(root, manifest)
    failures: list[str | None] = [NOT_YET] * manifest.num_samples
    content: list[bytes | None] = [None] * manifest.num_samples
    records = read_commits(root)
    for shard, record in records.items():
        if record.fingerprint != manifest.fingerprint:
            raise CacheDamagedError(
                f"{commit_path(root, shard)}: the record belongs to another cache; {AGAIN}"
            )
        require_rows(root, manifest, record)
        rows = manifest.rows_of(shard)
        content[rows.start : rows.stop] = [
            bytes.fromhex(sha) if sha else None for sha in record.content_sha256
        ]
        failures[rows.start : rows.stop] = [None] * len(rows)
        for failed in record.failures:
            failures[failed.row] = failed.reason
    samples = samples_table(
        Column[str](table["key"]), Column[int | None](table["label"]), content, failures
    )
    return samples, {o.path: o.size for record in records.values() for o in record.objects}


def require_rows(root: Path, manifest: CacheManifest, record: CommitRecord) -> None:
    """Raise CacheDamagedError if a commit record does not fit the rows of its shard."""
    problem = manifest.rows_problem(record)
    if problem is not None:
        raise CacheDamagedError(f"{commit_path(root, record.shard)}: {problem}; {ANEW}")


def shards_table(objects: Iterable[tuple[int, ShardObject]]) -> pa.Table:
    """Return the shard index of (shard, object) pairs that are in shard order."""
    rows = [(shard, o.path, o.size, o.sha256) for shard, o in objects]
    return pa.Table.from_arrays(
        [pa.array(column) for column in zip(*rows, strict=True)], schema=SHARD_SCHEMA
    )


def read_objects(root: Path) -> list[tuple[str, int, str]]:
    """Return (path, bytes, SHA-256) of every shard file of a sealed cache.

    Raises CacheDamagedError.
    """
    table = read_table(root / SHARDS)
    return list(
        zip(*(table[name].to_pylist() for name in ("path", "bytes", "sha256")), strict=True)
    )


def damaged_objects(root: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the files that are missing or not of the size in `sizes`, with their actual size."""
    damaged = {}
    for name, size in sizes.items():
        path = root / name
        if not path.is_file():
            damaged[name] = "no file"
        elif path.stat().st_size != size:
            damaged[name] = f"{path.stat().st_size} bytes"
    return damaged


def read_failures(path: Path) -> list[FailedSample]:
    """Return the failed samples of an index file (see `failed_samples`)."""
    return failed_samples(read_table(path))


def failed_samples(table: pa.Table) -> list[FailedSample]:
    """Return the samples of an index that have a row but no features, in row order."""
    rows = zip(
        table["row"].to_pylist(),
        table["key"].to_pylist(),
        table["failure"].to_pylist(),
        strict=True,
    )
    return [
        FailedSample(row=row, key=key, reason=reason)
        for row, key, reason in rows
        if reason is not None
    ]
