"""Mutations of Parquet tables."""

from random import Random
from typing import Any

import pyarrow as pa
from support.fuzz.json_values import HOSTILE_TEXTS

_TYPES: tuple[pa.DataType, ...] = (
    *(pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_()),
    *(pa.string(), pa.large_string(), pa.binary(), pa.binary(3), pa.null(), pa.date32()),
    *(pa.timestamp("s"), pa.timestamp("us", tz="UTC"), pa.decimal128(10, 2)),
    *(pa.list_(pa.int64()), pa.struct([("x", pa.int8())]), pa.dictionary(pa.int8(), pa.string())),
)


def mutate_table(table: pa.Table, rng: Random) -> tuple[pa.Table, str]:
    """Return a table with one change, and what was changed."""
    if not table.num_columns:
        return table, "no columns"
    kind = rng.randrange(15)
    at = rng.randrange(table.num_columns)
    name = table.column_names[at]
    column = table.column(at)
    rows = table.num_rows
    if kind == 0:
        return table.remove_column(at), f"without {name}"
    if kind == 1:
        names = list(table.column_names)
        names[at] = rng.choice((*table.column_names, *HOSTILE_TEXTS))
        return table.rename_columns(names), f"{name} renamed to {names[at][:20]!r}"
    if kind == 2:
        return table.append_column(name, column), f"{name} twice"
    if kind in (3, 4):
        kind_of = rng.choice(_TYPES)
        return _with(table, at, _retyped(column, kind_of, rng)), f"{name} as {kind_of}"
    if kind == 5:
        return _with(table, at, pa.nulls(rows, column.type)), f"{name} null"
    if kind == 6:
        order = list(range(rows))
        rng.shuffle(order)
        return table.take(pa.array(order, pa.int64())), "rows shuffled"
    if kind == 7:
        less = rng.randrange(rows + 1)
        return table.slice(0, less), f"{less} rows"
    if kind == 8:
        times = rng.choice((2, 1000))
        return pa.concat_tables([table] * times), f"{times} times the rows"
    if kind == 9:
        return _with(table, at, _bad_utf8(rows)), f"{name} bad UTF-8"
    if kind == 10:
        # Dictionary pages are small; decoded, the column would have 100 GB.
        indices = pa.array([0] * 100_000, pa.int32())
        column_of = pa.DictionaryArray.from_arrays(indices, pa.array(["A" * 1_000_000]))
        return pa.table({name: column_of}), f"{name} a dictionary that expands"
    if kind == 11:
        return table.append_column("more", pa.array(["x"] * rows)), "one more column"
    if kind == 12:
        metadata = {b"pandas": b"{", b"x": b"\xff" * 1000}
        return table.replace_schema_metadata(metadata), "metadata"
    values = column.to_pylist()
    if rows:
        values[rng.randrange(rows)] = _cell(column.type, values, rng)
    return _with(table, at, _array(values, column.type)), f"{name}: one cell"


def _with(table: pa.Table, at: int, column: Any) -> pa.Table:
    return table.set_column(at, table.column_names[at], column)


def _retyped(column: pa.ChunkedArray, kind: pa.DataType, rng: Random) -> pa.Array:
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    value = rng.choice((0, 1, -1, 2**62, "x", b"abc", [1], {"x": 1}, None))
    try:
        return pa.array([value] * len(column), kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.nulls(len(column), kind)


def _cell(kind: pa.DataType, values: list[Any], rng: Random) -> Any:
    if pa.types.is_integer(kind):
        return rng.choice((None, -1, 0, 2**31 - 1, 2**62, rng.choice(values)))
    if pa.types.is_string(kind):
        return rng.choice((None, rng.choice(values), *HOSTILE_TEXTS))
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return rng.choice((None, rng.choice(values), b"\0" * 32))
    return None


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array(values)


def _bad_utf8(rows: int) -> pa.Array:
    offsets = pa.array(range(0, 2 * rows + 1, 2), pa.int32())
    buffers = [None, offsets.buffers()[1], pa.py_buffer(b"\xc3\x28" * rows)]
    return pa.Array.from_buffers(pa.string(), rows, buffers)
