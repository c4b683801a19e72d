"""The sample index has stable hashes and one fixed Parquet encoding."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtcache.errors import CacheDamagedError
from dtcache.recipe import Sample
from dtcache.samples import SampleList
from dtcache.store import sample_index
from dtcache.store.sample_index import (
    SCHEMA,
    SHARD_SCHEMA,
    changed_samples,
    hash_samples,
    parquet_bytes,
    read_table,
    samples_table,
)


def test_hash_samples_covers_order_keys_and_labels() -> None:
    """The list's hash depends on its order, keys and labels, but not on the source's order."""
    samples = [Sample(index=i, key=f"k{i}", label=i % 2) for i in range(5)]
    hashes = {
        hash_samples(samples),
        hash_samples(samples[::-1]),
        hash_samples(samples[:4]),
        hash_samples([*samples[:4], Sample(index=4, key="k5", label=0)]),
        hash_samples([*samples[:4], Sample(index=4, key="k4", label=1)]),
        hash_samples([*samples[:4], Sample(index=4, key="k4")]),
    }
    assert len(hashes) == 6
    assert (
        hash_samples([Sample(index=9 - s.index, key=s.key, label=s.label) for s in samples])
        in hashes
    )


def table() -> pa.Table:
    """Return a small sample index with every kind of missing value."""
    return samples_table(
        ["a", "b/ü", "c"], [1, None, 3], [b"x" * 32, None, b"\0" * 32], [None, "broken", None]
    )


def test_samples_table_round_trips(tmp_path: Path) -> None:
    """pyarrow reads rows, keys, labels, hashes and failures as written, in the declared schema."""
    path = tmp_path / "samples.parquet"
    path.write_bytes(parquet_bytes(table()))
    found = read_table(path, SCHEMA)
    assert found.schema.equals(SCHEMA)
    assert found.to_pydict() == {
        "row": [0, 1, 2],
        "key": ["a", "b/ü", "c"],
        "label": [1, None, 3],
        "content_sha256": [b"x" * 32, None, b"\0" * 32],
        "failure": [None, "broken", None],
    }
    assert pq.read_table(path).equals(found)


def test_parquet_bytes_are_deterministic() -> None:
    """Equal tables give equal bytes, after a round trip too; a changed value changes the bytes."""
    first = parquet_bytes(table())
    assert parquet_bytes(table()) == first
    assert parquet_bytes(pq.read_table(pa.BufferReader(first))) == first
    assert parquet_bytes(table().slice(0, 2)) != first


WAS = ["ant/1", "ant/2", "bee/1", "bee/2"]
LABELS = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("keys", "labels", "order", "what"),
    [
        (
            ["ant/1", "ant/2", "ant/3", "ant/4", "bee/1", "bee/2"],
            [0, 0, 0, 0, 1, 1],
            [5, 3, 1, 0, 2, 4],
            "2 images were added (first ant/3)",
        ),
        (WAS[1:], LABELS[1:], [2, 0, 1], "1 image was removed (first ant/1)"),
        (
            ["ant/0", "ant/2", "bee/1", "bee/2"],
            LABELS,
            [0, 1, 2, 3],
            "1 image was added (first ant/0) and 1 image was removed (first ant/1)",
        ),
        (
            WAS,
            [0, 0, 2, 1],
            [2, 0, 3, 1],
            "labels changed, of 1 images (such as bee/1: 1 in the cache, 2 now)",
        ),
        (
            WAS,
            [0, 0, 1, None],
            [2, 0, 3, 1],
            "labels changed, of 1 images (such as bee/2: 1 in the cache, None now)",
        ),
        (WAS, LABELS, [3, 0, 2, 1], "the order of the images changed"),
        (WAS, LABELS, [2, 0], "the cache has 4 of the images, 2 are selected now (`limit`)"),
        (
            [*WAS, "cow/1"],
            [*LABELS, 2],
            [4, 1],
            "`limit` selects other images of the 5 that the source has now",
        ),
        ([*WAS[1:], "cow/1"], [*LABELS[1:], 2], [3, 1], "1 image was removed (first ant/1)"),
    ],
    ids=[
        "more",
        "fewer",
        "renamed",
        "label",
        "lost label",
        "order",
        "limit",
        "more and limit",
        "fewer and limit",
    ],
)
def test_what_changed_in_a_data_set_is_named(
    keys: list[str], labels: list[int | None], order: list[int], what: str
) -> None:
    """Added and removed images are named first, then changed labels, then a changed order."""
    was = samples_table([WAS[i] for i in (2, 0, 3, 1)], [LABELS[i] for i in (2, 0, 3, 1)])
    assert changed_samples(was, SampleList(keys, labels, np.array(order))) == what


def test_a_new_class_shifts_the_labels_after_it() -> None:
    """A new class reports both the added images and the labels that shifted."""
    was = samples_table(WAS, LABELS)
    now = SampleList(
        ["ant/1", "ant/2", "ape/1", "bee/1", "bee/2"], [0, 0, 1, 2, 2], np.array([4, 3, 2, 1, 0])
    )
    assert changed_samples(was, now) == (
        "1 image was added (first ape/1) and labels changed, of 2 images (such as bee/2: 1 in the "
        "cache, "
        "2 now)"
    )


def test_renamed_unicode_forms_are_told() -> None:
    """Names that changed from one Unicode form to another are neither added nor removed."""
    was = samples_table(["caf\u00e9.jpg", "b.jpg"], [0, 1])
    now = SampleList(["cafe\u0301.jpg", "b.jpg"], [0, 1], np.array([0, 1]))
    assert changed_samples(was, now) == (
        "1 image was renamed (first cafe\u0301.jpg), from one Unicode form to another"
    )


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
    return retyped(table(), "key", keys)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (table().drop(["label"]), r"expected the columns row int64, key string, .*, got row int64"),
        (renamed(table(), "key", "name"), r"expected the columns row int64, .* got .* name string"),
        (table().append_column("more", [[1, 2, 3]]), r"got .*more int64"),
        (
            pa.Table.from_arrays(
                [*table().columns, table()["key"]], [*table().column_names, "key"]
            ),
            r"got .*failure string, key string",
        ),
        (table().select(["key", "row", "label", "content_sha256", "failure"]), r"got key string"),
        (retyped(table(), "row", ["0", "1", "2"]), r"got row string"),
        (retyped(table(), "label", [0.5, 1.0, 2.0]), r"got .*label double"),
        (retyped(table(), "label", pa.nulls(3)), r"got .*label null"),
        (retyped(table(), "label", pa.array([1, 2, 3], pa.timestamp("s"))), r"got .*label times"),
        (retyped(table(), "content_sha256", [b"x", None, None]), r"got .*content_sha256 binary"),
        (retyped(table(), "failure", pa.array(["a", None, "b"]).dictionary_encode()), "got .*dict"),
        (retyped(table(), "key", ["a", None, "c"]), "null"),
        (retyped(table(), "row", [0, None, 2]), "null"),
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
    monkeypatch.setattr(sample_index, "FREE_BYTES", 1 << 20)
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
