"""The sample index: key, label, content hash and failure of every row."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.names import normal_form
from dtcache.recipe import FailedSample, Sample
from dtcache.samples import Column, SampleList
from dtcache.store.commits import ANEW, CommitRecord, ShardObject, commit_path, read_commits
from dtcache.store.layout import SAMPLES
from dtcache.store.manifest import CacheManifest
from dtcache.store.parquet_tables import read_table
from dtcache.store.shard_index import require_possible

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


def read_samples(root: Path, manifest: CacheManifest, *, bounded: bool = True) -> pa.Table:
    """Read a cache's sample index, within the bounds of `read_table`.

    Raises CacheDamagedError if it does not have one row per sample of the recipe, in row order.
    """
    table = read_table(root / SAMPLES, SCHEMA, bounded=bounded)
    if len(table) != manifest.num_samples:
        raise CacheDamagedError(
            f"{root / SAMPLES}: expected {manifest.num_samples} rows, got {len(table)}; {AGAIN}"
        )
    if not table["row"].equals(pa.chunked_array([np.arange(len(table))])):
        raise CacheDamagedError(f"{root / SAMPLES}: its rows are not numbered from 0; {AGAIN}")
    return table


def sealed_samples(path: Path, samples_sha256: str, records: Sequence[CommitRecord]) -> pa.Table:
    """Return the finished sample index: the index at `path`, completed from the commit records.

    `records` are those of all shards, in shard order. Raises CacheDamagedError if keys and labels
    are not those whose hash the recipe records.
    """
    table = read_table(path, SCHEMA, bounded=False)
    keys = Column[str](table["key"])
    labels = Column[int | None](table["label"])
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


def committed(root: Path, manifest: CacheManifest) -> tuple[pa.Table, dict[str, ShardObject]]:
    """Return the sample index and the shard files, by path, of an unfinished cache.

    Rows of shards without a commit record count as failed, with reason NOT_YET. Raises
    CacheDamagedError if a record is damaged or belongs to another cache.
    """
    table = read_samples(root, manifest)
    failures: list[str | None] = [NOT_YET] * manifest.num_samples
    content: list[bytes | None] = [None] * manifest.num_samples
    records = read_commits(root)
    for shard, record in records.items():
        require_record(root, manifest, record)
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
    return samples, {o.path: o for record in records.values() for o in record.objects}


def require_record(root: Path, manifest: CacheManifest, record: CommitRecord) -> None:
    """Raise CacheDamagedError if a commit record is not of this cache or not of its shard."""
    path = commit_path(root, record.shard)
    problem = manifest.record_problem(record)
    if problem is not None:
        raise CacheDamagedError(f"{path}: {problem}; {ANEW}")
    for listed, array in zip(record.objects, manifest.arrays.values(), strict=True):
        require_possible(path, listed, array)


def failures_in(table: pa.Table) -> pa.Table:
    """Return the rows of an index that have no features: row, key and failure."""
    return table.select(["row", "key", "failure"]).filter(table["failure"].is_valid())


def failed_samples(table: pa.Table) -> list[FailedSample]:
    """Return the samples of an index that have a row but no features, in row order."""
    return [
        FailedSample(row=failed["row"], key=failed["key"], reason=failed["failure"])
        for failed in failures_in(table).to_pylist()
    ]
