"""Row groups are checked when they are read, parsed from checked bytes alone, and kept a while."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtcache.errors import CacheDamagedError
from dtcache.store import parquet_tables, row_groups
from dtcache.store.parquet_tables import parquet_bytes, parts_of
from dtcache.store.row_groups import RowGroups
from dtcache.store.sample_index import SCHEMA, SampleIndex, samples_table

ROWS = 23


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """Return a sample index of three row groups."""
    for module in (parquet_tables, row_groups):
        monkeypatch.setattr(module, "GROUP_ROWS", 10)
    monkeypatch.setattr("dtcache.store.sample_index.GROUP_ROWS", 10)
    monkeypatch.setattr(row_groups, "EAGER_BYTES", 0)
    failures = [None if row % 7 else "broken" for row in range(ROWS)]
    labels = [row % 3 if row % 5 else None for row in range(ROWS)]
    content = [bytes([row]) * 32 for row in range(ROWS)]
    return samples_table((f"key {row}" for row in range(ROWS)), labels, content, failures)


def opened(path: Path, table: pa.Table) -> RowGroups:
    """Write and open a table."""
    path.write_bytes(parquet_bytes(table))
    with path.open("rb") as file:
        return RowGroups(path, SCHEMA, parts_of(file))


def test_rows_in_any_order_are_those_of_the_table(table: pa.Table, tmp_path: Path) -> None:
    """Rows, keys, labels and positions of keys equal the table's, for any rows with repeats."""
    failed = np.flatnonzero(table["failure"].is_valid().to_numpy())
    samples = SampleIndex(opened(tmp_path / "t", table), failed)
    assert samples.table().equals(table)
    rows = np.random.default_rng(0).integers(0, ROWS, 40)
    assert samples.take(rows).equals(table.take(pa.array(rows)))
    keys = table["key"].to_pylist()
    assert samples.keys(rows) == [keys[row] for row in rows]
    labels = [-1 if label is None else label for label in table["label"].to_pylist()]
    assert samples.labels(rows, -1).tolist() == [labels[row] for row in rows]
    assert samples.rows_of(pa.array(["key 22", "no", "key 3", "key 3"])).tolist() == [22, -1, 3, 3]
    assert list(samples.usable) == [row for row in range(ROWS) if row % 7]
    assert pickle.loads(pickle.dumps(samples)).keys([11]) == ["key 11"]
    with pytest.raises(IndexError, match="expected rows 0 to 22, got 23"):
        samples.keys([23])


def test_a_changed_row_group_is_named_when_it_is_read(table: pa.Table, tmp_path: Path) -> None:
    """A flipped byte is found at the first read of its row group; other row groups serve."""
    path = tmp_path / "t"
    groups = opened(path, table)
    content = bytearray(path.read_bytes())
    with path.open("rb") as file:
        first, second, *_ = parts_of(file)
    content[first.bytes + second.bytes // 2] ^= 1
    path.write_bytes(content)
    assert len(groups.group(0)) == 10 and len(groups.group(2)) == 3
    with pytest.raises(CacheDamagedError, match=r"t: missing or damaged \(bytes from .*SHA-256"):
        groups.group(1)


def test_footer_and_size_are_checked_when_a_table_is_opened(
    table: pa.Table, tmp_path: Path
) -> None:
    """A changed footer, a cut file and a manifest without parts are damage at opening."""
    path = tmp_path / "t"
    opened(path, table)
    content = path.read_bytes()
    with path.open("rb") as file:
        parts = parts_of(file)
    for changed, reason in (
        (content[:-1], "expected .* bytes, got"),
        (content[:-20] + bytes([content[-20] ^ 1]) + content[-19:], "expected SHA-256"),
    ):
        path.write_bytes(changed)
        with pytest.raises(CacheDamagedError, match=rf"missing or damaged \(.*{reason}"):
            RowGroups(path, SCHEMA, parts)
    with pytest.raises(CacheDamagedError, match="the manifest lists no parts"):
        RowGroups(path, SCHEMA, ())


def test_bytes_beside_a_row_group_are_never_parsed(table: pa.Table, tmp_path: Path) -> None:
    """If parts do not match the footer, a row group outside its part is damage."""
    path = tmp_path / "t"
    opened(path, table)
    with path.open("rb") as file:
        first, second, *rest = parts_of(file)
    content = path.read_bytes()
    moved = [
        type(first)(bytes=9, sha256=hashlib.sha256(content[:9]).hexdigest()),
        type(first)(
            bytes=first.bytes + second.bytes - 9,
            sha256=hashlib.sha256(content[9 : first.bytes + second.bytes]).hexdigest(),
        ),
    ]
    groups = RowGroups(path, SCHEMA, (*moved, *rest))
    with pytest.raises(CacheDamagedError, match="its footer points outside the row group"):
        groups.group(0)


def test_row_groups_of_other_sizes_are_refused(table: pa.Table, tmp_path: Path) -> None:
    """A footer whose row groups are too long or too short is damage at opening."""
    path = tmp_path / "t"
    for rows in (ROWS, 12, 5):
        pq.write_table(table, path, row_group_size=rows)
        with path.open("rb") as file:
            parts = parts_of(file)
        with pytest.raises(
            CacheDamagedError,
            match=rf"{len(parts) - 1} row groups of 10 rows, the last one shorter",
        ):
            RowGroups(path, SCHEMA, parts)


def test_kept_rows_stay_within_the_budget(
    table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row groups that were used least recently are dropped; the last one is always kept."""
    groups = opened(tmp_path / "t", table)
    monkeypatch.setattr(row_groups, "KEPT_BYTES", 1)
    for number in (0, 1, 2, 0):
        groups.group(number)
    assert list(groups._kept) == [0]
    assert groups._kept_bytes == groups.group(0).nbytes
