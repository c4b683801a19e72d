"""Parquet tables with one fixed encoding, read within bounds and with the columns of a schema."""

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
GROUP_ROWS = 1 << 14
"""Rows of a row group, except the last one of a table."""
WRITING = {"compression": "zstd", "write_statistics": False}
"""Settings of pyarrow's Parquet writer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePart:
    """A range of a Parquet file: a row group, or the footer."""

    bytes: int
    sha256: str


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as a Parquet file: always the same bytes with one version of pyarrow."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=GROUP_ROWS, **WRITING)
    return sink.getvalue()


def parts_of(file: BinaryIO) -> tuple[TablePart, ...]:
    """Return the parts that a Parquet file consists of: one per row group, then the footer.

    The first part includes the four bytes before its row group.
    """
    metadata = pq.read_metadata(file)
    edges = [0, *map(_group_end, map(metadata.row_group, range(metadata.num_row_groups)))]
    edges.append(file.seek(0, os.SEEK_END))
    file.seek(0)
    parts = []
    for start, end in pairwise(edges):
        content = file.read(end - start)
        parts.append(TablePart(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    return tuple(parts)


def _group_end(group: pq.RowGroupMetaData) -> int:
    """Return the byte offset after the last page of a row group."""
    columns = map(group.column, range(group.num_columns))
    end: int = max(
        (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
        for column in columns
    )
    return end


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
        require_columns(file.schema_arrow, schema)
    groups = list(range(metadata.num_row_groups))
    size = _declared_bytes(metadata, schema, groups, limit)
    tables = [schema.empty_table()]
    texts = _texts(schema)
    with pq.ParquetFile(handle, metadata=metadata, read_dictionary=texts, pre_buffer=False) as file:
        for number in groups:
            table = file.read_row_group(number, use_threads=False)
            table.validate(full=True)
            size += sum(_text_bytes(table[name]) for name in texts)
            _require_room(size, limit)
            tables.append(table.cast(schema))
    return pa.concat_tables(tables)


def read_group(
    handle: io.BufferedIOBase,
    metadata: pq.FileMetaData,
    number: int,
    schema: pa.Schema,
    limit: int | None,
) -> pa.Table:
    """Read one row group of a table with the columns of `schema`, as `read_table` reads all.

    Raises ValueError or Arrow's errors, also if its values have more than `limit` bytes.
    """
    size = _declared_bytes(metadata, schema, [number], limit)
    texts = _texts(schema)
    with pq.ParquetFile(handle, metadata=metadata, read_dictionary=texts, pre_buffer=False) as file:
        table = file.read_row_group(number, use_threads=False)
    table.validate(full=True)
    _require_room(size + sum(_text_bytes(table[name]) for name in texts), limit)
    return table.cast(schema)


def require_columns(got: pa.Schema, schema: pa.Schema) -> None:
    """Raise ValueError if the columns of a file are not those of `schema`."""
    columns = [(field.name, field.type) for field in got]
    expected = [(field.name, field.type) for field in schema]
    if columns != expected:
        raise ValueError(f"expected the columns {_described(expected)}, got {_described(columns)}")


def _texts(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_string(field.type)]


def _declared_bytes(
    metadata: pq.FileMetaData, schema: pa.Schema, groups: Sequence[int], limit: int | None
) -> int:
    """Return the bytes of the values of row groups, without text; check what the file declares.

    Raises ValueError if they have more than `limit` bytes.
    """
    rows = [metadata.row_group(number) for number in groups]
    widths = (4 if pa.types.is_string(kind) else kind.bit_width / 8 for kind in schema.types)
    size: int = math.ceil(sum(widths) * sum(group.num_rows for group in rows))
    _require_room(max(size, sum(map(_uncompressed_bytes, rows))), limit)
    return size


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
