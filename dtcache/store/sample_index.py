"""The sample index: key, label, content hash and failure of every row, read when they are used."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.names import normal_form
from dtcache.recipe import FailedSample, Sample
from dtcache.row_set import RowSet
from dtcache.samples import Column, SampleList
from dtcache.store.commits import ANEW, CommitRecord, ShardObject, commit_path, read_commits
from dtcache.store.layout import FAILURES, SAMPLES
from dtcache.store.manifest import CacheManifest
from dtcache.store.parquet_tables import GROUP_ROWS, read_table
from dtcache.store.row_groups import RowGroups, unchanged
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

FAILURE_SCHEMA = pa.schema([pa.field("row", pa.int64(), nullable=False)])


class SampleIndex:
    """The rows of a cache with their key, label, content hash and failure.

    Rows are read by row groups when they are used. Safe to share between threads.
    """

    def __init__(self, groups: RowGroups, failed: NDArray[np.int64]) -> None:
        """Serve the rows of a table. `failed` are the rows without features, ascending."""
        self.failed = failed
        self._groups = groups
        # The system allocates a page when it is first written, not here.
        self._labels = np.zeros(len(self), np.int32)
        self._has_label = np.zeros(len(self), np.bool_)
        self._labelled = np.zeros(len(groups), np.bool_)

    def __reduce__(self) -> tuple[type["SampleIndex"], tuple[RowGroups, NDArray[np.int64]]]:
        """Pickle without the rows that were read."""
        return SampleIndex, (self._groups, self.failed)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._groups.num_rows

    @property
    def usable(self) -> RowSet:
        """The rows that did not fail."""
        return RowSet.all_but(len(self), self.failed, self.failed + 1)

    def groups(self) -> Iterator[pa.Table]:
        """Yield all rows, ascending, in tables of at most GROUP_ROWS rows.

        Raises CacheDamagedError, as every method that reads rows does.
        """
        return map(self._groups.group, range(len(self._groups)))

    def table(self) -> pa.Table:
        """Return all rows: about 80 bytes per row."""
        return pa.concat_tables(self.groups())

    def take(self, rows: ArrayLike) -> pa.Table:
        """Return some rows, in the order of `rows`."""
        wanted = np.asarray(rows, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"expected rows 0 to {len(self) - 1}, got {wanted.max()}")
        numbers, inner = np.divmod(wanted, GROUP_ROWS)
        order = np.argsort(numbers, kind="stable")
        parts = [SCHEMA.empty_table()]
        for number in np.unique(numbers).tolist():
            first, last = np.searchsorted(numbers[order], [number, number + 1])
            parts.append(self._groups.group(number).take(pa.array(inner[order[first:last]])))
        return pa.concat_tables(parts).take(pa.array(np.argsort(order)))

    def keys(self, rows: ArrayLike) -> list[str]:
        """Return the keys of some rows, in the order of `rows`."""
        keys: list[str] = self.take(rows)["key"].to_pylist()
        return keys

    def key(self, row: int) -> str:
        """Return the key of a row."""
        return self.keys([row])[0]

    def labels(self, rows: NDArray[np.int64], missing: int) -> NDArray[np.int64]:
        """Return the labels of some rows, int64; `missing` for a row without a label.

        Labels that were read once stay in memory, 5 bytes per row, because a random order returns
        to every row group. Two threads that read the same row group write the same labels.
        """
        numbers = np.unique(rows // GROUP_ROWS)
        for number in numbers[~self._labelled[numbers]].tolist():
            column = self._groups.group(number)["label"]
            here = slice(number * GROUP_ROWS, number * GROUP_ROWS + len(column))
            self._labels[here] = column.fill_null(0).to_numpy()
            self._has_label[here] = column.is_valid().to_numpy()
            self._labelled[number] = True
        return np.where(self._has_label[rows], self._labels[rows], missing).astype(np.int64)

    def rows_of(self, keys: pa.Array) -> NDArray[np.int64]:
        """Return the rows of keys, -1 for an unknown one. Reads every row group."""
        rows = np.full(len(keys), -1, np.int64)
        for number, table in enumerate(self.groups()):
            if not pc.any(pc.is_in(table["key"], keys)).as_py():
                continue
            inner = pc.index_in(keys, value_set=table["key"]).fill_null(-1)
            place = np.asarray(inner.to_numpy(zero_copy_only=False), np.int64)
            here = (place >= 0) & (rows < 0)
            rows[here] = number * GROUP_ROWS + place[here]
            if (rows >= 0).all():
                break
        return rows


class Keys(Sequence[str]):
    """The keys of some rows, each read when it is used."""

    def __init__(self, read: Callable[[NDArray[np.int64]], list[str]], rows: RowSet) -> None:
        """Serve the keys of `rows`; `read` returns those of any rows, in their order."""
        self._read = read
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return the key at a position, or those of a slice. Raises CacheDamagedError."""
        if isinstance(index, slice):
            return self._read(self._rows[index].array())
        return self._read(self._rows.take([range(len(self))[index]]))[0]

    def __iter__(self) -> Iterator[str]:
        """Yield the keys in row order."""
        for start in range(0, len(self), GROUP_ROWS):
            yield from self[start : start + GROUP_ROWS]


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


