"""The sample index and the shard index: Parquet files with one fixed encoding."""

import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtcache.errors import AGAIN, CacheDamagedError, one_line
from dtcache.names import normal_form
from dtcache.recipe import FailedSample, Sample
from dtcache.regular_files import open_regular
from dtcache.samples import Column, SampleList
from dtcache.store.commits import ANEW, CommitRecord, ShardObject, commit_path, read_commits
from dtcache.store.layout import SAMPLES, SHARDS, PayloadArray
from dtcache.store.manifest import CacheManifest
from dtcache.store.shard import shard_bounds

_SHA256 = re.compile(r"[0-9a-f]{64}")
AT_ONCE = 1 << 16
FREE_BYTES = 384 << 20
"""Bytes that the values of any table may take: those of seven million images."""
MOST_COLUMNS = 8
"""Most columns that a message lists."""
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


def read_table(path: Path, schema: pa.Schema, *, bounded: bool = True) -> pa.Table:
    """Read a Parquet file of the cache that has exactly the columns of `schema`.

    The file's own description is checked before any value is read. If `bounded`, memory too is
    checked before it is allocated: repeated values take almost no bytes in a file. Raises
    CacheDamagedError if the file is missing or not a regular file, if columns or types differ, if a
    value is null in a column without nulls or is not UTF-8, and if the values need more than
    FREE_BYTES and four times the file's bytes.
    """
    try:
        with open_regular(path) as handle:
            limit = FREE_BYTES + 4 * os.fstat(handle.fileno()).st_size if bounded else None
            return _read_columns(handle, schema, limit)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise CacheDamagedError(
            f"{path}: missing or damaged ({one_line(error)}); delete this cache and extract it "
            "again"
        ) from error


def _read_columns(handle: BinaryIO, schema: pa.Schema, limit: int | None) -> pa.Table:
    """Read a table whose values have at most `limit` bytes. Raises ValueError or Arrow's errors.

    Text is read as dictionaries, which are as large as in the file, and expanded if there is room.
    """
    with pq.ParquetFile(handle) as file:
        metadata = file.metadata
        columns = [(field.name, field.type) for field in file.schema_arrow]
    expected = [(field.name, field.type) for field in schema]
    if columns != expected:
        raise ValueError(f"expected the columns {_described(expected)}, got {_described(columns)}")
    texts = [name for name, kind in expected if pa.types.is_string(kind)]
    widths = (4 if name in texts else kind.bit_width / 8 for name, kind in expected)
    size = math.ceil(sum(widths) * metadata.num_rows)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    _require_room(max(size, sum(map(_uncompressed_bytes, groups))), limit)
    tables = [schema.empty_table()]
    with pq.ParquetFile(handle, metadata=metadata, read_dictionary=texts, pre_buffer=False) as file:
        for number in range(len(groups)):
            table = file.read_row_group(number, use_threads=False)
            table.validate(full=True)
            size += sum(_text_bytes(table[name]) for name in texts)
            _require_room(size, limit)
            tables.append(table.cast(schema))
    return pa.concat_tables(tables)


def _described(columns: Sequence[tuple[str, pa.DataType]]) -> str:
    listed = [f"{name[:40]} {str(kind)[:40]}" for name, kind in columns[:MOST_COLUMNS]]
    return ", ".join(listed) + (", ..." if len(columns) > MOST_COLUMNS else "")


def _uncompressed_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Return the bytes of a dictionary column's text once every row has its own copy."""
    return sum(
        pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices), min_count=0).as_py()
        for chunk in column.chunks
    )


def _require_room(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise ValueError(
            f"expected at most {limit} bytes of values in a file of its size, got {size}"
        )


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
        _require_possible(path, listed, array)


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
            _require_possible(root / SHARDS, listed[path], array)
            objects[path] = listed[path]
    return objects


def _require_possible(source: Path, listed: ShardObject, array: PayloadArray) -> None:
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


def failures_in(table: pa.Table) -> pa.Table:
    """Return the rows of an index that have no features: row, key and failure."""
    return table.select(["row", "key", "failure"]).filter(table["failure"].is_valid())


def failed_samples(table: pa.Table) -> list[FailedSample]:
    """Return the samples of an index that have a row but no features, in row order."""
    return [
        FailedSample(row=failed["row"], key=failed["key"], reason=failed["failure"])
        for failed in failures_in(table).to_pylist()
    ]
