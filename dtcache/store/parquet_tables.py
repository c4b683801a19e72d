"""Parquet tables with one fixed encoding, read within bounds and with the columns of a schema."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtcache.errors import CacheDamagedError, one_line
from dtcache.regular_files import open_regular

FREE_BYTES = 384 << 20
"""Bytes that the values of any table may take: those of seven million images."""
MOST_COLUMNS = 8
"""Most columns that a message lists."""


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
