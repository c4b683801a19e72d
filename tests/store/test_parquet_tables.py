"""Parquet tables: the same bytes each time; only a schema's columns within bounds are read."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store.builders import sample_table

from dtcache.errors import CacheDamagedError
from dtcache.store import parquet_tables
from dtcache.store.parquet_tables import parquet_bytes, read_table
from dtcache.store.sample_index import SCHEMA, samples_table
from dtcache.store.shard_index import SHARD_SCHEMA


def test_parquet_bytes_are_deterministic() -> None:
    """Equal tables give equal bytes, after a round trip too; a changed value changes the bytes."""
    first = parquet_bytes(sample_table())
    assert parquet_bytes(sample_table()) == first
    assert parquet_bytes(pq.read_table(pa.BufferReader(first))) == first
    assert parquet_bytes(sample_table().slice(0, 2)) != first


def renamed(made: pa.Table, old: str, new: str) -> pa.Table:
    """Return the table with one column renamed."""
    return made.rename_columns([new if name == old else name for name in made.column_names])


def retyped(made: pa.Table, name: str, column: object) -> pa.Table:
    """Return the table with another column in place of one, without its null rules."""
    at = made.column_names.index(name)
    return made.set_column(at, pa.field(name, pa.array(column).type), pa.array(column))


def with_text(text: bytes) -> pa.Table:
    """Return the table with a key of any bytes."""
    offsets = pa.py_buffer(np.array([0, len(text), len(text), len(text)], np.int32))
    keys = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(text)])
    return retyped(sample_table(), "key", keys)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            sample_table().drop(["label"]),
            r"expected the columns row int64, key string, .*, got row int64",
        ),
        (
            renamed(sample_table(), "key", "name"),
            r"expected the columns row int64, .* got .* name string",
        ),
        (sample_table().append_column("more", [[1, 2, 3]]), r"got .*more int64"),
        (
            pa.Table.from_arrays(
                [*sample_table().columns, sample_table()["key"]],
                [*sample_table().column_names, "key"],
            ),
            r"got .*failure string, key string",
        ),
        (
            sample_table().select(["key", "row", "label", "content_sha256", "failure"]),
            r"got key string",
        ),
        (retyped(sample_table(), "row", ["0", "1", "2"]), r"got row string"),
        (retyped(sample_table(), "label", [0.5, 1.0, 2.0]), r"got .*label double"),
        (retyped(sample_table(), "label", pa.nulls(3)), r"got .*label null"),
        (
            retyped(sample_table(), "label", pa.array([1, 2, 3], pa.timestamp("s"))),
            r"got .*label times",
        ),
        (
            retyped(sample_table(), "content_sha256", [b"x", None, None]),
            r"got .*content_sha256 binary",
        ),
        (
            retyped(sample_table(), "failure", pa.array(["a", None, "b"]).dictionary_encode()),
            "got .*dict",
        ),
        (retyped(sample_table(), "key", ["a", None, "c"]), "null"),
        (retyped(sample_table(), "row", [0, None, 2]), "null"),
        (with_text(b"\xff\xfe"), "UTF8"),
        (with_text(b"\xed\xa0\x80"), "UTF8"),
    ],
)
def test_another_table_is_refused_by_its_schema(
    tmp_path: Path, made: pa.Table, reason: str
) -> None:
    """Missing, renamed, extra, doubled, moved, mistyped and null columns are named."""
    path = tmp_path / "samples.parquet"
    path.write_bytes(parquet_bytes(made))
    with pytest.raises(
        CacheDamagedError, match=rf"samples\.parquet: missing or damaged \(.*{reason}"
    ):
        read_table(path, SCHEMA)


def test_values_that_expand_are_refused_before_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated text and rows of nulls take few bytes in a file, but count as what they become."""
    monkeypatch.setattr(parquet_tables, "FREE_BYTES", 1 << 20)
    path = tmp_path / "samples.parquet"
    count = 5000
    text = samples_table(map(str, range(count)), [1] * count, failures=["x" * 100_000] * count)
    path.write_bytes(parquet_bytes(text))
    allocated = pa.total_allocated_bytes()
    with pytest.raises(CacheDamagedError, match=r"at most \d+ bytes of values .*, got 500\d{6}\)"):
        read_table(path, SCHEMA)
    assert pa.total_allocated_bytes() - allocated < 1 << 20
    assert len(read_table(path, SCHEMA, bounded=False)) == count
    rows = samples_table(("" for _ in range(40_000)), [None] * 40_000)
    path.write_bytes(parquet_bytes(rows))
    assert path.stat().st_size < 250_000
    with pytest.raises(CacheDamagedError, match=r"at most \d+ bytes of values .*, got 208\d{4}\)"):
        read_table(path, SCHEMA)


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "gone", "empty", "text"])
def test_a_table_that_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A FIFO, a folder, no file and a file of something else are damage."""
    path = tmp_path / "shards.parquet"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(b"" if kind == "empty" else b"PAR1 but no more PAR1")
    with pytest.raises(CacheDamagedError, match=r"shards\.parquet: missing or damaged \(.+\); del"):
        read_table(path, SHARD_SCHEMA)