def read_samples(
    root: Path, manifest: CacheManifest, *, bounded: bool = True, with_failures: bool = True
) -> SampleIndex:
    """Open a cache's sample index, within the bounds of `read_table`.

    Without `with_failures`, the failed rows of a sealed cache are not read. Row groups of a large
    index are checked when they are read. Raises CacheDamagedError if it does not have one row per
    sample of the recipe, in row order.
    """
    if manifest.state == "sealed" and with_failures:
        failed = _read_failures(root, manifest)
        return _opened(root, manifest, failed, functools.partial(_require_failed, failed), bounded)
    return _opened(root, manifest, np.zeros(0, np.int64), unchanged, bounded)


def _opened(
    root: Path,
    manifest: CacheManifest,
    failed: NDArray[np.int64],
    finish: Callable[[pa.Table], pa.Table],
    bounded: bool = True,
) -> SampleIndex:
    """Open the sample index whose row groups `finish` checks or completes."""
    groups = RowGroups(root / SAMPLES, SCHEMA, manifest.samples, finish=finish, bounded=bounded)
    if groups.num_rows != manifest.num_samples:
        raise CacheDamagedError(
            f"{root / SAMPLES}: expected {manifest.num_samples} rows, got {groups.num_rows}; "
            f"{AGAIN}"
        )
    return SampleIndex(groups, failed)


def _require_failed(failed: NDArray[np.int64], table: pa.Table) -> pa.Table:
    """Return a row group if its failed rows are among `failed`. Raises ValueError."""
    rows = table["row"].to_numpy()
    begin, end = np.searchsorted(failed, [rows[0], rows[-1] + 1])
    if not np.array_equal(rows[table["failure"].is_valid().to_numpy()], failed[begin:end]):
        raise ValueError(f"its failed rows from {rows[0]} on are not those of {FAILURES}")
    return table


def _read_failures(root: Path, manifest: CacheManifest) -> NDArray[np.int64]:
    """Return the failed rows of a sealed cache. Raises CacheDamagedError if they do not ascend."""
    table = read_table(root / FAILURES, FAILURE_SCHEMA)
    rows: NDArray[np.int64] = table["row"].combine_chunks().to_numpy().astype(np.int64)
    if len(rows) and not (rows[0] >= 0 and rows[-1] < manifest.num_samples):
        raise CacheDamagedError(
            f"{root / FAILURES}: expected rows 0 to {manifest.num_samples - 1}, got {rows[0]} to "
            f"{rows[-1]}; {AGAIN}"
        )
    if (np.diff(rows) <= 0).any():
        raise CacheDamagedError(f"{root / FAILURES}: its rows do not ascend; {AGAIN}")
    return rows


def failures_table(samples: pa.Table) -> pa.Table:
    """Return the table of the failed rows of a sample index."""
    return samples.select(["row"]).filter(samples["failure"].is_valid()).cast(FAILURE_SCHEMA)


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


def committed(root: Path, manifest: CacheManifest) -> tuple[SampleIndex, dict[str, ShardObject]]:
    """Return the sample index and the shard files, by path, of an unfinished cache.

    Rows of shards without a commit record count as failed, with reason NOT_YET. Raises
    CacheDamagedError if a record is damaged or belongs to another cache.
    """
    records = read_commits(root)
    failed = np.ones(manifest.num_samples, np.bool_)
    for shard, record in records.items():
        require_record(root, manifest, record)
        rows = manifest.rows_of(shard)
        failed[rows.start : rows.stop] = False
        failed[[failure.row for failure in record.failures]] = True
    finish = functools.partial(_completed, manifest, records)
    samples = _opened(root, manifest, np.flatnonzero(failed), finish)
    return samples, {o.path: o for record in records.values() for o in record.objects}


def _completed(
    manifest: CacheManifest, records: Mapping[int, CommitRecord], table: pa.Table
) -> pa.Table:
    """Return a row group with the content hashes and failures of the commit records."""
    failures: list[str | None] = [NOT_YET] * len(table)
    content: list[bytes | None] = [None] * len(table)
    first = table["row"][0].as_py()
    here = range(first, first + len(table))
    for shard in range(first // manifest.shard_rows, here[-1] // manifest.shard_rows + 1):
        record = records.get(shard)
        if record is None:
            continue
        rows = manifest.rows_of(shard)
        reasons = {failure.row: failure.reason for failure in record.failures}
        for row in range(max(rows.start, here.start), min(rows.stop, here.stop)):
            sha256 = record.content_sha256[row - rows.start]
            content[row - first] = bytes.fromhex(sha256) if sha256 else None
            failures[row - first] = reasons.get(row)
    columns = [pa.array(content, SCHEMA.field(3).type), pa.array(failures, pa.string())]
    return pa.Table.from_arrays([*table.columns[:3], *columns], schema=SCHEMA)


def require_record(root: Path, manifest: CacheManifest, record: CommitRecord) -> None:
    """Raise CacheDamagedError if a commit record is not of this cache or not of its shard."""
    path = commit_path(root, record.shard)
    problem = manifest.record_problem(record)
    if problem is not None:
        raise CacheDamagedError(f"{path}: {problem}; {ANEW}")
    for listed, array in zip(record.objects, manifest.arrays.values(), strict=True):
        require_possible(path, listed, array)


def failed_samples(samples: SampleIndex) -> list[FailedSample]:
    """Return the samples of an index that have a row but no features, in row order."""
    return [
        FailedSample(row=failed["row"], key=failed["key"], reason=failed["failure"])
        for failed in samples.take(samples.failed).to_pylist()
    ]
